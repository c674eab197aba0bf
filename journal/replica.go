package journal

import (
	"bytes"
	"cmp"
	"encoding/json"
	"os"
	"slices"
	"sync"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// Options are the tunable limits of a replica. The zero value has the defaults.
type Options struct {
	// ReserveBytes is how much of the file system stays free: Receive refuses
	// to go below. 0 means 64 MiB, a negative value none.
	ReserveBytes int64

	fs fileSystem
}

func (o Options) withDefaults() Options {
	if o.ReserveBytes == 0 {
		o.ReserveBytes = 64 << 20
	}
	if o.fs == nil {
		o.fs = osFileSystem{}
	}
	return o
}

// Replica is the recovery points of one protected VM, open for writing by this
// process alone. Its methods may be called concurrently: points can be received
// while a fold runs.
type Replica struct {
	dir  string
	opts Options
	fs   fileSystem
	lock *os.File

	// maintenance is held by Fold, DropAfter and seeding, whole runs of them.
	maintenance sync.Mutex

	mu       sync.Mutex // guards the rest; held over manifest writes
	manifest Manifest
	// unsettled: the manifest file holds manifest, but may not after a crash.
	unsettled bool
	segments  []segmentInfo // continue the base, ascending
	broken    []Damage      // segments that are there but do not continue it
	pins      map[string]Pin
	branches  map[string]BranchInfo
	storage   *storage // replaced, never changed
	marks     map[switchback.Sequence]switchback.Mark
	// marksDamage says why the marks cannot be read; nothing is dropped then.
	marksDamage error
	seeding     seedSums
	samples     samples
	temps       uint64 // names temporary files
	closed      bool
}

// segmentInfo is what is kept in memory of a closed segment.
type segmentInfo struct {
	point switchback.Point
	disks []DiskGeometry
}

// Close releases the replica. Running calls must have returned.
func (r *Replica) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil
	}
	r.closed = true
	r.closeSums()
	return r.lock.Close()
}

// Dir returns the directory of the replica, as OpenView wants it.
func (r *Replica) Dir() string { return r.dir }

// Manifest returns a copy of the manifest.
func (r *Replica) Manifest() Manifest {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.manifest.clone()
}

// Points returns the points that can be read, oldest first: the base's if it
// stands for one, then one for each segment.
func (r *Replica) Points() []switchback.Point {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.points()
}

func (r *Replica) points() []switchback.Point {
	var out []switchback.Point
	if r.manifest.noPoints() != nil {
		return nil
	}
	if r.manifest.Base.Sequence > 0 && r.manifest.Folding == 0 {
		out = append(out, r.manifest.Base)
	}
	for _, s := range r.segments {
		if s.point.Sequence >= r.manifest.Folding {
			out = append(out, s.point)
		}
	}
	return out
}

// Head returns the newest point; its Sequence is 0 when there is none. The next
// segment continues it.
func (r *Replica) Head() switchback.Point {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.head().point
}

func (r *Replica) head() segmentInfo {
	if n := len(r.segments); n > 0 {
		return r.segments[n-1]
	}
	return segmentInfo{r.manifest.Base, r.manifest.geometry()}
}

// Damaged names segments that are there but cannot be points, because they are
// damaged or follow one that is. While there are any, Receive is refused;
// DropAfter(Head().Sequence) removes them.
func (r *Replica) Damaged() []Damage {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.broken)
}

// update changes the manifest durably. The caller holds r.mu.
func (r *Replica) update(change func(*Manifest)) error {
	if r.closed {
		return switchback.Errorf(switchback.CodeInternal, "replica is closed")
	}
	next := r.manifest.clone()
	change(&next)
	err := writeDocument(r.fs, manifestPath(r.dir), next)
	if err == nil {
		r.manifest, r.unsettled = next, false
		r.trim()
		return nil
	}
	// Views go by the file. If it was replaced already and only not made
	// durable, it counts here too, but nothing may be built on it yet.
	var onDisk Manifest
	want, _ := json.Marshal(next)
	if e := readDocument(manifestPath(r.dir), &onDisk); e == nil {
		if got, _ := json.Marshal(onDisk); bytes.Equal(got, want) {
			r.manifest, r.unsettled = next, true
			r.trim()
		}
	}
	return err
}

// trim forgets segments that the manifest says are folded or dropped; their
// files may still be there.
func (r *Replica) trim() {
	after := func(seq switchback.Sequence) bool { return r.manifest.Dropping != nil && seq > *r.manifest.Dropping }
	r.segments = slices.DeleteFunc(r.segments, func(s segmentInfo) bool {
		return s.point.Sequence <= r.manifest.Base.Sequence || after(s.point.Sequence)
	})
	r.broken = slices.DeleteFunc(r.broken, func(d Damage) bool { return after(d.Segment) })
}

// settle makes the manifest durable if an update could not. It comes before
// anything that relies on the manifest without writing it. The caller holds r.mu.
func (r *Replica) settle() error {
	if !r.unsettled {
		return nil
	}
	return r.update(func(*Manifest) {})
}

// SetEpoch durably raises the epoch; from then on older ones are refused. The
// present one is accepted without effect.
func (r *Replica) SetEpoch(e switchback.Epoch) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.setEpoch(e)
}

func (r *Replica) setEpoch(e switchback.Epoch) error {
	if err := r.checkEpoch(e); err != nil {
		return err
	}
	if e == r.manifest.Epoch {
		return r.settle()
	}
	return r.update(func(m *Manifest) { m.Epoch = e })
}

func (r *Replica) checkEpoch(e switchback.Epoch) error {
	if e < r.manifest.Epoch {
		return switchback.Errorf(switchback.CodeStaleEpoch, "epoch %d is over; replica %s is in epoch %d", e, r.manifest.Protection, r.manifest.Epoch).
			WithHint("the active site of this VM has changed; the sender must stop")
	}
	return nil
}

// SetRetentionFrozen durably freezes or unfreezes retention; see PlanRetention.
func (r *Replica) SetRetentionFrozen(frozen bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.manifest.RetentionFrozen == frozen {
		return r.settle()
	}
	return r.update(func(m *Manifest) { m.RetentionFrozen = frozen })
}

// SetDisk names the base of a disk that the VM has got since (the file must
// exist before the fold that reaches it), or moves the base of one it has. The
// size is taken only for a new disk.
func (r *Replica) SetDisk(d ReplicaDisk) error {
	if err := d.validate(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	spec := r.manifest.clone()
	if old := spec.disk(d.Name); old != nil {
		old.BasePath, old.BaseFormat = d.BasePath, d.BaseFormat
	} else {
		d.Absent = true
		spec.Disks = append(spec.Disks, d)
	}
	if err := spec.Spec.validate(); err != nil {
		return err
	}
	return r.update(func(m *Manifest) { m.Disks = spec.Disks })
}

// ChangedAfter returns, by disk name, what the segments after seq change: where
// the head may differ from the point seq.
func (r *Replica) ChangedAfter(seq switchback.Sequence) (map[string]extent.Set, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkReadable(seq); err != nil {
		return nil, err
	}
	out := map[string]extent.Set{}
	for _, info := range r.segments {
		if info.point.Sequence <= seq {
			continue
		}
		s, err := r.storage.openSegment(info.point.Sequence)
		if err != nil {
			return nil, fault(err, "open segment %d", info.point.Sequence)
		}
		err = s.loadIndex()
		s.close()
		if err != nil {
			return nil, err
		}
		for i, d := range s.header.Disks {
			changed := s.index.changed(i)
			if s.header.fresh(d.Name) {
				changed = extent.NewSet(extent.Range{Length: d.SizeBytes})
			}
			out[d.Name] = out[d.Name].Union(changed)
		}
	}
	return out, nil
}

// checkReadable reports whether the state seq can be read.
func (r *Replica) checkReadable(seq switchback.Sequence) error {
	if r.manifest.Seeding {
		return switchback.Errorf(switchback.CodeRefused, "replica %s is being seeded: it has no point yet", r.manifest.Protection).
			WithHint("wait for the first point")
	}
	if err := r.manifest.noPoints(); err != nil {
		return err
	}
	if seq == r.manifest.Base.Sequence && r.manifest.Folding == 0 {
		return nil
	}
	oldest, head := r.manifest.oldest(), r.head().point.Sequence
	_, ok := r.findSegment(seq)
	switch {
	case seq < oldest || seq > head:
		return switchback.Errorf(switchback.CodeNotFound, "replica %s has no point %d; it has %d to %d", r.manifest.Protection, seq, oldest, head)
	case !ok:
		return switchback.Errorf(switchback.CodeNotFound, "replica %s has no point %d any more; it was merged into a newer one", r.manifest.Protection, seq).
			WithHint("choose one that is listed")
	}
	return nil
}

// findSegment returns the position of the segment seq in r.segments.
func (r *Replica) findSegment(seq switchback.Sequence) (int, bool) {
	return slices.BinarySearchFunc(r.segments, seq, func(s segmentInfo, seq switchback.Sequence) int {
		return cmp.Compare(s.point.Sequence, seq)
	})
}

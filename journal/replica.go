package journal

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

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

// Create makes a new replica in dir, which must not exist or be empty, and
// opens it. The base images are made by the caller.
func Create(dir string, spec Spec) (*Replica, error) { return Options{}.Create(dir, spec) }

// Open opens the replica in dir for this process alone; it completes what a
// crash left. A replica that is open elsewhere is refused with CodeConflict. A
// damaged segment does not prevent it: points before it are there, and Damaged
// names it.
func Open(dir string) (*Replica, error) { return Options{}.Open(dir) }

func manifestPath(dir string) string { return filepath.Join(dir, "manifest.json") }

// Create is the function Create with these options.
func (o Options) Create(dir string, spec Spec) (*Replica, error) {
	o = o.withDefaults()
	if err := spec.validate(); err != nil {
		return nil, err
	}
	if entries, err := os.ReadDir(dir); err == nil {
		for _, e := range entries {
			if e.Name() == "manifest.json" {
				return nil, switchback.Errorf(switchback.CodeConflict, "%s holds a replica already", dir).WithHint("open or remove it")
			}
			switch e.Name() { // what a crashed Create may have left
			case "lock", segmentDir, pinDir, sumDir, "manifest.json.tmp":
			default:
				return nil, switchback.Errorf(switchback.CodeConflict, "%s is not empty: it holds %s", dir, e.Name())
			}
		}
	}
	for _, d := range []string{dir, filepath.Join(dir, segmentDir), filepath.Join(dir, pinDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fault(err, "create replica")
		}
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	r := &Replica{dir: dir, opts: o, fs: o.fs, lock: lock, pins: map[string]Pin{}, storage: &storage{dir: dir, protection: spec.Protection}, marks: map[switchback.Sequence]switchback.Mark{}}
	r.manifest = Manifest{Spec: spec, Seeding: !spec.BaseIsOriginal}
	r.manifest.Base = switchback.Point{Protection: spec.Protection, Epoch: spec.Epoch}
	for _, d := range spec.Disks {
		if err == nil && !spec.BaseIsOriginal { // empty images: zeros
			err = createSums(dir, d.Name, d.SizeBytes, true)
		}
	}
	if err == nil {
		err = writeDocument(r.fs, manifestPath(dir), r.manifest)
	}
	if err == nil {
		err = fault(r.fs.syncDir(filepath.Dir(dir)), "create replica")
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	return r, nil
}

// lockDir takes the exclusive lock of a replica.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault(err, "lock replica")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, switchback.Errorf(switchback.CodeConflict, "replica %s is open already, by process %s", dir, strings.TrimSpace(string(holder[:n]))).
				WithHint("only one agent may have a replica open; stop the other one")
		}
		return nil, fault(err, "lock replica")
	}
	f.Truncate(0) // the number is for people only
	f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	return f, nil
}

// readManifest reads and validates the manifest in dir.
func readManifest(dir string) (Manifest, error) {
	var m Manifest
	if err := readDocument(manifestPath(dir), &m); err != nil {
		return m, err
	}
	if err := m.Spec.validate(); err != nil {
		return m, corrupt("%s: %w", manifestPath(dir), err)
	}
	return m, nil
}

// Open is the function Open with these options.
func (o Options) Open(dir string) (*Replica, error) {
	o = o.withDefaults()
	if _, err := os.Stat(manifestPath(dir)); errors.Is(err, os.ErrNotExist) {
		return nil, switchback.Errorf(switchback.CodeNotFound, "no replica in %s", dir)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	r := &Replica{dir: dir, opts: o, fs: o.fs, lock: lock}
	if err := r.load(); err != nil {
		lock.Close()
		return nil, err
	}
	return r, nil
}

func (r *Replica) load() (err error) {
	if r.manifest, err = readManifest(r.dir); err != nil {
		return err
	}
	for _, d := range []string{".", segmentDir, pinDir} {
		if err := r.removeTemps(filepath.Join(r.dir, d)); err != nil {
			return err
		}
		// What a killed process has renamed is read here, and may not be durable yet.
		if err := r.fs.syncDir(filepath.Join(r.dir, d)); err != nil {
			return fault(err, "open replica")
		}
	}
	if r.pins, err = readPins(r.dir); err != nil {
		return err
	}
	if r.storage, err = openStorage(r.dir, r.manifest.Protection); err != nil {
		return err
	}
	r.marks, r.marksDamage = readMarks(r.dir)
	if err := r.finishDrop(); err != nil {
		return err
	}
	if err := r.removeFolded(); err != nil {
		return err
	}
	return r.loadSegments()
}

// loadSegments finds the points. A segment that a merged one has taken in, and
// that a crash has left, is removed.
func (r *Replica) loadSegments() error {
	sequences, err := listSegments(r.dir)
	if err != nil {
		return err
	}
	type found struct {
		sequence switchback.Sequence
		segment  *segment // closed; nil when damaged
		damage   Damage
	}
	var all []found
	var after, upTo switchback.Sequence // the merged segment upTo has taken in what is between
	removed := false
	for _, seq := range slices.Backward(sequences) {
		if after < seq && seq < upTo {
			if err := r.removeSegment(seq); err != nil {
				return err
			}
			removed = true
			continue
		}
		s, err := r.storage.openSegment(seq)
		if err == nil {
			if s.header.Merged != nil {
				// Nothing is removed for a segment that could not replace it.
				if err = s.loadIndex(); err == nil {
					after, upTo = s.header.Merged.Continues, seq
				}
				s.index = nil
			}
			if err == nil {
				err = r.settleReference(s)
			}
			s.close()
		}
		f := found{sequence: seq, segment: s}
		if err != nil {
			if !errors.As(err, &f.damage) {
				return fault(err, "open segment %d", seq)
			}
			f.segment = nil
		}
		all = append(all, f)
	}
	if removed {
		if err := r.fs.syncDir(filepath.Join(r.dir, segmentDir)); err != nil {
			return fault(err, "remove segments")
		}
	}
	last := r.manifest.Base
	for _, f := range slices.Backward(all) {
		if f.segment == nil {
			r.broken = append(r.broken, f.damage)
			continue
		}
		s := f.segment
		if seq, digest := s.header.continues(); len(r.broken) > 0 || seq != last.Sequence || digest != last.Digest {
			r.broken = append(r.broken, Damage{Segment: f.sequence, File: s.path,
				Reason: fmt.Sprintf("continues %d, %s, but the point before is %d, %s", seq, shortDigest(digest), last.Sequence, shortDigest(last.Digest))})
			continue
		}
		r.segments = append(r.segments, segmentInfo{s.point, s.header.Disks})
		last = s.point
	}
	return nil
}

// listSegments returns the sequences of the segments in dir, ascending, be they
// files or references.
func listSegments(dir string) ([]switchback.Sequence, error) {
	entries, err := os.ReadDir(filepath.Join(dir, segmentDir))
	if err != nil {
		return nil, fault(err, "list segments")
	}
	var out []switchback.Sequence
	for _, e := range entries {
		if seq, ok := segmentSequence(e.Name()); ok {
			out = append(out, seq)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

func (r *Replica) removeTemps(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fault(err, "list %s", dir)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tempSuffix) {
			if err := r.fs.remove(filepath.Join(dir, e.Name())); err != nil {
				return fault(err, "remove what a crash left")
			}
		}
	}
	return nil
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

// Remove deletes the replica in dir: manifest, segments, pins, not the bases.
// It is refused while the replica is open or pinned, and does nothing when
// there is none.
func Remove(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	pins, err := readPins(dir)
	if err != nil {
		return err
	}
	for _, p := range pins {
		return switchback.Errorf(switchback.CodeRefused, "replica %s is pinned at point %d by %s", dir, p.Sequence, p.Name).
			WithHint("end what uses it first")
	}
	if err := RemoveObjects(context.Background(), dir); err != nil {
		return err
	}
	// The manifest goes first, so that a crash leaves no half of a replica.
	fs := osFileSystem{}
	err = fs.remove(manifestPath(dir))
	if err == nil {
		err = fs.syncDir(dir)
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	for _, name := range []string{segmentDir, pinDir, sumDir, "marks.json", "storage.json", samplesFile, checkFile, "manifest.json.tmp", "lock"} {
		if err == nil {
			err = os.RemoveAll(filepath.Join(dir, name))
		}
	}
	if err != nil {
		return fault(err, "remove replica %s", dir)
	}
	os.Remove(dir) // stays when somebody else keeps files in it
	return nil
}

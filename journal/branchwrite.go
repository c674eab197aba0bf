package journal

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"time"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// BranchSpec says what a branch is made of.
type BranchSpec struct {
	Name string
	// Point is the parent, and Pin the pin that keeps it, which must be there.
	Point switchback.Sequence
	Pin   string
	// Over names the branch that was written over; "" is the point itself. The
	// new branch takes its content in, and does not need it any more.
	Over  string
	Epoch switchback.Epoch
	Kind  switchback.PointKind
	Time  time.Time
	// Disks are what was written, by name; all of the point's must be there.
	Disks map[string]Written
}

// Written is what was written to a disk: Content counts where Ranges say so.
type Written struct {
	Ranges  extent.Set
	Content io.ReaderAt
}

const (
	branchChunk = 1 << 20
	// branchGrain is what is compared at once with what was there.
	branchGrain = 4096
)

// WriteBranch makes a branch and returns it once it is durable; a crash leaves
// all of it or nothing. What is as at the parent point is left out. One of that
// name that is there already is left as it is.
func (r *Replica) WriteBranch(ctx context.Context, spec BranchSpec, progress func(done, total int64)) (BranchInfo, error) {
	none := BranchInfo{}
	there, temp, st, err := r.mayBranch(spec)
	if err != nil || there != nil {
		return orNone(there), err
	}
	parent, err := OpenView(r.dir, spec.Point)
	if err != nil {
		return none, err
	}
	defer parent.Close()
	var over *View
	if spec.Over != "" {
		if over, err = OpenBranch(r.dir, spec.Over); err != nil {
			return none, err
		}
		defer over.Close()
	}
	h := Header{Protection: st.protection, Epoch: spec.Epoch, Sequence: spec.Point + 1, Kind: spec.Kind, Time: spec.Time,
		Parent: parent.Point().Digest, Branch: &Branch{Name: spec.Name, Pin: spec.Pin}}
	w := branchWriter{ctx: ctx, progress: progress}
	for _, d := range parent.Disks() {
		written, ok := spec.Disks[d.Name()]
		if !ok {
			return none, switchback.Errorf(switchback.CodeInvalid, "branch %s lacks disk %s", spec.Name, d.Name())
		}
		x := branchedDisk{before: d, written: written}
		x.ranges = x.written.Ranges.Clip(0, d.Size())
		x.written.Ranges = x.ranges
		if over != nil {
			if x.over = over.Disk(d.Name()); x.over == nil {
				return none, switchback.Errorf(switchback.CodeInvalid, "branch %s lacks disk %s", spec.Over, d.Name())
			}
			x.ranges = x.ranges.Union(over.changed(d.Name()))
		}
		h.Disks = append(h.Disks, DiskGeometry{d.Name(), d.Size()})
		w.total += x.ranges.Bytes()
		w.disks = append(w.disks, x)
	}
	if err := r.storeBranch(temp, h, w.write); err != nil {
		return none, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		r.fs.remove(temp)
		return none, switchback.Errorf(switchback.CodeInternal, "replica is closed")
	}
	if p, ok := r.pins[spec.Pin]; !ok || p.Sequence != spec.Point {
		r.fs.remove(temp)
		return none, switchback.Errorf(switchback.CodeRefused, "branch %s is not wanted any more", spec.Name)
	}
	path := branchPath(r.dir, spec.Name)
	if err := r.fs.rename(temp, path); err != nil {
		r.fs.remove(temp)
		return none, fault(err, "store branch %s", spec.Name)
	}
	if err := r.fs.syncDir(filepath.Dir(path)); err != nil {
		r.fs.remove(path)
		return none, fault(err, "store branch %s", spec.Name)
	}
	s, err := r.storage.openBranch(spec.Name)
	if err != nil {
		return none, fault(err, "open branch %s", spec.Name)
	}
	defer s.close()
	r.branches[spec.Name] = s.branchInfo()
	return r.branches[spec.Name], nil
}

func orNone(b *BranchInfo) BranchInfo {
	if b == nil {
		return BranchInfo{}
	}
	return *b
}

// mayBranch judges a branch, and returns the one of that name if it is there.
func (r *Replica) mayBranch(spec BranchSpec) (there *BranchInfo, temp string, st *storage, err error) {
	if !pinName.MatchString(spec.Name) {
		return nil, "", nil, switchback.Errorf(switchback.CodeInvalid, "branch name %q: use letters, digits, dots, dashes and underscores", spec.Name)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if b, ok := r.branches[spec.Name]; ok && !b.Damaged {
		return &b, "", nil, nil
	}
	if err := r.checkReadable(spec.Point); err != nil {
		return nil, "", nil, err
	}
	if p, ok := r.pins[spec.Pin]; !ok || p.Sequence != spec.Point || p.Damaged {
		return nil, "", nil, switchback.Errorf(switchback.CodeRefused, "no pin %q keeps point %d for branch %s", spec.Pin, spec.Point, spec.Name).WithHint("pin the point first")
	}
	r.temps++
	return nil, filepath.Join(r.dir, branchDir, fmt.Sprintf("%s-%d%s", spec.Name, r.temps, tempSuffix)), r.storage, nil
}

// storeBranch writes the segment of a branch to the file temp, durably.
func (r *Replica) storeBranch(temp string, h Header, content func(*SegmentWriter) error) error {
	f, err := r.fs.create(temp)
	if err != nil {
		return fault(err, "store branch %s", h.Branch.Name)
	}
	err = r.writeSegment(f, branchSealName(h.Branch.Name), func(out io.Writer) error {
		w, err := NewSegmentWriter(out, h, CodecZstd)
		if err != nil {
			return err
		}
		defer w.Abort()
		if err := content(w); err != nil {
			return err
		}
		_, err = w.Finish()
		return err
	})
	if err != nil {
		r.fs.remove(temp)
	}
	return fault(err, "store branch %s", h.Branch.Name)
}

// changed is what the newest segment of a view holds of a disk. It reads the
// index anew: views forget their extents.
func (v *View) changed(disk string) extent.Set {
	s := v.segments[len(v.segments)-1]
	again := segment{path: s.path, file: s.file, head: s.head, header: s.header, foot: s.foot, size: s.size}
	i := s.disk(disk)
	if i < 0 || again.loadIndex() != nil { // it was read a moment ago: reads of it will fail, too
		return extent.NewSet(extent.Range{Length: v.Disk(disk).Size()})
	}
	return again.index.changed(i)
}

// BranchChanged returns, by disk name, where a branch of the replica in dir may
// differ from its parent point.
func BranchChanged(dir, name string) (map[string]extent.Set, error) {
	v, err := OpenBranch(dir, name)
	if err != nil {
		return nil, err
	}
	defer v.Close()
	out := map[string]extent.Set{}
	for _, d := range v.Disks() {
		out[d.Name()] = v.changed(d.Name())
	}
	return out, nil
}

// branchedDisk is one disk of a branch that is being written.
type branchedDisk struct {
	before  *DiskView // at the parent point
	over    *DiskView // what was written over, where that is another branch
	written Written
	ranges  extent.Set // what may differ from before
}

// branchWriter writes what disks hold that their parent point does not.
type branchWriter struct {
	ctx         context.Context
	disks       []branchedDisk
	done, total int64
	progress    func(done, total int64)
}

func (b *branchWriter) write(w *SegmentWriter) error {
	now, before := make([]byte, branchChunk), make([]byte, branchChunk)
	for i, d := range b.disks {
		for _, r := range d.ranges.Ranges() {
			for off := r.Offset; off < r.End(); {
				n := min(branchChunk-off%branchChunk, r.End()-off)
				if err := b.ctx.Err(); err != nil {
					return switchback.Errorf(switchback.CodeCancelled, "branch: %w", err)
				}
				if err := d.read(now[:n], off); err != nil {
					return err
				}
				// What cannot be read is not what was written: it is kept as different.
				was := before[:n]
				if m, err := d.before.ReadAt(was, off); int64(m) < n {
					if unreachable(err) {
						return err
					}
					was = was[:0]
				}
				if err := putChanged(w, i, off, now[:n], was); err != nil {
					return err
				}
				off += n
				if b.done += n; b.progress != nil {
					b.progress(b.done, b.total)
				}
			}
		}
	}
	return nil
}

// read reads the disk as the run left it.
func (d *branchedDisk) read(p []byte, off int64) error {
	all, end := d.written.Ranges.Ranges(), off+int64(len(p))
	first := sort.Search(len(all), func(i int) bool { return all[i].End() > off })
	covered := first < len(all) && all[first].Offset <= off && all[first].End() >= end
	if d.over != nil && !covered {
		if n, err := d.over.ReadAt(p, off); n < len(p) {
			return err
		}
	}
	for _, r := range all[first:] {
		if r.Offset >= end {
			break
		}
		from := max(r.Offset, off)
		part := p[from-off : min(r.End(), end)-off]
		if n, err := d.written.Content.ReadAt(part, from); n < len(part) {
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			return fault(err, "read what was written to disk %s at %d", d.before.Name(), from)
		}
	}
	return nil
}

var zeroGrain [branchGrain]byte

// putChanged adds what of now differs from was, all of it where was is empty.
func putChanged(w *SegmentWriter, disk int, off int64, now, was []byte) error {
	const same, zero, data = 0, 1, 2
	put := func(kind int, from, to int64) error {
		switch kind {
		case zero:
			return w.Zero(disk, off+from, to-from)
		case data:
			return w.Data(disk, off+from, now[from:to])
		}
		return nil
	}
	kind, from := same, int64(0)
	for at := int64(0); at < int64(len(now)); at += branchGrain {
		end := min(at+branchGrain, int64(len(now)))
		k := data
		switch {
		case len(was) > 0 && bytes.Equal(now[at:end], was[at:end]):
			k = same
		case bytes.Equal(now[at:end], zeroGrain[:end-at]):
			k = zero
		}
		if k != kind {
			if err := put(kind, from, at); err != nil {
				return err
			}
			kind, from = k, at
		}
	}
	return put(kind, from, int64(len(now)))
}

// DetachBranch writes a branch with all that it reads of its parent point to
// the directory to, which is then a replica without points that holds nothing
// else, sealed as this one is. It appears complete or not at all; one that is
// there already is left as it is. The branch itself stays.
func (r *Replica) DetachBranch(ctx context.Context, name, to string, progress func(done, total int64)) error {
	if m, err := readManifest(to); err == nil && m.Detached {
		return nil
	}
	v, err := OpenBranch(r.dir, name)
	if err != nil {
		return err
	}
	defer v.Close()
	r.mu.Lock()
	st, m := r.storage, r.manifest.clone()
	r.mu.Unlock()
	temp := to + tempSuffix
	if err := os.RemoveAll(temp); err != nil {
		return fault(err, "detach branch %s", name)
	}
	for _, d := range []string{segmentDir, pinDir, branchDir} {
		if err := os.MkdirAll(filepath.Join(temp, d), 0o700); err != nil {
			return fault(err, "detach branch %s", name)
		}
	}
	done := false
	defer func() {
		if !done {
			os.RemoveAll(temp)
		}
	}()
	m = Manifest{Spec: m.Spec, Base: switchback.Point{Protection: m.Protection, Epoch: m.Epoch}, Detached: true}
	m.Disks, m.BaseIsOriginal = nil, false
	config := st.config
	config.Objects = nil
	if config.Keyring != nil {
		if err := writeDocument(r.fs, storagePath(temp), config); err != nil {
			return err
		}
	}
	h := v.segments[len(v.segments)-1].header
	h.Branch = &Branch{Name: name, Whole: true}
	w := wholeWriter{ctx: ctx, progress: progress, disks: v.Disks()}
	if err := r.storeBranch(branchPath(temp, name), h, w.write); err != nil {
		return err
	}
	if err := writeDocument(r.fs, manifestPath(temp), m); err != nil {
		return err
	}
	for _, d := range []string{filepath.Join(temp, branchDir), temp} {
		if err := r.fs.syncDir(d); err != nil {
			return fault(err, "detach branch %s", name)
		}
	}
	if err := os.Rename(temp, to); err != nil {
		return fault(err, "detach branch %s", name)
	}
	done = true
	return fault(r.fs.syncDir(filepath.Dir(to)), "detach branch %s", name)
}

// wholeWriter writes all that disks hold; what it leaves out is zero.
type wholeWriter struct {
	ctx         context.Context
	disks       []*DiskView
	done, total int64
	progress    func(done, total int64)
}

func (b *wholeWriter) write(w *SegmentWriter) error {
	var stored []extent.Set
	for _, d := range b.disks {
		var set extent.Set
		for off := int64(0); off < d.Size(); {
			list, err := d.Extents(off, min(1<<34, d.Size()-off))
			if err != nil {
				return err
			}
			for _, e := range list {
				if off = e.Offset + e.Length; !e.Zero {
					set.Add(e.Offset, e.Length)
				}
			}
		}
		stored = append(stored, set)
		b.total += set.Bytes()
	}
	buf, zeros := make([]byte, branchChunk), make([]byte, branchChunk)
	for i, d := range b.disks {
		for _, r := range stored[i].Ranges() {
			for off := r.Offset; off < r.End(); {
				if err := b.ctx.Err(); err != nil {
					return switchback.Errorf(switchback.CodeCancelled, "branch: %w", err)
				}
				n := min(branchChunk-off%branchChunk, r.End()-off)
				if m, err := d.ReadAt(buf[:n], off); int64(m) < n {
					return err
				}
				if err := putChanged(w, i, off, buf[:n], zeros[:n]); err != nil { // the rest of a fresh disk is zero
					return err
				}
				off += n
				if b.done += n; b.progress != nil {
					b.progress(b.done, b.total)
				}
			}
		}
	}
	return nil
}

package journal

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"github.com/switchback-dr/switchback"
)

// View is one point of a replica, open for reading. It needs no lock and no
// running agent: it may be opened by another process while points are received
// and folded, provided the point is pinned. Its methods may be called
// concurrently; Close only when none of them runs.
type View struct {
	point    switchback.Point
	segments []*segment
	disks    []*DiskView
	cache    *frameCache
}

// DiskView is one disk at the point. It is an io.ReaderAt.
type DiskView struct {
	*overlay
	base  baseReader // nil when no byte comes from a base
	cache *frameCache
}

// ViewOptions are the limits of a view. The zero value has the defaults.
type ViewOptions struct {
	// CacheBytes bounds the cache of decompressed frames, shared by all disks.
	// 0 means 64 MiB.
	CacheBytes int64
}

// OpenView opens point seq of the replica in dir. Sequence 0 is the original
// disks under a homeward replica, while they are untouched. A base image that
// package qcow2 does not support gives CodeUnsupported.
func OpenView(dir string, seq switchback.Sequence) (*View, error) {
	return ViewOptions{}.Open(dir, seq)
}

// Open is OpenView with these options.
func (o ViewOptions) Open(dir string, seq switchback.Sequence) (*View, error) {
	m, segments, err := openPoint(dir, seq)
	if err != nil {
		return nil, fault(err, "open point %d of replica %s", seq, dir)
	}
	return o.view(dir, m, segments)
}

// view puts segments, oldest first, over the bases. The result closes them.
func (o ViewOptions) view(dir string, m Manifest, segments []*segment) (_ *View, err error) {
	if o.CacheBytes == 0 {
		o.CacheBytes = 64 << 20
	}
	v := &View{point: m.Base, segments: segments, cache: newFrameCache(o.CacheBytes)}
	disks := m.geometry()
	for _, s := range segments {
		disks = s.header.Disks
		if s.header.Branch == nil {
			v.point = s.point
		}
	}
	for _, g := range disks {
		b := m.disk(g.Name)
		d := &DiskView{cache: v.cache, overlay: newOverlay(g.Name, g.SizeBytes, segments, b != nil && !b.Absent)}
		v.disks = append(v.disks, d)
		if d.onBase {
			if d.base, err = openProven(dir, *b); err != nil {
				v.Close()
				return nil, err
			}
		}
	}
	for _, s := range segments {
		s.forgetExtents()
	}
	return v, nil
}

// openPoint reads the manifest and opens the segments that make point seq.
func openPoint(dir string, seq switchback.Sequence) (Manifest, []*segment, error) {
	for attempt := 0; ; attempt++ {
		m, segments, err := tryPoint(dir, seq)
		if !errors.Is(err, errMoved) || attempt == 100 {
			return m, segments, err
		}
	}
}

func tryPoint(dir string, seq switchback.Sequence) (Manifest, []*segment, error) {
	m, err := readManifest(dir)
	if err != nil {
		return m, nil, err
	}
	if err := m.noPoints(); err != nil {
		return m, nil, err
	}
	switch {
	case m.Seeding:
		return m, nil, switchback.Errorf(switchback.CodeRefused, "replica %s is being seeded: it has no point yet", m.Protection).
			WithHint("wait for the first point")
	case seq < m.oldest(), m.Dropping != nil && seq > *m.Dropping:
		return m, nil, switchback.Errorf(switchback.CodeNotFound, "replica %s has no point %d any more", m.Protection, seq).
			WithHint("the oldest is %d", m.oldest())
	}
	st, err := openStorage(dir, m.Protection)
	if err != nil {
		return m, nil, err
	}
	segments, err := st.openSegments(m.Base, seq)
	return m, segments, err
}

// errMoved says that a fold, merge or drop came between two reads of a replica's
// directory: reading it anew succeeds.
var errMoved = errors.New("the replica has changed meanwhile")

// openSegments opens the segments that lead from base to the point seq, with
// their indexes, oldest first. It follows the chain from the newest, so that
// points that were merged away need not be known.
func (st *storage) openSegments(base switchback.Point, seq switchback.Sequence) (out []*segment, err error) {
	defer func() {
		if err != nil {
			for _, s := range out {
				s.close()
			}
			out = nil
		}
	}()
	n, want := seq, "" // the digest that the segment n must have
	for n > base.Sequence {
		s, err := st.openSegment(n)
		if errors.Is(err, os.ErrNotExist) {
			return out, st.missingSegment(base, out, n)
		}
		if err != nil {
			return out, err
		}
		out = append(out, s)
		if n != seq && s.point.Digest != want {
			if st.moved(base, out[:len(out)-1]) {
				return out, errMoved
			}
			return out, out[len(out)-2].misplaced(n)
		}
		if err := s.loadIndex(); err != nil {
			return out, err
		}
		n, want = s.header.continues()
	}
	if last := len(out) - 1; last >= 0 && (n != base.Sequence || want != base.Digest) {
		if st.moved(base, out) {
			return out, errMoved
		}
		return out, out[last].misplaced(base.Sequence)
	}
	slices.Reverse(out)
	return out, nil
}

func (s *segment) misplaced(before switchback.Sequence) error {
	return Damage{Segment: s.header.Sequence, File: s.path,
		Reason: fmt.Sprintf("it does not continue what is before it: point %d", before)}.corrupt()
}

// moved reports whether the base, or the segments that are open, newest first,
// are no longer those of the directory.
func (st *storage) moved(base switchback.Point, open []*segment) bool {
	m, err := readManifest(st.dir)
	if err != nil || m.Base.Sequence != base.Sequence {
		return err == nil
	}
	for _, s := range open {
		if now := st.state(s.header.Sequence); now == nil || !os.SameFile(s.id, now) {
			return true
		}
	}
	return false
}

// missingSegment says why the segment n, which the last one open continues, is
// not there.
func (st *storage) missingSegment(base switchback.Point, open []*segment, n switchback.Sequence) error {
	m, err := readManifest(st.dir)
	if err != nil {
		return err
	}
	switch {
	case st.moved(base, open):
		return errMoved
	case len(open) == 0:
		return switchback.Errorf(switchback.CodeNotFound, "replica %s has no point %d", m.Protection, n)
	}
	return Damage{Segment: n, File: segmentPath(st.dir, n), Reason: "the file is missing"}.corrupt()
}

// Point returns the point, or the one that a branch left; for sequence 0 only
// Protection and Epoch are set.
func (v *View) Point() switchback.Point { return v.point }

// Disks returns the disks at the point.
func (v *View) Disks() []*DiskView { return v.disks }

// Disk returns the disk called name, or nil.
func (v *View) Disk(name string) *DiskView {
	for _, d := range v.disks {
		if d.name == name {
			return d
		}
	}
	return nil
}

// Close closes all files.
func (v *View) Close() error {
	for _, s := range v.segments {
		s.close()
	}
	for _, d := range v.disks {
		if d.base != nil {
			d.base.Close()
		}
	}
	return nil
}

// Name returns the name of the disk.
func (d *DiskView) Name() string { return d.name }

// Size returns the size of the disk in bytes.
func (d *DiskView) Size() int64 { return d.size }

// clip returns how many of n bytes from off on are on the disk.
func (d *DiskView) clip(off, n int64) (int64, error) {
	if off < 0 || n < 0 {
		return 0, switchback.Errorf(switchback.CodeInvalid, "disk %s: offset %d, length %d", d.name, off, n)
	}
	return max(0, min(n, d.size-off)), nil
}

// ReadAt implements io.ReaderAt. Bytes from a segment are verified; damage
// gives CodeCorrupt (with a Damage in the chain) and never wrong bytes.
func (d *DiskView) ReadAt(p []byte, off int64) (int, error) {
	length, err := d.clip(off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	short := length < int64(len(p))
	p = p[:length]
	done := 0
	for i := d.find(off); done < len(p); {
		at := off + int64(done)
		part := p[done:]
		if i < len(d.live) && d.live[i].offset() <= at {
			e := d.live[i]
			part = part[:min(int64(len(part)), e.end()-at)]
			err = d.read(d.cache, e, part, at)
			i++
		} else {
			if i < len(d.live) {
				part = part[:min(int64(len(part)), d.live[i].offset()-at)]
			}
			err = d.readBase(part, at)
		}
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	if short {
		return done, io.EOF
	}
	return done, nil
}

// readBase reads from the base; what is past its end is zero.
func (d *DiskView) readBase(p []byte, off int64) error {
	if d.base == nil {
		return switchback.Errorf(switchback.CodeInternal, "disk %s: no base for offset %d", d.name, off)
	}
	n := max(0, min(int64(len(p)), d.base.Size()-off))
	if n > 0 {
		if got, err := d.base.ReadAt(p[:n], off); int64(got) < n {
			code := switchback.CodeOf(err)
			if code == switchback.CodeInternal || code == "" {
				code = switchback.CodeInternal
			}
			return switchback.Errorf(code, "disk %s: base at %d: %w", d.name, off, err)
		}
	}
	clear(p[n:])
	return nil
}

// Extents describes [off, off+length), clipped to the disk, in order and without
// gaps; neighbours differ in Zero.
func (d *DiskView) Extents(off, length int64) ([]Extent, error) {
	length, err := d.clip(off, length)
	if err != nil {
		return nil, err
	}
	var out []Extent
	add := func(n int64, zero bool) {
		if k := len(out); k > 0 && out[k-1].Zero == zero {
			out[k-1].Length += n
		} else {
			out = append(out, Extent{off, n, zero})
		}
		off += n
	}
	end := off + length
	for i := d.find(off); off < end; {
		if i < len(d.live) && d.live[i].offset() <= off {
			e := d.live[i]
			add(min(end, e.end())-off, e.zero())
			i++
			continue
		}
		stop := end
		if i < len(d.live) {
			stop = min(stop, d.live[i].offset())
		}
		if d.base != nil && off < d.base.Size() {
			list, err := d.base.Extents(off, stop-off)
			if err != nil {
				return nil, switchback.Errorf(switchback.CodeOf(err), "disk %s: base at %d: %w", d.name, off, err)
			}
			for _, x := range list {
				add(x.Length, x.Zero)
			}
		}
		if off < stop {
			add(stop-off, true)
		}
	}
	return out, nil
}

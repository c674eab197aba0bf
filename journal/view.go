package journal

import (
	"errors"
	"io"
	"os"

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
	if o.CacheBytes == 0 {
		o.CacheBytes = 64 << 20
	}
	for attempt := 0; ; attempt++ {
		m, segments, err := openPoint(dir, seq)
		if errors.Is(err, os.ErrNotExist) && switchback.CodeOf(err) == switchback.CodeInternal && attempt < 10 {
			continue // folded between reading the manifest and opening the segment
		}
		if err != nil {
			return nil, fault(err, "open point %d of replica %s", seq, dir)
		}
		v := &View{point: m.Base, segments: segments, cache: newFrameCache(o.CacheBytes)}
		disks := m.geometry()
		if n := len(segments); n > 0 {
			v.point, disks = segments[n-1].point, segments[n-1].header.Disks
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
		return v, nil
	}
}

// openPoint reads the manifest and opens the segments that make point seq.
func openPoint(dir string, seq switchback.Sequence) (Manifest, []*segment, error) {
	m, err := readManifest(dir)
	if err != nil {
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
	segments, err := openSegments(dir, m.Base, seq)
	return m, segments, err
}

// openSegments opens the segments after base up to seq, with their indexes,
// and verifies that they are one chain.
func openSegments(dir string, base switchback.Point, seq switchback.Sequence) (out []*segment, err error) {
	defer func() {
		if err != nil {
			for _, s := range out {
				s.close()
			}
			out = nil
		}
	}()
	if seq > base.Sequence {
		// The newest first: it tells a point that never was from one just folded.
		if _, err := os.Stat(segmentPath(dir, seq)); errors.Is(err, os.ErrNotExist) {
			if m, err := readManifest(dir); err == nil && m.Base.Sequence < seq {
				return nil, switchback.Errorf(switchback.CodeNotFound, "replica %s has no point %d", m.Protection, seq)
			}
		}
	}
	parent := base.Digest
	for n := base.Sequence + 1; n <= seq; n++ {
		s, err := openSegment(segmentPath(dir, n), n)
		if errors.Is(err, os.ErrNotExist) {
			// Folded meanwhile, or lost?
			if m, e := readManifest(dir); e == nil && m.Base.Sequence < n && m.Dropping == nil {
				return out, Damage{Segment: n, File: segmentPath(dir, n), Reason: "the file is missing"}.corrupt()
			}
		}
		if err != nil {
			return out, err
		}
		out = append(out, s)
		if s.header.Parent != parent {
			return out, Damage{Segment: n, File: s.path, Reason: "it does not continue the segment before"}.corrupt()
		}
		if err := s.loadIndex(); err != nil {
			return out, err
		}
		parent = s.point.Digest
	}
	return out, nil
}

// Point returns the point; for sequence 0 only Protection and Epoch are set.
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
		if i < len(d.live) && d.live[i].offset <= at {
			e := &d.live[i]
			part = part[:min(int64(len(part)), e.end()-at)]
			err = d.read(d.cache, e, part, at)
			i++
		} else {
			if i < len(d.live) {
				part = part[:min(int64(len(part)), d.live[i].offset-at)]
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
		if i < len(d.live) && d.live[i].offset <= off {
			e := &d.live[i]
			add(min(end, e.end())-off, e.pos < 0)
			i++
			continue
		}
		stop := end
		if i < len(d.live) {
			stop = min(stop, d.live[i].offset)
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

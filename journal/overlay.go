package journal

import (
	"container/heap"
	"slices"
	"sort"

	"github.com/switchback-dr/switchback"
)

// liveExtent is a range of a disk that a segment provides at a point. A view may
// hold millions, so that they are packed: offset (40 bits) and length (24), position
// plus 1 (40) and segment plus 1 (24), all but the last in sectors.
type liveExtent [2]uint64

const (
	lowBits = 24
	maxLive = 1<<lowBits - 1 // sectors in one extent
	maxDisk = sector << 39   // bytes of a disk
)

// newLive packs; pos is -1 for zeros, segment -1 for zeros that no segment holds.
func newLive(offset, pos, sectors int64, segment int32) liveExtent {
	if pos >= 0 {
		pos /= sector
	}
	return liveExtent{uint64(offset/sector)<<lowBits | uint64(sectors), uint64(pos+1)<<lowBits | uint64(segment+1)}
}

// offset is on the disk.
func (e liveExtent) offset() int64  { return int64(e[0]>>lowBits) * sector }
func (e liveExtent) sectors() int64 { return int64(e[0] & maxLive) }
func (e liveExtent) length() int64  { return e.sectors() * sector }
func (e liveExtent) end() int64     { return e.offset() + e.length() }

// zero reports whether the range reads as zeros.
func (e liveExtent) zero() bool { return e[1]>>lowBits == 0 }

// pos is in the disk's stream of the segment; negative for zeros.
func (e liveExtent) pos() int64 {
	if e.zero() {
		return -1
	}
	return (int64(e[1]>>lowBits) - 1) * sector
}

// segment says which of the open segments; -1 for zeros that no segment holds.
func (e liveExtent) segment() int32 { return int32(e[1]&maxLive) - 1 }

// candidate is an extent of one segment before it is known what newer ones hide.
type candidate struct {
	offset, end int64
	pos         int64
	segment     int32
}

// newestFirst is a heap of the candidates that cover the sweep's position.
type newestFirst []candidate

func (h newestFirst) Len() int           { return len(h) }
func (h newestFirst) Less(i, j int) bool { return h[i].segment > h[j].segment }
func (h newestFirst) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *newestFirst) Push(x any)        { *h = append(*h, x.(candidate)) }
func (h *newestFirst) Pop() any {
	old := *h
	x := old[len(old)-1]
	*h = old[:len(old)-1]
	return x
}

// merge returns what of the candidates is not hidden by newer ones, by offset.
// It sweeps over the disk once: O(n log n) for n candidates.
func merge(all []candidate, size int64) []liveExtent {
	slices.SortFunc(all, func(a, b candidate) int {
		if a.offset < b.offset {
			return -1
		} else if a.offset > b.offset {
			return 1
		}
		return 0
	})
	var out []liveExtent
	var active newestFirst
	var at int64
	for {
		for len(active) > 0 && active[0].end <= at {
			heap.Pop(&active)
		}
		if len(active) == 0 {
			if len(all) == 0 {
				return out
			}
			at = all[0].offset
		}
		for len(all) > 0 && all[0].offset <= at {
			heap.Push(&active, all[0])
			all = all[1:]
		}
		if at >= size {
			return out
		}
		if len(active) == 0 || active[0].end <= at {
			continue
		}
		top := active[0]
		end := min(top.end, size)
		if len(all) > 0 {
			end = min(end, all[0].offset)
		}
		pos := top.pos
		if pos >= 0 {
			pos += at - top.offset
		}
		out = appendLive(out, at, end, pos, top.segment)
		at = end
	}
}

// appendLive adds [at, end), growing the last extent when it is continued.
func appendLive(out []liveExtent, at, end, pos int64, segment int32) []liveExtent {
	if n := len(out); n > 0 && out[n-1].end() == at && out[n-1].segment() == segment && out[n-1].sectors()+(end-at)/sector <= maxLive {
		last := out[n-1]
		if pos < 0 && last.zero() || pos >= 0 && !last.zero() && last.pos()+last.length() == pos {
			out[n-1] = newLive(last.offset(), last.pos(), last.sectors()+(end-at)/sector, segment)
			return out
		}
	}
	for at < end {
		n := min(end-at, maxLive*sector)
		out = append(out, newLive(at, pos, n/sector, segment))
		at += n
		if pos >= 0 {
			pos += n
		}
	}
	return out
}

// overlay is one disk at a point as far as segments say what it holds; what
// they leave out is the base's.
type overlay struct {
	name     string
	size     int64
	segments []*segment
	disk     []int // the number of the disk in each segment
	live     []liveExtent
	// onBase: what segments leave out is in the base image. Otherwise the disk
	// did not exist at the base point, and all of it is in live.
	onBase bool
}

// newOverlay merges the segments, oldest first, for one disk. inBase says
// whether the disk existed at the base point.
func newOverlay(name string, size int64, segments []*segment, inBase bool) *overlay {
	o := &overlay{name: name, size: size, segments: segments, disk: make([]int, len(segments)), onBase: inBase}
	var all []candidate
	for i := len(segments) - 1; i >= 0; i-- {
		d := segments[i].disk(name)
		o.disk[i] = d
		if d < 0 { // the disk was gone: what is older does not count
			o.onBase = false
			break
		}
		ix := &segments[i].index.disks[d]
		var pos int64
		for _, r := range ix.data {
			all = append(all, candidate{r.Offset, r.End(), pos, int32(i)})
			pos += r.Length
		}
		for _, r := range ix.zero {
			all = append(all, candidate{r.Offset, r.End(), -1, int32(i)})
		}
		if segments[i].header.fresh(name) {
			o.onBase = false
			break
		}
	}
	if !o.onBase {
		all = append(all, candidate{0, size, -1, -1})
	}
	o.live = slices.Clone(merge(all, size)) // without room to grow
	return o
}

// frameAt returns the position in d.frames of the frame that holds pos.
func (d *diskIndex) frameAt(pos int64) int {
	return sort.Search(len(d.starts), func(i int) bool { return d.starts[i] > pos }) - 1
}

// find returns the number of the first live extent that ends after off.
func (o *overlay) find(off int64) int {
	return sort.Search(len(o.live), func(i int) bool { return o.live[i].end() > off })
}

// read fills p from the live extent e, beginning at disk offset off; [off,
// off+len(p)) must lie in e.
func (o *overlay) read(cache *frameCache, e liveExtent, p []byte, off int64) error {
	if e.zero() {
		clear(p)
		return nil
	}
	s := o.segments[e.segment()]
	d := &s.index.disks[o.disk[e.segment()]]
	pos := e.pos() + off - e.offset()
	for i := d.frameAt(pos); len(p) > 0; i++ {
		if i < 0 || i >= len(d.frames) { // the index was checked: cannot be
			return switchback.Errorf(switchback.CodeInternal, "position %d is in no frame", pos)
		}
		n := d.frames[i]
		skip := int(pos - d.starts[i])
		length := s.index.frames[n].rawLength()
		key := frameKey{s, n}
		if skip == 0 && len(p) >= length && !cache.has(key) {
			// A whole frame goes straight to its place and does not displace others.
			if err := s.load(n, p[:length]); err != nil {
				return err
			}
			p, pos = p[length:], pos+int64(length)
			continue
		}
		entry, err := cache.get(key, length)
		if err != nil {
			return err
		}
		done := copy(p, entry.data[skip:])
		cache.release(entry)
		p, pos = p[done:], pos+int64(done)
	}
	return nil
}

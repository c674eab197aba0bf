// Package extent is arithmetic on byte ranges of a disk: which bytes changed,
// which are still to be sent, which two sides may differ in. It does no I/O.
package extent

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"sort"
)

// Range is the bytes [Offset, Offset+Length) of a disk.
type Range struct {
	Offset int64 `json:"offset"`
	Length int64 `json:"length"`
}

// End returns the offset of the first byte after r.
func (r Range) End() int64 { return r.Offset + r.Length }

func (r Range) String() string { return fmt.Sprintf("[%d, %d)", r.Offset, r.End()) }

// clip returns the part of r that lies in [0, math.MaxInt64), so that no end
// overflows. An empty range has Length 0.
func (r Range) clip() Range {
	if r.Length <= 0 {
		return Range{}
	}
	if r.Offset < 0 {
		if r.Length += r.Offset; r.Length <= 0 {
			return Range{}
		}
		r.Offset = 0
	}
	r.Length = min(r.Length, math.MaxInt64-r.Offset)
	return r
}

// Set is a set of bytes, kept as sorted, disjoint ranges that do not touch.
// The zero Set is empty and ready to use. Union, Intersect, Subtract and Align
// return new sets; Add and AddRange change the receiver, so a Set that was
// copied by assignment and is then added to must be cloned first.
type Set struct {
	ranges []Range // sorted by Offset; Length > 0; each ends before the next begins
}

// NewSet returns the union of ranges, which may overlap and be in any order.
// It costs O(n log n), unlike n calls of Add in random order.
func NewSet(ranges ...Range) Set {
	sorted := make([]Range, 0, len(ranges))
	for _, r := range ranges {
		if r = r.clip(); r.Length > 0 {
			sorted = append(sorted, r)
		}
	}
	if !slices.IsSortedFunc(sorted, byOffset) {
		slices.SortFunc(sorted, byOffset)
	}
	s := Set{ranges: sorted[:0]} // never longer than what was read
	for _, r := range sorted {
		s.push(r)
	}
	return s
}

func byOffset(a, b Range) int {
	switch {
	case a.Offset < b.Offset:
		return -1
	case a.Offset > b.Offset:
		return 1
	}
	return 0
}

// push adds r, whose offset is not before that of the last range.
func (s *Set) push(r Range) {
	if n := len(s.ranges); n > 0 && r.Offset <= s.ranges[n-1].End() {
		last := &s.ranges[n-1]
		last.Length = max(last.End(), r.End()) - last.Offset
		return
	}
	s.ranges = append(s.ranges, r)
}

// Add puts the bytes [offset, offset+length) into s. Negative lengths add
// nothing; bytes before 0 are ignored. Adding in ascending order is O(1).
func (s *Set) Add(offset, length int64) { s.AddRange(Range{offset, length}) }

// AddRange is Add for a Range.
func (s *Set) AddRange(r Range) {
	if r = r.clip(); r.Length == 0 {
		return
	}
	n := len(s.ranges)
	if n == 0 || r.Offset >= s.ranges[n-1].Offset {
		s.push(r)
		return
	}
	// [from, to) are the ranges that r overlaps or touches.
	from := sort.Search(n, func(i int) bool { return s.ranges[i].End() >= r.Offset })
	to := from + sort.Search(n-from, func(i int) bool { return s.ranges[from+i].Offset > r.End() })
	if from < to {
		start := min(r.Offset, s.ranges[from].Offset)
		end := max(r.End(), s.ranges[to-1].End())
		r = Range{start, end - start}
	}
	s.ranges = slices.Replace(s.ranges, from, to, r)
}

// Clone returns a copy that shares no memory with s.
func (s Set) Clone() Set { return Set{ranges: slices.Clone(s.ranges)} }

// Ranges returns the sorted, disjoint ranges of s. The caller must not change them.
func (s Set) Ranges() []Range { return s.ranges }

// Len returns the number of ranges.
func (s Set) Len() int { return len(s.ranges) }

// IsEmpty reports whether s has no byte.
func (s Set) IsEmpty() bool { return len(s.ranges) == 0 }

// Bytes returns the number of bytes in s.
func (s Set) Bytes() int64 {
	var n int64
	for _, r := range s.ranges {
		n += r.Length
	}
	return n
}

// Contains reports whether every byte of [offset, offset+length) is in s. An
// empty range is contained in every set.
func (s Set) Contains(offset, length int64) bool {
	if length <= 0 {
		return true
	}
	if offset < 0 || length > math.MaxInt64-offset {
		return false
	}
	i := sort.Search(len(s.ranges), func(i int) bool { return s.ranges[i].End() > offset })
	return i < len(s.ranges) && s.ranges[i].Offset <= offset && s.ranges[i].End() >= offset+length
}

// Union returns the bytes that are in a or in b.
func (a Set) Union(b Set) Set {
	out := Set{ranges: make([]Range, 0, len(a.ranges)+len(b.ranges))}
	x, y := a.ranges, b.ranges
	for len(x) > 0 || len(y) > 0 {
		if len(y) == 0 || len(x) > 0 && x[0].Offset <= y[0].Offset {
			out.push(x[0])
			x = x[1:]
		} else {
			out.push(y[0])
			y = y[1:]
		}
	}
	return out
}

// Intersect returns the bytes that are in a and in b.
func (a Set) Intersect(b Set) Set {
	var out Set
	x, y := a.ranges, b.ranges
	for len(x) > 0 && len(y) > 0 {
		start, end := max(x[0].Offset, y[0].Offset), min(x[0].End(), y[0].End())
		if start < end {
			out.ranges = append(out.ranges, Range{start, end - start})
		}
		if x[0].End() < y[0].End() {
			x = x[1:]
		} else {
			y = y[1:]
		}
	}
	return out
}

// Subtract returns the bytes that are in a and not in b.
func (a Set) Subtract(b Set) Set {
	var out Set
	y := b.ranges
	for _, r := range a.ranges {
		start := r.Offset
		for len(y) > 0 && y[0].End() <= start {
			y = y[1:]
		}
		for i := 0; i < len(y) && y[i].Offset < r.End(); i++ {
			if y[i].Offset > start {
				out.ranges = append(out.ranges, Range{start, y[i].Offset - start})
			}
			start = y[i].End()
		}
		if start < r.End() {
			out.ranges = append(out.ranges, Range{start, r.End() - start})
		}
		// Ranges of b that end inside r are done with; one that reaches past r stays.
		for len(y) > 0 && y[0].End() <= r.End() {
			y = y[1:]
		}
	}
	return out
}

// Align returns s with each range grown outwards to multiples of granularity.
// The result may reach past the end of a disk whose size is no multiple of it;
// see Clip. A granularity below 2 returns a copy.
func (s Set) Align(granularity int64) Set {
	if granularity < 2 {
		return s.Clone()
	}
	out := Set{ranges: make([]Range, 0, len(s.ranges))}
	for _, r := range s.ranges {
		start := r.Offset - r.Offset%granularity
		end := r.End()
		if rest := end % granularity; rest != 0 {
			if end > math.MaxInt64-granularity {
				end = math.MaxInt64
			} else {
				end += granularity - rest
			}
		}
		out.push(Range{start, end - start})
	}
	return out
}

// Clip returns the bytes of s that lie in [offset, offset+length).
func (s Set) Clip(offset, length int64) Set {
	return s.Intersect(NewSet(Range{offset, length}))
}

// Split returns the ranges of s cut into pieces of at most length bytes, in order.
func (s Set) Split(length int64) []Range {
	var out []Range
	for _, r := range s.ranges {
		for r.Length > 0 {
			n := min(r.Length, length)
			out = append(out, Range{r.Offset, n})
			r.Offset, r.Length = r.Offset+n, r.Length-n
		}
	}
	return out
}

// Equal reports whether a and b hold the same bytes.
func (a Set) Equal(b Set) bool { return slices.Equal(a.ranges, b.ranges) }

// MarshalJSON writes s as one flat array of numbers, for each range the gap
// since the end of the one before and its length: [4096,512,1024,512].
func (s Set) MarshalJSON() ([]byte, error) {
	flat := make([]int64, 0, 2*len(s.ranges))
	var end int64
	for _, r := range s.ranges {
		flat = append(flat, r.Offset-end, r.Length)
		end = r.End()
	}
	return json.Marshal(flat)
}

// UnmarshalJSON reads what MarshalJSON wrote and refuses everything else.
func (s *Set) UnmarshalJSON(b []byte) error {
	var flat []int64
	if err := json.Unmarshal(b, &flat); err != nil {
		return err
	}
	if len(flat)%2 != 0 {
		return fmt.Errorf("range list has %d numbers, want pairs of gap and length", len(flat))
	}
	ranges := make([]Range, 0, len(flat)/2)
	var end int64
	for i := 0; i < len(flat); i += 2 {
		gap, length := flat[i], flat[i+1]
		if gap < 0 || gap == 0 && i > 0 || length <= 0 || gap > math.MaxInt64-end || length > math.MaxInt64-end-gap {
			return fmt.Errorf("range list: pair %d is (%d, %d)", i/2, gap, length)
		}
		ranges = append(ranges, Range{end + gap, length})
		end += gap + length
	}
	s.ranges = ranges
	return nil
}

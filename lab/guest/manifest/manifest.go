// Package manifest lists the files of a lab disk with their checksums, so that
// the guest can prove that it reads what the builder wrote. The list is the file
// Name in the root of the file system, one line a file:
//
//	<XXH64, 16 hex digits> <bytes> <path from the root>
package manifest

import (
	"encoding/binary"
	"errors"
	"math/bits"
	"strconv"
	"strings"
)

// Name is the list's file name.
const Name = "CHECK"

// Entry is one file.
type Entry struct {
	Sum  uint64
	Size int64
	Path string
}

// Append adds the entry's line to b.
func (e Entry) Append(b []byte) []byte {
	s := strconv.FormatUint(e.Sum, 16)
	b = append(b, "0000000000000000"[len(s):]...)
	b = append(b, s...)
	b = append(b, ' ')
	b = strconv.AppendInt(b, e.Size, 10)
	b = append(b, ' ')
	b = append(b, e.Path...)
	return append(b, '\n')
}

// Parse reads a list.
func Parse(text string) ([]Entry, error) {
	var es []Entry
	for line := range strings.SplitSeq(strings.TrimSuffix(text, "\n"), "\n") {
		sum, rest, _ := strings.Cut(line, " ")
		size, path, ok := strings.Cut(rest, " ")
		var e Entry
		var err1, err2 error
		e.Sum, err1 = strconv.ParseUint(sum, 16, 64)
		e.Size, err2 = strconv.ParseInt(size, 10, 64)
		e.Path = path
		if !ok || err1 != nil || err2 != nil {
			return nil, errors.New("bad line in manifest: " + line)
		}
		es = append(es, e)
	}
	return es, nil
}

// Hash is XXH64 with seed 0: fast without vector instructions, which counts in a
// guest whose processor is emulated. Write must get multiples of 32 bytes, save
// for the last.
type Hash struct {
	v     [4]uint64
	total uint64
	tail  []byte
}

const (
	p1 = 0x9e3779b185ebca87
	p2 = 0xc2b2ae3d27d4eb4f
	p3 = 0x165667b19e3779f9
	p4 = 0x85ebca77c2b2ae63
	p5 = 0x27d4eb2f165667c5
)

// NewHash is an empty hash.
func NewHash() *Hash {
	x := uint64(p1) // wraps, as the algorithm wants
	return &Hash{v: [4]uint64{x + p2, p2, 0, -x}}
}

func round(acc, in uint64) uint64 { return bits.RotateLeft64(acc+in*p2, 31) * p1 }

// Write adds bytes.
func (h *Hash) Write(b []byte) {
	if len(h.tail) > 0 {
		panic("manifest: write after a part that is no multiple of 32 bytes")
	}
	h.total += uint64(len(b))
	a, c, d, e := h.v[0], h.v[1], h.v[2], h.v[3]
	le := binary.LittleEndian
	for len(b) >= 32 {
		a = round(a, le.Uint64(b))
		c = round(c, le.Uint64(b[8:]))
		d = round(d, le.Uint64(b[16:]))
		e = round(e, le.Uint64(b[24:32]))
		b = b[32:]
	}
	h.v = [4]uint64{a, c, d, e}
	h.tail = append(h.tail, b...)
}

// Sum is the hash of all bytes so far.
func (h *Hash) Sum() uint64 {
	var s uint64 = p5
	if h.total >= 32 {
		s = bits.RotateLeft64(h.v[0], 1) + bits.RotateLeft64(h.v[1], 7) + bits.RotateLeft64(h.v[2], 12) + bits.RotateLeft64(h.v[3], 18)
		for _, v := range h.v {
			s = (s^round(0, v))*p1 + p4
		}
	}
	s += h.total
	b, le := h.tail, binary.LittleEndian
	for ; len(b) >= 8; b = b[8:] {
		s = bits.RotateLeft64(s^round(0, le.Uint64(b)), 27)*p1 + p4
	}
	if len(b) >= 4 {
		s = bits.RotateLeft64(s^uint64(le.Uint32(b))*p1, 23)*p2 + p3
		b = b[4:]
	}
	for _, c := range b {
		s = bits.RotateLeft64(s^uint64(c)*p5, 11) * p1
	}
	s = (s ^ s>>33) * p2
	s = (s ^ s>>29) * p3
	return s ^ s>>32
}

package agent

import (
	"encoding/binary"
	"iter"
)

func native32(b []byte) uint32 {
	if len(b) < 4 {
		return 0
	}
	return binary.NativeEndian.Uint32(b)
}

// attributes walks netlink attributes (netlink(7)): length, type, value, padded
// to four bytes. It ends at the first that does not fit.
func attributes(b []byte) iter.Seq2[uint16, []byte] {
	const nested = 1<<15 | 1<<14 // flags in the type
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= 4 {
			n, kind := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])
			if n < 4 || n > len(b) || !yield(kind&^nested, b[4:n]) {
				return
			}
			b = b[min((n+3)&^3, len(b)):]
		}
	}
}

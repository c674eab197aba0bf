package nbd

import (
	"math/bits"
	"sync"
)

// headRoom stands before the payload in every buffer, so that a reply's header
// goes out in one write with the payload, and the payload starts on a page.
const headRoom = 4096

// buffer holds one reply.
type buffer struct {
	b     []byte // headRoom and the capacity of the class
	class int
}

const (
	minClass = 12 // 4 KiB
	maxClass = 25 // 32 MiB, maxPayload
)

// bufferPools has one pool for each power of two.
var bufferPools [maxClass + 1]sync.Pool

// getBuffer returns a buffer with room for n <= maxPayload bytes of payload.
func getBuffer(n int) *buffer {
	class := max(minClass, bits.Len(uint(max(n, 1)-1)))
	if b, ok := bufferPools[class].Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, headRoom+1<<class), class: class}
}

func (b *buffer) put() { bufferPools[b.class].Put(b) }

// payload is the place of the first n bytes behind the header.
func (b *buffer) payload(n int) []byte { return b.b[headRoom : headRoom+n] }

package nbd

import (
	"cmp"
	"fmt"
	"io"
	"slices"

	switchback "github.com/switchback-dr/switchback"
)

// receive reads replies until the connection ends and then completes whatever
// is still in flight.
func (c *Client) receive() {
	var scratch []byte
	for {
		if err := c.receiveReply(&scratch); err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			c.fail(err)
			break
		}
	}
	// From here on start completes what the loop below came too early for.
	c.receiverGone.Store(true)
	for i := range c.slots {
		s := &c.slots[i]
		if h := s.active.Load(); h != 0 && s.active.CompareAndSwap(h, 0) {
			c.release(s, c.err)
		}
	}
}

func (c *Client) receiveReply(scratch *[]byte) error {
	h, err := c.br.Peek(simpleSize)
	if err != nil {
		return err
	}
	switch m := be.Uint32(h); {
	case m == magicSimple:
		errno, handle := be.Uint32(h[4:]), be.Uint64(h[8:])
		c.br.Discard(simpleSize)
		return c.simpleReply(handle, errno)
	case m == magicStructured && c.structured:
		if h, err = c.br.Peek(chunkSize); err != nil {
			return err
		}
		header, err := parseChunkHeader(h)
		if err != nil {
			return err
		}
		c.br.Discard(chunkSize)
		return c.chunk(header, scratch)
	default:
		return protocolErrorf("reply starts with %#x", m)
	}
}

// slotOf finds the request a reply belongs to.
func (c *Client) slotOf(handle uint64) (*slot, error) {
	i := handle & (1<<31 - 1)
	if i >= maxInFlight || handle == 0 || c.slots[i].active.Load() != handle {
		return nil, protocolErrorf("reply to a request that is not in flight (%#x)", handle)
	}
	return &c.slots[i], nil
}

func (c *Client) simpleReply(handle uint64, errno uint32) error {
	s, err := c.slotOf(handle)
	if err != nil {
		return err
	}
	switch {
	case errno != 0:
		s.err = &ServerError{Errno: errnoOf(errno)}
	case s.command == cmdRead && c.structured, s.command == cmdBlockStatus:
		return protocolError("simple reply to a request that needs a structured one")
	case s.command == cmdRead:
		if err := c.fill(s, 0, s.length); err != nil {
			return err
		}
		s.contiguo = s.length
	}
	return c.complete(s)
}

func (c *Client) chunk(h chunkHeader, scratch *[]byte) error {
	s, err := c.slotOf(h.handle)
	if err != nil {
		return err
	}
	switch h.kind {
	case chunkNone:
	case chunkOffsetData:
		b, err := c.br.Peek(8)
		if err != nil {
			return err
		}
		at, n := be.Uint64(b), int64(h.length)-8
		c.br.Discard(8)
		rel, err := s.note(at, n)
		if err != nil {
			return err
		}
		if err := c.fill(s, rel, n); err != nil {
			return err
		}
	case chunkOffsetHole:
		b, err := c.br.Peek(12)
		if err != nil {
			return err
		}
		at, n := be.Uint64(b), int64(be.Uint32(b[8:]))
		c.br.Discard(12)
		rel, err := s.note(at, n)
		if err != nil {
			return err
		}
		s.op.mu.Lock()
		if !s.op.abandoned {
			clear(s.buf[rel : rel+n])
		}
		s.op.mu.Unlock()
	case chunkBlockStatus:
		if s.command != cmdBlockStatus {
			return protocolError("block status that was not asked for")
		}
		b, err := c.payload(h.length, scratch)
		if err != nil {
			return err
		}
		if err := s.status(b); err != nil {
			return err
		}
	default:
		b, err := c.payload(h.length, scratch)
		if err != nil {
			return err
		}
		e, err := parseErrorChunk(b)
		if err != nil {
			return err
		}
		if s.err == nil {
			s.err = e
		}
	}
	if h.flags&chunkDone == 0 {
		return nil
	}
	return c.complete(s)
}

// payload reads the small payload of a chunk; it is valid until the next one.
// n was bounded by parseChunkHeader.
func (c *Client) payload(n uint32, scratch *[]byte) ([]byte, error) {
	*scratch = slices.Grow((*scratch)[:0], int(n))[:n]
	_, err := io.ReadFull(c.br, *scratch)
	return *scratch, err
}

// fill reads n bytes to offset rel of the request's buffer, or drops them if
// the caller is gone.
func (c *Client) fill(s *slot, rel, n int64) error {
	s.op.mu.Lock()
	defer s.op.mu.Unlock()
	if s.op.abandoned {
		_, err := c.br.Discard(int(n))
		return err
	}
	_, err := io.ReadFull(c.br, s.buf[rel:rel+n])
	return err
}

// note records that a read's bytes [at, at+n) are answered and returns their
// place in the request.
func (s *slot) note(at uint64, n int64) (rel int64, err error) {
	if s.command != cmdRead {
		return 0, protocolError("data that was not asked for")
	}
	rel = int64(at - uint64(s.offset))
	if at < uint64(s.offset) || n <= 0 || rel > s.length || n > s.length-rel {
		return 0, protocolErrorf("%d bytes at %d answered to a read of %d at %d", n, at, s.length, s.offset)
	}
	if rel == s.contiguo {
		s.contiguo += n
		return rel, nil
	}
	if rel < s.contiguo {
		return 0, protocolError("bytes answered twice")
	}
	return rel, s.scattered.add(rel, n, s.length)
}

func (s *slot) status(b []byte) error {
	s.op.mu.Lock()
	defer s.op.mu.Unlock()
	var dst []Extent
	if !s.op.abandoned {
		dst = s.op.extents
	}
	if len(b) >= 4 && be.Uint32(b) != s.context {
		dst = nil // the answer for another context of the connection
	} else if s.contiguo > 0 {
		return protocolError("two block status chunks for one context")
	}
	list, context, err := appendStatus(dst, b, s.offset, s.offset+s.length)
	if err != nil {
		return err
	}
	if context == s.context {
		s.contiguo = list[len(list)-1].End() - s.offset
		if !s.op.abandoned {
			s.op.extents = list
		}
	}
	return nil
}

// complete ends the request in s after its final reply.
func (c *Client) complete(s *slot) error {
	err := s.err
	switch {
	case err != nil:
		err = s.serverError(err.(*ServerError))
	case s.command == cmdRead && !s.scattered.fills(s.contiguo, s.length):
		return protocolError("a read was answered in part")
	case s.command == cmdBlockStatus && s.contiguo == 0:
		return protocolError("block status was answered without an extent")
	}
	if h := s.active.Load(); !s.active.CompareAndSwap(h, 0) {
		return c.err
	}
	c.release(s, err)
	return nil
}

var commandNames = map[uint16]string{cmdRead: "read", cmdWrite: "write", cmdFlush: "flush", cmdTrim: "trim",
	cmdWriteZeroes: "write zeroes", cmdBlockStatus: "block status"}

func (s *slot) serverError(e *ServerError) error {
	return &switchback.Error{Code: codeOfErrno(e.Errno), Op: "nbd", Err: e,
		Message: fmt.Sprintf("%s of %d bytes at %d refused by the server", commandNames[s.command], s.length, s.offset)}
}

// scattered remembers the parts of a read that came out of order, which the
// protocol allows and no known server does for small reads.
type scattered struct {
	parts []Extent
	sum   int64
}

func (p *scattered) reset() {
	if p.parts != nil {
		*p = scattered{}
	}
}

func (p *scattered) add(rel, n, length int64) error {
	// Parts do not overlap in a correct reply, so their sum bounds their number.
	if p.sum += n; p.sum > length {
		return protocolError("bytes answered twice")
	}
	p.parts = append(p.parts, Extent{Offset: rel, Length: n})
	return nil
}

// fills reports whether the parts together with [0, contiguous) make up
// exactly [0, length).
func (p *scattered) fills(contiguous, length int64) bool {
	slices.SortFunc(p.parts, func(a, b Extent) int { return cmp.Compare(a.Offset, b.Offset) })
	for _, e := range p.parts {
		if e.Offset != contiguous {
			return false
		}
		contiguous = e.End()
	}
	return contiguous == length
}

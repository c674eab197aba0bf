package nbd

import (
	"context"
	"io"

	switchback "github.com/switchback-dr/switchback"
)

const (
	// maxStatusRequest is how much one block status request asks about: the
	// length field holds less than 4 GiB.
	maxStatusRequest = 2 << 30
	// maxZeroRequest is the same for zeroing and trimming; smaller, because a
	// server may have to write the zeros before it answers.
	maxZeroRequest = 256 << 20
	// maxWhole is the length up to which a server must be able to answer a read
	// in one piece (NBD_CMD_FLAG_DF).
	maxWhole = 64 << 10
)

// ReadAt implements io.ReaderAt.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	return c.ReadAtContext(context.Background(), p, off)
}

// ReadAtContext reads len(p) bytes at off; at the end of the export it reads
// less and returns io.EOF. Large reads are cut into requests that are in
// flight together. On any other error the content of p is undefined and the
// count is 0. If ctx ends it returns CodeCancelled or CodeTimeout; p is then
// free for other use.
func (c *Client) ReadAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, switchback.Errorf(switchback.CodeInvalid, "read at negative offset %d", off)
	}
	if off >= c.size {
		if len(p) == 0 {
			return 0, nil
		}
		return 0, io.EOF
	}
	var eof error
	if int64(len(p)) > c.size-off {
		p, eof = p[:c.size-off], io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	for done := 0; done < len(p); {
		n := min(len(p)-done, readWindow)
		o := newOp()
		err := c.startPieces(ctx, o, []Piece{{off + int64(done), p[done : done+n]}})
		if _, err := c.wait(ctx, o, err); err != nil {
			return 0, err
		}
		done += n
	}
	return len(p), eof
}

func (c *Client) startReads(ctx context.Context, o *op, p []byte, off int64) error {
	for len(p) > 0 {
		n := min(int64(len(p)), c.maxRequest)
		s, err := c.acquire(ctx, o)
		if err != nil {
			return err
		}
		s.buf = p[:n]
		c.start(o, s, request{command: cmdRead, flags: c.readFlags(n), offset: uint64(off), length: uint32(n)})
		p, off = p[n:], off+n
	}
	return nil
}

// Piece is a range that is read into P.
type Piece struct {
	Offset int64
	P      []byte
}

// ReadPieces fills all pieces, whose requests it sends together. No piece may
// reach past the end of the export. On an error their content is undefined.
func (c *Client) ReadPieces(ctx context.Context, pieces []Piece) error {
	for _, x := range pieces {
		if x.Offset < 0 || int64(len(x.P)) > c.size-x.Offset {
			return switchback.Errorf(switchback.CodeInvalid, "range of %d bytes at %d is outside of the export of %d bytes", len(x.P), x.Offset, c.size)
		}
	}
	o := newOp()
	err := c.startPieces(ctx, o, pieces)
	_, err = c.wait(ctx, o, err)
	return err
}

func (c *Client) startPieces(ctx context.Context, o *op, pieces []Piece) error {
	for _, x := range pieces {
		if err := c.startReads(ctx, o, x.P, x.Offset); err != nil {
			return err
		}
	}
	return c.send(ctx, o, nil)
}

// readFlags asks for a small read's answer in one piece, which the protocol
// grants up to maxWhole. QEMU looks for holes before every other read, through
// all layers of the image, which costs as much as the reading.
func (c *Client) readFlags(length int64) uint16 {
	if c.structured && c.flags&FlagSendDF != 0 && length <= maxWhole {
		return cmdFlagDF
	}
	return 0
}

// WriteAt implements io.WriterAt.
func (c *Client) WriteAt(p []byte, off int64) (int, error) {
	return c.WriteAtContext(context.Background(), p, off)
}

// WriteAtContext writes p at off. The bytes are durable after a later Flush.
// On an error any part of the range may have been written.
func (c *Client) WriteAtContext(ctx context.Context, p []byte, off int64) (int, error) {
	if err := c.checkRange(off, int64(len(p)), 0); err != nil || len(p) == 0 {
		return 0, err
	}
	o := newOp()
	err := c.submitWrites(ctx, o, p, off)
	if _, err := c.wait(ctx, o, err); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (c *Client) submitWrites(ctx context.Context, o *op, p []byte, off int64) error {
	for len(p) > 0 {
		n := min(int64(len(p)), c.maxRequest)
		s, err := c.acquire(ctx, o)
		if err != nil {
			return err
		}
		c.start(o, s, request{command: cmdWrite, offset: uint64(off), length: uint32(n)})
		if err := c.send(ctx, o, p[:n]); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// WriteZeroes makes [off, off+length) read as zeros. With mayTrim the server
// may free the space, else it keeps or gets storage for it. It returns
// CodeUnsupported if the server cannot: write zeros then.
func (c *Client) WriteZeroes(ctx context.Context, off, length int64, mayTrim bool) error {
	r := request{command: cmdWriteZeroes}
	if !mayTrim {
		r.flags = cmdFlagNoHole
	}
	return c.ranged(ctx, r, off, length, FlagSendWriteZeroes)
}

// Trim tells the server that the content of [off, off+length) is of no more
// use; what it reads as afterwards is not defined.
func (c *Client) Trim(ctx context.Context, off, length int64) error {
	return c.ranged(ctx, request{command: cmdTrim}, off, length, FlagSendTrim)
}

// Flush makes all writes durable that were answered before it was called. It
// does nothing if the server says that it needs no flush.
func (c *Client) Flush(ctx context.Context) error {
	if c.flags&FlagSendFlush == 0 {
		return nil
	}
	return c.request(ctx, request{command: cmdFlush})
}

func (c *Client) ranged(ctx context.Context, r request, off, length int64, need Flags) error {
	if err := c.checkRange(off, length, need); err != nil {
		return err
	}
	for length > 0 {
		n := min(length, maxZeroRequest)
		r.offset, r.length = uint64(off), uint32(n)
		if err := c.request(ctx, r); err != nil {
			return err
		}
		off, length = off+n, length-n
	}
	return nil
}

// checkRange refuses a write that cannot succeed before it is sent.
func (c *Client) checkRange(off, length int64, need Flags) error {
	switch {
	case off < 0 || length < 0 || off > c.size || length > c.size-off:
		return switchback.Errorf(switchback.CodeInvalid, "range of %d bytes at %d is outside of the export of %d bytes", length, off, c.size)
	case c.ReadOnly():
		return switchback.Errorf(switchback.CodeRefused, "export is read-only")
	case c.flags&need != need:
		return switchback.Errorf(switchback.CodeUnsupported, "server does not offer this command (flags %#x)", uint16(c.flags))
	}
	return nil
}

// request does a single request without data.
func (c *Client) request(ctx context.Context, r request) error {
	o := newOp()
	s, err := c.acquire(ctx, o)
	if err == nil {
		c.start(o, s, r)
		err = c.send(ctx, o, nil)
	}
	_, err = c.wait(ctx, o, err)
	return err
}

// BlockStatus asks the metadata context about [off, off+length), which must
// lie in the export, and returns extents in order that cover exactly this
// range; neighbours differ in their flags. A context that the server does not
// have is CodeUnsupported.
func (c *Client) BlockStatus(ctx context.Context, metaContext string, off, length int64) ([]Extent, error) {
	id, ok := c.contexts[metaContext]
	if !ok {
		return nil, switchback.Errorf(switchback.CodeUnsupported, "server does not offer metadata context %q", metaContext)
	}
	if off < 0 || length < 0 || off > c.size || length > c.size-off {
		return nil, switchback.Errorf(switchback.CodeInvalid, "range of %d bytes at %d is outside of the export of %d bytes", length, off, c.size)
	}
	var out []Extent
	for end := off + length; off < end; {
		part, err := c.blockStatus(ctx, id, off, min(end-off, maxStatusRequest))
		if err != nil {
			return nil, err
		}
		for _, e := range part {
			out = appendExtent(out, e)
		}
		off = part[len(part)-1].End()
	}
	return out, nil
}

// blockStatus does one request; the answer starts at off, covers at least one
// byte and at most length.
func (c *Client) blockStatus(ctx context.Context, id uint32, off, length int64) ([]Extent, error) {
	o := newOp()
	s, err := c.acquire(ctx, o)
	if err == nil {
		s.context = id
		c.start(o, s, request{command: cmdBlockStatus, offset: uint64(off), length: uint32(length)})
		err = c.send(ctx, o, nil)
	}
	return c.wait(ctx, o, err)
}

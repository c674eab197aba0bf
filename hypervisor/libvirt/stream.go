package libvirt

import (
	"context"
	"fmt"

	switchback "github.com/switchback-dr/switchback"
)

// maxStream bounds what a stream may carry: a picture of the largest screen has less.
const maxStream = 128 << 20

// stream is data that libvirtd sends after the reply to a call, in messages
// that carry the call's serial number. The end is a message without data, which
// is answered with a finish (virStreamFinish), which libvirtd confirms.
type stream struct {
	data []byte
	done chan struct{} // closed when err and data are final
	err  error
}

// download makes a call whose reply is followed by a stream and returns both.
// A stream that ctx gives up ends with libvirtd's side of the connection.
func (c *conn) download(ctx context.Context, p procedure, a *args) (*result, []byte, error) {
	s := &stream{done: make(chan struct{})}
	r, serial, err := c.send(ctx, p, a, s)
	if err != nil {
		c.dropStream(serial)
		return nil, nil, err
	}
	select {
	case <-s.done:
		return r, s.data, s.err
	case <-ctx.Done():
		c.dropStream(serial)
		c.post(frame(header{program: p.program, version: programVersion, procedure: p.number, kind: typeStream, serial: serial, status: statusError}, nil))
		return nil, nil, ctx.Err()
	case <-c.dead:
		return nil, nil, c.failure()
	}
}

func (c *conn) dropStream(serial uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, serial)
}

// receive takes one message of a stream; called by the reader alone, which it
// must not block.
func (c *conn) receive(h header, payload []byte) {
	c.mu.Lock()
	s := c.streams[h.serial]
	c.mu.Unlock()
	if s == nil {
		return // given up
	}
	end := func(err error) {
		c.dropStream(h.serial)
		s.err = err
		close(s.done)
	}
	switch {
	case h.status == statusError:
		end(decodeError(payload))
	case h.status == statusOK:
		end(nil) // the finish is confirmed
	case len(payload) == 0:
		finish := frame(header{program: h.program, version: programVersion, procedure: h.procedure, kind: typeStream, serial: h.serial, status: statusOK}, nil)
		select {
		case c.out <- finish:
		default: // the writer is stuck, so is the connection
			end(switchback.Errorf(switchback.CodeUnavailable, "libvirtd does not read"))
		}
	case len(s.data)+len(payload) > maxStream:
		end(fmt.Errorf("the stream is longer than %d bytes", maxStream))
	default:
		s.data = append(s.data, payload...)
	}
}

// download is conn.download on a connection made when needed.
func (c *client) download(ctx context.Context, p procedure, a *args) (*result, []byte, error) {
	cn, err := c.conn(ctx)
	if err != nil {
		return nil, nil, err
	}
	return cn.download(ctx, p, a)
}

package nbd

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// slot is the place of one request in flight. A request's handle on the wire
// is the slot's index in the low and a use counter in the high half, so that a
// reply to an earlier use is recognised.
//
// All fields but active belong to the submitter until it stores active, and
// then to whoever swaps active back to zero: the receiver, or the submitter
// itself if it finds that the receiver has ended.
type slot struct {
	index  uint32
	uses   uint32
	active atomic.Uint64 // handle of the request in flight; 0 is none

	op       *op
	command  uint16
	offset   int64
	length   int64
	buf      []byte // where the bytes of a read go
	context  uint32 // metadata context of interest
	contiguo int64  // bytes received in order
	scattered
	err error // first error the server answered
}

// op is one call of a user: one or more requests and their common result.
type op struct {
	pending atomic.Int32  // requests in flight, and one for the submitter
	done    chan struct{} // of capacity 1; receives when pending gets to 0

	// mu is held by the receiver while it fills the caller's memory, so that
	// taking it is how a cancelled call gets that memory back.
	mu        sync.Mutex
	abandoned bool
	err       error
	extents   []Extent

	headers []byte // requests not written yet
}

var opPool = sync.Pool{New: func() any {
	return &op{done: make(chan struct{}, 1), headers: make([]byte, 0, 8*requestSize)}
}}

func newOp() *op {
	o := opPool.Get().(*op)
	o.pending.Store(1)
	return o
}

// recycle may be called when no request of o is in flight.
func (o *op) recycle() {
	o.err, o.extents, o.headers = nil, nil, o.headers[:0]
	opPool.Put(o)
}

func (o *op) finish(err error) {
	if err != nil {
		o.mu.Lock()
		if o.err == nil {
			o.err = err
		}
		o.mu.Unlock()
	}
	if o.pending.Add(-1) == 0 {
		o.done <- struct{}{}
	}
}

// acquire takes a free slot. Requests of o that were not written yet are
// written before it waits for one.
func (c *Client) acquire(ctx context.Context, o *op) (*slot, error) {
	select {
	case s := <-c.free:
		return s, nil
	default:
	}
	if err := c.send(ctx, o, nil); err != nil {
		return nil, err
	}
	select {
	case s := <-c.free:
		return s, nil
	case <-c.dead:
		return nil, c.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// start makes r, whose handle it sets, a request of o in s. It is written by
// the next send.
func (c *Client) start(o *op, s *slot, r request) {
	s.uses++
	r.handle = uint64(s.uses)<<32 | uint64(s.index) | 1<<31
	s.op, s.command, s.offset, s.length = o, r.command, int64(r.offset), int64(r.length)
	o.pending.Add(1)
	o.headers = appendRequest(o.headers, r)
	s.active.Store(r.handle)
	if c.receiverGone.Load() && s.active.CompareAndSwap(r.handle, 0) {
		c.release(s, c.err)
	}
}

// release completes the request in s. The caller has swapped s.active to 0.
func (c *Client) release(s *slot, err error) {
	o := s.op
	s.op, s.buf, s.err, s.contiguo = nil, nil, nil, 0
	s.scattered.reset()
	c.free <- s
	o.finish(err)
}

// send writes the requests o has collected, the last one followed by payload.
// Bytes half written cannot be taken back, so if ctx ends meanwhile and the
// server does not take them within the grace, the connection is given up.
func (c *Client) send(ctx context.Context, o *op, payload []byte) error {
	if len(o.headers) == 0 {
		return nil
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	var err error
	if payload == nil {
		_, err = c.conn.Write(o.headers)
	} else {
		release := c.boundWrite(ctx)
		c.wvec = [2][]byte{o.headers, payload}
		c.wbufs = c.wvec[:]
		_, err = c.wbufs.WriteTo(c.conn)
		c.wvec = [2][]byte{}
		release()
	}
	o.headers = o.headers[:0]
	if err != nil {
		c.fail(err)
		return c.err
	}
	return nil
}

func (c *Client) boundWrite(ctx context.Context) (release func()) {
	if ctx.Done() == nil {
		return func() {}
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(fired)
		_ = c.conn.SetWriteDeadline(time.Now().Add(stallGrace))
	})
	return func() {
		if !stop() {
			<-fired
			_ = c.conn.SetWriteDeadline(time.Time{})
		}
	}
}

// wait drops the submitter's share of o, waits for all requests and returns
// the result. submitErr is why not all of them were submitted, or nil. After
// wait the caller's memory is no longer touched, even if replies are to come.
func (c *Client) wait(ctx context.Context, o *op, submitErr error) ([]Extent, error) {
	if submitErr == nil {
		o.finish(nil)
		if ctx.Done() == nil {
			<-o.done
			return o.result()
		}
		select {
		case <-o.done:
			return o.result()
		case <-ctx.Done():
			submitErr = ctx.Err()
		}
	}
	// The receiver holds mu while it fills memory. A server that stops in the
	// middle of a payload would hold it for ever.
	stall := time.AfterFunc(stallGrace, func() { c.fail(context.DeadlineExceeded) })
	o.mu.Lock()
	o.abandoned = true
	o.mu.Unlock()
	stall.Stop()
	if contextCode(ctx, "") != "" && submitErr == ctx.Err() {
		submitErr = &switchback.Error{Code: contextCode(ctx, ""), Op: "nbd", Message: "request given up", Err: submitErr}
	}
	return nil, submitErr
}

func (o *op) result() ([]Extent, error) {
	extents, err := o.extents, o.err
	o.recycle()
	if err != nil {
		return nil, err
	}
	return extents, nil
}

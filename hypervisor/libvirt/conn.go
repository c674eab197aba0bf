package libvirt

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// callsPerConn keeps a connection below libvirtd's max_client_requests; see
// the package comment.
const callsPerConn = 4

// conn is one connection to libvirtd: it lives from dial until the first
// fault and is never repaired. Safe for concurrent use.
type conn struct {
	nc        net.Conn
	keepAlive keepAlive
	onEvent   func(procedure int32, payload []byte) // called from the reader; must not block

	out   chan []byte
	slots chan struct{} // one token per call that libvirtd has not answered
	dead  chan struct{} // closed when err is set
	heard atomic.Int64  // when the last message came, Unix nanoseconds
	wg    sync.WaitGroup

	mu      sync.Mutex
	serial  uint32
	pending map[uint32]chan reply // until libvirtd answers, even if nobody waits any more
	streams map[uint32]*stream    // that follow a reply
	err     error
}

type reply struct {
	failed  bool
	payload []byte
}

// keepAlive says how a silent peer is found out: it is asked after Interval of
// silence, and held for dead after Count questions without any message.
type keepAlive struct {
	Interval time.Duration
	Count    int
}

// dial connects and opens the URI. onEvent may be nil.
func dial(ctx context.Context, socket, uri string, ka keepAlive, onEvent func(int32, []byte)) (*conn, error) {
	var dialer net.Dialer
	nc, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeUnavailable, "cannot reach libvirt at %s: %w", socket, err).
			WithHint("is libvirtd (or virtqemud) running?")
	}
	c := &conn{
		nc: nc, keepAlive: ka, onEvent: onEvent,
		out: make(chan []byte, 16), slots: make(chan struct{}, callsPerConn), dead: make(chan struct{}),
		pending: make(map[uint32]chan reply), streams: make(map[uint32]*stream),
	}
	c.heard.Store(time.Now().UnixNano())
	c.wg.Go(c.read)
	c.wg.Go(c.write)
	if err := c.open(ctx, uri); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// open does what must precede every other call.
func (c *conn) open(ctx context.Context, uri string) error {
	r, err := c.call(ctx, procAuthList, newArgs())
	if err != nil {
		return err
	}
	free := false
	n := r.count(maxAuthTypes, 4)
	for range n {
		free = r.u32() == 0 || free
	}
	if r.err != nil {
		return fmt.Errorf("read %s: %w", procAuthList.name, r.err)
	}
	if n > 0 && !free {
		return switchback.Errorf(switchback.CodeUnauthorized, "libvirt asks for a login (SASL or polkit)").
			WithHint(`run as root, or set auth_unix_rw = "none" in libvirtd.conf`)
	}
	r, err = c.call(ctx, procConnectSupportsFeature, newArgs().i32(featureKeepAlive))
	switch {
	case err == nil && r.i32() == 1:
		c.wg.Go(c.ping)
	case err != nil && numberOf(err) == 0:
		return err
	}
	_, err = c.call(ctx, procConnectOpen, newArgs().optional(uri).u32(0))
	return err
}

// call sends one call and waits for its reply. When ctx ends first the call
// is not taken back: libvirtd still carries it out, and its reply is dropped.
func (c *conn) call(ctx context.Context, p procedure, a *args) (*result, error) {
	r, _, err := c.send(ctx, p, a, nil)
	return r, err
}

// send is call; a stream that follows the reply goes to s, unless that is nil.
func (c *conn) send(ctx context.Context, p procedure, a *args, s *stream) (_ *result, serial uint32, _ error) {
	select {
	case c.slots <- struct{}{}:
	case <-c.dead:
		return nil, 0, c.failure()
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	}
	answer := make(chan reply, 1)
	c.mu.Lock()
	c.serial++
	serial = c.serial
	c.pending[serial] = answer
	if s != nil {
		c.streams[serial] = s
	}
	c.mu.Unlock()

	msg := frame(header{program: p.program, version: programVersion, procedure: p.number, kind: typeCall, serial: serial}, a.b)
	select {
	case c.out <- msg:
	case <-c.dead:
		return nil, serial, c.failure()
	case <-ctx.Done():
		c.settle(serial)
		return nil, serial, ctx.Err()
	}
	select {
	case got := <-answer:
		r, err := got.result()
		return r, serial, err
	case <-ctx.Done():
		return nil, serial, ctx.Err()
	case <-c.dead:
		select {
		case got := <-answer:
			r, err := got.result()
			return r, serial, err
		default:
			return nil, serial, c.failure()
		}
	}
}

func (r reply) result() (*result, error) {
	if r.failed {
		return nil, decodeError(r.payload)
	}
	return &result{b: r.payload}, nil
}

// settle forgets a call and frees its slot. It returns where its caller waits,
// nil when no such call is under way.
func (c *conn) settle(serial uint32) chan reply {
	c.mu.Lock()
	answer := c.pending[serial]
	delete(c.pending, serial)
	c.mu.Unlock()
	if answer != nil {
		<-c.slots
	}
	return answer
}

func (c *conn) read() {
	from := bufio.NewReader(c.nc)
	for {
		h, payload, err := readFrame(from)
		if err != nil {
			c.fail(fmt.Errorf("connection lost: %w", err))
			return
		}
		c.heard.Store(time.Now().UnixNano())
		switch {
		case h.kind == typeReply:
			if answer := c.settle(h.serial); answer != nil {
				answer <- reply{failed: h.status == statusError, payload: payload}
			}
		case h.kind == typeStream:
			c.receive(h, payload)
		case h.kind == typeMessage && h.program == programKeepAlive:
			if h.procedure == procPing {
				c.post(frame(header{program: programKeepAlive, version: programVersion, procedure: procPong, kind: typeMessage}, nil))
			}
		case h.kind == typeMessage && h.program == programRemote && c.onEvent != nil:
			c.onEvent(h.procedure, payload)
		}
	}
}

func (c *conn) write() {
	for {
		select {
		case msg := <-c.out:
			if _, err := c.nc.Write(msg); err != nil {
				c.fail(fmt.Errorf("connection lost: %w", err))
				return
			}
		case <-c.dead:
			return
		}
	}
}

// post queues a message that may be dropped when the peer does not read.
func (c *conn) post(msg []byte) {
	select {
	case c.out <- msg:
	default:
	}
}

// ping asks a silent peer for a sign of life and gives it up when none comes.
func (c *conn) ping() {
	t := time.NewTicker(c.keepAlive.Interval)
	defer t.Stop()
	asked, seen := 0, int64(0)
	for {
		select {
		case <-c.dead:
			return
		case <-t.C:
		}
		if heard := c.heard.Load(); heard != seen {
			seen, asked = heard, 0
			if time.Since(time.Unix(0, heard)) < c.keepAlive.Interval {
				continue
			}
		}
		if asked >= c.keepAlive.Count {
			c.fail(fmt.Errorf("no answer to %d keep-alive messages in %s", asked, time.Duration(asked)*c.keepAlive.Interval))
			return
		}
		asked++
		c.post(frame(header{program: programKeepAlive, version: programVersion, procedure: procPing, kind: typeMessage}, nil))
	}
}

// fail ends the connection; only the first cause counts.
func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	close(c.dead)
	c.nc.Close()
}

func (c *conn) failure() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return switchback.Errorf(switchback.CodeUnavailable, "libvirt: %w", c.err).
		WithHint("whether the call took effect is not known; it connects again with the next call")
}

var errClosed = errors.New("the connection was closed")

// close ends the connection and waits for its goroutines.
func (c *conn) close() {
	c.fail(errClosed)
	c.wg.Wait()
}

func (c *conn) alive() bool {
	select {
	case <-c.dead:
		return false
	default:
		return true
	}
}

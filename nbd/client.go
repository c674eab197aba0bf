package nbd

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

const (
	// maxInFlight bounds the requests a client has open. QEMU works on 16 of a
	// connection at a time; the rest waits in the socket and hides latency.
	maxInFlight = 64
	// maxRequest is the size at which transfers are cut into several requests,
	// and readWindow is how much of one call's read is in flight. Measured with
	// qemu-nbd 7.2: reads of 4 MiB in 1 MiB requests were twice as fast as in
	// 2 MiB requests. Callers do best with buffers of 1 to 4 MiB; with 16 MiB
	// the rate was about half, whatever the request size.
	maxRequest = 1 << 20
	readWindow = 4 << 20
	// headerBuffer is the size of the buffer that replies' headers are read
	// through. The rest of a larger payload is read straight to its place.
	headerBuffer = 16 << 10
	// socketBuffer is asked for on local sockets. TCP is left alone, because
	// asking there turns the kernel's own tuning off.
	socketBuffer = 4 << 20
	// handshakeTimeout bounds Dial when its context has no deadline.
	handshakeTimeout = 30 * time.Second
	// stallGrace is how long a cancelled transfer may go on moving bytes that
	// cannot be taken back before the connection is given up.
	stallGrace = 3 * time.Second
)

var errClosed = errors.New("nbd client is closed")

// Options says what to ask of a server.
type Options struct {
	// Export is the export's name; empty is the server's default export.
	Export string
	// MetaContexts are the contexts BlockStatus may be asked about. A server
	// computes all of them at every BlockStatus call, so it is cheaper to ask
	// for a dirty bitmap and for base:allocation on connections of their own.
	// One that the server does not have is no error: see HasMetaContext.
	MetaContexts []string
}

// Client is one connection to one export. Its methods are safe for concurrent
// use and share the connection: requests of several goroutines are in flight
// together. After the connection is lost all calls return CodeUnavailable;
// there is no reconnecting.
type Client struct {
	conn       net.Conn
	br         *bufio.Reader
	size       int64
	flags      Flags
	structured bool
	maxRequest int64
	contexts   map[string]uint32

	wmu   sync.Mutex // held while a request is written
	wvec  [2][]byte  // reused by send, under wmu
	wbufs net.Buffers
	slots [maxInFlight]slot
	free  chan *slot

	failOnce sync.Once
	failed   atomic.Bool
	dead     chan struct{} // closed when failed
	err      error         // set before dead is closed
	done     sync.WaitGroup

	receiverGone atomic.Bool // receive reads no more replies
}

// Dial connects to a server, network and addr being those of net.Dial, and
// opens the export. It returns CodeUnavailable if the server cannot be reached
// and CodeNotFound if it has no such export. The caller closes the client.
func Dial(ctx context.Context, network, addr string, o Options) (*Client, error) {
	conn, err := dialConn(ctx, network, addr)
	if err != nil {
		return nil, err
	}
	return Open(ctx, conn, o)
}

func dialConn(ctx context.Context, network, addr string) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if err != nil {
		return nil, &switchback.Error{Code: contextCode(ctx, switchback.CodeUnavailable), Op: "nbd.Dial",
			Message: "connect to nbd server", Err: err}
	}
	tuneSocket(conn)
	return conn, nil
}

func tuneSocket(conn net.Conn) {
	if u, ok := conn.(*net.UnixConn); ok {
		// Larger buffers are an optimization; the kernel may give less.
		_ = u.SetReadBuffer(socketBuffer)
		_ = u.SetWriteBuffer(socketBuffer)
	}
}

// Open does the handshake on a connection that stands already, e.g. through a
// tunnel. It takes conn over, also when it returns an error.
func Open(ctx context.Context, conn net.Conn, o Options) (*Client, error) {
	c := &Client{conn: conn, br: bufio.NewReaderSize(conn, headerBuffer), maxRequest: maxRequest,
		free: make(chan *slot, maxInFlight), dead: make(chan struct{})}
	err := boundHandshake(ctx, conn, func() error {
		return c.handshake(o)
	})
	if err != nil {
		conn.Close()
		return nil, handshakeError(ctx, o.Export, err)
	}
	for i := range c.slots {
		c.slots[i].index = uint32(i)
		c.free <- &c.slots[i]
	}
	c.done.Go(c.receive)
	return c, nil
}

// boundHandshake runs f and interrupts conn when ctx or the time for a
// handshake ends.
func boundHandshake(ctx context.Context, conn net.Conn, f func() error) error {
	if err := conn.SetDeadline(time.Now().Add(handshakeTimeout)); err != nil {
		return err
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = conn.SetDeadline(time.Unix(1, 0))
	})
	err := f()
	if !stop() {
		<-interrupted
		return firstErr(err, ctx.Err())
	}
	return firstErr(err, conn.SetDeadline(time.Time{}))
}

func firstErr(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

func handshakeError(ctx context.Context, export string, err error) error {
	var e *switchback.Error
	if errors.As(err, &e) {
		return err
	}
	code := switchback.CodeUnavailable
	var p protocolError
	if errors.As(err, &p) {
		code = switchback.CodeUnsupported
	}
	return &switchback.Error{Code: contextCode(ctx, code), Op: "nbd.Dial",
		Message: fmt.Sprintf("open export %q", export), Err: err}
}

// contextCode is CodeTimeout or CodeCancelled if ctx ended, else code.
func contextCode(ctx context.Context, code switchback.Code) switchback.Code {
	switch err := ctx.Err(); {
	case errors.Is(err, context.DeadlineExceeded):
		return switchback.CodeTimeout
	case err != nil:
		return switchback.CodeCancelled
	}
	return code
}

// Size of the export in bytes, as it was when the connection was made.
func (c *Client) Size() int64 { return c.size }

// Flags are what the server said about the export.
func (c *Client) Flags() Flags { return c.flags }

// ReadOnly reports that the server refuses writes.
func (c *Client) ReadOnly() bool { return c.flags&FlagReadOnly != 0 }

// MultiConn reports that several connections to the export see one another's
// flushed writes.
func (c *Client) MultiConn() bool { return c.flags&FlagCanMultiConn != 0 }

// HasMetaContext reports that BlockStatus can be asked about the context.
func (c *Client) HasMetaContext(name string) bool {
	_, ok := c.contexts[name]
	return ok
}

// Done is closed when the connection is lost or closed; Err then says why.
func (c *Client) Done() <-chan struct{} { return c.dead }

// Err is nil while the connection stands.
func (c *Client) Err() error {
	select {
	case <-c.dead:
		return c.err
	default:
		return nil
	}
}

// Close tells the server and closes the connection. Requests in flight return
// an error; writes that were not flushed may or may not be done. It is
// idempotent.
func (c *Client) Close() error {
	if !c.failed.Load() {
		// An orderly goodbye lets the server log nothing; it is a courtesy, so
		// it must not hang on a server that reads no more.
		_ = c.conn.SetWriteDeadline(time.Now().Add(time.Second))
		var b [requestSize]byte
		c.wmu.Lock()
		_, _ = c.conn.Write(appendRequest(b[:0], request{command: cmdDisc}))
		c.wmu.Unlock()
	}
	c.fail(errClosed)
	c.done.Wait()
	return nil
}

// fail ends the connection; the first cause is kept. Requests in flight are
// completed by receive on its way out.
func (c *Client) fail(cause error) {
	c.failOnce.Do(func() {
		code := switchback.CodeUnavailable
		if errors.Is(cause, errClosed) || errors.Is(cause, os.ErrClosed) {
			code = switchback.CodeCancelled
		}
		c.err = &switchback.Error{Code: code, Op: "nbd", Message: "connection lost", Err: cause}
		c.failed.Store(true)
		close(c.dead)
		c.conn.Close()
	})
}

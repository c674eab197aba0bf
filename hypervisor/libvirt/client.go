package libvirt

import (
	"context"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// connectTimeout bounds how long making a connection may take.
const connectTimeout = 10 * time.Second

// client makes calls on a connection that it makes when needed, and anew when
// it was lost. Safe for concurrent use.
type client struct {
	socket, uri string
	keepAlive   keepAlive

	// turn is a mutex whose wait can be given up: it holds one token while
	// current and closed are looked at.
	turn    chan struct{}
	current *conn
	closed  bool
}

func newClient(socket, uri string, ka keepAlive) *client {
	return &client{socket: socket, uri: uri, keepAlive: ka, turn: make(chan struct{}, 1)}
}

func (c *client) conn(ctx context.Context) (*conn, error) {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-c.turn }()
	if c.closed {
		return nil, switchback.Errorf(switchback.CodeUnavailable, "the libvirt driver is closed")
	}
	if c.current != nil {
		if c.current.alive() {
			return c.current, nil
		}
		c.current.close()
		c.current = nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, connectTimeout, errConnectTimeout)
	defer cancel()
	made, err := dial(ctx, c.socket, c.uri, c.keepAlive, nil)
	if err != nil {
		if context.Cause(ctx) == errConnectTimeout {
			return nil, errConnectTimeout
		}
		return nil, err
	}
	c.current = made
	return made, nil
}

var errConnectTimeout = switchback.Errorf(switchback.CodeUnavailable, "libvirt accepts the connection but does not answer in %s", connectTimeout)

// call makes one call. decode reads the reply; nil when there is nothing in it.
func (c *client) call(ctx context.Context, p procedure, a *args, decode func(*result)) error {
	cn, err := c.conn(ctx)
	if err != nil {
		return err
	}
	r, err := cn.call(ctx, p, a)
	if err != nil {
		return err
	}
	if decode == nil {
		return nil
	}
	decode(r)
	if r.err != nil {
		return fmt.Errorf("read the reply to %s: %w", p.name, r.err)
	}
	return nil
}

func (c *client) close() {
	c.turn <- struct{}{}
	defer func() { <-c.turn }()
	c.closed = true
	if c.current != nil {
		c.current.close()
		c.current = nil
	}
}

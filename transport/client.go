package transport

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"golang.org/x/sys/unix"
)

const (
	dialTimeout = 5 * time.Second
	// deadPeer is after how long a peer that no longer answers TCP is given up,
	// whether data is under way or not.
	deadPeer = 20 * time.Second
	// bufferBytes is the size of a connection's read and write buffers: bulk
	// data goes over it.
	bufferBytes = 256 << 10
)

// ClientConfig says how to reach peers. Credentials is required.
type ClientConfig struct {
	Credentials *Credentials
	// Want judges the peer's identity; nil: anybody of the installation.
	Want func(Identity) error
	// Connections is how many idle connections per peer are kept; 8 if zero.
	Connections int
	// Dial makes the raw connection to host:port; nil: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Resolve says where a peer called by its name is (AgentName), and who is
	// believed there; an address that is a name again: it dials in. nil: all do.
	Resolve func(ctx context.Context, name string) (address string, want func(Identity) error, err error)
	// Inbound gives connections to peers that have dialled in; nil: none.
	Inbound *Inbound
}

// NewHTTPClient returns a client for HTTP/1.1 over mutual TLS. It has no overall
// timeout (bulk data takes as long as it takes): a call's context has. Calls that
// begin after Credentials.Replace use new connections.
func NewHTTPClient(cfg ClientConfig) *http.Client {
	if cfg.Connections <= 0 {
		cfg.Connections = 8
	}
	if cfg.Dial == nil {
		cfg.Dial = tcpDialer.DialContext
	}
	return &http.Client{Transport: &renewing{cfg: cfg}}
}

var tcpDialer = &net.Dialer{Timeout: dialTimeout, KeepAliveConfig: keepAlive, ControlContext: controlSocket}

var keepAlive = net.KeepAliveConfig{Enable: true, Idle: deadPeer / 2, Interval: deadPeer / 8, Count: 4}

// congestion is asked of the kernel for every connection: over a WAN that loses
// packets, a stream that takes loss for congestion is slow whatever its windows are
// (measured at 100 ms and 1 %: 0.2 MB/s under reno, 12 MB/s under bbr).
const congestion = "bbr"

// controlSocket makes unacknowledged data, too, reveal a dead peer (tcp(7),
// TCP_USER_TIMEOUT), and chooses the congestion control (TCP_CONGESTION) where the
// kernel has it and lets this process.
func controlSocket(_ context.Context, network, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadPeer.Milliseconds()))
		// Without it the kernel's own is used, which works as well but for loss.
		_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, congestion)
	}); e != nil {
		return e
	}
	return err
}

// renewing is a RoundTripper that starts anew with each generation of
// credentials, so that no connection outlives its certificate for long.
type renewing struct {
	cfg ClientConfig

	mu        sync.Mutex
	held      *held
	transport *http.Transport
}

func (t *renewing) current() *http.Transport {
	t.mu.Lock()
	defer t.mu.Unlock()
	if now := t.cfg.Credentials.held.Load(); now != t.held || t.transport == nil {
		if t.transport != nil {
			t.transport.CloseIdleConnections()
		}
		t.held = now
		t.transport = &http.Transport{
			DialTLSContext:        t.dial,
			MaxIdleConnsPerHost:   t.cfg.Connections,
			IdleConnTimeout:       90 * time.Second,
			ExpectContinueTimeout: time.Second,
			ReadBufferSize:        bufferBytes,
			WriteBufferSize:       bufferBytes,
			DisableCompression:    true,
			TLSNextProto:          map[string]func(string, *tls.Conn) http.RoundTripper{}, // no HTTP/2
		}
	}
	return t.transport
}

func (t *renewing) RoundTrip(req *http.Request) (*http.Response, error) {
	return t.current().RoundTrip(req)
}

// dial makes a connection in mutual TLS: to the address, or over a line that its owner has opened.
func (t *renewing) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if name, ok := strings.CutSuffix(address, ":443"); ok && IsName(name) {
		address = name // net/http adds a port to a name
	}
	want := t.cfg.Want
	if t.cfg.Resolve != nil && IsName(address) {
		var err error
		if address, want, err = t.cfg.Resolve(ctx, address); err != nil {
			return nil, err
		}
	}
	if t.cfg.Inbound != nil && IsName(address) {
		return t.cfg.Inbound.connect(ctx, address, want)
	}
	direct := func(ctx context.Context) (net.Conn, error) {
		raw, err := t.cfg.Dial(ctx, network, address)
		if err != nil {
			return nil, err
		}
		conn := tls.Client(raw, ClientTLS(t.cfg.Credentials, want))
		c, cancel := context.WithTimeout(ctx, 2*dialTimeout)
		defer cancel()
		if err := conn.HandshakeContext(c); err != nil {
			raw.Close()
			return nil, err
		}
		return conn, nil
	}
	if t.cfg.Inbound != nil {
		return t.cfg.Inbound.either(ctx, address, want, direct)
	}
	return direct(ctx)
}

// CloseIdleConnections makes http.Client.CloseIdleConnections work.
func (t *renewing) CloseIdleConnections() { t.current().CloseIdleConnections() }

// NewHTTPServer returns a server for handler, which it puts behind Authenticate.
// Start it with Listen and ServeTLS(listener, "", "").
func NewHTTPServer(c *Credentials, handler http.Handler, logger *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           Authenticate(c, handler),
		TLSConfig:         ServerTLS(c),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug), // handshakes of port scanners
	}
}

// Listen opens a TCP port whose connections notice a dead peer.
func Listen(ctx context.Context, address string) (net.Listener, error) {
	lc := net.ListenConfig{KeepAliveConfig: keepAlive, Control: func(network, address string, c syscall.RawConn) error {
		return controlSocket(ctx, network, address, c)
	}}
	l, err := lc.Listen(ctx, "tcp", address)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeUnavailable, "listen on %s: %w", address, err)
	}
	return l, nil
}

// Do sends a request and returns an answer of 2xx, whose body the caller
// closes. Everything else is a *switchback.Error: the peer's own, CodeUnavailable
// with its address where it cannot be reached or the connection broke,
// CodeTimeout, CodeCancelled, or CodeUnauthorized for a peer not to be believed.
func Do(client *http.Client, req *http.Request) (*http.Response, error) {
	resp, err := client.Do(req)
	if err != nil {
		return nil, connectionError(req.Context(), req.URL.Host, err)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		defer resp.Body.Close()
		return nil, ReadError(resp)
	}
	return resp, nil
}

// connectionError classifies what went wrong below HTTP.
func connectionError(ctx context.Context, address string, err error) error {
	address = strings.TrimSuffix(address, unreachableTLD)
	var known *switchback.Error
	var alert tls.AlertError
	var timeout net.Error
	switch {
	case errors.As(err, &known): // our own verdict on the peer's certificate
		return &switchback.Error{Code: known.Code, Message: "peer " + address + ": " + known.Message, Hint: known.Hint, Err: known.Err}
	case errors.Is(ctx.Err(), context.Canceled):
		return &switchback.Error{Code: switchback.CodeCancelled, Message: "call to " + address, Err: context.Cause(ctx)}
	case errors.Is(err, context.DeadlineExceeded):
		return &switchback.Error{Code: switchback.CodeTimeout, Message: "no answer from " + address + " in time", Err: err}
	case errors.As(err, &alert):
		return &switchback.Error{Code: switchback.CodeUnauthorized, Message: "peer " + address + " refused the connection's security", Err: err}
	case errors.As(err, &timeout) && timeout.Timeout():
		return &switchback.Error{Code: switchback.CodeUnavailable, Message: "no connection to " + address + " in time", Err: err}
	}
	return &switchback.Error{Code: switchback.CodeUnavailable, Message: "cannot reach " + address, Err: err}
}

// Call sends body as JSON (nil: none) and decodes the answer into a Resp, of
// which unknown fields are ignored so that a newer peer can be talked to. Use
// struct{} where there is no answer. Errors are those of Do.
func Call[Resp any](ctx context.Context, client *http.Client, method, url string, body any) (Resp, error) {
	var answer Resp
	var data io.Reader
	if body != nil {
		encoded, err := json.Marshal(body)
		if err != nil {
			return answer, fmt.Errorf("encode request: %w", err)
		}
		data = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, data)
	if err != nil {
		return answer, switchback.Errorf(switchback.CodeInvalid, "request: %v", err)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := Do(client, req)
	if err != nil {
		return answer, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, MaxResponseBytes+1))
	if err != nil {
		return answer, connectionError(ctx, req.URL.Host, err)
	}
	if _, none := any(answer).(struct{}); none || resp.StatusCode == http.StatusNoContent {
		return answer, nil
	}
	if len(text) > MaxResponseBytes {
		return answer, switchback.Errorf(switchback.CodeInvalid, "the answer of %s is larger than %d bytes", req.URL.Host, MaxResponseBytes)
	}
	if err := json.Unmarshal(text, &answer); err != nil {
		return answer, switchback.Errorf(switchback.CodeCorrupt, "the answer of %s is not understood: %v", req.URL.Host, err)
	}
	return answer, nil
}

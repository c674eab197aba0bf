package transport

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mathrand "math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// OutboundConfig says to whom a line is kept, and what is served on it. Address
// is optional, all other fields are required.
type OutboundConfig struct {
	Credentials *Credentials
	// Peer is the address (host:port) to dial; Want judges who answers there.
	Peer string
	Want func(Identity) error
	// Address is where this process would be reached if the peer can; "" = it cannot.
	Address string
	// Handler answers what the peer asks over the line; it is put behind Authenticate.
	Handler http.Handler
	Logger  *slog.Logger
}

// Outbound keeps this process within the reach of a peer that it can dial but
// that cannot dial it: one control connection, and a data connection each time
// the peer asks for one. On these the peer is the client and this process the
// server; they are ordinary connections of HTTP/1.1, one per request under way,
// so that bulk data has a TCP connection, and its windows, for itself.
type Outbound struct {
	cfg OutboundConfig

	mu     sync.Mutex
	status LineStatus
}

// NewOutbound returns a line that is not dialled yet.
func NewOutbound(cfg OutboundConfig) *Outbound {
	return &Outbound{cfg: cfg, status: LineStatus{Peer: cfg.Peer}}
}

// Status says how the line stands.
func (o *Outbound) Status() LineStatus {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.status
}

const (
	redialMin = 100 * time.Millisecond
	redialMax = 5 * time.Second
)

// Run keeps the line until ctx ends, dialling again with growing pauses.
func (o *Outbound) Run(ctx context.Context) {
	served := newHandedListener()
	srv := &http.Server{
		Handler:  Authenticate(o.cfg.Credentials, o.cfg.Handler),
		ErrorLog: slog.NewLogLogger(o.cfg.Logger.Handler(), slog.LevelDebug),
		// No timeout of idle connections: the peer's client ends them.
	}
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(served) }) // ends with ErrServerClosed
	defer wg.Wait()
	defer srv.Close()
	pause := redialMin
	for ctx.Err() == nil {
		began := time.Now()
		err := o.session(ctx, served, &wg)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > redialMax {
			pause = redialMin
		}
		o.mu.Lock()
		if o.status.Up || o.status.Error == "" {
			o.cfg.Logger.Warn("a line is down, dialling again", "peer", o.cfg.Peer, "error", err)
		}
		o.status = LineStatus{Peer: o.cfg.Peer, Error: err.Error(), Since: time.Now()}
		o.mu.Unlock()
		wait := time.NewTimer(pause/2 + mathrand.N(pause/2))
		select {
		case <-ctx.Done():
			wait.Stop()
		case <-wait.C:
		}
		pause = min(2*pause, redialMax)
	}
}

// session is the life of one control connection.
func (o *Outbound) session(ctx context.Context, served *handedListener, wg *sync.WaitGroup) error {
	session := rand.Text()
	conn, id, err := o.dial(ctx, lineControl, session)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	o.mu.Lock()
	o.status = LineStatus{Peer: id.String(), Up: true, Since: time.Now()}
	o.mu.Unlock()
	o.cfg.Logger.Info("a line is up", "peer", id, "address", o.cfg.Peer)
	var writing sync.Mutex
	say := func(format string, args ...any) error {
		writing.Lock()
		defer writing.Unlock()
		conn.SetWriteDeadline(time.Now().Add(lineDead))
		_, err := fmt.Fprintf(conn, format+"\n", args...)
		return err
	}
	lines := bufio.NewScanner(conn)
	for {
		conn.SetReadDeadline(time.Now().Add(lineDead))
		if !lines.Scan() {
			return switchback.Errorf(switchback.CodeUnavailable, "the line broke: %w", errors.Join(lines.Err(), io.EOF))
		}
		switch lines.Text() {
		case "ping":
			if err := say("pong"); err != nil {
				return err
			}
		case "open":
			wg.Go(func() {
				data, _, err := o.dial(ctx, lineData, session)
				if err != nil {
					_ = say("failed %s", strings.ReplaceAll(err.Error(), "\n", " ")) // a broken line is seen by its reader
					return
				}
				served.hand(data)
			})
		}
	}
}

// dial opens a connection and says what it is for.
func (o *Outbound) dial(ctx context.Context, kind, session string) (_ *tls.Conn, _ Identity, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*dialTimeout)
	defer cancel()
	raw, err := tcpDialer.DialContext(ctx, "tcp", o.cfg.Peer)
	if err != nil {
		return nil, Identity{}, connectionError(ctx, o.cfg.Peer, err)
	}
	defer func() {
		if err != nil {
			raw.Close()
		}
	}()
	conn := tls.Client(raw, ClientTLS(o.cfg.Credentials, o.cfg.Want))
	if err := conn.HandshakeContext(ctx); err != nil {
		return nil, Identity{}, connectionError(ctx, o.cfg.Peer, err)
	}
	id, err := identityOf(conn.ConnectionState().PeerCertificates[0]) // judged in the handshake
	if err != nil {
		return nil, id, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+o.cfg.Peer+DialInPath, http.NoBody)
	if err != nil {
		return nil, id, err
	}
	for k, v := range map[string]string{"Connection": "Upgrade", "Upgrade": lineProtocol, lineHeader: kind, sessionHeader: session, addressHeader: o.cfg.Address} {
		if v != "" {
			req.Header.Set(k, v)
		}
	}
	conn.SetDeadline(time.Now().Add(2 * dialTimeout))
	if err := req.Write(conn); err != nil {
		return nil, id, connectionError(ctx, o.cfg.Peer, err)
	}
	// Byte by byte: what follows the answer belongs to whoever reads next.
	resp, err := http.ReadResponse(bufio.NewReaderSize(oneByOne{conn}, 16), req)
	if err != nil {
		return nil, id, connectionError(ctx, o.cfg.Peer, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, id, ReadError(resp)
	}
	conn.SetDeadline(time.Time{})
	return conn, id, nil
}

// oneByOne gives its reader one byte at a time, so that it cannot read ahead.
type oneByOne struct{ r io.Reader }

func (o oneByOne) Read(p []byte) (int, error) { return o.r.Read(p[:min(1, len(p))]) }

// handedListener accepts connections that were opened by ourselves.
type handedListener struct {
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}
}

func newHandedListener() *handedListener {
	return &handedListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *handedListener) hand(c net.Conn) {
	select {
	case l.conns <- c:
	case <-l.done:
		c.Close()
	}
}

// Accept implements net.Listener.
func (l *handedListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (l *handedListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// Addr implements net.Listener.
func (l *handedListener) Addr() net.Addr { return &net.TCPAddr{} }

package transport

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// DialInPath is where a process takes lines from peers that it cannot dial.
const DialInPath = "/v1/dial-in"

const (
	lineProtocol   = "switchback-line/1"
	lineHeader     = "Switchback-Line"    // control or data
	sessionHeader  = "Switchback-Session" // ties data connections to their control connection
	addressHeader  = "Switchback-Address" // where the dialling side would be reached if it can be
	lineControl    = "control"
	lineData       = "data"
	linePing       = 2 * time.Second
	lineDead       = 8 * time.Second
	unreachableTLD = ".invalid" // RFC 2606: never resolved
)

// NameOf returns the host name under which a peer that dials in is called: it
// names the peer and not a place, and is never resolved. All servers of an
// installation have one name.
func NameOf(id Identity) string {
	if id.Role == RoleServer {
		return ServerName
	}
	return AgentName(switchback.AgentID(id.ID))
}

// ServerName is the address of a server that agents cannot dial.
const ServerName = "server" + unreachableTLD

// AgentName is the address of an agent that cannot be dialled.
func AgentName(id switchback.AgentID) string { return string(id) + ".agent" + unreachableTLD }

// NamedAgent is the inverse of AgentName.
func NamedAgent(name string) (switchback.AgentID, bool) {
	id, ok := strings.CutSuffix(name, ".agent"+unreachableTLD)
	return switchback.AgentID(id), ok
}

// IsName reports whether an address names a peer that dials in.
func IsName(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = address
	}
	return strings.HasSuffix(host, unreachableTLD)
}

// Inbound are the lines that peers have opened to this process, so that it can
// call them: it serves DialInPath and hands out connections to NewHTTPClient.
// Make it with NewInbound; it may be used from several goroutines.
type Inbound struct {
	creds *Credentials
	admit func(Identity) error

	mu      sync.Mutex
	lines   []*inLine     // newest last
	changed chan struct{} // closed and replaced when lines changes
	direct  map[string]time.Time
}

// NewInbound returns an Inbound without lines. admit judges who may open one,
// beside having to be an agent or a server of the installation.
func NewInbound(c *Credentials, admit func(Identity) error) *Inbound {
	return &Inbound{creds: c, admit: admit, changed: make(chan struct{}), direct: map[string]time.Time{}}
}

// LineStatus describes one line, at either end.
type LineStatus struct {
	// Peer is who is at the other end.
	Peer string `json:"peer"`
	// Inbound: the peer dialled and is called over the line; otherwise this process did.
	Inbound bool `json:"inbound"`
	// Up says that it stands, since when; Error why not.
	Up    bool      `json:"up"`
	Since time.Time `json:"since,omitzero"`
	Error string    `json:"error,omitempty"`
	// RoundTrip is that of the last ping, in nanoseconds; 0 = not measured.
	RoundTrip time.Duration `json:"round_trip,omitempty"`
}

// inLine is one control connection that a peer has opened.
type inLine struct {
	id      Identity
	session string
	address string
	conn    net.Conn
	since   time.Time
	done    chan struct{}

	mu      sync.Mutex // of the fields below, and of writes
	waiting []chan dialled
	pinged  time.Time
	round   time.Duration
}

type dialled struct {
	conn net.Conn
	err  error
}

// ServeHTTP takes a control or a data connection; it stands behind Authenticate.
func (in *Inbound) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, err := PeerIdentity(r)
	if err == nil {
		err = wantRole(id, RoleAgent, RoleServer)
	}
	if err == nil && in.admit != nil {
		err = in.admit(id)
	}
	kind, session := r.Header.Get(lineHeader), r.Header.Get(sessionHeader)
	if err == nil && (r.Header.Get("Upgrade") != lineProtocol || session == "" || kind != lineControl && kind != lineData) {
		err = switchback.Errorf(switchback.CodeUnsupported, "this is no line that is known here").WithHint("use the same version on both sides")
	}
	var line *inLine
	if err == nil && kind == lineData {
		if line = in.find(func(l *inLine) bool { return l.session == session && l.id == id }); line == nil {
			err = switchback.Errorf(switchback.CodeConflict, "the line that this connection belongs to is gone")
		}
	}
	if err != nil {
		WriteError(w, err)
		return
	}
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		WriteError(w, switchback.Errorf(switchback.CodeUnsupported, "take the connection over: %w", err))
		return
	}
	conn.SetDeadline(time.Now().Add(dialTimeout))
	_, err = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", lineProtocol)
	if err != nil || buffered.Reader.Buffered() > 0 {
		conn.Close() // gone, or it speaks before it was asked
		return
	}
	conn.SetDeadline(time.Time{})
	if kind == lineData {
		line.deliver(dialled{conn: conn})
		return
	}
	in.control(&inLine{id: id, session: session, address: r.Header.Get(addressHeader), conn: conn, since: time.Now(), done: make(chan struct{})})
}

// control keeps a line until it breaks.
func (in *Inbound) control(l *inLine) {
	in.set(func() { in.lines = append(in.lines, l) })
	defer func() {
		in.set(func() { in.lines = slices.DeleteFunc(in.lines, func(x *inLine) bool { return x == l }) })
		l.conn.Close()
		close(l.done)
	}()
	go l.ping()
	lines := bufio.NewScanner(l.conn)
	for {
		l.conn.SetReadDeadline(time.Now().Add(lineDead))
		if !lines.Scan() {
			return
		}
		switch word, rest, _ := strings.Cut(lines.Text(), " "); word {
		case "pong":
			l.mu.Lock()
			l.round = time.Since(l.pinged)
			l.mu.Unlock()
		case "failed":
			l.deliver(dialled{err: switchback.Errorf(switchback.CodeUnavailable, "%s could not open a connection: %s", l.id.ID, rest)})
		}
	}
}

func (l *inLine) ping() {
	t := time.NewTicker(linePing)
	defer t.Stop()
	for {
		l.mu.Lock()
		l.pinged = time.Now()
		l.mu.Unlock()
		if l.say("ping") != nil {
			return
		}
		select {
		case <-l.done:
			return
		case <-t.C:
		}
	}
}

// say sends a word to the peer; a line that cannot take it is broken.
func (l *inLine) say(word string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conn.SetWriteDeadline(time.Now().Add(lineDead))
	_, err := fmt.Fprintln(l.conn, word)
	if err != nil {
		l.conn.Close()
	}
	return err
}

// deliver gives what the peer has dialled to the one that waits longest.
func (l *inLine) deliver(d dialled) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.waiting) > 0 {
		l.waiting[0] <- d // of capacity 1, and taken out with this
		l.waiting = l.waiting[1:]
	} else if d.conn != nil {
		d.conn.Close()
	}
}

// open has the peer dial one more connection.
func (l *inLine) open(ctx context.Context) (net.Conn, error) {
	w := make(chan dialled, 1)
	l.mu.Lock()
	l.waiting = append(l.waiting, w)
	l.mu.Unlock()
	err := l.say("open")
	if err == nil {
		select {
		case d := <-w:
			return d.conn, d.err
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-l.done:
			err = net.ErrClosed
		}
	}
	l.mu.Lock()
	l.waiting = slices.DeleteFunc(l.waiting, func(x chan dialled) bool { return x == w })
	l.mu.Unlock()
	select {
	case d := <-w: // it came after all
		return d.conn, d.err
	default:
	}
	return nil, switchback.Errorf(switchback.CodeUnavailable, "the line of %s gave no connection: %w", l.id.ID, err)
}

// leadsTo reports whether the line is of the one who is wanted at an address. A
// peer can announce any address, but is nobody else than it is.
func (l *inLine) leadsTo(address string, want func(Identity) error) bool {
	return l.address == address && want != nil && want(l.id) == nil
}

func (in *Inbound) set(f func()) {
	in.mu.Lock()
	defer in.mu.Unlock()
	f()
	close(in.changed)
	in.changed = make(chan struct{})
}

func (in *Inbound) find(match func(*inLine) bool) *inLine {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, l := range slices.Backward(in.lines) {
		if match(l) {
			return l
		}
	}
	return nil
}

// connect returns a connection to a peer that has dialled in, which is waited
// for a little, or one that announced this address.
func (in *Inbound) connect(ctx context.Context, host string, want func(Identity) error) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*dialTimeout)
	defer cancel()
	for {
		in.mu.Lock()
		changed := in.changed
		in.mu.Unlock()
		l := in.find(func(l *inLine) bool { return NameOf(l.id) == host || l.leadsTo(host, want) })
		if l != nil {
			conn, err := l.open(ctx)
			if err != nil {
				return nil, err
			}
			// Judged again: the line may be older than a revocation.
			id, err := in.creds.verify(conn.(*tls.Conn).ConnectionState().PeerCertificates, time.Now())
			if err == nil && id != l.id {
				err = switchback.Errorf(switchback.CodeUnauthorized, "the line of %s carries a connection of %s", l.id, id)
			}
			if err == nil && want != nil {
				err = want(id)
			}
			if err != nil {
				conn.Close()
				return nil, err
			}
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, switchback.Errorf(switchback.CodeUnavailable, "%s cannot be dialled, and has not dialled in", strings.TrimSuffix(host, unreachableTLD)).
				WithHint("see at its side why it does not reach this one")
		case <-changed:
		}
	}
}

// Lines lists the lines that stand, by peer.
func (in *Inbound) Lines() []LineStatus {
	in.mu.Lock()
	defer in.mu.Unlock()
	list := []LineStatus{}
	for _, l := range in.lines {
		l.mu.Lock()
		list = append(list, LineStatus{Peer: l.id.String(), Inbound: true, Up: true, Since: l.since, RoundTrip: l.round})
		l.mu.Unlock()
	}
	slices.SortStableFunc(list, func(a, b LineStatus) int { return cmp.Compare(a.Peer, b.Peer) })
	return list
}

// Judge ends the lines of peers that are not believed any more.
func (in *Inbound) Judge() {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, l := range in.lines {
		if _, err := in.creds.verify(l.conn.(*tls.Conn).ConnectionState().PeerCertificates, time.Now()); err != nil {
			l.conn.Close()
		}
	}
}

// Close ends all lines; connections that were handed out stay.
func (in *Inbound) Close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	for _, l := range in.lines {
		l.conn.Close()
	}
}

// headStart is how long a direct connection is waited for where a line could
// give one, too; directAgain is how long after a failure it is not tried first.
const (
	headStart   = 300 * time.Millisecond
	directAgain = 30 * time.Second
)

// either dials an address whose owner has dialled in as well: directly if that
// works, else over its line.
func (in *Inbound) either(ctx context.Context, address string, want func(Identity) error, dial func(context.Context) (net.Conn, error)) (net.Conn, error) {
	if in.find(func(l *inLine) bool { return l.leadsTo(address, want) }) == nil {
		return dial(ctx)
	}
	in.mu.Lock()
	failing := time.Since(in.direct[address]) < directAgain
	in.mu.Unlock()
	if failing {
		return in.connect(ctx, address, want)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	direct := make(chan dialled, 1)
	go func() {
		c, err := dial(ctx)
		direct <- dialled{c, err}
	}()
	late := time.NewTimer(headStart)
	defer late.Stop()
	select {
	case d := <-direct:
		if d.err == nil {
			return d.conn, nil
		}
	case <-late.C:
		defer func() {
			cancel()
			go func() {
				if d := <-direct; d.conn != nil {
					d.conn.Close()
				}
			}()
		}()
	}
	conn, err := in.connect(ctx, address, want)
	if err == nil {
		in.mu.Lock()
		in.direct[address] = time.Now()
		in.mu.Unlock()
	}
	return conn, err
}

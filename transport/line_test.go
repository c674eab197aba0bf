package transport

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// lineBed is a process that listens, and one that only dials it.
type lineBed struct {
	t        *testing.T
	ca       *CA
	listens  *Credentials // of server
	dials    *Credentials // of agent a-1 at berlin
	inbound  *Inbound
	address  string
	srv      *http.Server
	outbound *Outbound
	stop     func()
}

func newLineBed(t *testing.T, handler http.Handler) *lineBed {
	t.Helper()
	ca, err := NewCA("sb-test")
	if err != nil {
		t.Fatal(err)
	}
	b := &lineBed{t: t, ca: ca}
	b.listens = b.issue(Identity{Installation: "sb-test", Role: RoleServer, ID: "server"})
	b.dials = b.issue(Identity{Installation: "sb-test", Role: RoleAgent, Site: "berlin", ID: "a-1"})
	b.inbound = NewInbound(b.listens, func(id Identity) error {
		if id.ID == "a-stranger" {
			return switchback.Errorf(switchback.CodeUnauthorized, "%s has no part here", id)
		}
		return nil
	})
	b.listen("127.0.0.1:0")
	t.Cleanup(func() { b.srv.Close(); b.inbound.Close() })
	b.outbound, b.stop = b.dialIn(b.dials, handler)
	t.Cleanup(b.stop)
	return b
}

func (b *lineBed) issue(id Identity) *Credentials {
	b.t.Helper()
	c, err := b.ca.Issue(id, time.Hour)
	if err != nil {
		b.t.Fatal(err)
	}
	return c
}

func (b *lineBed) listen(address string) {
	b.t.Helper()
	mux := http.NewServeMux()
	mux.Handle("POST "+DialInPath, b.inbound)
	b.srv = NewHTTPServer(b.listens, mux, slog.New(slog.DiscardHandler))
	ln, err := Listen(context.Background(), address)
	if err != nil {
		b.t.Fatal(err)
	}
	b.address = ln.Addr().String()
	go b.srv.ServeTLS(ln, "", "")
}

func (b *lineBed) dialIn(c *Credentials, handler http.Handler) (*Outbound, func()) {
	o := NewOutbound(OutboundConfig{Credentials: c, Peer: b.address, Want: AnyServer, Handler: handler, Logger: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { o.Run(ctx); close(done) }()
	return o, func() { cancel(); <-done }
}

func (b *lineBed) client(agent switchback.AgentID) *http.Client {
	return NewHTTPClient(ClientConfig{Credentials: b.listens, Want: Agent(agent), Inbound: b.inbound})
}

func (b *lineBed) await(what string, ok func() bool) {
	b.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			b.t.Fatal(what)
		}
	}
}

// callerAndBytes answers with the caller's identity and the length of the body.
var callerAndBytes = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	id, err := PeerIdentity(r)
	if err != nil {
		WriteError(w, err)
		return
	}
	n, err := io.Copy(io.Discard, r.Body)
	if err != nil {
		WriteError(w, err)
		return
	}
	WriteJSON(w, http.StatusOK, fmt.Sprintf("%s sent %d", id, n))
})

func TestLineCarriesRequestsTheOtherWay(t *testing.T) {
	b := newLineBed(t, callerAndBytes)
	client := b.client("a-1")
	url := "https://" + AgentName("a-1") + "/v1/anything"
	for range 3 {
		got, err := Call[string](t.Context(), client, http.MethodGet, url, nil)
		if want := "spiffe://sb-test/server/server sent 0"; err != nil || got != want {
			t.Fatalf("got %q, %v, want %q", got, err, want)
		}
	}
	// Bulk data, several streams at a time.
	const size = 8 << 20
	answers := make(chan error, 6)
	for range cap(answers) {
		go func() {
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, io.LimitReader(zeros{}, size))
			if err != nil {
				answers <- err
				return
			}
			resp, err := Do(client, req)
			if err == nil {
				text, _ := io.ReadAll(resp.Body)
				resp.Body.Close()
				if !strings.Contains(string(text), fmt.Sprint("sent ", size)) {
					err = fmt.Errorf("answer %q", text)
				}
			}
			answers <- err
		}()
	}
	for range cap(answers) {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
	if lines := b.inbound.Lines(); len(lines) != 1 || lines[0].Peer != "spiffe://sb-test/agent/berlin/a-1" {
		t.Errorf("lines %+v", lines)
	}
	if s := b.outbound.Status(); !s.Up || s.Peer != "spiffe://sb-test/server/server" {
		t.Errorf("at the other end: %+v", s)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestLineRefuses(t *testing.T) {
	b := newLineBed(t, callerAndBytes)
	b.await("no line", func() bool { return len(b.inbound.Lines()) == 1 })

	t.Run("somebody else than is wanted", func(t *testing.T) {
		_, err := Call[string](t.Context(), b.client("a-2"), http.MethodGet, "https://"+AgentName("a-1")+"/", nil)
		if switchback.CodeOf(err) != switchback.CodeUnauthorized {
			t.Errorf("got %v", err)
		}
	})
	t.Run("an address announced by somebody else", func(t *testing.T) {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address := ln.Addr().String()
		ln.Close()
		o := NewOutbound(OutboundConfig{Credentials: b.dials, Peer: b.address, Want: AnyServer, Address: address, Handler: callerAndBytes, Logger: slog.New(slog.DiscardHandler)})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go o.Run(ctx)
		b.await("no second line", func() bool { return len(b.inbound.Lines()) == 2 })
		if _, err := Call[string](t.Context(), b.client("a-2"), http.MethodGet, "https://"+address+"/", nil); switchback.CodeOf(err) != switchback.CodeUnavailable {
			t.Errorf("a-2 was looked for at the address that a-1 announced: %v", err)
		}
		if got, err := Call[string](t.Context(), b.client("a-1"), http.MethodGet, "https://"+address+"/", nil); err != nil {
			t.Errorf("a-1 cannot be called at the address that nobody can dial: %q, %v", got, err)
		}
	})
	for _, c := range []struct {
		name  string
		creds *Credentials
	}{
		{"one that is not admitted", b.issue(Identity{Installation: "sb-test", Role: RoleAgent, Site: "berlin", ID: "a-stranger"})},
		{"an administrator", b.issue(Identity{Installation: "sb-test", Role: RoleAdmin, ID: "admin"})},
		{"another installation", otherInstallation(t)},
	} {
		t.Run(c.name, func(t *testing.T) {
			o, stop := b.dialIn(c.creds, callerAndBytes)
			defer stop()
			b.await("no verdict", func() bool { return o.Status().Error != "" })
			if o.Status().Up {
				t.Error("it has a line")
			}
		})
	}
}

func otherInstallation(t *testing.T) *Credentials {
	ca, err := NewCA("sb-test")
	if err != nil {
		t.Fatal(err)
	}
	c, err := ca.Issue(Identity{Installation: "sb-test", Role: RoleAgent, Site: "berlin", ID: "a-1"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestLineComesBack(t *testing.T) {
	var served atomic.Int64
	b := newLineBed(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		served.Add(1)
		callerAndBytes(w, r)
	}))
	client := b.client("a-1")
	call := func() error {
		_, err := Call[string](t.Context(), client, http.MethodGet, "https://"+AgentName("a-1")+"/", nil)
		return err
	}
	if err := call(); err != nil {
		t.Fatal(err)
	}
	// The listening side goes away and comes back.
	b.srv.Close()
	b.inbound.Close()
	client.CloseIdleConnections()
	b.await("the loss is not noticed", func() bool { return !b.outbound.Status().Up })
	b.listen(b.address)
	b.await("the line does not come back", func() bool { return b.outbound.Status().Up })
	if err := call(); err != nil {
		t.Fatal(err)
	}
	// The dialling side ends: calls fail, and say so.
	b.stop()
	b.await("the end is not noticed", func() bool { return len(b.inbound.Lines()) == 0 })
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := Call[string](ctx, client, http.MethodGet, "https://"+AgentName("a-1")+"/", nil)
	if code := switchback.CodeOf(err); code != switchback.CodeUnavailable && code != switchback.CodeTimeout {
		t.Errorf("got %v", err)
	}
	if served.Load() != 2 {
		t.Errorf("served %d requests", served.Load())
	}
}

// TestLineGoesSilent: a peer that says nothing any more, without having closed
// anything, is noticed in seconds at both ends.
func TestLineGoesSilent(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for the silence")
	}
	t.Parallel()
	b := newLineBed(t, callerAndBytes)
	b.await("no line", func() bool { return len(b.inbound.Lines()) == 1 })
	var quiet atomic.Bool
	proxy, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	go func() {
		for {
			near, err := proxy.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", b.address)
			if err != nil {
				near.Close()
				continue
			}
			pass := func(from, to net.Conn) {
				buf := make([]byte, 4096)
				for {
					n, err := from.Read(buf)
					for quiet.Load() {
						time.Sleep(10 * time.Millisecond)
					}
					if err != nil {
						to.Close()
						return
					}
					if _, err := to.Write(buf[:n]); err != nil {
						return
					}
				}
			}
			go pass(near, far)
			go pass(far, near)
		}
	}()
	second := b.issue(Identity{Installation: "sb-test", Role: RoleAgent, Site: "berlin", ID: "a-2"})
	o := NewOutbound(OutboundConfig{Credentials: second, Peer: proxy.Addr().String(), Want: AnyServer, Handler: callerAndBytes, Logger: slog.New(slog.DiscardHandler)})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go o.Run(ctx)
	b.await("no second line", func() bool { return len(b.inbound.Lines()) == 2 && o.Status().Up })
	quiet.Store(true)
	defer quiet.Store(false)
	began := time.Now()
	b.await("the silence is not noticed", func() bool { return len(b.inbound.Lines()) == 1 && !o.Status().Up })
	t.Logf("noticed at both ends after %v", time.Since(began).Round(100*time.Millisecond))
}

package transport

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"github.com/google/go-cmp/cmp"
)

var (
	serverID = Identity{Installation: "lab", Role: RoleServer, ID: "srv-1"}
	agentID  = Identity{Installation: "lab", Role: RoleAgent, Site: "east", ID: "a-1"}
	adminID  = Identity{Installation: "lab", Role: RoleAdmin, ID: "ann"}
)

func newCA(t *testing.T, installation string) *CA {
	t.Helper()
	ca, err := CreateCA(t.TempDir(), installation)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func issue(t *testing.T, ca *CA, id Identity, ttl time.Duration) *Credentials {
	t.Helper()
	c, err := ca.Issue(id, ttl)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// serve starts a server and returns its address.
func serve(t *testing.T, c *Credentials, handler http.Handler) string {
	t.Helper()
	l, err := Listen(t.Context(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := NewHTTPServer(c, handler, slog.New(slog.DiscardHandler))
	done := make(chan error, 1)
	go func() { done <- s.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// whoami answers with the caller's identity.
var whoami = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
	id, err := PeerIdentity(r)
	if err != nil {
		WriteError(w, err)
		return
	}
	WriteJSON(w, http.StatusOK, id)
})

func ask(t *testing.T, c *Credentials, want func(Identity) error, address string) (Identity, error) {
	t.Helper()
	client := NewHTTPClient(ClientConfig{Credentials: c, Want: want})
	defer client.CloseIdleConnections()
	return Call[Identity](t.Context(), client, http.MethodGet, "https://"+address+"/", nil)
}

func wantError(t *testing.T, err error, code switchback.Code, texts ...string) {
	t.Helper()
	var e *switchback.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("error is %v (%s), want code %s", err, switchback.CodeOf(err), code)
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("error %q does not say %q", err, text)
		}
	}
}

func TestIdentity(t *testing.T) {
	for _, id := range []Identity{serverID, agentID, adminID} {
		got, err := ParseIdentity(id.URI())
		if err != nil || got != id {
			t.Errorf("%s: %+v, %v", id, got, err)
		}
	}
	if s := agentID.String(); s != "spiffe://lab/agent/east/a-1" {
		t.Errorf("agent is %s", s)
	}
	for _, bad := range []string{
		"https://lab/server/x", "spiffe://lab/server", "spiffe://lab/server/a/b", "spiffe://lab/agent/a-1", "spiffe://lab/root/x",
		"spiffe:///server/x", "spiffe://LAB/server/x", "spiffe://lab/agent/east/..", "spiffe://lab/agent//a", "spiffe://u@lab/server/x",
		"spiffe://lab/server/x?y", "spiffe://lab/agent/east/a%2Fb", "spiffe://lab:1/server/x",
	} {
		u, err := url.Parse(bad)
		if err != nil {
			t.Fatal(err)
		}
		if id, err := ParseIdentity(u); err == nil {
			t.Errorf("%s is taken for %+v", bad, id)
		}
	}
}

func TestMutualTLS(t *testing.T) {
	ca, other, twin := newCA(t, "lab"), newCA(t, "prod"), newCA(t, "lab")
	address := serve(t, issue(t, ca, serverID, time.Hour), whoami)
	otherAddress := serve(t, issue(t, other, Identity{Installation: "prod", Role: RoleServer, ID: "srv-1"}, time.Hour), whoami)
	agent := issue(t, ca, agentID, time.Hour)

	id, err := ask(t, agent, AnyServer, address)
	if err != nil || id != agentID {
		t.Fatalf("server saw %+v, %v", id, err)
	}

	t.Run("client of another installation", func(t *testing.T) {
		stranger := issue(t, other, Identity{Installation: "prod", Role: RoleAgent, Site: "east", ID: "a-1"}, time.Hour)
		insecure := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{
			InsecureSkipVerify:   true,
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &stranger.held.Load().tls, nil },
		}}}
		defer insecure.CloseIdleConnections()
		_, err := Call[Identity](t.Context(), insecure, http.MethodGet, "https://"+address+"/", nil)
		wantError(t, err, switchback.CodeUnauthorized, "signed by another installation", "prod", "lab")
	})
	t.Run("client of another installation of the same name", func(t *testing.T) {
		stranger := issue(t, twin, agentID, time.Hour)
		// It believes our CA, so that only the server can refuse.
		half := *stranger.held.Load()
		half.roots = agent.held.Load().roots
		stranger.held.Store(&half)
		_, err := ask(t, stranger, AnyServer, address)
		wantError(t, err, switchback.CodeUnauthorized, "another installation of the same name")
	})
	t.Run("server of another installation", func(t *testing.T) {
		_, err := ask(t, agent, AnyServer, otherAddress)
		wantError(t, err, switchback.CodeUnauthorized, "signed by another installation", otherAddress, "prod")
	})
	t.Run("server is not the agent wanted", func(t *testing.T) {
		_, err := ask(t, agent, Agent("a-2"), address)
		wantError(t, err, switchback.CodeUnauthorized, "not agent a-2", address)
	})
	t.Run("server must be a server", func(t *testing.T) {
		_, err := ask(t, agent, AnyServer, serve(t, agent, whoami))
		wantError(t, err, switchback.CodeUnauthorized, "not of role")
	})
	t.Run("expired client", func(t *testing.T) {
		_, err := ask(t, issue(t, ca, agentID, -time.Minute), AnyServer, address)
		wantError(t, err, switchback.CodeUnauthorized, "expired")
	})
	t.Run("expired server", func(t *testing.T) {
		_, err := ask(t, agent, AnyServer, serve(t, issue(t, ca, serverID, -time.Minute), whoami))
		wantError(t, err, switchback.CodeUnauthorized, "expired")
	})
	t.Run("no certificate", func(t *testing.T) {
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
		defer client.CloseIdleConnections()
		_, err := Call[Identity](t.Context(), client, http.MethodGet, "https://"+address+"/", nil)
		wantError(t, err, switchback.CodeUnauthorized, "no certificate")
	})
	t.Run("nobody listens", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		gone := l.Addr().String()
		l.Close()
		_, err = ask(t, agent, AnyServer, gone)
		wantError(t, err, switchback.CodeUnavailable, gone)
	})
	t.Run("old TLS", func(t *testing.T) {
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
		if err == nil {
			conn.Close()
			t.Error("TLS 1.2 is spoken")
		}
	})
	t.Run("HTTP/2 is offered, bulk clients keep to 1.1", func(t *testing.T) {
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if p := conn.ConnectionState().NegotiatedProtocol; p != "h2" {
			t.Errorf("protocol is %q", p)
		}
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+address+"/", nil)
		client := NewHTTPClient(ClientConfig{Credentials: agent})
		defer client.CloseIdleConnections()
		resp, err := Do(client, req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.ProtoMajor != 1 {
			t.Errorf("bulk client speaks %s", resp.Proto)
		}
	})
}

func TestRequireRole(t *testing.T) {
	ca := newCA(t, "lab")
	address := serve(t, issue(t, ca, serverID, time.Hour), RequireRole(whoami, RoleAdmin, RoleServer))
	if _, err := ask(t, issue(t, ca, adminID, time.Hour), nil, address); err != nil {
		t.Error(err)
	}
	_, err := ask(t, issue(t, ca, agentID, time.Hour), nil, address)
	wantError(t, err, switchback.CodeUnauthorized, "spiffe://lab/agent/east/a-1 may not do this", "admin")

	// Without Authenticate in front nobody is let through.
	w := httptest.NewRecorder()
	RequireRole(whoami, RoleAdmin).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusForbidden {
		t.Errorf("status is %d", w.Code)
	}
}

// TestRenewal: both sides get new certificates while client and server live on.
func TestRenewal(t *testing.T) {
	ca := newCA(t, "lab")
	serverCreds, agentCreds := issue(t, ca, serverID, time.Hour), issue(t, ca, agentID, time.Hour)
	serials := make(chan string, 1)
	address := serve(t, serverCreds, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		serials <- r.TLS.PeerCertificates[0].SerialNumber.Text(16)
		WriteJSON(w, http.StatusOK, struct{}{})
	}))
	client := NewHTTPClient(ClientConfig{Credentials: agentCreds, Want: AnyServer})
	defer client.CloseIdleConnections()
	call := func() (server, agent string) {
		t.Helper()
		req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+address+"/", nil)
		resp, err := Do(client, req)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		return resp.TLS.PeerCertificates[0].SerialNumber.Text(16), <-serials
	}
	for range 3 {
		if server, agent := call(); server != serverCreds.Serial() || agent != agentCreds.Serial() {
			t.Fatalf("serials are %s and %s, want %s and %s", server, agent, serverCreds.Serial(), agentCreds.Serial())
		}
		for _, c := range []*Credentials{serverCreds, agentCreds} {
			was := c.Serial()
			if err := c.Replace(issue(t, ca, c.Identity(), 2*time.Hour)); err != nil {
				t.Fatal(err)
			}
			if c.Serial() == was {
				t.Fatal("serial did not change")
			}
		}
	}
	wantError(t, agentCreds.Replace(serverCreds), switchback.CodeInvalid)

	c := issue(t, ca, agentID, 3*time.Hour-backdate)
	if got := time.Until(c.RenewAt()); got < 110*time.Minute-backdate || got > 2*time.Hour-backdate {
		t.Errorf("renewal in %v", got)
	}
	if got := time.Until(c.Expires()); got > 3*time.Hour || got < 2*time.Hour {
		t.Errorf("expires in %v", got)
	}
}

func TestStoredOnDisk(t *testing.T) {
	dir := t.TempDir()
	_, err := OpenCA(dir)
	wantError(t, err, switchback.CodeNotFound)
	_, err = LoadCredentials(dir)
	wantError(t, err, switchback.CodeNotFound)
	_, err = CreateCA(dir, "Not Valid")
	wantError(t, err, switchback.CodeInvalid)
	ca, err := CreateCA(dir, "lab")
	if err != nil {
		t.Fatal(err)
	}
	_, err = CreateCA(dir, "lab")
	wantError(t, err, switchback.CodeConflict)
	again, err := OpenCA(dir)
	if err != nil || again.Fingerprint() != ca.Fingerprint() || again.Installation() != "lab" {
		t.Fatalf("opened CA is %+v, %v", again, err)
	}
	c := issue(t, again, agentID, time.Hour)
	if err := SaveCredentials(dir, c); err != nil {
		t.Fatal(err)
	}
	loaded, err := LoadCredentials(dir)
	if err != nil {
		t.Fatal(err)
	}
	if loaded.Identity() != agentID || loaded.Serial() != c.Serial() || !bytes.Equal(loaded.CAPEM(), ca.CertificatePEM()) {
		t.Errorf("loaded %+v", loaded.Identity())
	}
	for _, name := range []string{caFile, credentialsFile} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	for _, name := range []string{caFile, credentialsFile} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("garbage"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, err = OpenCA(dir)
	wantError(t, err, switchback.CodeCorrupt)
	_, err = LoadCredentials(dir)
	wantError(t, err, switchback.CodeCorrupt)
}

func TestSignRefuses(t *testing.T) {
	ca := newCA(t, "lab")
	keyPEM, csr, err := NewKeyAndCSR()
	if err != nil {
		t.Fatal(err)
	}
	_, err = ca.Sign(csr, Identity{Installation: "prod", Role: RoleServer, ID: "x"}, time.Hour)
	wantError(t, err, switchback.CodeInvalid, "not of installation")
	_, err = ca.Sign(csr, Identity{Installation: "lab", Role: RoleAgent, ID: "x"}, time.Hour)
	wantError(t, err, switchback.CodeInvalid, "site")
	_, err = ca.Sign([]byte("x"), serverID, time.Hour)
	wantError(t, err, switchback.CodeInvalid)

	// A request whose signature is broken proves nothing.
	body := bytes.ReplaceAll(csr, []byte("\n"), nil)
	start, end := len("-----BEGIN CERTIFICATE REQUEST-----"), bytes.Index(body, []byte("-----END"))
	der, err := base64.StdEncoding.DecodeString(string(body[start:end]))
	if err != nil {
		t.Fatal(err)
	}
	der[len(der)-1] ^= 1
	broken := "-----BEGIN CERTIFICATE REQUEST-----\n" + base64.StdEncoding.EncodeToString(der) + "\n-----END CERTIFICATE REQUEST-----\n"
	_, err = ca.Sign([]byte(broken), serverID, time.Hour)
	wantError(t, err, switchback.CodeUnauthorized, "not signed by the key")

	// Another key than the certificate's, another CA.
	cert, err := ca.Sign(csr, agentID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	otherKey, _, err := NewKeyAndCSR()
	if err != nil {
		t.Fatal(err)
	}
	_, err = NewCredentials(cert, otherKey, ca.CertificatePEM())
	wantError(t, err, switchback.CodeInvalid, "key")
	_, err = NewCredentials(cert, keyPEM, newCA(t, "lab").CertificatePEM())
	wantError(t, err, switchback.CodeInvalid, "CA")
	serial, expires, err := CertificateInfo(cert)
	if err != nil || serial == "" || time.Until(expires) > time.Hour {
		t.Errorf("info: %s %s %v", serial, expires, err)
	}
}

// joinServer is what the server's handler does with these types, with one token.
type joinServer struct {
	ca      *CA
	hash    string
	expires time.Time
	saw     []JoinRequest
}

func (s *joinServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var req JoinRequest
	if err := ReadJSON(r, &req); err != nil {
		WriteError(w, err)
		return
	}
	s.saw = append(s.saw, req)
	if err := VerifySecret(req.Secret, s.hash, s.expires, time.Now()); err != nil {
		WriteError(w, err)
		return
	}
	id, err := AgentIDFor([]byte(req.CSRPEM))
	if err != nil {
		WriteError(w, err)
		return
	}
	cert, err := s.ca.Sign([]byte(req.CSRPEM), Identity{Installation: s.ca.Installation(), Role: RoleAgent, Site: "east", ID: string(id)}, time.Hour)
	if err != nil {
		WriteError(w, err)
		return
	}
	WriteJSON(w, http.StatusOK, JoinResponse{CertificatePEM: string(cert), CAPEM: string(s.ca.CertificatePEM())})
}

func TestJoin(t *testing.T) {
	ca := newCA(t, "lab")
	handler := &joinServer{ca: ca}
	mux := http.NewServeMux()
	mux.Handle("POST "+JoinPath, handler)
	mux.Handle("/", whoami)
	address := serve(t, issue(t, ca, serverID, time.Hour), mux)
	impostorCA := newCA(t, "lab")
	impostor := &joinServer{ca: impostorCA}
	impostorAddress := serve(t, issue(t, impostorCA, serverID, time.Hour), impostor)
	agentAddress := serve(t, issue(t, ca, agentID, time.Hour), impostor) // of this installation, but no server

	mint := func(ttl time.Duration, servers ...string) Token {
		token := MintToken(servers, ca.Fingerprint(), "east", time.Now().Add(ttl))
		handler.hash, handler.expires = HashSecret(token.Secret), token.ExpiresAt
		return token
	}
	keyPEM, csr, err := NewKeyAndCSR()
	if err != nil {
		t.Fatal(err)
	}
	info := AgentInfo{Address: "10.0.0.1:7443", Version: "1.0", Hostname: "east-1"}
	join := func(token string) (JoinResponse, error) { return Join(t.Context(), token, csr, info) }

	t.Run("good, the first server is away", func(t *testing.T) {
		token := mint(time.Hour, "127.0.0.1:1", address)
		resp, err := join(" " + token.String() + "\n")
		if err != nil {
			t.Fatal(err)
		}
		if resp.Server != address {
			t.Errorf("answered by %s", resp.Server)
		}
		if diff := cmp.Diff(info, handler.saw[0].Agent); diff != "" {
			t.Errorf("agent info:\n%s", diff)
		}
		c, err := NewCredentials([]byte(resp.CertificatePEM), keyPEM, []byte(resp.CAPEM))
		if err != nil {
			t.Fatal(err)
		}
		id, err := ask(t, c, AnyServer, address)
		if err != nil || id != c.Identity() || id.Site != "east" {
			t.Errorf("joined as %+v, %v", id, err)
		}
		again, err := join(token.String())
		if err != nil {
			t.Fatal(err)
		}
		c2, err := NewCredentials([]byte(again.CertificatePEM), keyPEM, []byte(again.CAPEM))
		if err != nil || c2.Identity() != c.Identity() {
			t.Errorf("joined again as %+v, %v", c2.Identity(), err)
		}
	})
	t.Run("expired at the agent", func(t *testing.T) {
		handler.saw = nil
		_, err := join(mint(-time.Minute, address).String())
		wantError(t, err, switchback.CodeUnauthorized, "expired")
		if len(handler.saw) != 0 {
			t.Error("the server was asked")
		}
	})
	t.Run("expired at the server", func(t *testing.T) {
		token := mint(time.Hour, address)
		handler.expires = time.Now()
		_, err := join(token.String())
		wantError(t, err, switchback.CodeUnauthorized, "expired")
	})
	t.Run("wrong secret", func(t *testing.T) {
		token := mint(time.Hour, address)
		handler.hash = HashSecret("another")
		_, err := join(token.String())
		wantError(t, err, switchback.CodeUnauthorized, "unknown join token")
	})
	t.Run("tampered secret", func(t *testing.T) {
		token := mint(time.Hour, address)
		token.Secret = strings.ToUpper(token.Secret)
		_, err := join(token.String())
		wantError(t, err, switchback.CodeUnauthorized, "unknown join token")
	})
	for name, server := range map[string]string{"impostor": impostorAddress, "agent posing as server": agentAddress} {
		t.Run(name, func(t *testing.T) {
			_, err := join(mint(time.Hour, server).String())
			wantError(t, err, switchback.CodeUnauthorized, server)
			if len(impostor.saw) != 0 {
				t.Error("the secret was sent")
			}
		})
	}
	t.Run("tampered fingerprint", func(t *testing.T) {
		token := mint(time.Hour, address)
		token.CA = impostorCA.Fingerprint()
		_, err := join(token.String())
		wantError(t, err, switchback.CodeUnauthorized, "does not belong to the installation")
	})
	t.Run("nobody there", func(t *testing.T) {
		_, err := join(mint(time.Hour, "127.0.0.1:1").String())
		wantError(t, err, switchback.CodeUnavailable, "127.0.0.1:1")
	})
	t.Run("damaged text", func(t *testing.T) {
		text := mint(time.Hour, address).String()
		for _, bad := range []string{"", "sbjoin1.", text[:len(text)-9], "sbjoin2." + text[8:], text[:20] + "!" + text[21:], "sbjoin1." + base64.RawURLEncoding.EncodeToString([]byte("{}"))} {
			_, err := join(bad)
			wantError(t, err, switchback.CodeInvalid, "join token")
		}
	})
}

// TestErrorsSurviveTheWire sends one error of each code through a server.
func TestErrorsSurviveTheWire(t *testing.T) {
	for code := range status {
		sent := &switchback.Error{Code: code, Op: "agent.Begin", Message: "no room, 3 % left", Hint: "free some"}
		w := httptest.NewRecorder()
		WriteError(w, sent)
		resp := w.Result()
		if resp.StatusCode != StatusOf(code) || resp.StatusCode < 400 || resp.Header.Get("Content-Type") != problemType {
			t.Errorf("%s: %s %s", code, resp.Status, resp.Header.Get("Content-Type"))
		}
		if diff := cmp.Diff(error(sent), ReadError(resp)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", code, diff)
		}
	}
	for _, c := range []struct {
		err  error
		want *switchback.Error
	}{
		{fmt.Errorf("read segment 3: %w", switchback.Errorf(switchback.CodeCorrupt, "bad checksum").WithHint("verify")),
			&switchback.Error{Code: switchback.CodeCorrupt, Message: "read segment 3: bad checksum", Hint: "verify"}},
		{&switchback.Error{Code: switchback.CodeTimeout, Message: "freeze", Err: io.EOF}, &switchback.Error{Code: switchback.CodeTimeout, Message: "freeze: EOF"}},
		{switchback.Errorf(switchback.CodeTimeout, "freeze: %w", io.EOF), &switchback.Error{Code: switchback.CodeTimeout, Message: "freeze: EOF"}},
		{io.ErrUnexpectedEOF, &switchback.Error{Code: switchback.CodeInternal, Message: "unexpected EOF"}},
		{context.DeadlineExceeded, &switchback.Error{Code: switchback.CodeTimeout, Message: "context deadline exceeded"}},
	} {
		w := httptest.NewRecorder()
		WriteError(w, c.err)
		if diff := cmp.Diff(error(c.want), ReadError(w.Result())); diff != "" {
			t.Errorf("%v (-want +got):\n%s", c.err, diff)
		}
	}
}

func TestAnswersWithoutProblem(t *testing.T) {
	for code, want := range map[int]switchback.Code{404: switchback.CodeUnsupported, 502: switchback.CodeUnavailable, 500: switchback.CodeInternal, 403: switchback.CodeUnauthorized} {
		w := httptest.NewRecorder()
		http.Error(w, "oops", code)
		wantError(t, ReadError(w.Result()), want, "oops")
	}
}

func TestReadJSON(t *testing.T) {
	type body struct{ Name string }
	for _, c := range []struct {
		text string
		want switchback.Code
	}{
		{`{"Name":"x"}`, ""},
		{`{"Name":"x","Extra":1}`, switchback.CodeInvalid},
		{`{"Name":"x"}{}`, switchback.CodeInvalid},
		{`{"Name":`, switchback.CodeInvalid},
		{``, switchback.CodeInvalid},
		{`{"Name":"` + strings.Repeat("x", MaxRequestBytes) + `"}`, switchback.CodeInvalid},
	} {
		var b body
		err := ReadJSON(httptest.NewRequest(http.MethodPost, "/", strings.NewReader(c.text)), &b)
		if switchback.CodeOf(err) != c.want || c.want == "" && b.Name != "x" {
			t.Errorf("%.40q: %v, %+v", c.text, err, b)
		}
	}
}

func TestCall(t *testing.T) {
	ca := newCA(t, "lab")
	mux := http.NewServeMux()
	mux.HandleFunc("POST /echo", func(w http.ResponseWriter, r *http.Request) {
		var v map[string]any
		if err := ReadJSON(r, &v); err != nil {
			WriteError(w, err)
			return
		}
		WriteJSON(w, http.StatusCreated, v)
	})
	mux.HandleFunc("/empty", func(w http.ResponseWriter, r *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("/slow", func(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	mux.HandleFunc("/broken", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = w.Write([]byte("{"))
	})
	mux.HandleFunc("/garbage", func(w http.ResponseWriter, r *http.Request) { _, _ = w.Write([]byte("hello")) })
	address := serve(t, issue(t, ca, serverID, time.Hour), mux)
	client := NewHTTPClient(ClientConfig{Credentials: issue(t, ca, agentID, time.Hour)})
	defer client.CloseIdleConnections()
	base := "https://" + address

	type answer struct{ A int }
	got, err := Call[answer](t.Context(), client, http.MethodPost, base+"/echo", map[string]int{"A": 3, "New": 4})
	if err != nil || got.A != 3 {
		t.Errorf("echo: %+v, %v", got, err)
	}
	if _, err := Call[struct{}](t.Context(), client, http.MethodPost, base+"/echo", json.RawMessage(`{}`)); err != nil {
		t.Error(err)
	}
	if _, err := Call[answer](t.Context(), client, http.MethodGet, base+"/empty", nil); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = Call[answer](ctx, client, http.MethodGet, base+"/slow", nil)
	wantError(t, err, switchback.CodeTimeout, address)
	ctx, cancel = context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	_, err = Call[answer](ctx, client, http.MethodGet, base+"/slow", nil)
	wantError(t, err, switchback.CodeCancelled)
	_, err = Call[answer](t.Context(), client, http.MethodGet, base+"/broken", nil)
	wantError(t, err, switchback.CodeUnavailable, address)
	_, err = Call[answer](t.Context(), client, http.MethodGet, base+"/garbage", nil)
	wantError(t, err, switchback.CodeCorrupt, address)
	_, err = Call[answer](t.Context(), client, http.MethodGet, base+"/none", nil)
	wantError(t, err, switchback.CodeUnsupported, "404")
}

func FuzzParseToken(f *testing.F) {
	f.Add(MintToken([]string{"a:1"}, strings.Repeat("ab", 32), "east", time.Unix(1e9, 0)).String())
	f.Add("sbjoin1.e30")
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken(text)
		if err != nil {
			return
		}
		again, err := ParseToken(token.String())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(token, again); diff != "" {
			t.Error(diff)
		}
	})
}

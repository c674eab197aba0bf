package server

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/transport"
)

var (
	// rawRoute finds what is served past the registry of people's requests.
	rawRoute = regexp.MustCompile(`mux\.Handle\("((?:GET|POST|PUT|PATCH|DELETE) /[^"]+)", `)
	wildcard = regexp.MustCompile(`\{[^}]*\}`)
)

// servedRoutes are all patterns that the server answers.
func servedRoutes(t *testing.T, s *Server) []string {
	t.Helper()
	list := append(slices.Collect(maps.Keys(s.routes().known)), "POST "+transport.JoinPath, "POST "+transport.DialInPath)
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range rawRoute.FindAllStringSubmatch(string(text), -1) {
			list = append(list, m[1])
		}
	}
	if len(list) < 40 {
		t.Fatalf("only %d routes found: %v", len(list), list)
	}
	return list
}

// TestCallers is the table of calls and callers. A call that is not named here
// is the administrator's alone.
func TestCallers(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	issue := func(id transport.Identity) *transport.Credentials {
		c, err := f.s.ca.Issue(id, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	installation := f.s.ca.Installation()
	agent := func(site switchback.SiteID, id string) transport.Identity {
		return transport.Identity{Installation: installation, Role: transport.RoleAgent, Site: site, ID: id}
	}
	strange, err := transport.NewCA(installation)
	if err != nil {
		t.Fatal(err)
	}
	impostor, err := strange.Issue(agent("berlin", "a-berlin"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	callers := map[string]*transport.Credentials{
		"agent":         issue(agent("berlin", "a-berlin")),
		"moved agent":   issue(agent("riga", "a-berlin")), // its record says berlin
		"gone agent":    issue(agent("berlin", "a-gone")),
		"revoked agent": issue(agent("riga", "a-riga")),
		"impostor":      impostor,
		"server":        f.s.creds,
		"administrator": issue(transport.Identity{Installation: installation, Role: transport.RoleAdmin, ID: "admin"}),
		"nobody":        nil,
	}
	admin := issue(transport.Identity{Installation: installation, Role: transport.RoleAdmin, ID: "admin"})

	srv := transport.NewHTTPServer(f.s.creds, f.s.handler(), slog.New(slog.DiscardHandler))
	ln, err := transport.Listen(ctx, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go srv.ServeTLS(ln, "", "")
	defer srv.Close()
	address := ln.Addr().String()
	call := func(c *transport.Credentials, route, body string) error {
		method, path, _ := strings.Cut(wildcard.ReplaceAllString(route, "x"), " ")
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, method, "https://"+address+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		client := unbelieving(nil)
		if c != nil {
			client = transport.NewHTTPClient(transport.ClientConfig{Credentials: c})
			if c == impostor { // it would not believe the server, either
				client = unbelieving(c)
			}
		}
		defer client.CloseIdleConnections()
		resp, err := transport.Do(client, req)
		if err == nil {
			_, err = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
		return err
	}
	if _, err := transport.Call[struct{}](ctx, transport.NewHTTPClient(transport.ClientConfig{Credentials: admin}), http.MethodPost,
		"https://"+address+"/v1/agents/a-riga/revoke", struct{}{}); err != nil {
		t.Fatal(err)
	}

	everybody := []string{"agent", "moved agent", "gone agent", "server", "administrator", "nobody"}
	allowed := map[string][]string{
		"POST " + transport.JoinPath:   everybody,
		"GET /v1/openapi.yaml":         everybody,
		"GET /v1/openapi.json":         everybody,
		"GET /docs":                    everybody,
		"GET /v1/login":                everybody,
		"POST /v1/login":               everybody,
		"POST " + transport.DialInPath: {"agent"},
		"POST /v1/agents/report":       {"agent"},
		"POST /v1/agents/renew":        {"agent"},
		"POST /v1/agents/ownership":    {"agent"},
	}
	// "not a document" is refused by whatever reads it, after the caller was judged.
	bodies := map[string]string{"POST /v1/agents/report": "{}", "POST /v1/agents/renew": "{}"}
	for _, route := range servedRoutes(t, f.s) {
		may := map[string]bool{}
		for _, who := range allowed[route] {
			may[who] = true
		}
		if allowed[route] == nil {
			may["administrator"] = true
		}
		for who, c := range callers {
			body := bodies[route]
			if body == "" {
				body = "not a document"
			}
			err := call(c, route, body)
			refused := switchback.CodeOf(err) == switchback.CodeUnauthorized
			if refused == may[who] {
				t.Errorf("%s by %s: allowed %t, want %t (%v)", route, who, !refused, may[who], err)
			}
		}
	}
}

// TestAgentSpeaksForItself is what an agent may say in a call that it may make.
func TestAgentSpeaksForItself(t *testing.T) {
	f := newFleet(t)
	report := func(st agentapi.AgentStatus, as transport.Identity) error {
		creds, err := f.s.ca.Issue(as, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		srv := transport.NewHTTPServer(f.s.creds, f.s.handler(), slog.New(slog.DiscardHandler))
		ln, err := transport.Listen(t.Context(), "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		go srv.ServeTLS(ln, "", "")
		defer srv.Close()
		_, err = transport.Call[agentapi.ReportAnswer](t.Context(), transport.NewHTTPClient(transport.ClientConfig{Credentials: creds}), http.MethodPost,
			"https://"+ln.Addr().String()+"/v1/agents/report", st)
		return err
	}
	berlin := transport.Identity{Installation: f.s.ca.Installation(), Role: transport.RoleAgent, Site: "berlin", ID: "a-berlin"}
	if err := report(agentapi.AgentStatus{Address: transport.AgentName("a-riga")}, berlin); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("an agent gives another one's name as its address: %v", err)
	}
	// At the address of another agent it is not taken for that one.
	if err := report(agentapi.AgentStatus{Address: f.agents["riga"].addr}, berlin); err != nil {
		t.Fatal(err)
	}
	if _, err := f.s.agentClient("a-riga").Status(t.Context()); err != nil {
		t.Errorf("riga: %v", err)
	}
	if _, err := f.s.agentClient("a-berlin").Status(t.Context()); switchback.CodeOf(err) != switchback.CodeUnauthorized {
		t.Errorf("berlin at the address of riga: %v", err)
	}
}

// unbelieving is a client that takes any server's certificate, and shows c's; nil = none.
func unbelieving(c *transport.Credentials) *http.Client {
	cfg := &tls.Config{InsecureSkipVerify: true}
	if c != nil {
		cfg = transport.ClientTLS(c, nil)
		cfg.VerifyConnection = nil
	}
	return &http.Client{Transport: &http.Transport{TLSClientConfig: cfg}}
}

// TestMovedPeers: an agent is told the addresses that it has wrong.
func TestMovedPeers(t *testing.T) {
	f := newFleet(t)
	riga := f.agents["riga"].addr
	got, err := f.s.movedPeers(t.Context(), map[switchback.AgentID]string{"a-riga": "old:1", "a-berlin": f.agents["berlin"].addr, "a-gone": "x:1"})
	if err != nil || len(got) != 1 || got["a-riga"] != riga {
		t.Errorf("told %v, %v", got, err)
	}
}

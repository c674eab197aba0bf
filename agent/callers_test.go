package agent

import (
	"context"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/transport"
)

// silent is a hypervisor that answers nothing.
type silent struct{ hypervisor.Hypervisor }

func (silent) Host(context.Context) (hypervisor.Host, error) {
	return hypervisor.Host{}, switchback.Errorf(switchback.CodeUnavailable, "silent")
}

func (silent) Domains(context.Context) ([]hypervisor.Domain, error) {
	return nil, switchback.Errorf(switchback.CodeUnavailable, "silent")
}

var (
	routePattern = regexp.MustCompile(`"((?:GET|POST|PUT|PATCH|DELETE) /v1/[^"]*)"`)
	wildcard     = regexp.MustCompile(`\{[^}]*\}`)
)

// TestCallers is the table of calls and callers. A call that is not named here
// is a server's alone. The agent is the target of p-1, whose source is a-peer.
func TestCallers(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	routes := []string{"POST " + transport.DialInPath}
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range routePattern.FindAllStringSubmatch(string(text), -1) {
			if !strings.Contains(m[1], " /v1/local") { // on a socket of the host
				routes = append(routes, m[1])
			}
		}
	}
	if len(routes) < 10 {
		t.Fatalf("only %d routes found: %v", len(routes), routes)
	}

	ca, err := transport.NewCA("sb-test")
	if err != nil {
		t.Fatal(err)
	}
	strange, err := transport.NewCA("sb-test")
	if err != nil {
		t.Fatal(err)
	}
	issue := func(ca *transport.CA, role transport.Role, site switchback.SiteID, id string) *transport.Credentials {
		c, err := ca.Issue(transport.Identity{Installation: "sb-test", Role: role, Site: site, ID: id}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	own := issue(ca, transport.RoleAgent, "riga", "a-own")
	callers := map[string]*transport.Credentials{
		"peer":                    issue(ca, transport.RoleAgent, "berlin", "a-peer"),
		"peer of another site":    issue(ca, transport.RoleAgent, "oslo", "a-peer"),
		"neighbour of the peer":   issue(ca, transport.RoleAgent, "berlin", "a-neighbour"),
		"neighbour":               issue(ca, transport.RoleAgent, "riga", "a-beside"),
		"revoked peer":            issue(ca, transport.RoleAgent, "berlin", "a-revoked"),
		"impostor of the peer":    issue(strange, transport.RoleAgent, "berlin", "a-peer"),
		"impostor of the server":  issue(strange, transport.RoleServer, "", "server"),
		"server":                  issue(ca, transport.RoleServer, "", "server"),
		"administrator":           issue(ca, transport.RoleAdmin, "", "admin"),
		"the agent's own replica": own,
	}
	dir := t.TempDir()
	a, err := New(Config{StateDir: dir, RunDir: filepath.Join("/tmp", filepath.Base(filepath.Dir(dir))), Address: "127.0.0.1:1", Credentials: own, Hypervisor: silent{}, Executable: "none"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(a.cfg.RunDir) })
	own.Revoke([]switchback.AgentID{"a-revoked"})
	ctx, cancel := context.WithCancel(t.Context())
	a.tasks = &taskTable{ctx: ctx, tasks: map[string]*task{}}
	defer func() { cancel(); a.tasks.wg.Wait() }()
	for id, peer := range map[switchback.ProtectionID]switchback.AgentID{"p-1": "a-peer", "p-2": "a-revoked"} {
		a.ensureVM(id).a = Assignment{Protection: id, Epoch: 1, Role: agentapi.RoleTarget, Peer: agentapi.Peer{Agent: peer, Site: "berlin"}}
	}
	srv := transport.NewHTTPServer(own, a.handler(), slog.New(slog.DiscardHandler))
	ln, err := transport.Listen(ctx, "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go srv.ServeTLS(ln, "", "")
	defer srv.Close()

	for _, route := range routes {
		may := map[string]bool{"server": true}
		protection := "p-1"
		switch {
		case route == "POST "+transport.DialInPath:
			may["peer"] = true
		case strings.Contains(route, "/v1/replicas/"), route == "POST /v1/ownership":
			may = map[string]bool{"peer": true}
		}
		for who, c := range callers {
			if who == "revoked peer" {
				protection = "p-2"
			} else {
				protection = "p-1"
			}
			method, path, _ := strings.Cut(wildcard.ReplaceAllString(strings.ReplaceAll(route, "{protection}", protection), "x"), " ")
			req, err := http.NewRequestWithContext(ctx, method, "https://"+ln.Addr().String()+path, strings.NewReader("not a document"))
			if err != nil {
				t.Fatal(err)
			}
			tls := transport.ClientTLS(c, nil)
			tls.VerifyConnection = nil // an impostor does not believe this agent
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: tls}}
			resp, err := transport.Do(client, req)
			if err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
			}
			client.CloseIdleConnections()
			if refused := switchback.CodeOf(err) == switchback.CodeUnauthorized; refused == may[who] {
				t.Errorf("%s by %s: allowed %t, want %t (%v)", route, who, !refused, may[who], err)
			}
		}
	}
}

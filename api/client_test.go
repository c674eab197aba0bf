package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/transport"
)

func serve(t *testing.T, h http.HandlerFunc) *Client {
	t.Helper()
	srv := httptest.NewTLSServer(h)
	t.Cleanup(srv.Close)
	return &Client{http: srv.Client(), server: strings.TrimPrefix(srv.URL, "https://")}
}

// sendEvent sends an operation, or with an ID a line of its log.
func sendEvent(t *testing.T, w http.ResponseWriter, id string, v any) {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	if id == "" {
		fmt.Fprintf(w, "event: operation\ndata: %s\n\n", data)
		return
	}
	fmt.Fprintf(w, "event: log\nid: %s\ndata: %s\n\n", id, data)
}

// TestWatch: a stream that breaks is asked for again, until the operation has ended.
func TestWatch(t *testing.T) {
	streams := [][]operation.State{
		{operation.StateQueued, operation.StateRunning},
		{operation.StateRunning, operation.StateSucceeded, operation.StateRunning}, // nothing after the end counts
	}
	asked := 0
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/operations/op-1/events" {
			t.Errorf("asked for %s", r.URL.Path)
		}
		if asked == 1 && r.Header.Get("Last-Event-ID") != "2" {
			t.Errorf("the stream goes on after %q", r.Header.Get("Last-Event-ID"))
		}
		fmt.Fprint(w, ": alive\n\n")
		for i, s := range streams[asked] {
			sendEvent(t, w, "", operation.Record{ID: "op-1", State: s})
			sendEvent(t, w, fmt.Sprint(2*asked+i+1), operation.LogLine{Sequence: int64(2*asked + i + 1)})
		}
		asked++
	})
	var seen []operation.State
	var lines []int64
	err := c.Watch(context.Background(), "op-1", func(r operation.Record) { seen = append(seen, r.State) },
		func(l operation.LogLine) { lines = append(lines, l.Sequence) })
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]int64{1, 2, 3}, lines); d != "" {
		t.Error(d)
	}
	want := []operation.State{operation.StateQueued, operation.StateRunning, operation.StateRunning, operation.StateSucceeded}
	if d := cmp.Diff(want, seen); d != "" {
		t.Error(d)
	}
}

func TestWatchErrors(t *testing.T) {
	away := 0
	c := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		if away++; away == 1 { // a restart is waited for
			transport.WriteError(w, switchback.Errorf(switchback.CodeUnavailable, "starting"))
			return
		}
		transport.WriteError(w, switchback.Errorf(switchback.CodeNotFound, "no operation op-1"))
	})
	err := c.Watch(context.Background(), "op-1", func(operation.Record) { t.Error("an operation was seen") })
	if switchback.CodeOf(err) != switchback.CodeNotFound || away != 2 {
		t.Errorf("error %v after %d requests", err, away)
	}
	ctx, cancel := context.WithCancel(context.Background())
	c = serve(t, func(w http.ResponseWriter, _ *http.Request) {
		cancel()
		transport.WriteError(w, switchback.Errorf(switchback.CodeUnavailable, "away"))
	})
	if err := c.Watch(ctx, "op-1", nil); err != context.Canceled {
		t.Errorf("cancelled: %v", err)
	}
}

// TestPaths: names are escaped, and each method asks for what it says.
func TestPaths(t *testing.T) {
	var got string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		got = r.Method + " " + r.URL.RequestURI()
		transport.WriteJSON(w, http.StatusOK, struct{}{})
	})
	ctx := context.Background()
	for want, call := range map[string]func() error{
		"GET /v1/vms/a%2Fb":                                 func() error { _, err := c.VM(ctx, "a/b"); return err },
		"GET /v1/vms/a%2Fb/points?limit=1000":               func() error { _, err := c.Points(ctx, "a/b"); return err },
		"POST /v1/vms/web/operations/take-point":            func() error { _, err := c.Request(ctx, "web", "take-point", OperationRequest{}); return err },
		"DELETE /v1/sites/x%20y":                            func() error { return c.DeleteSite(ctx, "x y") },
		"POST /v1/sites/x/tokens":                           func() error { _, err := c.MintToken(ctx, "x", 1); return err },
		"GET /v1/operations?limit=3&unfinished=true&vm=a+b": func() error { _, err := c.Operations(ctx, "a b", true, 3); return err },
		"GET /v1/operations/op-1/log?after=7&limit=1000":    func() error { _, err := c.OperationLog(ctx, "op-1", 7); return err },
		"POST /v1/operations/op-1/cancel":                   func() error { return c.CancelOperation(ctx, "op-1") },
		"POST /v1/operations/op-1/retry":                    func() error { return c.RetryOperation(ctx, "op-1") },
	} {
		if err := call(); err != nil {
			t.Errorf("%s: %v", want, err)
		}
		if got != want {
			t.Errorf("asked %s, want %s", got, want)
		}
	}
}

func TestDial(t *testing.T) {
	dir := t.TempDir()
	if _, err := Dial(dir); switchback.CodeOf(err) != switchback.CodeNotFound || !strings.Contains(fmt.Sprint(err), "STATE/admin") {
		t.Errorf("no credentials: %v", err)
	}
	ca, err := transport.CreateCA(filepath.Join(dir, "ca"), "sb-test")
	if err != nil {
		t.Fatal(err)
	}
	creds, err := ca.Issue(transport.Identity{Installation: "sb-test", Role: transport.RoleAdmin, ID: "admin"}, 1e12)
	if err != nil {
		t.Fatal(err)
	}
	if err := transport.SaveCredentials(dir, creds); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(dir); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("no address: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "server"), []byte("host:1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := Dial(dir); err != nil || c.server != "host:1" {
		t.Errorf("dialled %+v, %v", c, err)
	}
}

// TestPages: a list is asked for until it ends, or as much of it as is wanted.
func TestPages(t *testing.T) {
	var asked []string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.RawQuery)
		p := Page[Site]{Items: []Site{{ID: "a"}, {ID: "b"}}, Next: "b"}
		if r.URL.Query().Get("after") != "" {
			p = Page[Site]{Items: []Site{{ID: "c"}}}
		}
		transport.WriteJSON(w, http.StatusOK, p)
	})
	sites, err := c.Sites(context.Background())
	if err != nil || len(sites) != 3 {
		t.Errorf("%v, %v", sites, err)
	}
	if two, err := list[Site](context.Background(), c, "/v1/sites", nil, 2); err != nil || len(two) != 2 {
		t.Errorf("%v, %v", two, err)
	}
	if d := cmp.Diff([]string{"limit=1000", "after=b&limit=1000", "limit=2"}, asked); d != "" {
		t.Error(d)
	}
}

// TestBeginAgain: a request whose answer is lost is sent again under the same
// key; one that was answered is not.
func TestBeginAgain(t *testing.T) {
	var keys []string
	c := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if keys = append(keys, r.Header.Get("Idempotency-Key")); len(keys) == 1 {
			panic(http.ErrAbortHandler)
		}
		if len(keys) > 2 {
			transport.WriteError(w, switchback.Errorf(switchback.CodeUnavailable, "the agent is away"))
			return
		}
		transport.WriteJSON(w, http.StatusOK, OperationAnswer{Operation: &operation.Record{ID: "op-1"}})
	})
	a, err := c.Request(context.Background(), "web", "failover", OperationRequest{})
	if err != nil || a.Operation == nil || len(keys) != 2 || keys[0] == "" || keys[0] != keys[1] {
		t.Errorf("%+v, %v, keys %q", a, err, keys)
	}
	_, err = c.Request(context.Background(), "web", "failover", OperationRequest{})
	if switchback.CodeOf(err) != switchback.CodeUnavailable || len(keys) != 3 || keys[2] == keys[1] {
		t.Errorf("%v, keys %q", err, keys)
	}
}

// TestAnotherServer: what may be repeated goes to another server when the first dies.
func TestAnotherServer(t *testing.T) {
	var first *httptest.Server
	answer := func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			transport.WriteJSON(w, http.StatusOK, OperationAnswer{Operation: &operation.Record{ID: "op-1"}})
			return
		}
		sendEvent(t, w, "", operation.Record{ID: "op-1", State: operation.StateSucceeded})
	}
	for name, ask := range map[string]func(c *Client) error{
		"begin": func(c *Client) error {
			_, err := c.Request(context.Background(), "web", "failover", OperationRequest{})
			return err
		},
		"watch": func(c *Client) error { return c.Watch(context.Background(), "op-1", func(operation.Record) {}) },
	} {
		first = httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			first.Listener.Close() // it takes no connections any more
			panic(http.ErrAbortHandler)
		}))
		t.Cleanup(first.Close)
		second := httptest.NewTLSServer(http.HandlerFunc(answer))
		t.Cleanup(second.Close)
		servers := []string{first.Listener.Addr().String(), second.Listener.Addr().String()}
		if err := ask(&Client{http: first.Client(), server: servers[0], servers: servers}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

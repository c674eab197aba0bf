package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
)

// listen serves the fleet's API over mutual TLS, as Run does.
func (f *fleet) listen() string {
	f.t.Helper()
	ln, err := transport.Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		f.t.Fatal(err)
	}
	srv := transport.NewHTTPServer(f.s.creds, f.s.handler(), slog.New(slog.DiscardHandler))
	go srv.ServeTLS(ln, "", "")
	f.t.Cleanup(func() { srv.Close() })
	return ln.Addr().String()
}

// admin is the client of somebody with a certificate.
func (f *fleet) admin(address string) *api.Client {
	f.t.Helper()
	dir := f.t.TempDir()
	creds, err := f.s.ca.Issue(transport.Identity{Installation: f.s.ca.Installation(), Role: transport.RoleAdmin, ID: "admin"}, time.Hour)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := transport.SaveCredentials(dir, creds); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "server"), []byte(address+"\n"), 0o600); err != nil {
		f.t.Fatal(err)
	}
	c, err := api.Dial(dir)
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

// send sends a request as the administrator, past the client.
func (f *fleet) send(method, path, body string, header ...string) (int, string) {
	f.t.Helper()
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	w := httptest.NewRecorder()
	f.s.handler().ServeHTTP(w, transport.WithIdentity(r, transport.Identity{Installation: "x", Role: transport.RoleAdmin, ID: "admin"}))
	return w.Code, w.Body.String()
}

// TestProblems: each refusal is a problem document, and comes out of the client
// as the error that went in.
func TestProblems(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	c := f.admin(f.listen())
	_, ours := f.ask(recovery.Commit, api.OperationRequest{})
	_, theirs := c.Request(context.Background(), "web", recovery.Commit, api.OperationRequest{})
	if d := cmp.Diff(switchback.Flatten(ours), switchback.Flatten(theirs)); d != "" || switchback.CodeOf(theirs) != switchback.CodeRefused {
		t.Errorf("%v\n%s", theirs, d)
	}
	for _, x := range []struct {
		method, path, body string
		status             int
		code               switchback.Code
		says               string
	}{
		{"GET", "/v1/vms/nobody", "", 404, switchback.CodeNotFound, "nobody"},
		{"POST", "/v1/sites", `{"id":"x","colour":"red"}`, 400, switchback.CodeInvalid, "body.colour"},
		{"POST", "/v1/sites", `{"id":`, 400, switchback.CodeInvalid, "not understood"},
		{"POST", "/v1/sites", `{"id":"a b"}`, 400, switchback.CodeInvalid, "letters"},
		{"POST", "/v1/sites", `{"id":"riga"}`, 409, switchback.CodeConflict, "riga"},
		{"GET", "/v1/vms?limit=0", "", 400, switchback.CodeInvalid, "query.limit"},
		{"GET", "/v1/vms?after=!", "", 400, switchback.CodeInvalid, "after"},
		{"GET", "/v1/nothing", "", 404, switchback.CodeUnsupported, "/v1/nothing"},
		{"DELETE", "/v1/vms", "", 404, switchback.CodeUnsupported, "DELETE"},
		{"GET", "/v1/operations/op-1/events", "", 404, switchback.CodeNotFound, "op-1"},
	} {
		status, body := f.send(x.method, x.path, x.body, transport.RequestIDHeader, "request-1234")
		var p transport.Problem
		if err := json.Unmarshal([]byte(body), &p); err != nil {
			t.Errorf("%s %s: %v in %s", x.method, x.path, err, body)
			continue
		}
		if status != x.status || p.Status != x.status || p.Code != x.code || !strings.Contains(p.Detail, x.says) || p.Type != "urn:switchback:error:"+string(x.code) {
			t.Errorf("%s %s: %d %s", x.method, x.path, status, body)
		}
	}
}

// TestRepeatedRequest: the same key begins one operation, also when that has
// ended; another request cannot have the key.
func TestRepeatedRequest(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.report()
	ask := func(key, body string) (int, api.OperationAnswer) {
		status, text := f.send("POST", "/v1/vms/web/operations/take-point", body, keyHeader, key)
		var a api.OperationAnswer
		if err := json.Unmarshal([]byte(text), &a); err != nil && status == http.StatusOK {
			t.Fatal(err)
		}
		return status, a
	}
	_, first := ask("k1", `{}`)
	if first.Operation == nil {
		t.Fatal("nothing was begun")
	}
	f.wait(first.Operation.ID)
	if status, again := ask("k1", `{}`); status != http.StatusOK || again.Operation == nil || again.Operation.ID != first.Operation.ID || again.Operation.State != operation.StateSucceeded {
		t.Errorf("repeated: %d %+v", status, again.Operation)
	}
	if status, _ := ask("k1", `{"application_consistent":true}`); status != http.StatusConflict {
		t.Errorf("another request with the key: %d", status)
	}
	f.report()
	_, second := ask("k2", `{}`)
	if second.Operation == nil || second.Operation.ID == first.Operation.ID {
		t.Fatalf("another key: %+v", second.Operation)
	}
	f.wait(second.Operation.ID)
	// Two at once: both have passed the look for the first.
	c := asked{id: "r", key: "k3", digest: "d", who: caller{Principal: api.Principal{Name: "admin"}}}
	ctx := context.WithValue(context.Background(), askedKey{}, c)
	one, err := f.s.begin(ctx, operation.Record{Kind: "verify"})
	if err != nil {
		t.Fatal(err)
	}
	if two, err := f.s.begin(ctx, operation.Record{Kind: "verify"}); err != nil || two.ID != one.ID {
		t.Errorf("%s and %s, %v", one.ID, two.ID, err)
	}
	// One that begins several: the key is the first one's.
	c.key, c.keyed = "k4", new(bool)
	ctx = context.WithValue(context.Background(), askedKey{}, c)
	for i, want := range []string{"admin k4", ""} {
		if rec, err := f.s.begin(ctx, operation.Record{Kind: "verify"}); err != nil || rec.Request.Key != want {
			t.Errorf("operation %d has key %q, %v", i, rec.Request.Key, err)
		}
	}
}

// TestListsInPages goes through lists in pages of one, with filters.
func TestListsInPages(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.report()
	if status, body := f.send("PUT", "/v1/vms/web/tags", `{"tags":["gold","db","gold"]}`); status != http.StatusOK || !strings.Contains(body, `["db","gold"]`) {
		t.Errorf("tags: %d %s", status, body)
	}
	for path, want := range map[string]int{
		"/v1/sites?": 2, "/v1/agents?": 2, "/v1/agents?site=riga&": 1, "/v1/vms?": 1, "/v1/vms?tag=gold&": 1, "/v1/vms?tag=red&": 0,
		"/v1/vms?phase=switched&": 0, "/v1/vms?site=riga&": 1, "/v1/vms?health=critical&": 0, "/v1/vms?name=web&": 1,
		"/v1/vms/web/points?": 1, "/v1/operations?": 1, "/v1/operations?unfinished=true&": 0, "/v1/operations?state=succeeded&vm=web&": 1,
		"/v1/operations?kind=failover&": 0, "/v1/machines?": 1, "/v1/machines?protected=false&": 0, "/v1/vms/web/drills?": 0,
	} {
		got, after := 0, ""
		for {
			status, body := f.send("GET", path+"limit=1&after="+after, "")
			var page api.Page[json.RawMessage]
			if err := json.Unmarshal([]byte(body), &page); err != nil || status != http.StatusOK || page.Items == nil {
				t.Fatalf("%s: %d %s", path, status, body)
			}
			got += len(page.Items)
			if after = page.Next; after == "" {
				break
			}
		}
		if got != want {
			t.Errorf("%s has %d, want %d", path, got, want)
		}
	}
}

// TestWatchStream: the operation comes to its end, its log once, in order.
func TestWatchStream(t *testing.T) {
	f := newFleet(t)
	id := f.begin(recovery.Protect, api.OperationRequest{})
	c := f.admin(f.listen())
	var last operation.Record
	var lines []int64
	if err := c.Watch(context.Background(), id, func(r operation.Record) { last = r }, func(l operation.LogLine) { lines = append(lines, l.Sequence) }); err != nil {
		t.Fatal(err)
	}
	if last.State != operation.StateSucceeded || len(lines) == 0 {
		t.Errorf("%s after %d lines", last.State, len(lines))
	}
	for i, n := range lines {
		if n != int64(i+1) {
			t.Errorf("lines %v", lines)
			break
		}
	}
	if _, body := f.send("GET", "/v1/operations/"+string(id)+"/events", "", "Last-Event-ID", fmt.Sprint(len(lines))); strings.Contains(body, "event: log") {
		t.Errorf("lines come again: %s", body)
	}
}

// TestClientFitsDocument calls every method of the client and looks whether the
// document has what it asks for.
func TestClientFitsDocument(t *testing.T) {
	var wants []*regexp.Regexp
	for path, item := range (&Server{}).routes().api.OpenAPI().Paths {
		for method, op := range map[string]any{"GET": item.Get, "POST": item.Post, "PUT": item.Put, "DELETE": item.Delete} {
			if !reflect.ValueOf(op).IsNil() {
				wants = append(wants, regexp.MustCompile("^"+method+" "+regexp.MustCompile(`\{[a-z]+\}`).ReplaceAllString(path, "[^/]+")+"$"))
			}
		}
	}
	f := newFleet(t)
	var asked []string
	ln, err := transport.Listen(context.Background(), "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := transport.NewHTTPServer(f.s.creds, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.Method+" "+r.URL.EscapedPath())
		io.Copy(io.Discard, r.Body)
		transport.WriteError(w, switchback.Errorf(switchback.CodeNotFound, "it is only looked at"))
	}), slog.New(slog.DiscardHandler))
	go srv.ServeTLS(ln, "", "")
	t.Cleanup(func() { srv.Close() })
	c := reflect.ValueOf(f.admin(ln.Addr().String()))
	for i := range c.NumMethod() {
		name, method := c.Type().Method(i).Name, c.Method(i)
		if method.Type().NumIn() == 0 || method.Type().In(0) != reflect.TypeFor[context.Context]() {
			continue
		}
		args := []reflect.Value{reflect.ValueOf(t.Context())}
		for j := 1; j < method.Type().NumIn(); j++ {
			if method.Type().IsVariadic() && j == method.Type().NumIn()-1 {
				break
			}
			v := reflect.New(method.Type().In(j)).Elem()
			if v.Kind() == reflect.String {
				v.SetString("verify") // also a kind of request
			}
			args = append(args, v)
		}
		before := len(asked)
		method.Call(args)
		if len(asked) == before {
			t.Errorf("%s asks for nothing", name)
		}
		for _, a := range asked[before:] {
			fits := false
			for _, w := range wants {
				fits = fits || w.MatchString(a)
			}
			if !fits {
				t.Errorf("%s asks for %s, which is not in the document", name, a)
			}
		}
	}
}

// TestPlainRoute: a route of one line stands in the document and behind the guard.
func TestPlainRoute(t *testing.T) {
	rt := newRoutes(newFleet(t).s)
	rt.admin("POST /v1/vms/{vm}/wave", func(r *http.Request) (any, error) { return r.PathValue("vm"), nil })
	op := rt.api.OpenAPI().Paths["/v1/vms/{vm}/wave"].Post
	if op == nil || len(op.Parameters) != 1 || op.Parameters[0].Name != "vm" {
		t.Fatalf("%+v", op)
	}
	w := httptest.NewRecorder()
	r := httptest.NewRequest("POST", "/v1/vms/web/wave", nil)
	rt.ServeHTTP(w, r)
	if w.Code != http.StatusForbidden {
		t.Errorf("without identity: %d", w.Code)
	}
	w = httptest.NewRecorder()
	rt.ServeHTTP(w, transport.WithIdentity(r, transport.Identity{Role: transport.RoleAdmin, ID: "a"}))
	if w.Code != http.StatusOK || !strings.Contains(w.Body.String(), "web") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

package server

import (
	"context"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// token makes a token and returns a client that uses it over TLS.
func (f *fleet) token(address, person string, role switchback.AccessRole, scope switchback.Scope) (*api.Client, api.NewAPIToken) {
	f.t.Helper()
	t, err := f.s.createAPIToken(context.Background(), "admin", api.APITokenRequest{Person: person, Role: role, Scope: scope, ValidFor: time.Hour})
	if err != nil {
		f.t.Fatal(err)
	}
	t.Servers = []string{address}
	dir := f.t.TempDir()
	if err := api.SaveToken(dir, t); err != nil {
		f.t.Fatal(err)
	}
	c, err := api.Dial(dir)
	if err != nil {
		f.t.Fatal(err)
	}
	return c, t
}

// wantCode wants an error of a code that says all of these; "" wants none.
func wantCode(t *testing.T, what string, err error, code switchback.Code, says ...string) {
	t.Helper()
	if switchback.CodeOf(err) != code {
		t.Errorf("%s: %v", what, err)
		return
	}
	for _, x := range says {
		if !strings.Contains(err.Error(), x) {
			t.Errorf("%s: %v does not say %q", what, err, x)
		}
	}
}

func TestTokens(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	address := f.listen()
	admin := f.admin(address)
	alice, tok := f.token(address, "alice", switchback.Operator, switchback.Scope{})
	who, err := alice.Whoami(ctx)
	if err != nil || who.Name != "alice" || who.Role != switchback.Operator || who.Via != "token "+tok.ID {
		t.Errorf("%+v, %v", who, err)
	}
	kept, err := f.s.store.APIToken(ctx, tok.ID)
	if err != nil || strings.Contains(tok.Token, kept.Hash) || kept.UsedAt.IsZero() {
		t.Errorf("kept %+v, %v", kept, err)
	}
	for name, text := range map[string]string{"damaged": tok.Token + "x", "other ID": "sbapi_000000000000_" + tok.Token[len("sbapi_000000000000_"):], "no token": "x"} {
		if _, err := f.s.tokenCaller(ctx, text); switchback.CodeOf(err) != switchback.CodeUnauthorized || strings.Contains(err.Error(), "alice") {
			t.Errorf("%s: %v", name, err)
		}
	}
	wantCode(t, "revoke", admin.RevokeAPIToken(ctx, tok.ID), "")
	_, err = alice.Whoami(ctx)
	wantCode(t, "revoked", err, switchback.CodeUnauthorized, "revoked", "alice")
	now := time.Now()
	if err := f.s.store.CreateAPIToken(ctx, store.APIToken{ID: "0123456789ab", Hash: transport.HashSecret("s"), Person: "old", Role: switchback.Viewer, ExpiresAt: now.Add(-time.Second)}); err != nil {
		t.Fatal(err)
	}
	_, err = f.s.tokenCaller(ctx, "sbapi_0123456789ab_s")
	wantCode(t, "expired", err, switchback.CodeUnauthorized, "expired")
	list, err := admin.APITokens(ctx, "")
	if err != nil || len(list) != 2 || list[0].State != "revoked" || list[1].State != "expired" {
		t.Errorf("%+v, %v", list, err)
	}
	for name, req := range map[string]api.APITokenRequest{
		"reserved name": {Person: "admin", Role: switchback.Viewer, ValidFor: time.Hour},
		"no role":       {Person: "bob", Role: "root", ValidFor: time.Hour},
		"for ever":      {Person: "bob", Role: switchback.Viewer},
	} {
		_, err := admin.CreateAPIToken(ctx, req)
		wantCode(t, name, err, switchback.CodeInvalid)
	}
}

// TestRoles: each role may do its part, and a refusal says which role is missing.
func TestRoles(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	f.run(recovery.Protect, api.OperationRequest{})
	f.report()
	address := f.listen()
	viewer, _ := f.token(address, "vera", switchback.Viewer, switchback.Scope{})
	operator, _ := f.token(address, "otto", switchback.Operator, switchback.Scope{})
	boss, _ := f.token(address, "ada", switchback.Administrator, switchback.Scope{})
	view := func(c *api.Client) error { _, err := c.VM(ctx, "web"); return err }
	act := func(c *api.Client) error {
		f.report()
		a, err := c.Request(ctx, "web", recovery.TakePoint, api.OperationRequest{})
		if err == nil {
			if rec := f.wait(a.Operation.ID); rec.RequestedBy == "" || rec.RequestedBy == "admin" || rec.Request.ID == "" {
				t.Errorf("asked by %q in %q", rec.RequestedBy, rec.Request.ID)
			}
		}
		return err
	}
	rule := func(c *api.Client) error { _, err := c.APITokens(ctx, ""); return err }
	for _, x := range []struct {
		who              string
		c                *api.Client
		view, act, ruled switchback.AccessRole // the role that is missing
	}{
		{"vera", viewer, "", switchback.Operator, switchback.Administrator},
		{"otto", operator, "", "", switchback.Administrator},
		{"ada", boss, "", "", ""},
	} {
		for what, y := range map[string]struct {
			err  error
			miss switchback.AccessRole
		}{"view": {view(x.c), x.view}, "act": {act(x.c), x.act}, "rule": {rule(x.c), x.ruled}} {
			if y.miss == "" {
				wantCode(t, x.who+" "+what, y.err, "")
				continue
			}
			wantCode(t, x.who+" "+what, y.err, switchback.CodeUnauthorized, x.who, "takes the role "+string(y.miss))
		}
	}
}

// TestEveryRouteIsGuarded: nobody unknown gets anything but the document.
func TestEveryRouteIsGuarded(t *testing.T) {
	f := newFleet(t)
	rt := f.s.routes()
	for pattern := range rt.known {
		method, path, _ := strings.Cut(pattern, " ")
		r := httptest.NewRequest(method, pathParameter.ReplaceAllString(path, "x"), strings.NewReader("{}"))
		w := httptest.NewRecorder()
		rt.ServeHTTP(w, r)
		if w.Code != http.StatusForbidden {
			t.Errorf("%s: %d", pattern, w.Code)
		}
		w = httptest.NewRecorder()
		rt.ServeHTTP(w, transport.WithIdentity(r, transport.Identity{Role: transport.RoleAgent, Site: "riga", ID: "a-riga"}))
		if w.Code != http.StatusForbidden {
			t.Errorf("%s by an agent: %d", pattern, w.Code)
		}
	}
	if len(rt.known) < 20 {
		t.Errorf("only %d routes", len(rt.known))
	}
	if n, err := f.s.store.Audit(t.Context(), store.AuditFilter{}); err != nil || len(n) > 0 {
		t.Errorf("strangers fill the audit log: %v, %v", n, err)
	}
}

// TestScopes: who is limited to a site or a tag sees and moves nothing else.
func TestScopes(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	address := f.listen()
	berlin, _ := f.token(address, "bert", switchback.Operator, switchback.Scope{Sites: []switchback.SiteID{"berlin"}})
	riga, _ := f.token(address, "rita", switchback.Operator, switchback.Scope{Sites: []switchback.SiteID{"riga"}})
	gold, _ := f.token(address, "gerd", switchback.Operator, switchback.Scope{Tags: []string{"gold"}})
	boss, _ := f.token(address, "bea", switchback.Administrator, switchback.Scope{Sites: []switchback.SiteID{"berlin"}})

	f.report()
	_, err := riga.Request(ctx, "web", recovery.Protect, api.OperationRequest{To: "riga"})
	wantCode(t, "protect", err, switchback.CodeUnauthorized, "site berlin", "rita")
	a, err := berlin.Request(ctx, "web", recovery.Protect, api.OperationRequest{To: "riga"})
	if err != nil {
		t.Fatal(err)
	}
	f.wait(a.Operation.ID)
	f.report()

	sees := func(c *api.Client) (s string) {
		vms, err := c.VMs(ctx)
		if err != nil {
			t.Fatal(err)
		}
		ops, err := c.Operations(ctx, "", false, 0)
		if err != nil {
			t.Fatal(err)
		}
		machines, err := c.Machines(ctx)
		if err != nil {
			t.Fatal(err)
		}
		sites, err := c.Sites(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for i, n := range []int{len(vms), len(ops), len(machines), len(sites)} {
			s += strings.Repeat(string("vomS"[i]), n)
		}
		return s
	}
	for _, x := range []struct {
		who  string
		c    *api.Client
		want string
	}{{"bert", berlin, "vomS"}, {"rita", riga, "S"}, {"gerd", gold, ""}} {
		if got := sees(x.c); got != x.want {
			t.Errorf("%s sees %q, want %q", x.who, got, x.want)
		}
	}
	if sites, err := riga.Sites(ctx); err != nil || len(sites) != 1 || sites[0].Agents[0].Status == nil || len(sites[0].Agents[0].Status.VMs) > 0 {
		t.Errorf("rita sees what the agent does for others: %+v, %v", sites, err)
	}
	_, err = riga.VM(ctx, "web")
	wantCode(t, "VM of another site", err, switchback.CodeUnauthorized, "VM web", "site riga")
	_, err = riga.Operation(ctx, a.Operation.ID)
	wantCode(t, "operation of another site", err, switchback.CodeUnauthorized, string(a.Operation.ID))
	wantCode(t, "its events", riga.Watch(ctx, a.Operation.ID, nil), switchback.CodeUnauthorized)
	_, err = gold.Request(ctx, "web", recovery.TakePoint, api.OperationRequest{})
	wantCode(t, "VM without the tag", err, switchback.CodeUnauthorized, "tag gold")
	if _, err := boss.SetTags(ctx, "web", []string{"gold"}); err != nil {
		t.Fatal(err)
	}
	if got := sees(gold); got != "vom" {
		t.Errorf("gerd sees %q of what has the tag", got)
	}
	_, err = gold.Request(ctx, "web", recovery.TakePoint, api.OperationRequest{})
	wantCode(t, "VM with the tag", err, "")
	wantCode(t, "a site as a whole", boss.CreateSite(ctx, "oslo"), switchback.CodeUnauthorized, "installation as a whole")
	_, err = boss.APITokens(ctx, "")
	wantCode(t, "tokens", err, switchback.CodeUnauthorized)
	_, err = boss.MintToken(ctx, "riga", time.Hour)
	wantCode(t, "join token of another site", err, switchback.CodeUnauthorized, "site riga")
	_, err = boss.MintToken(ctx, "berlin", time.Hour)
	wantCode(t, "join token of its site", err, "")
}

// TestAuditOfRequests: who, what, when, outcome, request.
func TestAuditOfRequests(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	address := f.listen()
	admin := f.admin(address)
	vera, _ := f.token(address, "vera", switchback.Viewer, switchback.Scope{})
	f.report()
	a, err := admin.Request(ctx, "web", recovery.Protect, api.OperationRequest{To: "riga"})
	if err != nil {
		t.Fatal(err)
	}
	rec := f.wait(a.Operation.ID)
	f.report()
	_, err = admin.Request(ctx, "web", recovery.Commit, api.OperationRequest{})
	wantCode(t, "commit", err, switchback.CodeRefused)
	_, err = vera.Request(ctx, "web", recovery.Failover, api.OperationRequest{})
	wantCode(t, "failover", err, switchback.CodeUnauthorized)
	if _, err := admin.VMs(ctx); err != nil { // looking is not noted
		t.Fatal(err)
	}
	entries, err := admin.Audit(ctx, api.AuditFilter{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, strings.Join([]string{e.Who, e.Via, e.Action, e.Object, e.Outcome, string(e.Code)}, " "))
		if e.Request == "" || time.Since(e.At).Abs() > time.Minute {
			t.Errorf("%+v", e)
		}
	}
	want := []string{
		"admin certificate request-operation vms/web/operations/protect asked ",
		"admin certificate request-operation vms/web/operations/protect done ",
		"admin certificate request-operation vms/web/operations/commit asked ",
		"admin certificate request-operation vms/web/operations/commit failed refused",
		entries[len(entries)-1].Who + " " + entries[len(entries)-1].Via + " request-operation vms/web/operations/failover refused unauthorized",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if entries[0].Request != entries[1].Request || entries[0].Request != rec.Request.ID || entries[1].Detail != string(rec.ID) || !strings.Contains(entries[0].Detail, `"riga"`) {
		t.Errorf("%+v\n%+v\n%+v", entries[0], entries[1], rec.Request)
	}
	v, err := admin.VerifyAudit(ctx, nil)
	if err != nil || len(v.Problems) > 0 || v.Entries != 5 {
		t.Errorf("%+v, %v", v, err)
	}
	v, err = admin.VerifyAudit(ctx, []audit.Head{{Sequence: 1, Hash: entries[1].Hash}, v.Head})
	if err != nil || len(v.Problems) != 1 {
		t.Errorf("%+v, %v", v, err)
	}
	// What a policy begins by itself is noted, too.
	if _, err := f.s.request(ctx, policyName, "web", recovery.TakePoint, api.OperationRequest{}); err != nil {
		t.Fatal(err)
	}
	entries, err = admin.Audit(ctx, api.AuditFilter{Limit: 1})
	if err != nil || len(entries) != 1 || entries[0].Who != policyName || entries[0].Action != "begin-take-point" {
		t.Errorf("%+v, %v", entries, err)
	}
}

package server

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// TestDryRuns: in each phase, the plan of each allowed operation names the steps
// that would run, and nothing changes.
func TestDryRuns(t *testing.T) {
	f := newFleet(t)
	dry := func(kind recovery.Kind, req api.OperationRequest) *api.Plan {
		t.Helper()
		req.DryRun = true
		a, err := f.ask(kind, req)
		if err != nil || a.Plan == nil || a.Operation != nil {
			t.Fatalf("dry run of %s: %+v, %v", kind, a, err)
		}
		return a.Plan
	}
	operations := func() int {
		list, err := f.s.store.Operations(context.Background(), operation.Filter{})
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	plan := dry(recovery.Protect, api.OperationRequest{To: "riga"})
	if plan.Bytes != 1<<30 || plan.Time < 10*time.Second || len(plan.Changes) != 1 || len(plan.Keeps) != 1 {
		t.Errorf("plan %+v", plan)
	}
	if _, err := f.s.find(context.Background(), "web"); switchback.CodeOf(err) != switchback.CodeNotFound || operations() != 0 {
		t.Errorf("a dry run of protect leaves a protection (%v) or one of %d operations", err, operations())
	}
	steps := func(rec operation.Record) (names []string) {
		for _, s := range rec.Steps {
			names = append(names, s.Name)
		}
		return names
	}
	plans := map[recovery.Kind]*api.Plan{recovery.Protect: plan}
	for _, next := range []recovery.Kind{recovery.Protect, recovery.TakePoint, recovery.Failover, recovery.Commit, recovery.Reprotect, recovery.Failback, recovery.Cancel, recovery.Unprotect} {
		if next != recovery.Protect {
			f.report()
			before, n := f.web(), operations()
			v, err := f.s.view(context.Background(), before, true)
			if err != nil {
				t.Fatal(err)
			}
			f.took()
			for _, a := range v.Allowed {
				if !a.Allowed || a.Kind == recovery.Retry {
					continue
				}
				req := api.OperationRequest{Drill: &api.DrillRequest{NoNetwork: true}}
				if a.Kind == recovery.ChangePoint {
					req.Point = "latest"
				}
				plans[a.Kind] = dry(a.Kind, req)
			}
			if d := cmp.Diff(before, f.web()); d != "" || operations() != n {
				t.Errorf("%s: dry runs change %s, or begin one of %d operations", before.Phase, d, operations()-n)
			}
			for _, did := range strings.Split(f.took(), "\n") {
				if did != "" && !strings.HasSuffix(did, " dry") {
					t.Errorf("%s: a dry run did %s", before.Phase, did)
				}
			}
		}
		rec := f.run(next, api.OperationRequest{})
		var planned []string
		for _, s := range plans[next].Steps {
			planned = append(planned, s.Name)
		}
		if d := cmp.Diff(steps(rec), planned); d != "" {
			t.Errorf("%s: planned steps: %s", next, d)
		}
	}
}

// TestProtectRefusals: what cannot be protected is refused before anything is made.
func TestProtectRefusals(t *testing.T) {
	f := newFleet(t)
	berlin := f.agents["berlin"]
	for _, c := range []struct {
		name   string
		vm     string
		req    api.OperationRequest
		change func()
		code   switchback.Code
		say    string
	}{
		{"no target", "web", api.OperationRequest{}, nil, switchback.CodeInvalid, "no target site"},
		{"an unknown VM", "nope", api.OperationRequest{To: "riga"}, nil, switchback.CodeNotFound, `no VM "nope" at any site`},
		{"not at that site", "web", api.OperationRequest{From: "riga", To: "berlin"}, nil, switchback.CodeNotFound, `at site riga`},
		{"an unknown site", "web", api.OperationRequest{To: "oslo"}, nil, switchback.CodeNotFound, "oslo"},
		{"the site where it is", "web", api.OperationRequest{To: "berlin"}, nil, switchback.CodeInvalid, "must be another site"},
		{"a policy that cannot work", "web", api.OperationRequest{To: "riga", Policy: &switchback.Policy{}}, nil, switchback.CodeInvalid, "shorter than 1 s"},
		{"off", "web", api.OperationRequest{To: "riga"}, func() { berlin.state = hypervisor.StateOff }, switchback.CodeRefused, "web is off"},
		{"the target's preflight", "web", api.OperationRequest{To: "riga"}, func() {
			f.setHook(func(site switchback.SiteID, _ string) error {
				return switchback.Errorf(switchback.CodeNoSpace, "the first copy needs 4096 MiB")
			})
		}, switchback.CodeNoSpace, "needs 4096 MiB"},
	} {
		t.Run(c.name, func(t *testing.T) {
			berlin.state = hypervisor.StateRunning
			f.setHook(func(switchback.SiteID, string) error { return nil })
			if c.change != nil {
				c.change()
			}
			f.report()
			_, err := f.s.request(context.Background(), "tester", c.vm, recovery.Protect, c.req)
			if switchback.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.say) {
				t.Errorf("error %v, want %s with %q", err, c.code, c.say)
			}
			list, err := f.s.store.Protections(context.Background())
			if err != nil || len(list) != 0 {
				t.Errorf("%d protections are left, %v", len(list), err)
			}
		})
	}
	berlin.state = hypervisor.StateRunning
	f.setHook(func(switchback.SiteID, string) error { return nil })
	t.Run("a silent agent", func(t *testing.T) {
		f.report()
		if err := f.s.store.TouchAgent(context.Background(), "a-riga", f.agents["riga"].addr, "test", time.Now().Add(-time.Minute), nil); err != nil {
			t.Fatal(err)
		}
		_, err := f.s.request(context.Background(), "tester", "web", recovery.Protect, api.OperationRequest{To: "riga"})
		if switchback.CodeOf(err) != switchback.CodeUnavailable || !strings.Contains(err.Error(), "silent since") {
			t.Errorf("error %v", err)
		}
	})
	t.Run("twice", func(t *testing.T) {
		f.run(recovery.Protect, api.OperationRequest{})
		if _, err := f.ask(recovery.Protect, api.OperationRequest{To: "riga"}); switchback.CodeOf(err) != switchback.CodeConflict {
			t.Errorf("error %v", err)
		}
	})
}

// TestRequestRefusals: what the state machine does not allow is refused with
// reason and remedy, and begins nothing.
func TestRequestRefusals(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.took()
	for _, c := range []struct {
		name string
		kind recovery.Kind
		req  api.OperationRequest
		code switchback.Code
		hint string
	}{
		{"commit before a switch", recovery.Commit, api.OperationRequest{}, switchback.CodeRefused, "fail over first"},
		{"failback at home", recovery.Failback, api.OperationRequest{}, switchback.CodeRefused, "use failover"},
		{"failover that commits", recovery.Failover, api.OperationRequest{AndCommit: true}, switchback.CodeInvalid, "commit it"},
		{"edit to a bad policy", recovery.Edit, api.OperationRequest{Policy: &switchback.Policy{Interval: time.Millisecond}}, switchback.CodeInvalid, "1s"},
		{"nothing to retry", recovery.Retry, api.OperationRequest{}, switchback.CodeRefused, ""},
		{"no such operation", "explode", api.OperationRequest{}, switchback.CodeInvalid, ""},
	} {
		_, err := f.ask(c.kind, c.req)
		if switchback.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.hint) {
			t.Errorf("%s: %v, want %s with %q", c.name, err, c.code, c.hint)
		}
	}
	if did := f.took(); did != "" {
		t.Errorf("refused requests did %s", did)
	}
	if p := f.web(); p.Operation != "" || p.Phase != switchback.PhaseProtected {
		t.Errorf("stands at %+v", f.at())
	}
}

func TestEditPauseResume(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.took()
	policy := switchback.Policy{Interval: 30 * time.Second, KeepPoints: 9, Compression: "s2"}
	f.run(recovery.Edit, api.OperationRequest{Policy: &policy})
	f.run(recovery.Pause, api.OperationRequest{})
	if p := f.web(); !cmp.Equal(p.Policy, policy) || !p.Paused {
		t.Errorf("policy %+v, paused %v", p.Policy, p.Paused)
	}
	f.run(recovery.Resume, api.OperationRequest{})
	if p := f.web(); !cmp.Equal(p.Policy, policy) || p.Paused {
		t.Errorf("policy %+v, paused %v", p.Policy, p.Paused)
	}
	if got, want := f.took(), strings.TrimSuffix(strings.Repeat("berlin set-policy@1\nriga set-policy@1\n", 3), "\n"); got != want {
		t.Errorf("did:\n%s", got)
	}
}

func TestValidSite(t *testing.T) {
	for name, ok := range map[string]bool{"berlin": true, "B-2": true, "": false, "a b": false, "ä": false, "a/b": false, "..": false,
		strings.Repeat("a", 40): true, strings.Repeat("a", 41): false} {
		if err := validSite(switchback.SiteID(name)); (err == nil) != ok {
			t.Errorf("site %q: %v", name, err)
		}
	}
}

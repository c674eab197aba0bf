package server

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

func TestDrillDue(t *testing.T) {
	at := func(s string) time.Time {
		x, err := time.ParseInLocation("2006-01-02 15:04", s, time.Local)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	for _, c := range []struct {
		name, schedule string
		served         time.Time
		now            string
		begin, due     bool
	}{
		{"none", "", at("2026-01-01 00:00"), "2026-01-05 00:00", false, false},
		{"new", "0 3 * * *", time.Time{}, "2026-01-05 04:00", true, false},
		{"not yet", "0 3 * * *", at("2026-01-05 03:00"), "2026-01-06 02:59", false, false},
		{"now", "0 3 * * *", at("2026-01-05 03:00"), "2026-01-06 03:00", false, true},
		{"once after many days of downtime", "0 3 * * *", at("2026-01-05 03:00"), "2026-02-05 12:00", false, true},
		{"served after the downtime", "0 3 * * *", at("2026-02-05 12:00"), "2026-02-05 12:01", false, false},
		{"clock set back", "@daily", at("2026-02-05 12:00"), "2026-01-05 12:01", false, false},
	} {
		begin, due, err := drillDue(c.schedule, c.served, at(c.now))
		if begin != c.begin || due != c.due || err != nil {
			t.Errorf("%s: begin %v, due %v, %v", c.name, begin, due, err)
		}
	}
	if _, _, err := drillDue("every day", time.Now(), time.Now()); err == nil {
		t.Error("a schedule that is none")
	}
}

func TestTaggedForDrill(t *testing.T) {
	points := make([]switchback.MarkedPoint, 6)
	for i := range points {
		points[i].Sequence = switchback.Sequence(i + 1)
	}
	points[1].Mark.Tag = "boot-a"
	points[3].Mark.Tag = "boot-b"
	points[4].Mark.Tag = "other"
	for _, c := range []struct{ after, want switchback.Sequence }{{0, 4}, {3, 4}, {4, 0}} {
		if got := taggedForDrill(points, "boot-", c.after); got != c.want {
			t.Errorf("after %d: %d", c.after, got)
		}
	}
	points[3].Mark.Boot = &switchback.BootProof{}
	if got := taggedForDrill(points, "boot-", 0); got != 2 {
		t.Errorf("with 4 proven: %d", got)
	}
}

func TestCompareGaps(t *testing.T) {
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	list := func(seconds ...int) (points []switchback.MarkedPoint) {
		for _, s := range seconds {
			points = append(points, switchback.MarkedPoint{Point: switchback.Point{Time: begin.Add(time.Duration(s) * time.Second)}})
		}
		return points
	}
	for _, c := range []struct {
		points       []switchback.MarkedPoint
		n            int
		during, then time.Duration
	}{
		{nil, 0, 0, 0},
		{list(-9, -3, -2, 1, 2), 2, 3 * time.Second, 6 * time.Second},
		{list(-3, -2), 0, 0, 0},
		{list(2, 5), 2, 3 * time.Second, 0},
	} {
		want := api.DrillReplication{Points: c.n, LongestGap: c.during, LongestGapBefore: c.then}
		if got := compareGaps(c.points, begin); got != want {
			t.Errorf("%v, want %v", got, want)
		}
	}
}

func TestValidateGuestPolicy(t *testing.T) {
	for _, c := range []struct {
		policy switchback.Policy
		ok     bool
	}{
		{switchback.Policy{}, true},
		{switchback.Policy{Drill: &switchback.DrillPolicy{Schedule: "30 2 * * 0", Interval: time.Hour}}, true},
		{switchback.Policy{Drill: &switchback.DrillPolicy{Schedule: "2:30"}}, false},
		{switchback.Policy{Drill: &switchback.DrillPolicy{Interval: -1}}, false},
		{switchback.Policy{Checks: []switchback.GuestCheck{{Kind: "ping"}}}, false},
	} {
		if err := validateGuestPolicy(c.policy); (err == nil) != c.ok || err != nil && switchback.CodeOf(err) != switchback.CodeInvalid {
			t.Errorf("%+v: %v", c.policy, err)
		}
	}
}

const (
	drillBegins = `
riga drill-preflight@1 dry
riga drill-open@1
riga drill-start@1`
	drillDid = drillBegins + `
riga guest-checks@1
riga drill-screenshot@1
riga drill-mark@1
riga drill-clean@1`
)

var (
	passedCheck = switchback.CheckResult{Check: "power", Required: true, Passed: true}
	failedCheck = switchback.CheckResult{Check: "tcp:10.0.0.5:5432", Required: true, Attempts: 3, Error: "refused"}
	untouched   = at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: 1}
)

func noNetwork() api.OperationRequest {
	return api.OperationRequest{Drill: &api.DrillRequest{NoNetwork: true}}
}

func (f *fleet) protected() {
	f.t.Helper()
	f.run(recovery.Protect, api.OperationRequest{})
	f.took()
}

func TestDrill(t *testing.T) {
	f := newFleet(t)
	f.protected()
	f.checks = []switchback.CheckResult{passedCheck, {Check: "agent;optional", Error: "silent"}}
	rec := f.run(recovery.TestFailover, noNetwork())
	f.want("a drill", untouched, drillDid)
	d, err := drillReport(rec)
	if err != nil || !d.Passed || !d.Judged || d.Domain != "web-drill-1" || d.BytesWritten != 4096 || d.Screen == nil || d.Screen.Width != 2 || d.Point.Sequence != 1 ||
		d.ViewAt.IsZero() || d.GuestUpAt.IsZero() || d.CheckedAt.IsZero() || d.CleanedAt.IsZero() || len(d.Checks) != 2 || d.Cause != "asked" {
		t.Errorf("report %+v, %v", d, err)
	}
	if len(f.proofs) != 1 || !f.proofs[0].Proof.Passed || f.proofs[0].Sequence != 1 || f.proofs[0].Proof.Report != string(rec.ID) {
		t.Errorf("the point's mark: %+v", f.proofs)
	}
	if b, err := readPicture(f.s.pictureFile(rec.ID)); string(b) != "picture" {
		t.Errorf("picture %q, %v", b, err)
	}
	proof := switchback.DrillProof{At: d.CheckedAt, Sequence: 1, Time: d.Point.Time, Passed: true, Report: rec.ID}
	if diff := cmp.Diff(switchback.DrillAxis{Last: &proof, Passed: &proof}, f.web().Drill); diff != "" {
		t.Errorf("drill axis: %s", diff)
	}

	// The next one fails its checks: it is cleared all the same, and says which.
	f.checks = []switchback.CheckResult{passedCheck, failedCheck}
	rec = f.wait(f.begin(recovery.TestFailover, noNetwork()))
	f.want("a failed drill", untouched, drillDid)
	if len(f.proofs) != 2 || f.proofs[1].Proof.Passed {
		t.Errorf("the point's mark: %+v", f.proofs)
	}
	if rec.State != operation.StateFailed || !strings.Contains(rec.Error.Error(), "tcp:10.0.0.5:5432 (3 attempts): refused") {
		t.Errorf("it is %s: %v", rec.State, rec.Error)
	}
	axis := f.web().Drill
	if axis.Operation != "" || axis.Last == nil || axis.Last.Passed || axis.Last.Report != rec.ID || axis.Passed == nil || axis.Passed.Report != proof.Report {
		t.Errorf("drill axis: %+v", axis)
	}
	v, err := f.s.view(context.Background(), f.web(), false)
	if err != nil || len(v.Conditions) != 1 || v.Conditions[0].Name != "drill-failed" || v.Current != nil {
		t.Errorf("conditions %+v, %v", v.Conditions, err)
	}
}

// TestDrillRefusals: nothing is begun.
func TestDrillRefusals(t *testing.T) {
	f := newFleet(t)
	f.protected()
	for _, c := range []struct {
		name string
		req  api.OperationRequest
		code switchback.Code
		say  string
	}{
		{"no network named", api.OperationRequest{}, switchback.CodeInvalid, "no network for the drill"},
		{"both", api.OperationRequest{Drill: &api.DrillRequest{NoNetwork: true, Network: "x"}}, switchback.CodeInvalid, "exclude"},
		{"kept for ever", api.OperationRequest{Drill: &api.DrillRequest{NoNetwork: true, Keep: 365 * 24 * time.Hour}}, switchback.CodeInvalid, "kept for"},
		{"a check there is not", api.OperationRequest{Drill: &api.DrillRequest{NoNetwork: true, Checks: []switchback.GuestCheck{{Kind: "x"}}}}, switchback.CodeInvalid, "unknown kind"},
		{"a point there is not", api.OperationRequest{Point: "77", Drill: &api.DrillRequest{NoNetwork: true}}, switchback.CodeNotFound, "no point 77"},
	} {
		if _, err := f.ask(recovery.TestFailover, c.req); switchback.CodeOf(err) != c.code || !strings.Contains(err.Error(), c.say) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	f.want("refusals", untouched, "")
}

// TestDrillUndone: a drill that breaks anywhere is cleared.
func TestDrillUndone(t *testing.T) {
	for action, did := range map[string]string{
		agentapi.ActionDrillOpen:  "riga drill-preflight@1 dry\nriga drill-open@1\nriga drill-clean@1",
		agentapi.ActionDrillStart: drillBegins + "\nriga drill-clean@1",
	} {
		t.Run(action, func(t *testing.T) {
			f := newFleet(t)
			f.protected()
			f.setHook(func(_ switchback.SiteID, a string) error {
				if a == action {
					return switchback.Errorf(switchback.CodeUnsupported, "it does not start")
				}
				return nil
			})
			rec := f.wait(f.begin(recovery.TestFailover, noNetwork()))
			if rec.State != operation.StateUndone {
				t.Errorf("it is %s", rec.State)
			}
			f.want("a broken drill", untouched, did)
			if axis := f.web().Drill; axis.Operation != "" || axis.Last == nil || axis.Last.Passed || axis.Passed != nil {
				t.Errorf("drill axis: %+v", axis)
			}
		})
	}
}

// kept begins a drill that is kept and waits until it is.
func (f *fleet) keptDrill() switchback.OperationID {
	f.t.Helper()
	req := noNetwork()
	req.Drill.Keep = time.Hour
	id := f.begin(recovery.TestFailover, req)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		rec, err := f.s.runner.Get(context.Background(), id)
		if err != nil || rec.State.Finished() || time.Now().After(deadline) {
			f.t.Fatalf("not kept: %+v, %v", rec, err)
		}
		if rec.Step("hold").State == operation.StepRunning {
			return id
		}
	}
}

// TestDrillKept: it can be ended, and whatever moves the VM sweeps it away.
func TestDrillKept(t *testing.T) {
	f := newFleet(t)
	f.protected()
	f.checks = []switchback.CheckResult{passedCheck}
	id := f.keptDrill()
	if _, err := f.ask(recovery.TestFailover, noNetwork()); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "drill clean") {
		t.Errorf("a second one: %v", err)
	}
	f.run(recovery.TakePoint, api.OperationRequest{}) // they do not meet
	a, err := f.ask(recovery.CleanDrill, api.OperationRequest{})
	if err != nil || a.Operation.ID != id {
		t.Fatalf("%+v, %v", a, err)
	}
	if rec := f.wait(id); rec.State != operation.StateSucceeded {
		t.Errorf("ended on request it is %s: %v", rec.State, rec.Error)
	}
	if _, err := f.ask(recovery.CleanDrill, api.OperationRequest{}); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("nothing to clean: %v", err)
	}

	id = f.keptDrill()
	f.took()
	f.run(recovery.Failover, api.OperationRequest{})
	if rec := f.wait(id); rec.State != operation.StateCancelled {
		t.Errorf("overtaken by a failover it is %s: %v", rec.State, rec.Error)
	}
	did := f.took()
	if first := strings.Split(did, "\n")[0]; first != "riga drill-clean@1" {
		t.Errorf("the failover did %s", did)
	}
	if axis := f.web().Drill; axis.Operation != "" || axis.Passed == nil || axis.Passed.Report != id {
		t.Errorf("drill axis: %+v", axis)
	}
}

// TestFailoverChecks: the policy's checks judge a failover, too.
func TestFailoverChecks(t *testing.T) {
	f := newFleet(t)
	policy := switchback.DefaultPolicy()
	policy.Checks = []switchback.GuestCheck{{Kind: switchback.CheckPower}}
	f.run(recovery.Protect, api.OperationRequest{Policy: &policy})
	f.checks = []switchback.CheckResult{passedCheck, failedCheck}
	rec := f.wait(f.begin(recovery.Failover, api.OperationRequest{}))
	if rec.State != operation.StateUndone || !strings.Contains(rec.Error.Error(), "1 required check of the guest failed: tcp:10.0.0.5:5432") || f.running() != "berlin" {
		t.Errorf("it is %s, web runs at %s: %v", rec.State, f.running(), rec.Error)
	}
	f.checks = []switchback.CheckResult{passedCheck, {Check: "agent;optional", Error: "silent"}}
	f.run(recovery.Failover, api.OperationRequest{})
	if f.running() != "riga" {
		t.Errorf("web runs at %s", f.running())
	}
}

// TestScheduledDrill: a due drill begins once, on what the policy says, and shows
// as due until one has passed.
func TestScheduledDrill(t *testing.T) {
	f := newFleet(t)
	policy := switchback.DefaultPolicy()
	policy.Drill = &switchback.DrillPolicy{Schedule: "* * * * *", Interval: time.Nanosecond}
	f.run(recovery.Protect, api.OperationRequest{Policy: &policy})
	f.took()
	f.checks = []switchback.CheckResult{passedCheck}
	ctx := context.Background()
	look := func() []operation.Record {
		t.Helper()
		f.report()
		if err := f.s.beginDueDrills(ctx); err != nil {
			t.Fatal(err)
		}
		list, err := f.s.store.Operations(ctx, operation.Filter{Kind: "test-failover"})
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	if n := len(look()); n != 0 || f.web().Drill.ScheduledAt.IsZero() {
		t.Fatalf("a new schedule began %d drills and counts from %v", n, f.web().Drill.ScheduledAt)
	}
	if v, err := f.s.view(ctx, f.web(), false); err != nil || len(v.Conditions) != 1 || v.Conditions[0].Name != "drill-due" {
		t.Errorf("conditions %+v, %v", v.Conditions, err)
	}
	if _, err := f.s.update(ctx, f.web().ID, func(p *switchback.Protection) error {
		p.Drill.ScheduledAt = time.Now().Add(-48 * time.Hour) // a long downtime
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	list := look()
	if len(list) != 1 || list[0].RequestedBy != "policy" {
		t.Fatalf("begun: %+v", list)
	}
	if rec := f.wait(list[0].ID); rec.State != operation.StateSucceeded {
		t.Errorf("it is %s: %v", rec.State, rec.Error)
	}
	f.want("a scheduled drill", untouched, drillDid)
	if served := f.web().Drill.ScheduledAt; time.Since(served) < time.Second*30 && time.Now().Second() < 50 {
		if n := len(look()); n != 1 {
			t.Errorf("%d drills after the downtime", n)
		}
	}
}

package server

import (
	"context"
	"strings"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// logged is the text of an operation's log.
func (f *fleet) logged(id switchback.OperationID) string {
	f.t.Helper()
	lines, err := f.s.store.OperationLog(context.Background(), id, 0)
	if err != nil {
		f.t.Fatal(err)
	}
	var b strings.Builder
	for _, l := range lines {
		b.WriteString(l.Level + " " + l.Message)
		for k, v := range l.Attrs {
			b.WriteString(" " + k + "=" + v)
		}
		b.WriteString("\n")
	}
	return b.String()
}

// TestLatestProcessed: it is the newest complete point before the shutdown; no
// other is taken first, and what it leaves behind is asked for and told.
func TestLatestProcessed(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.run(recovery.TakePoint, api.OperationRequest{})
	f.took()
	a, err := f.ask(recovery.Failover, api.OperationRequest{Point: "latest-processed", DryRun: true})
	if err != nil || len(a.Plan.Warnings) != 1 || !strings.Contains(a.Plan.Warnings[0], "would be lost") {
		t.Fatalf("dry run: %+v, %v", a.Plan, err)
	}
	rec := f.run(recovery.Failover, api.OperationRequest{Point: "latest-processed", AcceptLoss: true})
	f.want("failover", at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 2, Switching: true},
		strings.Replace(strings.Replace(failoverDid, "berlin take-point@1\n", "", 1), "point 3", "point 2", 1))
	if sw := f.web().Switch; sw.Point.Sequence != 2 || sw.Last.Sequence != 3 {
		t.Errorf("started from point %d, last is %d", sw.Point.Sequence, sw.Last.Sequence)
	}
	for _, part := range []string{"choice=latest-processed", "later points are left behind", "points=1"} {
		if log := f.logged(rec.ID); !strings.Contains(log, part) {
			t.Errorf("the log does not say %q:\n%s", part, log)
		}
	}
}

// TestChoiceIsMadeOnce: points that come between a failure and its retry do not
// change what was chosen.
func TestChoiceIsMadeOnce(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	tries := 0
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionHold {
			if tries++; tries == 1 {
				f.mu.Lock()
				f.points = append(f.points, switchback.Point{Sequence: 2})
				f.mu.Unlock()
				return switchback.Errorf(switchback.CodeUnavailable, "the test's agent is away")
			}
		}
		return nil
	})
	if rec := f.wait(f.begin(recovery.Failover, api.OperationRequest{Point: "latest-processed", AcceptLoss: true})); rec.State != operation.StateSucceeded || tries != 2 {
		t.Fatalf("%s after %d tries: %v", rec.State, tries, rec.Error)
	}
	if sw := f.web().Switch; sw.Point.Sequence != 1 || sw.Last.Sequence != 3 {
		t.Errorf("started from point %d, last is %d", sw.Point.Sequence, sw.Last.Sequence)
	}
}

// TestLatestIsLogged: latest says in the log what it shipped.
func TestLatestIsLogged(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	rec := f.run(recovery.Failover, api.OperationRequest{})
	if log := f.logged(rec.ID); !strings.Contains(log, "nothing is left behind") || !strings.Contains(log, "changed_bytes=90") {
		t.Errorf("the log is\n%s", log)
	}
	f.run(recovery.Commit, api.OperationRequest{})
	if _, err := f.ask(recovery.Failback, api.OperationRequest{Point: "latest-app", AcceptLoss: true}); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("a point of the way home is chosen before there is one: %v", err)
	}
}

// TestSuspiciousPoints are chosen like any other, and told of: in the dry run
// and in the log, also where latest comes to one.
func TestSuspiciousPoints(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.run(recovery.TakePoint, api.OperationRequest{})
	f.mu.Lock()
	bad := switchback.Mark{Suspicious: "everything was rewritten"}
	f.marks = map[switchback.Sequence]switchback.Mark{1: {Tag: "good", Boot: &switchback.BootProof{Passed: true}}, 2: bad, 4: bad}
	f.mu.Unlock()
	for _, point := range []string{"latest", "2"} {
		a, err := f.ask(recovery.Failover, api.OperationRequest{Point: point, DryRun: true})
		if err != nil || !strings.Contains(strings.Join(a.Plan.Warnings, "\n"), "point 2: it is marked as suspicious: everything was rewritten") {
			t.Errorf("dry run from %s: %+v, %v", point, a.Plan, err)
		}
	}
	if a, err := f.ask(recovery.Failover, api.OperationRequest{Point: "latest-verified", DryRun: true}); err != nil || strings.Contains(strings.Join(a.Plan.Warnings, "\n"), "suspicious") {
		t.Errorf("dry run: %+v, %v", a.Plan, err)
	}
	rec := f.run(recovery.Failover, api.OperationRequest{})
	if log := f.logged(rec.ID); !strings.Contains(log, "WARN the chosen point may be bad why=point 4: it is marked") {
		t.Errorf("the log is\n%s", log)
	}
	rec = f.run(recovery.ChangePoint, api.OperationRequest{Point: "2"})
	if log := f.logged(rec.ID); !strings.Contains(log, "WARN the chosen point may be bad why=point 2") {
		t.Errorf("the log is\n%s", log)
	}
	f.run(recovery.ChangePoint, api.OperationRequest{Point: "good"})
	if sw := f.web().Switch; sw.Point.Sequence != 1 {
		t.Errorf("it runs from point %d", sw.Point.Sequence)
	}
}

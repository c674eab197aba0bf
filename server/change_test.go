package server

import (
	"context"
	"encoding/json"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// switched is a fleet whose web is switched to riga, from point 4 of 4.
func switched(t *testing.T, policy switchback.CommitPolicy) *fleet {
	f := newFleet(t)
	all := switchback.DefaultPolicy()
	all.Commit = policy
	f.run(recovery.Protect, api.OperationRequest{Policy: &all})
	f.run(recovery.TakePoint, api.OperationRequest{})
	f.run(recovery.Failover, api.OperationRequest{})
	f.took()
	return f
}

// TestChangePoint: to an older point, back to what was written before, and on;
// each change has an epoch of its own. The commit says what becomes of snapshots.
func TestChangePoint(t *testing.T) {
	f := switched(t, switchback.CommitPolicy{})
	for _, c := range []struct {
		req  api.OperationRequest
		code switchback.Code
	}{
		{api.OperationRequest{}, switchback.CodeInvalid},
		{api.OperationRequest{Point: "1", Snapshot: "x"}, switchback.CodeInvalid},
		{api.OperationRequest{Point: "77"}, switchback.CodeNotFound},
		{api.OperationRequest{Snapshot: "x"}, switchback.CodeNotFound},
	} {
		if _, err := f.ask(recovery.ChangePoint, c.req); switchback.CodeOf(err) != c.code {
			t.Errorf("%+v: %v", c.req, err)
		}
	}
	rec := f.run(recovery.ChangePoint, api.OperationRequest{Point: "2"})
	f.want("change", at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 3, Switching: true}, "riga change-point@2 point 2 dry\nriga change-point@3 point 2\nriga check@3")
	var sum api.Summary
	if err := json.Unmarshal(rec.Result, &sum); err != nil || sum.Change == nil || sum.Change.From.Sequence != 4 || sum.Change.To.Sequence != 2 ||
		sum.Change.SetAside != "epoch-2-from-point-4" || sum.Change.Outage <= 0 {
		t.Errorf("summary %s, %v", rec.Result, err)
	}
	if sw := f.web().Switch; sw.Point.Sequence != 2 || sw.Last.Sequence != 4 || sw.Epoch != 3 || sw.Changing != nil {
		t.Errorf("the switch is %+v", sw)
	}
	f.run(recovery.ChangePoint, api.OperationRequest{Snapshot: "epoch-2-from-point-4"})
	f.want("back", at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 4, Switching: true}, "riga change-point@3 point 4 snapshot epoch-2-from-point-4 dry\nriga change-point@4 point 4 snapshot epoch-2-from-point-4\nriga check@4")
	if sw := f.web().Switch; sw.Point.Sequence != 4 || sw.Snapshot != "epoch-2-from-point-4" {
		t.Errorf("the switch is %+v", sw)
	}
	if _, err := f.ask(recovery.DropSnapshot, api.OperationRequest{Snapshot: "epoch-2-from-point-4"}); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("the snapshot that the VM runs from is dropped: %v", err)
	}
	if _, err := f.ask(recovery.Commit, api.OperationRequest{DryRun: true}); err != nil && !strings.Contains(err.Error(), "1 kept snapshots") {
		t.Errorf("a commit of what runs from a snapshot: %v", err)
	}
	f.run(recovery.ChangePoint, api.OperationRequest{Point: "latest"})
	f.took()
	if d := cmp.Diff([]string{"epoch-2-from-point-4", "epoch-3-from-point-2", "epoch-4-from-point-4"}, f.kept()); d != "" {
		t.Errorf("kept: %s", d)
	}

	if _, err := f.ask(recovery.Commit, api.OperationRequest{}); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "--snapshots keep") || !strings.Contains(err.Error(), "15 MiB") {
		t.Errorf("a commit that does not say what becomes of snapshots: %v", err)
	}
	if _, err := f.ask(recovery.Commit, api.OperationRequest{Snapshots: "sell"}); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("%v", err)
	}
	if a, err := f.ask(recovery.Commit, api.OperationRequest{Snapshots: "keep", DryRun: true}); err != nil || !strings.Contains(strings.Join(a.Plan.Changes, "\n"), "at most 15 MiB") {
		t.Errorf("dry run: %+v, %v", a.Plan, err)
	}
	f.run(recovery.DropSnapshot, api.OperationRequest{Snapshot: "epoch-3-from-point-2"})
	f.want("drop", at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 5, Switching: true}, "riga drop-snapshot@5 epoch-3-from-point-2")
	if _, err := f.ask(recovery.DropSnapshot, api.OperationRequest{Snapshot: "epoch-3-from-point-2"}); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("dropped twice: %v", err)
	}
	rec = f.run(recovery.Commit, api.OperationRequest{Snapshots: "keep"})
	f.want("commit", at{Phase: switchback.PhaseCommitted, Source: "riga", Target: "berlin", Epoch: 5},
		"riga settle-snapshots@5 keep=true"+strings.ReplaceAll(commitDid, "@2", "@5"))
	sum = api.Summary{}
	if err := json.Unmarshal(rec.Result, &sum); err != nil || len(sum.Commit.Snapshots) != 2 || sum.Commit.SnapshotBytes != 8<<20 {
		t.Errorf("summary %s, %v", rec.Result, err)
	}
	if _, err := f.ask(recovery.ChangePoint, api.OperationRequest{Point: "2"}); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "the points are gone") {
		t.Errorf("after the commit: %v", err)
	}
	f.run(recovery.Reprotect, api.OperationRequest{}) // the snapshot is in nobody's way
}

// kept are the names of the snapshots at riga.
func (f *fleet) kept() (names []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range f.agents["riga"].snapshots {
		names = append(names, s.Name)
	}
	return names
}

// TestChangePointFails: a change that does not come about leaves the VM
// switching; it can be retried, replaced by another change, or the switch cancelled.
func TestChangePointFails(t *testing.T) {
	for _, c := range []struct {
		kind recovery.Kind
		req  api.OperationRequest
		want at
		did  string
	}{
		{recovery.Retry, api.OperationRequest{}, at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 3, Switching: true},
			"riga change-point@3 point 2\nriga check@3"},
		{recovery.ChangePoint, api.OperationRequest{Point: "3"}, at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 4, Switching: true},
			"riga change-point@3 point 3 dry\nriga change-point@4 point 3\nriga check@4"},
		{recovery.Cancel, api.OperationRequest{}, at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: 4}, "riga abandon@4\nberlin reinstate@4"},
	} {
		t.Run(string(c.kind), func(t *testing.T) {
			f := switched(t, switchback.CommitPolicy{})
			asked := 0
			f.setHook(func(_ switchback.SiteID, action string) error {
				if action == agentapi.ActionChangePoint {
					if asked++; asked == 1 {
						return nil // the check
					}
					return switchback.Errorf(switchback.CodeInternal, "the test's %s fails", action)
				}
				return nil
			})
			rec := f.wait(f.begin(recovery.ChangePoint, api.OperationRequest{Point: "2"}))
			if rec.State != operation.StateFailed {
				t.Fatalf("ended %s with %v", rec.State, rec.Error)
			}
			f.want("after the failure", at{Phase: switchback.PhaseSwitching, Source: "riga", Target: "berlin", Epoch: 3, Switching: true, Operation: rec.ID}, "riga change-point@2 point 2 dry\nriga change-point@3 point 2")
			if _, err := f.ask(recovery.Commit, api.OperationRequest{}); switchback.CodeOf(err) != switchback.CodeRefused {
				t.Errorf("commit: %v", err)
			}
			f.setHook(func(switchback.SiteID, string) error { return nil })
			f.run(c.kind, c.req)
			f.want(string(c.kind), c.want, c.did)
		})
	}
}

// TestChangePointSurvivesRestarts: a server that dies in the change goes on with
// it, under the same epoch.
func TestChangePointSurvivesRestarts(t *testing.T) {
	f := switched(t, switchback.CommitPolicy{})
	reached := make(chan struct{})
	release := make(chan struct{})
	var asked atomic.Int32
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionChangePoint && asked.Add(1) == 2 { // the first is the check
			close(reached)
			<-release
		}
		return nil
	})
	id := f.begin(recovery.ChangePoint, api.OperationRequest{Point: "2"})
	<-reached
	f.close()
	close(release)
	f.open()
	if rec := f.wait(id); rec.State != operation.StateSucceeded {
		t.Fatalf("ended %s with %v", rec.State, rec.Error)
	}
	if p := f.web(); p.Epoch != 3 || p.Switch.Point.Sequence != 2 {
		t.Errorf("epoch %d, point %d", p.Epoch, p.Switch.Point.Sequence)
	}
}

// TestCommitPolicy: the timer commits or undoes by itself, is shown, extended
// and stopped, survives a restart of the server, and says why it cannot begin.
func TestCommitPolicy(t *testing.T) {
	ctx := context.Background()
	view := func(f *fleet) api.VM {
		f.report()
		v, err := f.s.view(ctx, f.web(), true)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	condition := func(v api.VM, name string) *switchback.Condition {
		for _, c := range v.Conditions {
			if c.Name == name {
				return &c
			}
		}
		return nil
	}
	for action, phase := range map[switchback.CommitAction]switchback.Phase{switchback.CommitCommit: switchback.PhaseCommitted, switchback.CommitUndo: switchback.PhaseProtected} {
		t.Run(string(action), func(t *testing.T) {
			f := switched(t, switchback.CommitPolicy{Action: action, After: time.Hour})
			v := view(f)
			if v.Countdown == nil || v.Countdown.Action != action || v.Countdown.Seconds < 3500 || v.Countdown.Seconds > 3600 || condition(v, "commit-countdown") == nil || v.Health != "normal" {
				t.Fatalf("countdown %+v, health %s, conditions %+v", v.Countdown, v.Health, v.Conditions)
			}
			deadline := f.web().Switch.Deadline
			f.run(recovery.Extend, api.OperationRequest{ExtendBy: 30 * time.Minute})
			if got := f.web().Switch.Deadline; !got.Equal(deadline.Add(30 * time.Minute)) {
				t.Errorf("extended from %v to %v", deadline, got)
			}
			f.close()
			f.open()
			now, tried := time.Now(), map[switchback.ProtectionID]time.Time{}
			if err := f.s.beginDue(ctx, now.Add(89*time.Minute), tried); err != nil || f.took() != "" {
				t.Fatalf("it began before its time: %v", err)
			}
			f.setHook(func(switchback.SiteID, string) error { return nil })
			f.report()
			if err := f.s.beginDue(ctx, now.Add(91*time.Minute), tried); err != nil {
				t.Fatal(err)
			}
			list, err := f.s.store.Operations(ctx, operation.Filter{Limit: 1})
			if err != nil || len(list) != 1 || list[0].RequestedBy != policyName {
				t.Fatalf("%+v, %v", list, err)
			}
			if rec := f.wait(list[0].ID); rec.State != operation.StateSucceeded {
				t.Fatalf("%s is %s: %v", rec.Title, rec.State, rec.Error)
			}
			if p := f.web(); p.Phase != phase {
				t.Errorf("it is %s", p.Phase)
			}
		})
	}
	t.Run("Stopped", func(t *testing.T) {
		f := switched(t, switchback.CommitPolicy{Action: switchback.CommitUndo, After: time.Hour})
		f.run(recovery.Extend, api.OperationRequest{Stop: true})
		if v := view(f); v.Countdown != nil || condition(v, "commit-countdown") != nil {
			t.Errorf("countdown %+v", v.Countdown)
		}
		if _, err := f.ask(recovery.Extend, api.OperationRequest{ExtendBy: time.Hour}); switchback.CodeOf(err) != switchback.CodeRefused {
			t.Errorf("%v", err)
		}
		if err := f.s.beginDue(ctx, time.Now().Add(100*time.Hour), map[switchback.ProtectionID]time.Time{}); err != nil || f.took() != "" {
			t.Errorf("it began: %v", err)
		}
		f.run(recovery.ChangePoint, api.OperationRequest{Point: "2"}) // starts it anew
		if f.web().Switch.Deadline.IsZero() {
			t.Error("a changed point has no countdown")
		}
	})
	t.Run("Refused", func(t *testing.T) {
		f := switched(t, switchback.CommitPolicy{Action: switchback.CommitCommit, After: time.Hour})
		f.run(recovery.ChangePoint, api.OperationRequest{Point: "2"}) // leaves a snapshot
		f.took()
		f.report()
		tried := map[switchback.ProtectionID]time.Time{}
		later := time.Now().Add(2 * time.Hour)
		if err := f.s.beginDue(ctx, later, tried); err != nil || f.took() != "" {
			t.Fatalf("%v", err)
		}
		v := view(f)
		if c := condition(v, "commit-policy-refused"); c == nil || !strings.Contains(c.Cause, "kept snapshots") || v.Health != "warning" {
			t.Errorf("health %s, conditions %+v", v.Health, v.Conditions)
		}
		f.run(recovery.DropSnapshot, api.OperationRequest{Snapshot: "epoch-2-from-point-4"})
		f.report()
		if err := f.s.beginDue(ctx, later.Add(overdueEvery), tried); err != nil {
			t.Fatal(err)
		}
		for begin := time.Now(); f.web().Phase != switchback.PhaseCommitted; time.Sleep(5 * time.Millisecond) {
			if time.Since(begin) > 10*time.Second {
				t.Fatalf("it is %s", f.web().Phase)
			}
		}
	})
}

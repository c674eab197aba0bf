package server

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// at is where a protection stands.
type at struct {
	Phase          switchback.Phase
	Source, Target switchback.SiteID
	Epoch          switchback.Epoch
	Switching      bool
	Operation      switchback.OperationID
}

func (f *fleet) at() at {
	f.t.Helper()
	p := f.web()
	if p.SourceAgent != switchback.AgentID("a-"+p.Source) || p.TargetAgent != switchback.AgentID("a-"+p.Target) {
		f.t.Errorf("source %s by %s, target %s by %s", p.Source, p.SourceAgent, p.Target, p.TargetAgent)
	}
	return at{p.Phase, p.Source, p.Target, p.Epoch, p.Switch != nil, p.Operation}
}

func (f *fleet) want(what string, w at, did string) {
	f.t.Helper()
	if d := cmp.Diff(w, f.at()); d != "" {
		f.t.Errorf("%s: %s", what, d)
	}
	if d := cmp.Diff(strings.TrimSpace(did), f.took()); d != "" {
		f.t.Errorf("%s: %s", what, d)
	}
}

const (
	protectDid = `
riga prepare-replica@1 dry
riga prepare-replica@1
berlin replicate@1
berlin await-point@1`
	failoverDid = `
berlin take-point@1
riga freeze@1
berlin hold@1
berlin shutdown@1
berlin final-point@1
berlin fence@2
riga activate@2
riga start@2 point 3
riga check@2`
	commitDid = `
riga fold@2
riga collapse@2
riga settle@2
berlin retire@2`
	reprotectDid = `
berlin prepare-replica@2 dry
berlin prepare-replica@2
riga replicate@2
riga await-point@2
berlin verify-replica@2
riga await-point@2`
	failbackDid = `
riga take-point@2
berlin freeze@2
riga hold@2
riga shutdown@2
riga final-point@2
riga fence@3
berlin activate@3
berlin start@3 point 3
berlin check@3`
)

// TestLoop is the whole loop, there and back and forward again.
func TestLoop(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.want("protect", at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: 1}, protectDid)
	f.run(recovery.TakePoint, api.OperationRequest{})
	f.want("take-point", at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: 1}, "berlin take-point@1")

	rec := f.run(recovery.Failover, api.OperationRequest{})
	f.want("failover", at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 2, Switching: true}, strings.Replace(failoverDid, "point 3", "point 4", 1))
	var sum api.Summary
	if err := json.Unmarshal(rec.Result, &sum); err != nil {
		t.Fatal(err)
	}
	if sw := sum.Switch; sw == nil || sw.Outage <= 0 || sw.Point.Sequence != 4 || sw.From != "berlin" || sw.To != "riga" || sw.BytesSent != 70 || sw.GuestAgent != "answered" {
		t.Errorf("summary %+v", sum.Switch)
	}
	if f.running() != "riga" {
		t.Errorf("web runs at %q", f.running())
	}

	f.run(recovery.Cancel, api.OperationRequest{})
	f.want("cancel", at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: 3}, "riga abandon@3\nberlin reinstate@3")
	if f.running() != "berlin" {
		t.Errorf("web runs at %q", f.running())
	}
	up := func(did string, by int) string { // the same under later epochs
		for e := 3; e > 0; e-- {
			did = strings.ReplaceAll(did, fmt.Sprintf("@%d", e), fmt.Sprintf("@%d", e+by))
		}
		return did
	}
	f.run(recovery.Failover, api.OperationRequest{})
	f.want("failover again", at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 4, Switching: true},
		strings.Replace(up(failoverDid, 2), "point 3", "point 6", 1))
	rec = f.run(recovery.Commit, api.OperationRequest{})
	f.want("commit", at{Phase: switchback.PhaseCommitted, Source: "riga", Target: "berlin", Epoch: 4}, up(commitDid, 2))
	sum = api.Summary{}
	if err := json.Unmarshal(rec.Result, &sum); err != nil || sum.Commit == nil || sum.Commit.FoldedBytes != 111 || sum.Commit.CopiedBytes != 222 || len(sum.Commit.Seeds) != 1 {
		t.Errorf("summary %s, %v", rec.Result, err)
	}
	if d := cmp.Diff(map[switchback.SiteID][]switchback.Disk{"berlin": webDisks()}, f.web().Seeds); d != "" {
		t.Errorf("seeds: %s", d)
	}
	f.run(recovery.Reprotect, api.OperationRequest{})
	f.want("reprotect", at{Phase: switchback.PhaseProtected, Source: "riga", Target: "berlin", Epoch: 4}, up(reprotectDid, 2))
	if n := len(f.web().Seeds["berlin"]); n != 0 {
		t.Errorf("%d seeds are shown at berlin, which is a replica now", n)
	}
	f.run(recovery.Failback, api.OperationRequest{})
	f.want("failback", at{Phase: switchback.PhaseSwitched, Source: "berlin", Target: "riga", Epoch: 5, Switching: true}, up(failbackDid, 2))
	f.run(recovery.Commit, api.OperationRequest{})
	f.want("commit at home", at{Phase: switchback.PhaseCommitted, Source: "berlin", Target: "riga", Epoch: 5},
		"berlin fold@5\nberlin collapse@5\nberlin settle@5\nriga retire@5 undefine")
	f.run(recovery.Reprotect, api.OperationRequest{})
	f.want("forward again", at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: 5}, `
riga prepare-replica@5 dry
riga prepare-replica@5
berlin replicate@5
berlin await-point@5
riga verify-replica@5
berlin await-point@5`)
	rec = f.run(recovery.Unprotect, api.OperationRequest{RemoveData: true})
	if d := cmp.Diff("berlin release@5 remove\nriga release@5 remove", f.took()); d != "" {
		t.Errorf("unprotect: %s", d)
	}
	sum = api.Summary{}
	if err := json.Unmarshal(rec.Result, &sum); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"left at berlin", "left at riga"}, sum.Left); d != "" {
		t.Errorf("left: %s", d)
	}
	if _, err := f.s.find(context.Background(), "web"); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("after unprotect: %v", err)
	}
}

// TestFailbackAsOne: reprotect, home, commit and forward again are one operation.
func TestFailbackAsOne(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.run(recovery.Failover, api.OperationRequest{})
	f.run(recovery.Commit, api.OperationRequest{})
	f.took()
	rec := f.run(recovery.Failback, api.OperationRequest{AndCommit: true, AndReprotect: true})
	var sum api.Summary
	if err := json.Unmarshal(rec.Result, &sum); err != nil || sum.Copy == nil || sum.Switch == nil || sum.Commit == nil || sum.Switch.To != "berlin" {
		t.Errorf("summary %s, %v", rec.Result, err)
	}
	f.want("failback", at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: 3}, reprotectDid+failbackDid+`
berlin fold@3
berlin collapse@3
berlin settle@3
riga retire@3 undefine
riga prepare-replica@3 dry
riga prepare-replica@3
berlin replicate@3
berlin await-point@3
riga verify-replica@3
berlin await-point@3`)
}

// TestOlderPoint: an older point is refused unless its loss is accepted.
func TestOlderPoint(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.run(recovery.TakePoint, api.OperationRequest{})
	for point, code := range map[string]switchback.Code{"1": switchback.CodeRefused, "99": switchback.CodeNotFound, "0": switchback.CodeNotFound, "yesterday": switchback.CodeNotFound,
		"before:never": switchback.CodeInvalid, "latest-app": switchback.CodeNotFound, "latest-verified": switchback.CodeNotFound, "latest-processed": switchback.CodeRefused} {
		if _, err := f.ask(recovery.Failover, api.OperationRequest{Point: point}); switchback.CodeOf(err) != code {
			t.Errorf("point %s: %v, want %s", point, err, code)
		}
	}
	f.took()
	f.run(recovery.Failover, api.OperationRequest{Point: "1", AcceptLoss: true})
	f.want("failover", at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 2, Switching: true},
		strings.Replace(failoverDid, "point 3", "point 1", 1))
	if sw := f.web().Switch; sw.Point.Sequence != 1 || sw.Last.Sequence != 4 {
		t.Errorf("started from point %d, last is %d", sw.Point.Sequence, sw.Last.Sequence)
	}
}

// TestGuestIsOff: a guest that is off is moved without being started at the old side by an undo.
func TestGuestIsOff(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.agents["berlin"].state = hypervisor.StateOff
	f.took()
	f.run(recovery.Failover, api.OperationRequest{})
	f.want("failover", at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 2, Switching: true},
		strings.Replace(strings.Replace(failoverDid, "berlin take-point@1\n", "", 1), "point 3", "point 2", 1))
	f.run(recovery.Cancel, api.OperationRequest{})
	f.want("cancel", at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: 3}, "riga abandon@3\nberlin reinstate@3 off")
}

// switchActions are the actions of a failover in order, with the epoch under
// which it is undone; 0 = there is nothing to undo.
var switchActions = []struct {
	site   switchback.SiteID
	action string
	undo   switchback.Epoch
}{
	{"berlin", agentapi.ActionDescribe, 0},
	{"berlin", agentapi.ActionTakePoint, 0},
	{"riga", agentapi.ActionFreeze, 2},
	{"berlin", agentapi.ActionHold, 2},
	{"berlin", agentapi.ActionShutdown, 2},
	{"berlin", agentapi.ActionFinalPoint, 2},
	{"berlin", agentapi.ActionFence, 3},
	{"riga", agentapi.ActionActivate, 3},
	{"riga", agentapi.ActionStart, 3},
	{"riga", agentapi.ActionCheck, 3},
}

// undone is what is done from the n-th action of a failover on when it is undone there.
func undone(n int) string {
	lines := strings.Split(strings.TrimSpace(failoverDid), "\n")[:n] // describe is not listed
	if e := switchActions[n].undo; e > 0 {
		lines = append(lines, fmt.Sprintf("riga abandon@%d", e), fmt.Sprintf("berlin reinstate@%d", e))
	}
	return strings.Join(lines, "\n")
}

// TestFailoverFails: an error at any step undoes what was begun, under a new
// epoch, newest first; the guest runs at the old side.
func TestFailoverFails(t *testing.T) {
	for n, c := range switchActions {
		t.Run(c.action, func(t *testing.T) {
			f := newFleet(t)
			f.run(recovery.Protect, api.OperationRequest{})
			f.took()
			f.setHook(func(_ switchback.SiteID, action string) error {
				if action == c.action {
					return switchback.Errorf(switchback.CodeInternal, "the test's %s fails", action)
				}
				return nil
			})
			rec := f.wait(f.begin(recovery.Failover, api.OperationRequest{}))
			want := at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: max(1, c.undo)}
			state := operation.StateUndone
			if c.undo == 0 {
				state, want.Operation = operation.StateFailed, rec.ID
			}
			if rec.State != state || rec.Error == nil || !strings.Contains(rec.Error.Error(), "the test's "+c.action+" fails") {
				t.Errorf("ended %s with %v", rec.State, rec.Error)
			}
			f.want("after the failure", want, undone(n))
			if f.running() != "berlin" {
				t.Errorf("web runs at %q", f.running())
			}
			// Nothing is in the way of the next try.
			f.setHook(func(switchback.SiteID, string) error { return nil })
			f.run(recovery.Failover, api.OperationRequest{})
			if p := f.web(); p.Phase != switchback.PhaseSwitched || p.Operation != "" {
				t.Errorf("the next failover ends %s, operation %q", p.Phase, p.Operation)
			}
		})
	}
}

// TestFailoverCancelled: a cancel in any step ends where the failover began.
func TestFailoverCancelled(t *testing.T) {
	for n, c := range switchActions {
		t.Run(c.action, func(t *testing.T) {
			f := newFleet(t)
			f.run(recovery.Protect, api.OperationRequest{})
			f.took()
			reached, asked := make(chan struct{}), make(chan struct{})
			var once atomic.Bool
			f.setHook(func(_ switchback.SiteID, action string) error {
				if action == c.action && !once.Swap(true) {
					close(reached)
					<-asked
				}
				return nil
			})
			id := f.begin(recovery.Failover, api.OperationRequest{})
			<-reached
			f.mu.Lock()
			if d := cmp.Diff(strings.Join(strings.Split(strings.TrimSpace(failoverDid), "\n")[:n], "\n"), strings.Join(f.did, "\n")); d != "" {
				t.Errorf("before the cancel: %s", d)
			}
			f.mu.Unlock()
			a, err := f.ask(recovery.Cancel, api.OperationRequest{})
			close(asked)
			if err != nil || a.Operation.ID != id {
				t.Fatalf("cancel: %+v, %v", a, err)
			}
			if rec := f.wait(id); rec.State != operation.StateCancelled || switchback.CodeOf(rec.Error) != switchback.CodeCancelled {
				t.Errorf("ended %s with %v", rec.State, rec.Error)
			}
			did := undone(n)
			if c.action == agentapi.ActionFreeze { // the rest of its step is done first
				did = strings.Replace(did, "freeze@1\n", "freeze@1\nberlin hold@1\n", 1)
			}
			f.want("after the cancel", at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: max(1, c.undo)}, did)
			if f.running() != "berlin" {
				t.Errorf("web runs at %q", f.running())
			}
		})
	}
}

// TestUndoFails: a failed undo stays where facts prove it is, and is resumed by retry.
func TestUndoFails(t *testing.T) {
	for _, c := range []struct {
		action string
		again  string
	}{
		{agentapi.ActionAbandon, "riga abandon@3\nberlin reinstate@3"},
		{agentapi.ActionReinstate, "riga abandon@3\nberlin reinstate@3"},
	} {
		t.Run(c.action, func(t *testing.T) {
			f := newFleet(t)
			f.run(recovery.Protect, api.OperationRequest{})
			f.setHook(func(_ switchback.SiteID, action string) error {
				if action == agentapi.ActionCheck || action == c.action {
					return switchback.Errorf(switchback.CodeInternal, "the test's %s fails", action)
				}
				return nil
			})
			rec := f.wait(f.begin(recovery.Failover, api.OperationRequest{}))
			if rec.State != operation.StateFailed {
				t.Fatalf("ended %s with %v", rec.State, rec.Error)
			}
			if got, want := f.at(), (at{Phase: switchback.PhaseUndoing, Source: "berlin", Target: "riga", Epoch: 3, Switching: true, Operation: rec.ID}); got != want {
				t.Errorf("stands at %+v, want %+v", got, want)
			}
			f.report()
			v, err := f.s.view(context.Background(), f.web(), true)
			if err != nil || v.Health != "critical" {
				t.Errorf("health %s, %v: %+v", v.Health, err, v.Conditions)
			}
			for _, a := range v.Allowed {
				if a.Allowed != (a.Kind == recovery.Retry) {
					t.Errorf("%s allowed: %v (%s)", a.Kind, a.Allowed, a.Reason)
				}
			}
			f.took()
			f.setHook(func(switchback.SiteID, string) error { return nil })
			id := f.begin(recovery.Retry, api.OperationRequest{})
			if rec := f.wait(id); rec.State != operation.StateUndone {
				t.Errorf("retried: %s, %v", rec.State, rec.Error)
			}
			f.want("after the retry", at{Phase: switchback.PhaseProtected, Source: "berlin", Target: "riga", Epoch: 3}, c.again)
		})
	}
}

// TestProtectFails: nothing is left of a protection that did not come about.
func TestProtectFails(t *testing.T) {
	for _, c := range []struct{ action, did string }{
		{agentapi.ActionPrepareReplica, "riga prepare-replica@1 dry\nriga prepare-replica@1\nriga release@1 remove"},
		{agentapi.ActionReplicate, "riga prepare-replica@1 dry\nriga prepare-replica@1\nberlin replicate@1\nberlin release@1\nriga release@1 remove"},
		{agentapi.ActionAwaitPoint, "riga prepare-replica@1 dry\nriga prepare-replica@1\nberlin replicate@1\nberlin await-point@1\nberlin release@1\nriga release@1 remove"},
	} {
		t.Run(c.action, func(t *testing.T) {
			f := newFleet(t)
			asked := 0
			f.setHook(func(_ switchback.SiteID, action string) error {
				if action == c.action {
					if asked++; asked > 1 || action != agentapi.ActionPrepareReplica { // the preflight passes
						return switchback.Errorf(switchback.CodeInternal, "the test's %s fails", action)
					}
				}
				return nil
			})
			rec := f.wait(f.begin(recovery.Protect, api.OperationRequest{}))
			if rec.State != operation.StateUndone {
				t.Errorf("ended %s with %v", rec.State, rec.Error)
			}
			if d := cmp.Diff(c.did, f.took()); d != "" {
				t.Error(d)
			}
			if _, err := f.s.find(context.Background(), "web"); switchback.CodeOf(err) != switchback.CodeNotFound {
				t.Errorf("the VM is still known: %v", err)
			}
			f.setHook(func(switchback.SiteID, string) error { return nil })
			f.run(recovery.Protect, api.OperationRequest{})
		})
	}
}

// TestCommitGoesOnlyForward: a commit that fails anywhere is not undone and not
// cancelled; retry goes on from the step that failed.
func TestCommitGoesOnlyForward(t *testing.T) {
	lines := strings.Split(strings.TrimSpace(commitDid), "\n")
	for n, action := range []string{agentapi.ActionFold, agentapi.ActionCollapse, agentapi.ActionSettle, agentapi.ActionRetire} {
		t.Run(action, func(t *testing.T) {
			f := newFleet(t)
			f.run(recovery.Protect, api.OperationRequest{})
			f.run(recovery.Failover, api.OperationRequest{})
			f.took()
			f.setHook(func(_ switchback.SiteID, a string) error {
				if a == action {
					return switchback.Errorf(switchback.CodeInternal, "the test's %s fails", a)
				}
				return nil
			})
			rec := f.wait(f.begin(recovery.Commit, api.OperationRequest{}))
			if rec.State != operation.StateFailed {
				t.Errorf("ended %s", rec.State)
			}
			f.want("after the failure", at{Phase: switchback.PhaseCommitting, Source: "riga", Target: "berlin", Epoch: 2, Switching: true, Operation: rec.ID},
				strings.Join(lines[:n+1], "\n"))
			if _, err := f.ask(recovery.Cancel, api.OperationRequest{}); switchback.CodeOf(err) != switchback.CodeRefused {
				t.Errorf("cancel: %v", err)
			}
			if err := f.s.runner.Cancel(context.Background(), rec.ID); switchback.CodeOf(err) != switchback.CodeRefused {
				t.Errorf("cancel of the operation: %v", err)
			}
			f.setHook(func(switchback.SiteID, string) error { return nil })
			if rec := f.wait(f.begin(recovery.Retry, api.OperationRequest{})); rec.State != operation.StateSucceeded {
				t.Errorf("retried: %s, %v", rec.State, rec.Error)
			}
			f.want("after the retry", at{Phase: switchback.PhaseCommitted, Source: "riga", Target: "berlin", Epoch: 2}, strings.Join(lines[n:], "\n"))
		})
	}
}

// TestReprotectFails: it ends committed, and can be asked for again.
func TestReprotectFails(t *testing.T) {
	for _, c := range []struct {
		action string
		state  operation.State
		undo   bool
	}{
		{agentapi.ActionPrepareReplica, operation.StateFailed, false},
		{agentapi.ActionReplicate, operation.StateUndone, true},
		{agentapi.ActionVerifyReplica, operation.StateUndone, true},
	} {
		t.Run(c.action, func(t *testing.T) {
			f := newFleet(t)
			f.run(recovery.Protect, api.OperationRequest{})
			f.run(recovery.Failover, api.OperationRequest{})
			f.run(recovery.Commit, api.OperationRequest{})
			f.took()
			f.setHook(func(_ switchback.SiteID, a string) error {
				if a == c.action {
					return switchback.Errorf(switchback.CodeCorrupt, "the test's %s fails", a)
				}
				return nil
			})
			rec := f.wait(f.begin(recovery.Reprotect, api.OperationRequest{}))
			if rec.State != c.state {
				t.Errorf("ended %s with %v", rec.State, rec.Error)
			}
			if did := f.took(); strings.HasSuffix(did, "\nriga hold@2") != c.undo {
				t.Errorf("did:\n%s", did)
			}
			if p := f.web(); p.Phase != switchback.PhaseCommitted || p.Source != "riga" || p.Epoch != 2 {
				t.Errorf("stands at %+v", f.at())
			}
			f.setHook(func(switchback.SiteID, string) error { return nil })
			f.run(recovery.Reprotect, api.OperationRequest{})
			if p := f.web(); p.Phase != switchback.PhaseProtected {
				t.Errorf("the next try ends %s", p.Phase)
			}
		})
	}
}

// TestRestart: a server that ends in any step of a failover and comes again goes
// on with that very effect, under the same epoch, and minting no further one.
func TestRestart(t *testing.T) {
	for n, c := range switchActions[1:] {
		t.Run(c.action, func(t *testing.T) {
			f := newFleet(t)
			f.run(recovery.Protect, api.OperationRequest{})
			f.took()
			reached, goOn := make(chan struct{}), make(chan struct{})
			var once atomic.Bool
			f.setHook(func(_ switchback.SiteID, action string) error {
				if action == c.action && !once.Swap(true) {
					close(reached)
					<-goOn
				}
				return nil
			})
			id := f.begin(recovery.Failover, api.OperationRequest{})
			<-reached
			f.close()
			close(goOn)
			f.open()
			if rec := f.wait(id); rec.State != operation.StateSucceeded {
				t.Fatalf("ended %s with %v", rec.State, rec.Error)
			}
			if got, want := f.at(), (at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 2, Switching: true}); got != want {
				t.Errorf("stands at %+v, want %+v", got, want)
			}
			lines := strings.Split(strings.TrimSpace(failoverDid), "\n")
			did := strings.Split(f.took(), "\n")
			strip := func(s string) string { return strings.Split(s, " point ")[0] } // a point may have been taken twice
			var want, got []string
			for i, l := range lines {
				if want = append(want, strip(l)); i != n {
					continue
				}
				if c.action == agentapi.ActionHold { // its step begins with freeze
					want = append(want, strip(lines[i-1]))
				}
				want = append(want, strip(l))
			}
			for _, l := range did {
				got = append(got, strip(l))
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("did: %s", d)
			}
			keys := map[string]bool{}
			for entry, list := range f.keys {
				if strip(entry) == strip(lines[n]) {
					for _, k := range list {
						keys[k] = true
					}
				}
			}
			if len(keys) != 1 {
				t.Errorf("the effect was asked for under the keys %v", keys)
			}
		})
	}
}

// TestRetryable: an agent that is away for a moment is waited for.
func TestRetryable(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.took()
	failures := map[string]int{}
	f.setHook(func(_ switchback.SiteID, action string) error {
		if failures[action]++; failures[action] <= 2 && action != agentapi.ActionDescribe {
			return switchback.Errorf(switchback.CodeUnavailable, "away")
		}
		return nil
	})
	rec := f.run(recovery.Failover, api.OperationRequest{})
	for _, s := range rec.Steps[1:] {
		want := 3
		if s.Name == "hold" { // two actions
			want = 5
		}
		if s.Name == "prove" { // asks again by itself: it must not fail
			want = 1
		}
		if s.Attempts != want {
			t.Errorf("step %s: %d attempts, want %d", s.Name, s.Attempts, want)
		}
	}
	if got, want := f.at(), (at{Phase: switchback.PhaseSwitched, Source: "riga", Target: "berlin", Epoch: 2, Switching: true}); got != want {
		t.Errorf("stands at %+v, want %+v", got, want)
	}
}

// TestStubbornGuest: a guest that does not power off is not waited for again.
func TestStubbornGuest(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.took()
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionShutdown {
			return switchback.Errorf(switchback.CodeTimeout, "still running")
		}
		return nil
	})
	rec := f.wait(f.begin(recovery.Failover, api.OperationRequest{}))
	if rec.State != operation.StateUndone || switchback.CodeOf(rec.Error) != switchback.CodeRefused || !strings.Contains(rec.Error.Hint, "--force-off") {
		t.Errorf("ended %s with %v", rec.State, rec.Error)
	}
	if rec.Step("shutdown").Attempts != 1 {
		t.Errorf("%d attempts", rec.Step("shutdown").Attempts)
	}
}

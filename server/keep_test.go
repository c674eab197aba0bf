package server

import (
	"encoding/json"
	"strings"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// TestCommitKeepsPoints: they stay until the new direction has its own, or are dropped by hand.
func TestCommitKeepsPoints(t *testing.T) {
	const keepDid = "riga keep-points@2 dry\nriga keep-points@2" + commitDid
	for _, by := range []recovery.Kind{recovery.Reprotect, recovery.DropKept} {
		t.Run(string(by), func(t *testing.T) {
			f := switched(t, switchback.CommitPolicy{})
			if _, err := f.ask(recovery.Commit, api.OperationRequest{Points: "sell"}); switchback.CodeOf(err) != switchback.CodeInvalid {
				t.Errorf("%v", err)
			}
			a, err := f.ask(recovery.Commit, api.OperationRequest{Points: "keep", DryRun: true})
			if err != nil || !strings.Contains(strings.Join(a.Plan.Changes, " "), "at most 3 MiB") || !strings.Contains(strings.Join(a.Plan.Keeps, " "), "read-only") {
				t.Errorf("dry run: %+v, %v", a.Plan, err)
			}
			f.took()
			rec := f.run(recovery.Commit, api.OperationRequest{Points: "keep"})
			f.want("commit", at{Phase: switchback.PhaseCommitted, Source: "riga", Target: "berlin", Epoch: 2}, keepDid)
			var sum api.Summary
			if err := json.Unmarshal(rec.Result, &sum); err != nil || sum.Commit.KeptPoints != 4 || sum.Commit.KeptBytes != 3<<20 || !f.web().KeptPoints {
				t.Errorf("summary %s, %v", rec.Result, err)
			}
			if _, err := f.ask(recovery.ChangePoint, api.OperationRequest{Point: "2"}); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "only to be read") {
				t.Errorf("%v", err)
			}
			f.run(by, api.OperationRequest{})
			if did := f.took(); !strings.HasSuffix(did, "riga drop-kept@2") || f.web().KeptPoints {
				t.Errorf("%s did\n%s", by, did)
			}
		})
	}
}

// TestKeepNeedsRoom: without room for it the VM stays switched.
func TestKeepNeedsRoom(t *testing.T) {
	f := switched(t, switchback.CommitPolicy{})
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionKeepPoints {
			return switchback.Errorf(switchback.CodeNoSpace, "the test's disk is full")
		}
		return nil
	})
	if rec := f.wait(f.begin(recovery.Commit, api.OperationRequest{Points: "keep"})); rec.State != operation.StateFailed {
		t.Errorf("it is %s", rec.State)
	}
	if p := f.web(); p.Phase != switchback.PhaseSwitched {
		t.Errorf("it is %s", p.Phase)
	}
	f.run(recovery.Commit, api.OperationRequest{Points: "delete"})
}

// TestLocked: what would delete a locked point is refused, with its number.
func TestLocked(t *testing.T) {
	f := switched(t, switchback.CommitPolicy{})
	lock := func(seq switchback.Sequence) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.marks = map[switchback.Sequence]switchback.Mark{}
		if seq > 0 {
			f.marks[seq] = switchback.Mark{Locked: true}
		}
	}
	lock(2)
	_, err := f.ask(recovery.Commit, api.OperationRequest{})
	if switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "point 2 is locked") {
		t.Errorf("commit: %v", err)
	}
	if _, err := f.ask(recovery.Commit, api.OperationRequest{Points: "keep", DryRun: true}); err != nil {
		t.Errorf("commit that keeps it: %v", err)
	}
	lock(0)
	f.run(recovery.Commit, api.OperationRequest{})
}

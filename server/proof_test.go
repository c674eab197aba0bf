package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

func summary(t *testing.T, rec operation.Record) api.Summary {
	t.Helper()
	var sum api.Summary
	if err := json.Unmarshal(rec.Result, &sum); err != nil {
		t.Fatal(err)
	}
	return sum
}

// TestProof: the hashes of both sides are kept; sides that differ stay
// switched, and are committed only by one who says so.
func TestProof(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	sum := summary(t, f.run(recovery.Failover, api.OperationRequest{}))
	if p := sum.Proof; p == nil || !p.Equal || p.Point != sum.Switch.Last.Sequence || len(p.Disks) != 1 || p.Disks[0].Old != "same" || p.Disks[0].New != "same" {
		t.Fatalf("proof %+v", p)
	}
	f.run(recovery.Cancel, api.OperationRequest{})

	f.roots = map[switchback.SiteID]string{"riga": "other"}
	sum = summary(t, f.run(recovery.Failover, api.OperationRequest{}))
	want := extent.Range{Offset: agentapi.LeafBytes, Length: agentapi.LeafBytes}
	if p := sum.Proof; p.Equal || p.Mismatch() != fmt.Sprint("disk vda ", want) {
		t.Errorf("proof %+v: %s", p, p.Mismatch())
	}
	if f.running() != "riga" || f.web().Phase != switchback.PhaseSwitched {
		t.Errorf("web runs at %q, %s", f.running(), f.web().Phase)
	}
	v, err := f.s.view(t.Context(), f.web(), false)
	if err != nil {
		t.Fatal(err)
	}
	if c := proofConditions(v.Protection); len(c) != 1 || c[0].Name != "sides-differ" || c[0].Severity != switchback.SeverityCritical || v.Health != "critical" {
		t.Errorf("conditions %+v", c)
	}
	_, err = f.ask(recovery.Commit, api.OperationRequest{})
	if switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "disk vda") {
		t.Errorf("commit: %v", err)
	}
	f.run(recovery.Commit, api.OperationRequest{AcceptMismatch: true})

	// A failback that was to commit by itself is undone.
	f.run(recovery.Reprotect, api.OperationRequest{})
	f.roots = map[switchback.SiteID]string{"berlin": "other"}
	rec := f.wait(f.begin(recovery.Failback, api.OperationRequest{AndCommit: true}))
	if rec.State != operation.StateUndone || f.running() != "riga" {
		t.Errorf("ended %s with %v, web runs at %q", rec.State, rec.Error, f.running())
	}
}

// TestNoProof: a side that cannot be hashed costs the proof, not the switch.
func TestNoProof(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionHashRest {
			return switchback.Errorf(switchback.CodeConflict, "disk vda was changed since its last point")
		}
		return nil
	})
	sum := summary(t, f.run(recovery.Failover, api.OperationRequest{}))
	if sum.Proof == nil || sum.Proof.Equal || !strings.Contains(sum.Proof.Missing, "was changed") {
		t.Errorf("proof %+v", sum.Proof)
	}
	if c := proofConditions(f.web()); len(c) != 1 || c[0].Name != "equality-not-proven" {
		t.Errorf("conditions %+v", c)
	}
	f.run(recovery.Commit, api.OperationRequest{})

	f = newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	if rec := f.run(recovery.Failover, api.OperationRequest{NoProof: true}); rec.Step("prove").State != operation.StepSkipped {
		t.Errorf("prove is %s", rec.Step("prove").State)
	}
}

// TestPointOperations: what only reads goes on beside a switch; what changes
// points is judged first.
func TestPointOperations(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	ask := func(kind string, q pointsParams) (operation.Record, error) {
		q.Protection = f.web().ID
		a, err := f.s.requestPoints(t.Context(), "test", f.web(), kind, q)
		if err != nil {
			return operation.Record{}, err
		}
		return f.wait(a.Operation.ID), nil
	}
	begun, release := make(chan bool, 1), make(chan bool)
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionCheckReplica {
			begun <- true
			<-release
		}
		return nil
	})
	done := make(chan error, 1)
	go func() {
		rec, err := ask("verify", pointsParams{})
		if err == nil && rec.State != operation.StateSucceeded {
			err = errors.New(string(rec.State))
		}
		done <- err
	}()
	<-begun
	if rec := f.run(recovery.Failover, api.OperationRequest{}); rec.State != operation.StateSucceeded {
		t.Errorf("failover beside a check: %s", rec.State)
	}
	close(release)
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, kind := range []string{"repair", "delete-point"} {
		if _, err := ask(kind, pointsParams{Sequence: 1}); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "switched") {
			t.Errorf("%s of a switched VM: %v", kind, err)
		}
	}
	// A snapshot is read where it is kept, also when there are no points any more.
	f.setHook(func(switchback.SiteID, string) error { return nil })
	f.run(recovery.ChangePoint, api.OperationRequest{Point: "1"})
	f.run(recovery.Commit, api.OperationRequest{Snapshots: "keep"})
	if _, err := ask("verify", pointsParams{}); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("verify of a committed VM: %v", err)
	}
	f.report()
	f.took()
	for kind, want := range map[string]string{"verify": "riga check-snapshot@", "export": "riga export-snapshot@"} {
		q := pointsParams{PointsRequest: api.PointsRequest{Snapshot: f.kept()[0], Format: "qcow2", To: "/srv/x"}}
		rec, err := ask(kind, q)
		if err != nil || rec.State != operation.StateSucceeded || !strings.Contains(rec.Title, q.Snapshot) {
			t.Errorf("%s: %+v, %v", kind, rec, err)
		}
		if did := f.took(); !strings.HasPrefix(did, want) || !strings.HasSuffix(did, " "+q.Snapshot) {
			t.Errorf("%s did %q", kind, did)
		}
		if _, err := ask(kind, pointsParams{PointsRequest: api.PointsRequest{Snapshot: "none"}}); switchback.CodeOf(err) != switchback.CodeNotFound {
			t.Errorf("%s of a snapshot that is not there: %v", kind, err)
		}
	}
}

func TestPointNamed(t *testing.T) {
	points := []switchback.MarkedPoint{{Point: switchback.Point{Sequence: 3}}, {Point: switchback.Point{Sequence: 4}, Mark: switchback.Mark{Tag: "gold"}}, {Point: switchback.Point{Sequence: 5}}}
	for name, want := range map[string]switchback.Sequence{"3": 3, "gold": 4, "latest": 5, "oldest": 3, "9": 0, "silver": 0, "": 0} {
		p, err := pointNamed(points, name)
		if p.Sequence != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %d, %v", name, p.Sequence, err)
		}
	}
	for tag, ok := range map[string]bool{"": true, "before upgrade": true, "gold": true, "17": false, "latest": false, "latest-good": false, "oldest": false, "a/b": false, " x": false} {
		if err := switchback.ValidTag(tag); (err == nil) != ok {
			t.Errorf("tag %q: %v", tag, err)
		}
	}
}

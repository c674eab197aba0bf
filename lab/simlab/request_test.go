package simlab_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// asking is an operation that is asked for, and what its outcome is held against.
type asking struct {
	kind recovery.Kind
	req  api.OperationRequest
	// for operations on points
	call, point string
	points      api.PointsRequest

	sequence switchback.Sequence // delete-point: which
	deadline time.Time           // extend: the one to come
	kept     int                 // change-point: snapshots before
}

func (b *bed) ask(a asking) (api.OperationAnswer, error) {
	if a.call != "" {
		return b.client.RequestPoints(b.t.Context(), b.machine.Name, a.point, a.call, a.points)
	}
	return b.client.Request(b.t.Context(), b.machine.Name, a.kind, a.req)
}

// beginAsked asks until the operation is accepted.
func (b *bed) beginAsked(a asking) (id switchback.OperationID) {
	b.t.Helper()
	b.until(string(a.kind)+" is accepted", func() (bool, string) {
		answer, err := b.ask(a)
		if err == nil {
			id = answer.Operation.ID
		}
		return err == nil, fmt.Sprint(err)
	})
	return id
}

// carryOut runs an operation that must succeed.
func (b *bed) carryOut(a asking) {
	b.t.Helper()
	if rec := b.end(b.beginAsked(a)); rec.State != operation.StateSucceeded {
		b.t.Fatalf("%s is %s: %v", rec.Title, rec.State, rec.Error)
	}
}

// asking are the parameters of a path's operation.
func (b *bed) asking(p path) asking {
	b.t.Helper()
	a := asking{kind: p.kind}
	points := ""
	if p.keep {
		points = "keep"
	}
	switch p.kind {
	case recovery.Protect, recovery.Edit:
		a.req = fast()
	case recovery.Failback:
		a.req = api.OperationRequest{AndCommit: true, AndReprotect: true, Snapshots: "drop", Points: points}
	case recovery.Commit:
		a.req = api.OperationRequest{Snapshots: "drop", Points: points}
	case recovery.Unprotect:
		a.req = api.OperationRequest{RemoveData: true}
	case recovery.Extend:
		a.req = api.OperationRequest{ExtendBy: time.Hour}
		a.deadline = b.vm().Switch.Deadline.Add(time.Hour)
	case recovery.ChangePoint:
		a.req = api.OperationRequest{Point: fmt.Sprint(b.vm().Switch.Point.Sequence), ForceOff: true}
		a.kept = len(b.snapshots(simlab.Recovery))
	case recovery.Resolve:
		a.req = api.OperationRequest{Winner: simlab.Primary}
	case recovery.DropSnapshot:
		a.req = api.OperationRequest{Snapshot: b.snapshots(simlab.Recovery)[0].Name}
	case verify:
		a.call = api.PointsVerify
	case repair:
		a.call = api.PointsRepair
	case exportPoint:
		out := filepath.Join(filepath.Dir(b.StateDir(simlab.Recovery)), "out")
		b.must(os.MkdirAll(out, 0o755))
		there, err := os.ReadDir(out)
		b.must(err)
		a.call, a.point = api.PointsExport, "latest"
		a.points = api.PointsRequest{Format: "qcow2", To: filepath.Join(out, fmt.Sprint(len(there)))}
	case deletePoint:
		a.call = api.PointsDelete
		b.until("an older point can be deleted", func() (bool, string) {
			points, err := b.client.Points(b.t.Context(), b.machine.Name)
			if err != nil || len(points) < 2 {
				return false, fmt.Sprint(err)
			}
			for _, x := range points[:len(points)-1] {
				detail, err := b.client.Point(b.t.Context(), b.machine.Name, fmt.Sprint(x.Sequence))
				if err == nil && len(detail.Pins) == 0 {
					a.sequence, a.point = x.Sequence, fmt.Sprint(x.Sequence)
					return true, ""
				}
			}
			return false, "every one is pinned"
		})
	}
	return a
}

// prepare makes what the cell's operation works on, where that is not there yet.
func (b *bed) prepare(c cell) {
	b.t.Helper()
	switch string(c.Kind) + "/" + c.Step {
	case "commit/snapshots":
		if len(b.snapshots(simlab.Recovery)) == 0 {
			b.carryOut(b.asking(pathOf(recovery.ChangePoint)))
			b.until("the snapshot shows", func() (bool, string) { return len(b.snapshots(simlab.Recovery)) > 0, "" })
		}
	}
	if c.Kind == recovery.Resolve {
		b.contest()
	}
	if c.Kind == recovery.DropSnapshot && len(b.snapshots(simlab.Recovery)) == 0 {
		b.carryOut(b.asking(pathOf(recovery.Failover)))
		b.runsAt(simlab.Recovery)
		b.carryOut(b.asking(pathOf(recovery.Cancel)))
		b.until("the snapshot shows", func() (bool, string) { return len(b.snapshots(simlab.Recovery)) > 0, "" })
	}
}

// snapshots are those kept at a site, as its agent last said.
func (b *bed) snapshots(site string) []agentapi.Snapshot {
	b.t.Helper()
	v := b.vm()
	status := v.AtTarget
	if string(v.Source) == site {
		status = v.AtSource
	}
	if status == nil {
		return nil
	}
	return status.Snapshots
}

// outcome holds what the cell's operation has made or removed against what it
// was asked for: once, and nothing beside it.
func (b *bed) outcome(c cell, a asking) {
	b.t.Helper()
	v := b.vm()
	if v.Switch != nil && v.Switch.Proof != nil {
		if m := v.Switch.Proof.Mismatch(); m != "" {
			b.t.Errorf("both sides differ: %s", m)
		}
	}
	switch c.Kind {
	case recovery.Extend:
		if !v.Switch.Deadline.Equal(a.deadline) {
			b.t.Errorf("the countdown ends at %v, want %v", v.Switch.Deadline, a.deadline)
		}
	case recovery.ChangePoint:
		b.until("one snapshot more", func() (bool, string) {
			n := len(b.snapshots(simlab.Recovery))
			return n == a.kept+1, fmt.Sprintf("%d, %d before", n, a.kept)
		})
	case recovery.DropSnapshot:
		b.until("the snapshot is gone", func() (bool, string) {
			list := b.snapshots(simlab.Recovery)
			return !slices.ContainsFunc(list, func(s agentapi.Snapshot) bool { return s.Name == a.req.Snapshot }), fmt.Sprint(list)
		})
	case deletePoint:
		if _, err := b.client.Point(b.t.Context(), b.machine.Name, a.point); switchback.CodeOf(err) != switchback.CodeNotFound {
			b.t.Errorf("point %d is there: %v", a.sequence, err)
		}
	case exportPoint:
		if !isThere(a.points.To) || isThere(a.points.To+".partial") {
			b.t.Errorf("%s is not there, or is there in part", a.points.To)
		}
		b.pinless()
	case verify, repair:
		b.pinless()
	}
	if (c.Kind == recovery.Reprotect || c.Kind == recovery.Failback) && !c.Undo {
		b.until("no points are kept", func() (bool, string) {
			v := b.vm()
			return !v.KeptPoints && v.AtSource != nil && v.AtSource.Kept == nil && v.AtTarget != nil && v.AtTarget.Kept == nil,
				fmt.Sprintf("%+v, %+v", v.AtSource, v.AtTarget)
		})
	}
	if to := c.path().to; !c.Undo && (to == committed || to == keeping) && v.KeptPoints != (to == keeping) {
		b.t.Errorf("kept points: %v", v.KeptPoints)
	}
}

// pinless: nothing that has ended keeps a point.
func (b *bed) pinless() {
	b.t.Helper()
	b.until("no point is pinned", func() (bool, string) {
		points, err := b.client.Points(b.t.Context(), b.machine.Name)
		if err != nil {
			return false, err.Error()
		}
		kept := b.snapshots(simlab.Recovery)
		for _, x := range points {
			detail, err := b.client.Point(b.t.Context(), b.machine.Name, fmt.Sprint(x.Sequence))
			if switchback.CodeOf(err) == switchback.CodeNotFound {
				continue // retention has taken it
			}
			if err != nil {
				return false, err.Error()
			}
			for _, pin := range detail.Pins {
				if !slices.ContainsFunc(kept, func(s agentapi.Snapshot) bool { return s.Pin == pin }) {
					return false, fmt.Sprintf("point %d: %v", x.Sequence, pin)
				}
			}
		}
		return true, ""
	})
}

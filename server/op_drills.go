package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/check"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

const (
	// drillSeveral is the kind of the operation that drills several VMs.
	drillSeveral = "test-failover-several"
	drillsPoll   = 300 * time.Millisecond
)

// drillsParams are the parameters of a drill of several VMs.
type drillsParams struct {
	Members []drillsMember `json:"members"`
}

// drillsMember is the drill of one of them. Its operation has its ID before it
// exists, so that it is begun once however often the server dies.
type drillsMember struct {
	Protection switchback.ProtectionID `json:"protection"`
	VM         string                  `json:"vm"`
	Params     drillParams             `json:"params"`
}

// member is the ID of the nth drill of a drill of several.
func member(parent switchback.OperationID, n int) switchback.OperationID {
	return switchback.OperationID(fmt.Sprintf("%s-%d", parent, n))
}

// requestDrills judges each drill as if it were asked for alone, then begins all.
func (s *Server) requestDrills(ctx context.Context, who string, req api.DrillsRequest) (api.OperationAnswer, error) {
	var none api.OperationAnswer
	if len(req.VMs) == 0 {
		return none, switchback.Errorf(switchback.CodeInvalid, "no VM is named")
	}
	var params drillsParams
	var names []string
	var wait time.Duration
	plan := &api.Plan{Kind: string(recovery.TestFailover), Basis: "nothing crosses it: the points are at the target"}
	var host switchback.AgentID
	asked := map[switchback.ProtectionID]string{}
	points := map[string]bool{}
	for _, name := range req.VMs {
		p, err := s.find(ctx, name)
		if err != nil {
			return none, err
		}
		if _, ok := asked[p.ID]; ok {
			return none, switchback.Errorf(switchback.CodeInvalid, "VM %s is named twice", p.Name)
		}
		asked[p.ID] = name
		if host != "" && p.TargetAgent != host {
			return none, switchback.Errorf(switchback.CodeInvalid, "%s and %s are kept by different agents: an isolated network does not reach from one host to another", names[0], p.Name).
				WithHint("drill the VMs of each agent by themselves")
		}
		host = p.TargetAgent
		v, err := s.view(ctx, p, true)
		if err != nil {
			return none, err
		}
		if a := recovery.Find(v.Allowed, recovery.TestFailover); !a.Allowed {
			return none, switchback.Errorf(switchback.CodeRefused, "a drill of %s is not possible: %s", p.Name, a.Reason).WithHint("%s", a.Remedy)
		}
		point := req.Point
		for _, key := range []string{name, p.Name} {
			if one, ok := req.Points[key]; ok {
				point = one
				points[key] = true
			}
		}
		drill, at, err := s.judgeDrill(ctx, v, api.OperationRequest{Point: point, Drill: req.Drill})
		if err != nil {
			return none, fmt.Errorf("%s: %w", p.Name, err)
		}
		names = append(names, p.Name)
		params.Members = append(params.Members, drillsMember{Protection: p.ID, VM: p.Name, Params: drill})
		wait = max(wait, check.Budget(drill.Checks), check.Budget(p.Policy.Checks))
		if req.DryRun {
			one, err := s.planDrill(ctx, v, drill, at)
			if err != nil {
				return none, fmt.Errorf("%s: %w", p.Name, err)
			}
			plan.Steps, plan.Time = one.Steps, max(plan.Time, one.Time)
			plan.Changes, plan.Warnings = append(plan.Changes, one.Changes...), append(plan.Warnings, one.Warnings...)
			plan.Keeps = append(plan.Keeps, one.Keeps...)
		}
	}
	for key := range req.Points {
		if !points[key] {
			return none, switchback.Errorf(switchback.CodeInvalid, "a point is named for %s, which is not among the VMs", key)
		}
	}
	if req.DryRun {
		plan.VM = strings.Join(names, ", ")
		slices.Sort(plan.Keeps)
		plan.Keeps = slices.Compact(plan.Keeps)
		return api.OperationAnswer{Plan: plan}, nil
	}
	for i := range params.Members {
		params.Members[i].Params.Wait = wait
	}
	raw, err := json.Marshal(params)
	if err != nil {
		return none, err
	}
	rec, err := s.begin(ctx, operation.Record{Kind: drillSeveral, Title: "test-failover " + strings.Join(names, ", "), Params: raw, RequestedBy: who})
	return api.OperationAnswer{Operation: &rec}, err
}

// drillsSteps begin drills, wait for them and judge them. What each does to its
// VM, and what it gives way to, is its own; this only begins, and clears when it
// is cancelled.
func (s *Server) drillsSteps() []operation.Step {
	return []operation.Step{
		{Name: "begin", Title: "begin the drills", RetryFor: shortRetry, Do: s.drillsBegin, Undo: s.drillsClear},
		{Name: "wait", Title: "wait for the drills", RetryFor: longRetry, Cancellable: true, Do: s.drillsWait},
		{Name: "verdict", Title: "judge the drills", Irreversible: true, Do: s.drillsVerdict},
	}
}

func (s *Server) drillsBegin(ctx context.Context, r *operation.Run) error {
	var params drillsParams
	if err := r.Params(&params); err != nil {
		return err
	}
	for i, m := range params.Members {
		p, err := s.store.Protection(ctx, m.Protection)
		if err != nil {
			return err
		}
		id := member(r.ID(), i)
		m.Params.Group, m.Params.Together = r.ID(), nil
		for j, other := range params.Members {
			if j != i {
				m.Params.Together = append(m.Params.Together, other.VM)
			}
		}
		rec, err := s.submitDrillAs(ctx, id, r.Record().RequestedBy, p, string(recovery.TestFailover), m.Params)
		if err != nil {
			return fmt.Errorf("%s: %w", p.Name, err)
		}
		r.Log(slog.LevelInfo, "drill begun", "vm", p.Name, "drill", rec.ID)
	}
	return nil
}

// drills are the member operations that exist.
func (s *Server) drills(ctx context.Context, parent operation.Record) (list []operation.Record, params drillsParams, err error) {
	if err := json.Unmarshal(parent.Params, &params); err != nil {
		return nil, params, err
	}
	for i := range params.Members {
		rec, err := s.runner.Get(ctx, member(parent.ID, i))
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			continue
		}
		if err != nil {
			return nil, params, err
		}
		list = append(list, rec)
	}
	return list, params, nil
}

// drillsWait waits until every drill has ended.
func (s *Server) drillsWait(ctx context.Context, r *operation.Run) error {
	for {
		list, params, err := s.drills(ctx, r.Record())
		if err != nil {
			return err
		}
		ended, kept := 0, 0
		for _, rec := range list {
			if rec.State.Finished() {
				ended++
			} else if st := rec.Step("hold"); st != nil && st.State == operation.StepRunning {
				kept++
			}
		}
		if ended == len(list) {
			return nil
		}
		r.Progress(operation.Progress{Message: fmt.Sprintf("%d of %d have been checked, %d have ended", kept+ended, len(params.Members), ended)})
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(drillsPoll):
		}
	}
}

// drillsClear ends every drill that was begun, and waits until each has cleared
// what it made. It is the undo of a drill of several VMs.
func (s *Server) drillsClear(ctx context.Context, r *operation.Run) error {
	for {
		list, _, err := s.drills(ctx, r.Record())
		if err != nil {
			return err
		}
		left := 0
		for _, rec := range list {
			if rec.State.Finished() {
				continue
			}
			left++
			if err := s.runner.Cancel(ctx, rec.ID); err != nil && switchback.CodeOf(err) != switchback.CodeRefused {
				return err
			}
		}
		if left == 0 {
			return s.gatherDrills(r, list)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(drillsPoll):
		}
	}
}

// gatherDrills puts the reports of the members together.
func (s *Server) gatherDrills(r *operation.Run, list []operation.Record) error {
	var reports []api.DrillReport
	for _, rec := range list {
		report, err := reportOf(rec)
		if err != nil {
			return err
		}
		reports = append(reports, report)
	}
	return summarise(r, func(sum *api.Summary) { sum.Drills = reports })
}

// drillsVerdict fails where one of the drills did not pass. One that gave way to
// a move of its VM has shown nothing, and counts as failed, too.
func (s *Server) drillsVerdict(ctx context.Context, r *operation.Run) error {
	list, params, err := s.drills(ctx, r.Record())
	if err != nil {
		return err
	}
	if err := s.gatherDrills(r, list); err != nil {
		return err
	}
	var failed []string
	for i, m := range params.Members {
		k := slices.IndexFunc(list, func(rec operation.Record) bool { return rec.ID == member(r.ID(), i) })
		switch {
		case k < 0:
			failed = append(failed, m.VM+": not begun")
		case list[k].State == operation.StateSucceeded:
		case list[k].Error != nil:
			failed = append(failed, fmt.Sprintf("%s: %v", m.VM, list[k].Error))
		default:
			failed = append(failed, fmt.Sprintf("%s: %s", m.VM, list[k].State))
		}
	}
	if len(failed) > 0 {
		return switchback.Errorf(switchback.CodeRefused, "%d of %d drills did not pass: %s", len(failed), len(params.Members), strings.Join(failed, "; ")).
			WithHint("switchback vm drill report VM shows each")
	}
	return nil
}

// awaitDrills waits in a drill that belongs to several until all others are past
// a step, or will not get there: they gave way, failed, or were cancelled. It
// returns early when this drill is to end.
func (s *Server) awaitDrills(ctx context.Context, r *operation.Run, params drillParams, step string) error {
	if params.Group == "" {
		return nil
	}
	for {
		p, err := s.of(ctx, r)
		if err != nil {
			return err
		}
		if p.Drill.Release == r.ID() {
			return nil
		}
		parent, err := s.runner.Get(ctx, params.Group)
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			return nil
		}
		if err != nil {
			return err
		}
		list, group, err := s.drills(ctx, parent)
		if err != nil {
			return err
		}
		behind := 0
		if !parent.State.Finished() && parent.State != operation.StateUndoing {
			behind = len(group.Members) - len(list) // about to be begun
		}
		for _, rec := range list {
			if rec.ID != r.ID() && !pastStep(rec, step) {
				behind++
			}
		}
		if behind == 0 {
			return nil
		}
		r.Progress(operation.Progress{Message: fmt.Sprintf("waiting for %d of %d drills", behind, len(group.Members))})
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(drillsPoll):
		}
	}
}

// pastStep reports whether an operation is done with a step, or will never be.
func pastStep(rec operation.Record, step string) bool {
	if rec.State.Finished() || rec.State == operation.StateUndoing || rec.CancelRequested {
		return true
	}
	st := rec.Step(step)
	if st == nil {
		return true
	}
	switch st.State {
	case operation.StepPending, operation.StepRunning, operation.StepWaiting:
		return false
	}
	return true
}

// lastChecked is when the last of the drills that belong together was checked.
func (s *Server) lastChecked(ctx context.Context, params drillParams, own time.Time) (time.Time, error) {
	if params.Group == "" {
		return own, nil
	}
	parent, err := s.runner.Get(ctx, params.Group)
	if err != nil {
		return own, err
	}
	list, _, err := s.drills(ctx, parent)
	if err != nil {
		return own, err
	}
	for _, rec := range list {
		if report, err := drillReport(rec); err == nil && report.CheckedAt.After(own) {
			own = report.CheckedAt
		}
	}
	return own, nil
}

// routeDrills are the requests about drills of several VMs.
func (s *Server) routeDrills(rt *routes) {
	handle(rt, route{ID: "begin-drills", Tag: "Operations", Pattern: "POST /v1/drills", Summary: "Drill several VMs together, on one isolated network", Need: switchback.Operator, Begins: true},
		func(ctx context.Context, in *struct{ Body api.DrillsRequest }) (api.OperationAnswer, error) {
			return s.requestDrills(ctx, callOf(ctx).who.Name, in.Body)
		})
	handle(rt, route{ID: "clean-drills", Tag: "Operations", Pattern: "POST /v1/drills/{id}/clean", Summary: "End all drills that an operation has begun", Need: switchback.Operator},
		func(ctx context.Context, in *OperationIn) (struct{}, error) {
			return struct{}{}, s.cleanDrills(ctx, in.ID)
		})
}

// cleanDrills ends all drills of one operation. Those that wait for each other no
// longer do.
func (s *Server) cleanDrills(ctx context.Context, id switchback.OperationID) error {
	parent, err := s.runner.Get(ctx, id)
	if err != nil {
		return err
	}
	if parent.Kind != drillSeveral {
		return switchback.Errorf(switchback.CodeInvalid, "operation %s is no drill of several VMs", id).WithHint("name the VMs: switchback vm drill clean VM…")
	}
	if parent.State.Finished() {
		return switchback.Errorf(switchback.CodeRefused, "operation %s has ended: %s", id, parent.State)
	}
	list, _, err := s.drills(ctx, parent)
	if err != nil {
		return err
	}
	if st := parent.Step("wait"); st == nil || st.State != operation.StepRunning {
		return s.runner.Cancel(ctx, id) // not all have begun
	}
	var errs []error
	for _, rec := range list {
		if !rec.State.Finished() {
			errs = append(errs, s.endDrillEarly(ctx, rec))
		}
	}
	return errors.Join(errs...)
}

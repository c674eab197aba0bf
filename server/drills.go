package server

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/robfig/cron/v3"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/check"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// validateGuestPolicy reports what cannot work in a policy's checks and drills.
func validateGuestPolicy(p switchback.Policy) error {
	if err := check.ValidateAll(p.Checks); err != nil {
		return err
	}
	if p.Drill == nil {
		return nil
	}
	if p.Drill.Interval < 0 {
		return switchback.Errorf(switchback.CodeInvalid, "the interval of drills cannot be negative")
	}
	if p.Drill.Schedule != "" {
		if _, err := cron.ParseStandard(p.Drill.Schedule); err != nil {
			return switchback.Errorf(switchback.CodeInvalid, "schedule %q: %w", p.Drill.Schedule, err).
				WithHint("a cron expression of five fields (minute hour day month weekday), or @daily, @weekly, @every 12h")
		}
	}
	return nil
}

// requestDrill begins a drill, or ends one. Everything that can be refused at
// once is, beside what the preflight step finds.
func (s *Server) requestDrill(ctx context.Context, who string, v api.VM, kind recovery.Kind, req api.OperationRequest) (api.OperationAnswer, error) {
	if kind == recovery.CleanDrill {
		return s.requestCleanDrill(ctx, who, v, req)
	}
	params, point, err := s.judgeDrill(ctx, v, req)
	if err != nil {
		return api.OperationAnswer{}, err
	}
	if req.DryRun {
		plan, err := s.planDrill(ctx, v, params, point)
		return api.OperationAnswer{Plan: plan}, err
	}
	rec, err := s.submitDrill(ctx, who, v.Protection, string(recovery.TestFailover), params)
	return api.OperationAnswer{Operation: &rec}, err
}

// judgeDrill finds what can be refused at once, and the point.
func (s *Server) judgeDrill(ctx context.Context, v api.VM, req api.OperationRequest) (drillParams, switchback.Point, error) {
	p := v.Protection
	refuse := func(err error) (drillParams, switchback.Point, error) { return drillParams{}, switchback.Point{}, err }
	params := drillParams{Point: req.Point, Cause: "asked"}
	if req.Drill != nil {
		params.DrillRequest = *req.Drill
	}
	if params.Network == "" && len(params.Networks) == 0 && !params.NoNetwork && p.Policy.Drill != nil {
		params.Network = p.Policy.Drill.Network
	}
	switch {
	case params.NoNetwork && (params.Network != "" || len(params.Networks) > 0):
		return refuse(switchback.Errorf(switchback.CodeInvalid, "a drill with no network and one on a network exclude each other"))
	case !params.NoNetwork && params.Network == "" && len(params.Networks) == 0 && (v.Protection.Policy.Drill == nil):
		return refuse(switchback.Errorf(switchback.CodeInvalid, "no network for the drill").
			WithHint("name an isolated one with --test-network, map them with --network HOME=ISOLATED, or use --no-network"))
	case params.Keep < 0 || params.Keep > maxKeep:
		return refuse(switchback.Errorf(switchback.CodeInvalid, "a drill is kept for 0 to %v", maxKeep))
	}
	if err := check.ValidateAll(params.Checks); err != nil {
		return refuse(err)
	}
	points, err := s.points(ctx, p)
	if err != nil {
		return refuse(err)
	}
	point, err := drillPoint(points, params.Point)
	return params, point, err
}

// planDrill asks the target about the networks, so that a dry run shows a refusal.
func (s *Server) planDrill(ctx context.Context, v api.VM, params drillParams, point switchback.Point) (*api.Plan, error) {
	p := v.Protection
	source, err := s.describe(ctx, p)
	if err != nil {
		return nil, err
	}
	networks, err := s.drillNetworks(ctx, p, source.networks, params.DrillRequest)
	if err != nil {
		return nil, err
	}
	a, err := s.store.Agent(ctx, p.TargetAgent)
	if err != nil {
		return nil, err
	}
	t := agentapi.Task{Key: fmt.Sprintf("plan/%s/%d", p.ID, time.Now().UnixNano()), Action: agentapi.ActionDrillPreflight, Protection: p.ID, Epoch: p.Epoch}
	if err := s.agentClient(a.ID).Run(ctx, t, networks, nil, nil); err != nil {
		return nil, err
	}
	checks := source.checksOf(params.Checks, p.Policy.Checks)
	plan := &api.Plan{Kind: string(recovery.TestFailover), VM: p.Name, Basis: "nothing crosses it: the point is at the target",
		Time: params.Keep + 30*time.Second}
	for _, st := range s.drillSteps() {
		plan.Steps = append(plan.Steps, api.PlanStep{Name: st.Name, Title: st.Title, Site: p.Target})
	}
	where := "with no network"
	if used := networks.Used(); len(used) > 0 {
		where = fmt.Sprintf("on %v", used)
	}
	plan.Changes = []string{fmt.Sprintf("a copy of %s runs at %s from point %d of %s, %s, under a name and UUID of its own", p.Name, p.Target,
		point.Sequence, point.Time.UTC().Format(time.RFC3339), where)}
	if source.note != "" {
		plan.Warnings = append(plan.Warnings, source.note)
	}
	for _, c := range checks {
		plan.Changes = append(plan.Changes, "check "+check.Format(c))
	}
	plan.Keeps = []string{fmt.Sprintf("%s at %s and its replication, untouched", p.Name, p.Source), "the report and a picture of the screen; nothing else is left"}
	return plan, nil
}

// submitDrill makes a drill durable on its own lane and axis.
func (s *Server) submitDrill(ctx context.Context, who string, p switchback.Protection, kind string, params any) (operation.Record, error) {
	return s.submitDrillAs(ctx, "", who, p, kind, params)
}

// submitDrillAs is submitDrill under an ID. A repetition finds the drill that is
// there.
func (s *Server) submitDrillAs(ctx context.Context, id switchback.OperationID, who string, p switchback.Protection, kind string, params any) (operation.Record, error) {
	raw, err := json.Marshal(params)
	if err != nil {
		return operation.Record{}, err
	}
	rec, err := s.begin(ctx, operation.Record{ID: id, Kind: kind, Protection: p.ID, Lane: drillLane, Title: kind + " " + p.Name, Params: raw, RequestedBy: who})
	if switchback.CodeOf(err) == switchback.CodeConflict && id != "" {
		if there, gerr := s.runner.Get(ctx, id); gerr == nil {
			rec, err = there, nil
		}
	}
	if err != nil {
		return rec, err
	}
	_, err = s.update(ctx, p.ID, func(x *switchback.Protection) error {
		// It may have ended already and said so.
		if cur, gerr := s.runner.Get(ctx, rec.ID); gerr == nil && !cur.State.Finished() && kind == string(recovery.TestFailover) {
			x.Drill.Operation = rec.ID
		}
		return nil
	})
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		err = nil
	}
	return rec, err
}

// requestCleanDrill ends the drill under way, as one that has passed where it is
// only kept and else as cancelled, or clears what one has left.
func (s *Server) requestCleanDrill(ctx context.Context, who string, v api.VM, req api.OperationRequest) (api.OperationAnswer, error) {
	if req.DryRun {
		plan := &api.Plan{Kind: string(recovery.CleanDrill), VM: v.Name, Basis: "nothing is copied", Time: 2 * time.Second}
		if v.AtTarget != nil {
			for _, d := range v.AtTarget.Drills {
				plan.Changes = append(plan.Changes, fmt.Sprintf("%s at %s is turned off and removed, with all it wrote", d.Name, v.Target))
			}
		}
		plan.Keeps = []string{"the VM, its replication and its points; the reports of drills"}
		return api.OperationAnswer{Plan: plan}, nil
	}
	if cur := v.CurrentDrill; cur != nil {
		if err := s.endDrillEarly(ctx, *cur); err != nil {
			return api.OperationAnswer{}, err
		}
		rec, err := s.runner.Get(ctx, cur.ID)
		return api.OperationAnswer{Operation: &rec}, err
	}
	rec, err := s.submitDrill(ctx, who, v.Protection, string(recovery.CleanDrill), struct{}{})
	return api.OperationAnswer{Operation: &rec}, err
}

// endDrillEarly ends a drill under way: one that is only kept as it stands, any
// other as cancelled.
func (s *Server) endDrillEarly(ctx context.Context, cur operation.Record) error {
	if st := cur.Step("hold"); st != nil && st.State == operation.StepRunning {
		_, err := s.update(ctx, cur.Protection, func(p *switchback.Protection) error { p.Drill.Release = cur.ID; return nil })
		return err
	}
	return s.runner.Cancel(ctx, cur.ID)
}

// reportOf is the report of a drill, or what is known before there is one.
func reportOf(rec operation.Record) (api.DrillReport, error) {
	report, err := drillReport(rec)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		report, err = api.DrillReport{Drill: rec.ID, VM: strings.TrimPrefix(rec.Title, rec.Kind+" "), RequestedAt: rec.CreatedAt}, nil
	}
	if rec.Error != nil && report.Error == "" {
		report.Error = rec.Error.Error()
	}
	return report, err
}

// viewDrill adds the drill axis to a VM: what runs, what is due, what is left.
func (s *Server) viewDrill(ctx context.Context, v *api.VM, facts *recovery.Facts) error {
	p := v.Protection
	if id := p.Drill.Operation; id != "" {
		rec, err := s.runner.Get(ctx, id)
		if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
			return err
		}
		if err == nil && !rec.State.Finished() {
			v.CurrentDrill, facts.Drill.Running = &rec, id
		}
	}
	for _, st := range []*agentapi.VMStatus{v.AtSource, v.AtTarget} {
		if st == nil {
			continue
		}
		for _, d := range st.Drills {
			if d.Drill == facts.Drill.Running {
				continue
			}
			facts.Drill.Left++
			if len(d.Left) > 0 {
				v.Conditions = append(v.Conditions, switchback.Condition{Name: "drill-left-behind", Severity: switchback.SeverityWarning, Since: d.ExpiresAt,
					Cause:  fmt.Sprintf("drill %s cannot be cleared: %v", d.Drill, d.Left),
					Remedy: "it is tried again by itself; see the causes, or switchback vm drill clean " + p.Name})
			}
		}
	}
	if last := p.Drill.Last; last != nil && !last.Passed {
		v.Conditions = append(v.Conditions, switchback.Condition{Name: "drill-failed", Severity: switchback.SeverityWarning, Since: last.At,
			Cause: fmt.Sprintf("the last drill, of point %d, did not pass", last.Sequence), Remedy: fmt.Sprintf("switchback vm drill report %s", p.Name)})
	}
	if p.Policy.Drill != nil && p.Phase == switchback.PhaseProtected {
		if due := p.Policy.Drill.DueAt(p.Drill, p.CreatedAt); !due.IsZero() && time.Now().After(due) {
			cause := "it was never proven to boot"
			if p.Drill.Passed != nil {
				cause = "it was last proven to boot at " + p.Drill.Passed.At.UTC().Format(time.RFC3339)
			}
			v.Conditions = append(v.Conditions, switchback.Condition{Name: "drill-due", Severity: switchback.SeverityWarning, Since: due,
				Cause: cause, Remedy: "switchback vm test-failover " + p.Name})
		}
	}
	return nil
}

func drillReport(rec operation.Record) (api.DrillReport, error) {
	var sum api.Summary
	if len(rec.Result) > 0 {
		if err := json.Unmarshal(rec.Result, &sum); err != nil {
			return api.DrillReport{}, err
		}
	}
	if sum.Drill == nil {
		return api.DrillReport{}, switchback.Errorf(switchback.CodeNotFound, "drill %s has no report yet", rec.ID)
	}
	return *sum.Drill, nil
}

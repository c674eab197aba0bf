package server

import (
	"context"
	"log/slog"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// changeShutdownDeadline is how long a guest may take to power off before its
// point is changed; it may be one that does not boot.
const changeShutdownDeadline = 20 * time.Second

// changeParams are the parameters of change-point.
type changeParams struct {
	Point            string        `json:"point,omitempty"`
	Snapshot         string        `json:"snapshot,omitempty"`
	ShutdownDeadline time.Duration `json:"shutdown_deadline"`
}

// changeChosen is the result of the step choose.
type changeChosen struct {
	Point switchback.MarkedPoint `json:"point"`
	// GuestAgent: it answered, so that it can be waited for after the change.
	GuestAgent bool `json:"guest_agent"`
}

// changePointSteps move a switched VM to another point, or back to what an
// earlier run wrote, under an epoch of its own. Once the guest is stopped the
// change only goes forward: what was written is kept, and the way back is
// another change.
func (s *Server) changePointSteps() []operation.Step {
	return []operation.Step{
		{Name: "choose", Title: "choose the point and look at the guest", RetryFor: shortRetry, Do: s.changeChoose},
		{Name: "change", Title: "stop the guest, keep its writes, start it from the point", RetryFor: shortRetry, Irreversible: true, Do: s.changeRun},
		{Name: "check", Title: "check that it runs", RetryFor: shortRetry, Irreversible: true, Do: s.changeCheck},
	}
}

// changeTarget resolves what a change of the point is asked for: a point, or the
// parent point of a snapshot that the new side keeps.
func (s *Server) changeTarget(ctx context.Context, p switchback.Protection, params changeParams, now time.Time) (switchback.MarkedPoint, error) {
	if params.Snapshot == "" {
		choice, err := recovery.ParseChoice(params.Point)
		if err != nil {
			return switchback.MarkedPoint{}, err
		}
		return s.choose(ctx, p, choice, now)
	}
	a, err := s.store.Agent(ctx, p.Switch.ToAgent)
	if err != nil {
		return switchback.MarkedPoint{}, err
	}
	st, err := s.agentClient(a.ID).Status(ctx)
	if err != nil {
		return switchback.MarkedPoint{}, err
	}
	for _, v := range st.VMs {
		if v.Protection != p.ID {
			continue
		}
		for _, kept := range v.Snapshots {
			if kept.Name != params.Snapshot {
				continue
			}
			if kept.SelfContained {
				return switchback.MarkedPoint{}, switchback.Errorf(switchback.CodeRefused, "snapshot %s is of before a commit: its point is gone", kept.Name).
					WithHint("it holds whole disks: switchback points export %s --snapshot %s", p.Name, kept.Name)
			}
			return s.choose(ctx, p, recovery.Choice{Kind: recovery.ChooseSequence, Sequence: kept.Point}, now)
		}
	}
	return switchback.MarkedPoint{}, switchback.Errorf(switchback.CodeNotFound, "site %s keeps no snapshot %s", p.Switch.To, params.Snapshot).WithHint("'vm snapshots' lists them")
}

func (s *Server) changeChoose(ctx context.Context, r *operation.Run) error {
	var params changeParams
	if err := r.Params(&params); err != nil {
		return err
	}
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	chosen, err := s.changeTarget(ctx, p, params, r.Record().CreatedAt)
	if err != nil {
		return err
	}
	// That it can be done is seen while the guest still runs.
	check := agentapi.ChangePointParams{Sequence: chosen.Sequence, Snapshot: params.Snapshot, DryRun: true}
	if err := s.do(ctx, r, p.Switch.ToAgent, p.Epoch, agentapi.ActionChangePoint, check, nil); err != nil {
		return err
	}
	var found agentapi.DescribeResult
	err = s.do(ctx, r, p.Switch.ToAgent, p.Epoch, agentapi.ActionDescribe, agentapi.DescribeParams{VM: p.VM, AskAgent: true}, &found)
	if err != nil {
		return err
	}
	r.Log(slog.LevelInfo, "to be changed", "from", p.Switch.Point.Sequence, "to", chosen.Sequence, "kind", chosen.Kind,
		"time", chosen.Time.UTC().Format(time.RFC3339Nano), "snapshot", params.Snapshot)
	if w := recovery.Warning(chosen); w != "" {
		r.Log(slog.LevelWarn, "the chosen point may be bad", "why", w)
	}
	return r.SetResult(changeChosen{Point: chosen, GuestAgent: found.Domain.State == hypervisor.StateRunning && found.GuestAgent})
}

func (s *Server) changeRun(ctx context.Context, r *operation.Run) error {
	var params changeParams
	var chosen changeChosen
	if err := r.Params(&params); err != nil {
		return err
	}
	if err := r.StepResult("choose", &chosen); err != nil {
		return err
	}
	p, err := s.update(ctx, r.Protection(), func(p *switchback.Protection) error {
		if c := p.Switch.Changing; c != nil && c.Operation == r.ID() {
			return nil // before a restart
		}
		p.Mint()
		p.Phase = switchback.PhaseSwitching
		p.Switch.Epoch, p.Switch.Deadline, p.Switch.Overdue = p.Epoch, time.Time{}, ""
		p.Switch.Changing = &switchback.ChangingPoint{Operation: r.ID(), Point: chosen.Point.Point, Snapshot: params.Snapshot}
		return nil
	})
	if err != nil {
		return err
	}
	var out agentapi.ChangePointResult
	err = s.do(ctx, r, p.Switch.ToAgent, p.Epoch, agentapi.ActionChangePoint, agentapi.ChangePointParams{Sequence: chosen.Point.Sequence,
		Snapshot: params.Snapshot, ShutdownDeadline: params.ShutdownDeadline}, &out)
	if err != nil {
		return err
	}
	if out.SetAside != "" {
		r.Log(slog.LevelInfo, "what the guest had written is kept", "snapshot", out.SetAside)
	}
	if err := r.SetResult(out); err != nil {
		return err
	}
	from := p.Switch.Point
	return summarise(r, func(sum *api.Summary) {
		if sum.Change == nil {
			sum.Change = &api.Changed{From: from}
		}
		sum.Change.To, sum.Change.Snapshot, sum.Change.SetAside = chosen.Point.Point, params.Snapshot, out.SetAside
		sum.Change.Outage = out.RunningAt.Sub(out.OffAt)
	})
}

func (s *Server) changeCheck(ctx context.Context, r *operation.Run) error {
	var chosen changeChosen
	if err := r.StepResult("choose", &chosen); err != nil {
		return err
	}
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	params := agentapi.CheckParams{Settle: 2 * time.Second}
	if chosen.GuestAgent {
		params.AgentTimeout = guestAgentDeadline
	}
	var out agentapi.CheckResult
	if err := s.do(ctx, r, p.Switch.ToAgent, p.Epoch, agentapi.ActionCheck, params, &out); err != nil {
		return err
	}
	if out.GuestAgent == "silent" {
		r.Log(slog.LevelWarn, "the guest runs, but its guest agent, which answered before, does not", "waited", params.AgentTimeout)
	}
	if err := summarise(r, func(sum *api.Summary) { sum.Change.GuestAgent = out.GuestAgent }); err != nil {
		return err
	}
	_, err = s.update(ctx, p.ID, func(p *switchback.Protection) error {
		if c := p.Switch.Changing; c != nil {
			p.Switch.Point, p.Switch.Snapshot, p.Switch.Changing = c.Point, c.Snapshot, nil
			p.Switch.Deadline = p.Policy.Commit.Deadline(time.Now())
		}
		p.Phase = switchback.PhaseSwitched
		return nil
	})
	return err
}

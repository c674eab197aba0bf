package server

import (
	"context"
	"log/slog"
	"strconv"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// guestAgentDeadline is how long the agent of a guest that boots is waited for.
const guestAgentDeadline = 90 * time.Second

// switchParams are the parameters of failover and failback.
type switchParams struct {
	// Point is a choice: see recovery.ParseChoice.
	Point            string        `json:"point"`
	AcceptLoss       bool          `json:"accept_loss"`
	ShutdownDeadline time.Duration `json:"shutdown_deadline"`
	ForceOff         bool          `json:"force_off"`
	NoProof          bool          `json:"no_proof,omitempty"`
	// failback only
	FromCommitted bool `json:"from_committed"`
	AndCommit     bool `json:"and_commit"`
	AndReprotect  bool `json:"and_reprotect"`
	// for AndCommit: see commitParams
	Snapshots string `json:"snapshots,omitempty"`
	Points    string `json:"points,omitempty"`
}

// switchSteps moves a VM that is protected and whose both sites are up. Undo
// of everything from hold on is one piece (undoSwitch), on the step hold.
func (s *Server) switchSteps() []operation.Step {
	return []operation.Step{
		{Name: "preflight", Title: "check the VM and both sites", RetryFor: shortRetry, Do: s.switchPreflight},
		{Name: "sync", Title: "bring the target up to date", RetryFor: shortRetry, Cancellable: true, Do: s.switchSync},
		{Name: "hold", Title: "hold replication", RetryFor: shortRetry, Do: s.switchHold, Undo: s.undoSwitch},
		{Name: "shutdown", Title: "shut the guest down", RetryFor: shortRetry, Cancellable: true, Do: s.switchShutdown},
		{Name: "final-point", Title: "ship the last changes", RetryFor: shortRetry, Cancellable: true, Do: s.switchFinalPoint},
		{Name: "fence", Title: "fence the old side", RetryFor: shortRetry, Do: s.switchFence},
		{Name: "activate", Title: "hand the new epoch to the new side", RetryFor: shortRetry, Do: s.switchActivate},
		{Name: "start", Title: "start the guest from the point's view", RetryFor: shortRetry, Do: s.switchStart},
		{Name: "check", Title: "check that it runs", RetryFor: shortRetry, Cancellable: true, Do: s.switchCheck},
		s.proofStep(),
	}
}

func (s *Server) switchPreflight(ctx context.Context, r *operation.Run) error {
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	s.stopDrills(ctx, r, p)
	var source, target agentapi.DescribeResult
	if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionDescribe, agentapi.DescribeParams{VM: p.VM, MustExist: true, AskAgent: true}, &source); err != nil {
		return err
	}
	if _, err := hypervisor.Protectable(source.Domain); err != nil {
		return err
	}
	if err := s.agentDescribe(ctx, p.TargetAgent, p, &target); err != nil {
		return err
	}
	if target.Domain.UUID != "" && target.Domain.State != hypervisor.StateOff {
		return switchback.Errorf(switchback.CodeRefused, "VM %s is %s at site %s", p.Name, target.Domain.State, p.Target).WithHint("turn it off there")
	}
	return r.SetResult(source)
}

// agentDescribe asks an agent about the VM without a task of the run's key.
func (s *Server) agentDescribe(ctx context.Context, agent switchback.AgentID, p switchback.Protection, out *agentapi.DescribeResult) error {
	a, err := s.store.Agent(ctx, agent)
	if err != nil {
		return err
	}
	t := agentapi.Task{Key: "describe/" + string(p.ID) + "/" + strconv.FormatInt(time.Now().UnixNano(), 36), Action: agentapi.ActionDescribe, Protection: p.ID, Epoch: p.Epoch}
	return s.agentClient(a.ID).Run(ctx, t, agentapi.DescribeParams{VM: p.VM}, out, nil)
}

// switchSync takes a point while the guest still runs, so that little is left
// to ship after its shutdown.
func (s *Server) switchSync(ctx context.Context, r *operation.Run) error {
	var source agentapi.DescribeResult
	if err := r.StepResult("preflight", &source); err != nil {
		return err
	}
	if source.Domain.State == hypervisor.StateOff {
		return operation.Skip("the guest is off")
	}
	var params switchParams
	if err := r.Params(&params); err != nil {
		return err
	}
	if choice, err := recovery.ParseChoice(params.Point); err != nil {
		return err
	} else if choice.Kind == recovery.ChooseProcessed {
		return operation.Skip("latest-processed waits for no point")
	}
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	return s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionTakePoint, nil, nil)
}

func (s *Server) switchHold(ctx context.Context, r *operation.Run) error {
	var source agentapi.DescribeResult
	if err := r.StepResult("preflight", &source); err != nil {
		return err
	}
	p, err := s.update(ctx, r.Protection(), func(p *switchback.Protection) error {
		if p.Phase == switchback.PhaseSwitching {
			return nil // before a restart
		}
		p.Phase, p.Paused = switchback.PhaseSwitching, false
		p.Switch = &switchback.Switch{From: p.Source, To: p.Target, FromAgent: p.SourceAgent, ToAgent: p.TargetAgent,
			PreviousEpoch: p.Epoch, StartedAt: time.Now(), WasRunning: source.Domain.State != hypervisor.StateOff}
		return nil
	})
	if err != nil {
		return err
	}
	if err := s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionFreeze, nil, nil); err != nil {
		return err
	}
	if err := s.holdPoint(ctx, r, p); err != nil {
		return err
	}
	return s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionHold, nil, nil)
}

func (s *Server) switchShutdown(ctx context.Context, r *operation.Run) error {
	var params switchParams
	if err := r.Params(&params); err != nil {
		return err
	}
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	var out agentapi.ShutdownResult
	err = s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionShutdown, agentapi.ShutdownParams{Deadline: params.ShutdownDeadline, Force: params.ForceOff}, &out)
	if switchback.CodeOf(err) == switchback.CodeTimeout {
		// Not to be retried: the guest does not want to, and is still running.
		return switchback.Errorf(switchback.CodeRefused, "%w", err).WithHint("shut the guest down from inside, or use --force-off")
	}
	if err != nil {
		return err
	}
	r.Log(slog.LevelInfo, "guest is off", "was_running", out.WasRunning)
	return r.SetResult(out)
}

func (s *Server) switchFinalPoint(ctx context.Context, r *operation.Run) error {
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	var out agentapi.PointResult
	if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionFinalPoint, nil, &out); err != nil {
		return err
	}
	if err := r.SetResult(out); err != nil {
		return err
	}
	last := out.Report.Point
	chosen, err := s.switchPoint(ctx, r, p, last, out.Report.ChangedBytes)
	if err != nil {
		return err
	}
	_, err = s.update(ctx, p.ID, func(p *switchback.Protection) error { p.Switch.Last, p.Switch.Point = last, chosen; return nil })
	return err
}

func (s *Server) switchFence(ctx context.Context, r *operation.Run) error {
	p, err := s.update(ctx, r.Protection(), func(p *switchback.Protection) error {
		if p.Switch.Epoch == 0 {
			p.Switch.Epoch = p.Mint()
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = s.do(ctx, r, p.Switch.FromAgent, p.Switch.Epoch, agentapi.ActionFence, agentapi.FenceParams{ActiveSite: p.Switch.To}, nil)
	return s.fencedByLease(ctx, r, p, err)
}

func (s *Server) switchActivate(ctx context.Context, r *operation.Run) error {
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	return s.do(ctx, r, p.Switch.ToAgent, p.Switch.Epoch, agentapi.ActionActivate, agentapi.ActivateParams{Unproven: p.Switch.Unproven}, nil)
}

func (s *Server) switchStart(ctx context.Context, r *operation.Run) error {
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	var source agentapi.DescribeResult
	if err := r.StepResult("preflight", &source); err != nil {
		return err
	}
	networks := p.Networks
	if p.Switch.To == p.Home {
		networks = map[string]string{}
		for home, away := range p.Networks {
			networks[away] = home
		}
	}
	var out agentapi.StartResult
	err = s.do(ctx, r, p.Switch.ToAgent, p.Switch.Epoch, agentapi.ActionStart, agentapi.StartParams{
		Sequence: p.Switch.Point.Sequence, Definition: source.Definition, Networks: networks, Autostart: source.Domain.Autostart}, &out)
	if err != nil {
		return err
	}
	return r.SetResult(out)
}

func (s *Server) switchCheck(ctx context.Context, r *operation.Run) error {
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	var source agentapi.DescribeResult
	if err := r.StepResult("preflight", &source); err != nil {
		return err
	}
	params := agentapi.CheckParams{Settle: 2 * time.Second}
	if source.GuestAgent { // it answered at the old side: it will at the new one
		params.AgentTimeout = guestAgentDeadline
	}
	var out agentapi.CheckResult
	if err := s.do(ctx, r, p.Switch.ToAgent, p.Switch.Epoch, agentapi.ActionCheck, params, &out); err != nil {
		return err
	}
	if out.GuestAgent == "silent" {
		r.Log(slog.LevelWarn, "the guest runs, but its guest agent, which answered before, does not", "waited", params.AgentTimeout)
	}
	checks, err := s.guestChecks(ctx, r, p, p.Switch.ToAgent, p.Switch.Epoch)
	if err != nil {
		return err
	}
	var off agentapi.ShutdownResult
	var started agentapi.StartResult
	if err := r.StepResult("shutdown", &off); err != nil {
		return err
	}
	if err := r.StepResult("start", &started); err != nil {
		return err
	}
	var final agentapi.PointResult
	if err := r.StepResult("final-point", &final); err != nil {
		return err
	}
	err = summarise(r, func(sum *api.Summary) {
		sum.Switch = &api.Switched{From: p.Switch.From, To: p.Switch.To, Outage: started.RunningAt.Sub(off.OffAt), Point: p.Switch.Point, Last: p.Switch.Last,
			OffAt: off.OffAt, RunningAt: started.RunningAt, GuestAgent: out.GuestAgent, Checks: checks,
			BytesSent: final.Report.SentBytes, BytesChanged: final.Report.ChangedBytes}
	})
	if err != nil {
		return err
	}
	_, err = s.update(ctx, p.ID, func(p *switchback.Protection) error {
		p.Phase = switchback.PhaseSwitched
		p.Switch.Deadline = p.Policy.Commit.Deadline(time.Now())
		p.Source, p.Target = p.Switch.To, p.Switch.From
		p.SourceAgent, p.TargetAgent = p.Switch.ToAgent, p.Switch.FromAgent
		return nil
	})
	return err
}

// undoSwitch returns a VM to where it was: new side off, its writes kept, old
// side on under a new epoch, replication resumed. From whichever step was reached.
func (s *Server) undoSwitch(ctx context.Context, r *operation.Run) error {
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	if p.Switch == nil {
		return nil // never began, or undone before
	}
	p, err = s.update(ctx, p.ID, func(p *switchback.Protection) error {
		p.Phase = switchback.PhaseUndoing
		if p.Switch.UndoEpoch == 0 {
			p.Switch.UndoEpoch = p.Mint()
		}
		return nil
	})
	if err != nil {
		return err
	}
	sw := p.Switch
	err = s.do(ctx, r, sw.ToAgent, sw.UndoEpoch, agentapi.ActionAbandon, agentapi.FenceParams{ActiveSite: sw.From}, nil)
	rec := r.Record()
	if st := rec.Step("activate"); err != nil && switchback.IsRetryable(err) && st != nil && st.StartedAt.IsZero() {
		// The new side never owned the VM: the old one need not wait for it. It
		// learns the epoch from the first point.
		r.Log(slog.LevelWarn, "the new side does not answer, and never was active: going on without it", "site", sw.To, "error", err)
		err = nil
	}
	if err != nil {
		return err
	}
	r.Log(slog.LevelInfo, "new side is off", "site", sw.To)
	if err := s.do(ctx, r, sw.FromAgent, sw.UndoEpoch, agentapi.ActionReinstate, agentapi.ReinstateParams{Start: sw.WasRunning}, nil); err != nil {
		return err
	}
	r.Log(slog.LevelInfo, "old side is active again, replication resumed", "site", sw.From)
	_, err = s.update(ctx, p.ID, func(p *switchback.Protection) error {
		p.Phase, p.Switch = switchback.PhaseProtected, nil
		p.Source, p.Target, p.SourceAgent, p.TargetAgent = sw.From, sw.To, sw.FromAgent, sw.ToAgent
		return nil
	})
	return err
}

func (s *Server) cancelSteps() []operation.Step {
	return []operation.Step{{Name: "undo", Title: "new side off, old side on, replication resumed", RetryFor: shortRetry, Irreversible: true, Do: s.undoSwitch}}
}

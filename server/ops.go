package server

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
)

// Retry times of steps. An agent that is being restarted is waited for; a
// person decides what happens to one that stays away.
const (
	shortRetry = 2 * time.Minute
	longRetry  = 24 * time.Hour // copies: replication itself retries for ever
)

// definitions are all operations the server knows.
func (s *Server) definitions() []operation.Definition {
	return append(s.pointDefinitions(), []operation.Definition{
		{Kind: "protect", Steps: operation.Fixed(s.protectSteps()...), OnEnd: s.endProtect},
		{Kind: "take-point", Steps: operation.Fixed(s.takePointSteps()...), OnEnd: s.end},
		{Kind: "failover", Steps: operation.Fixed(s.switchSteps()...), OnEnd: s.end},
		{Kind: "change-point", Steps: operation.Fixed(s.changePointSteps()...), OnEnd: s.end},
		{Kind: "extend", Steps: operation.Fixed(s.extendSteps()...), OnEnd: s.end},
		{Kind: "drop-snapshot", Steps: operation.Fixed(s.dropSnapshotSteps()...), OnEnd: s.end},
		{Kind: "drop-kept", Steps: operation.Fixed(s.dropKeptSteps()...), OnEnd: s.end},
		{Kind: "commit", Steps: operation.Fixed(s.commitSteps("")...), OnEnd: s.end},
		{Kind: "cancel", Steps: operation.Fixed(s.cancelSteps()...), OnEnd: s.end},
		{Kind: "reprotect", Steps: operation.Fixed(s.reprotectSteps("")...), OnEnd: s.end},
		{Kind: "failback", Steps: s.failbackSteps, OnEnd: s.end},
		{Kind: "resolve", Steps: operation.Fixed(s.resolveSteps()...), OnEnd: s.endResolve},
		{Kind: "unprotect", Steps: operation.Fixed(s.unprotectSteps()...), OnEnd: s.end},
		{Kind: "edit", Steps: operation.Fixed(s.editSteps()...), OnEnd: s.end},
		{Kind: "test-failover", Steps: operation.Fixed(s.drillSteps()...), OnEnd: s.endDrill},
		{Kind: drillSeveral, Steps: operation.Fixed(s.drillsSteps()...)},
		{Kind: "clean-drill", Steps: operation.Fixed(s.cleanDrillSteps()...), OnEnd: s.endCleanDrill},
	}...)
}

// protection of the run.
func (s *Server) of(ctx context.Context, r *operation.Run) (switchback.Protection, error) {
	return s.store.Protection(ctx, r.Protection())
}

// update changes a protection; a concurrent change is read again and retried.
func (s *Server) update(ctx context.Context, id switchback.ProtectionID, f func(*switchback.Protection) error) (switchback.Protection, error) {
	for {
		p, err := s.store.Protection(ctx, id)
		if err != nil {
			return p, err
		}
		from := p.Phase
		if err := f(&p); err != nil {
			return p, err
		}
		next, err := s.store.UpdateProtection(ctx, p)
		if switchback.CodeOf(err) == switchback.CodeConflict && ctx.Err() == nil {
			continue
		}
		if err == nil && from != next.Phase {
			s.log.Info("phase", "vm", p.Name, "protection", id, "from", from, "to", next.Phase, "epoch", next.Epoch)
		}
		return next, err
	}
}

func (s *Server) setPhase(ctx context.Context, id switchback.ProtectionID, phase switchback.Phase) error {
	_, err := s.update(ctx, id, func(p *switchback.Protection) error { p.Phase = phase; return nil })
	return err
}

// do has an agent carry out an action as part of a step and shows its progress.
func (s *Server) do(ctx context.Context, r *operation.Run, agent switchback.AgentID, epoch switchback.Epoch, action string, params, out any) error {
	return s.doFor(ctx, r, r.Protection(), "", agent, epoch, action, params, out)
}

// doFor is do for an operation that belongs to no protection; key tells apart
// what one step asks several times.
func (s *Server) doFor(ctx context.Context, r *operation.Run, id switchback.ProtectionID, key string, agent switchback.AgentID, epoch switchback.Epoch, action string, params, out any) error {
	a, err := s.store.Agent(ctx, agent)
	if err != nil {
		return err
	}
	t := agentapi.Task{Key: r.Key() + "/" + action + key, Action: action, Protection: id, Epoch: epoch, Fence: r.Fence()}
	err = s.agentClient(a.ID).Run(ctx, t, params, out, func(st agentapi.TaskState) {
		p := operation.Progress{Message: st.Message}
		if st.Progress != nil {
			p.Percent, p.DoneBytes, p.TotalBytes = st.Progress.Percent, st.Progress.DoneBytes, st.Progress.TotalBytes
			p.RateBytesPerSecond, p.ETA = st.Progress.RateBytesPerSecond, st.Progress.ETA
		}
		r.Progress(p)
	})
	if err != nil && ctx.Err() == nil {
		var e *switchback.Error
		if errors.As(err, &e) && e.Op == "" {
			c := *e
			c.Op = string(a.Site)
			return &c
		}
	}
	return err
}

// summarise adds to what the operation's record keeps. An operation of several
// parts (failback) gathers them.
func summarise(r *operation.Run, f func(*api.Summary)) error {
	var sum api.Summary
	if raw := r.Record().Result; len(raw) > 0 {
		if err := json.Unmarshal(raw, &sum); err != nil {
			return err
		}
	}
	f(&sum)
	return r.SetSummary(sum)
}

// end notes how the operation ended on the protection.
func (s *Server) end(ctx context.Context, r *operation.Run, final operation.State) error {
	rec := r.Record()
	_, err := s.update(ctx, r.Protection(), func(p *switchback.Protection) error {
		p.Ended = rec.ID
		if final == operation.StateFailed {
			p.Operation = rec.ID // kept: it can be retried
		} else {
			p.Operation = ""
		}
		if rec.Expired() {
			notApproved(p, rec, s.store.Now())
		}
		return nil
	})
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return nil // unprotected
	}
	r.Log(slog.LevelInfo, "ended", "state", final)
	return err
}

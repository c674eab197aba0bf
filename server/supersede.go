package server

import (
	"context"
	"slices"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// An operation that has failed stays the VM's until it is retried, cancelled or
// followed by another one. What the agents know may overtake it as well: after a
// restore it may long have ended, and going on with it would undo that.

// cancelOperation cancels an operation, unless it is superseded.
func (s *Server) cancelOperation(ctx context.Context, id switchback.OperationID) error {
	if _, err := s.notSuperseded(ctx, id); err != nil {
		return err
	}
	return s.runner.Cancel(ctx, id)
}

// retryOperation lets a failed operation go on, unless it is superseded, or the VM
// has become contested: then only what ends the contest may go on.
func (s *Server) retryOperation(ctx context.Context, id switchback.OperationID) error {
	rec, err := s.notSuperseded(ctx, id)
	if err != nil {
		return err
	}
	if rec.State == operation.StateFailed && rec.Protection != "" && rec.Lane == "" {
		_, facts, err := s.factsOf(ctx, rec)
		if err != nil {
			return err
		}
		if a, decided := recovery.CheckRetry(facts); decided && !a.Allowed {
			return refusal(a)
		}
	}
	return s.runner.Retry(ctx, id)
}

// factsOf gathers how an operation's VM stands now, at its agents.
func (s *Server) factsOf(ctx context.Context, rec operation.Record) (p switchback.Protection, f recovery.Facts, err error) {
	if p, err = s.store.Protection(ctx, rec.Protection); err == nil {
		_, f, err = s.viewFacts(ctx, p, true)
	}
	return p, f, err
}

// stillAllowed judges an operation that awaits approval once more, as if it were
// asked for now: the VM may have changed since.
func (s *Server) stillAllowed(ctx context.Context, rec operation.Record) error {
	kind := recovery.Kind(rec.Kind)
	if rec.State != operation.StateAwaiting || rec.Protection == "" || rec.Lane != "" || !slices.Contains(recovery.Kinds, kind) {
		return nil
	}
	p, facts, err := s.factsOf(ctx, rec)
	if err != nil {
		return err
	}
	facts.Running, facts.RunningID = "", "" // that is rec itself
	if p.Ended != "" {
		// It may have been asked for because the one before it had failed.
		before, err := s.store.Operation(ctx, p.Ended)
		if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
			return err
		}
		facts.Failed, facts.FailedKind = before.State == operation.StateFailed, before.Kind
	}
	if a := recovery.Check(p, facts, kind); !a.Allowed {
		return refusal(a)
	}
	return nil
}

func refusal(a recovery.Allowed) error {
	return switchback.Errorf(switchback.CodeRefused, "%s is not possible: %s", a.Kind, a.Reason).WithHint("%s", a.Remedy)
}

// notSuperseded returns an operation. CodeConflict: it has failed, and is not its
// VM's any more.
func (s *Server) notSuperseded(ctx context.Context, id switchback.OperationID) (operation.Record, error) {
	rec, err := s.store.Operation(ctx, id)
	if err == nil && rec.State == operation.StateCancelled && rec.Error != nil && rec.Error.Code == switchback.CodeConflict {
		return rec, rec.Error // ended by supersede
	}
	if err != nil || rec.State != operation.StateFailed || rec.Protection == "" || rec.Lane != "" {
		return rec, err
	}
	p, err := s.store.Protection(ctx, rec.Protection)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return rec, nil
	}
	if err == nil && p.Operation != id {
		err = superseded(id).WithHint("see how the VM stands, then start a new operation")
	}
	return rec, err
}

func superseded(id switchback.OperationID) *switchback.Error {
	return switchback.Errorf(switchback.CodeConflict, "operation %s is superseded: the VM has gone on without it", id)
}

// supersede ends a failed operation in whose place comes what the agents know.
// CodeConflict: it has been retried or cancelled meanwhile.
func (s *Server) supersede(ctx context.Context, rec operation.Record) error {
	rec = operation.End(rec, operation.StateCancelled, s.store.Now().UTC())
	rec.Error = superseded(rec.ID)
	return s.store.EndFailed(ctx, rec)
}

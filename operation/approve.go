package operation

import (
	"context"

	switchback "github.com/switchback-dr/switchback"
)

// Approve lets an operation go on that awaits it, with the consent of by; it
// returns when that is durable. CodeRefused: it does not await approval, or not
// any more. Whether by may approve is the caller's to know.
func (r *Runner) Approve(ctx context.Context, id switchback.OperationID, by, note string) (Record, error) {
	rec, err := r.cfg.Store.Operation(ctx, id)
	if err != nil {
		return rec, err
	}
	now := r.cfg.Now().UTC()
	switch {
	case rec.State != StateAwaiting:
		return rec, switchback.Errorf(switchback.CodeRefused, "operation %s does not await approval: it is %s", id, rec.State)
	case !rec.Approval.Until.IsZero() && !now.Before(rec.Approval.Until):
		return rec, switchback.Errorf(switchback.CodeRefused, "operation %s awaited approval until %s", id, rec.Approval.Until.Format("2006-01-02 15:04:05")).
			WithHint("ask for it again")
	}
	approval := *rec.Approval
	approval.By, approval.At, approval.Note = by, now, note
	rec.Approval, rec.State = &approval, StateQueued
	return rec, r.release(ctx, rec)
}

// Expire cancels the operations that nobody has approved in time, and returns them.
func (r *Runner) Expire(ctx context.Context) (expired []Record, err error) {
	list, err := r.cfg.Store.Operations(ctx, Filter{State: StateAwaiting, Limit: 1000})
	if err != nil {
		return nil, err
	}
	now := r.cfg.Now()
	for _, rec := range list {
		if rec.Approval == nil || rec.Approval.Until.IsZero() || now.Before(rec.Approval.Until) {
			continue
		}
		rec = cancelled(rec)
		rec.Error = rec.Approval.expired()
		switch err := r.release(ctx, rec); switchback.CodeOf(err) {
		case "":
			expired = append(expired, rec)
		case switchback.CodeConflict: // approved or cancelled meanwhile
		default:
			return expired, err
		}
	}
	return expired, nil
}

// expired is why an operation ends that nobody has approved in time.
func (a *Approval) expired() *switchback.Error {
	return &switchback.Error{Code: switchback.CodeCancelled, Message: "nobody approved it until " + a.Until.UTC().Format("2006-01-02 15:04:05 UTC"), Hint: "ask for it again"}
}

// Expired reports whether the operation ends, or has ended, since nobody has
// approved it in time.
func (r Record) Expired() bool {
	return r.CancelRequested && !r.Approval.Given() && r.Error != nil && *r.Error == *r.Approval.expired()
}

// cancelled is an operation that awaits approval as a cancel leaves it: a Runner
// takes it and ends it without a step.
func cancelled(rec Record) Record {
	rec.State, rec.CancelRequested = StateQueued, true
	return rec
}

func (r *Runner) release(ctx context.Context, rec Record) error {
	if err := r.cfg.Store.ReleaseOperation(ctx, rec); err != nil {
		return err
	}
	r.kick()
	return nil
}

package operation

import (
	"context"
	"encoding/json"
	"time"
)

// Step is one part of an operation. See the package comment for what Do and
// Undo owe.
type Step struct {
	// Name is unique within the operation and stays the same across versions of
	// the program; Title is for people.
	Name  string
	Title string
	// Do has the effect. An error for which switchback.IsRetryable holds is
	// tried again for RetryFor; Skip says there was nothing to do.
	Do func(ctx context.Context, r *Run) error
	// Undo takes the effect back. Nil where nothing needs to be.
	Undo func(ctx context.Context, r *Run) error
	// Cancellable: Do's context is cancelled when a cancel is requested.
	// Otherwise a cancel takes effect after Do.
	Cancellable bool
	// Irreversible: once this step has begun the operation can no longer be
	// cancelled, and a failure leaves it failed, not undone.
	Irreversible bool
	// RetryFor is how long after the step's begin retryable errors are tried
	// again; restarts do not prolong it. Undo is retried at least UndoRetryFor.
	RetryFor time.Duration
}

// UndoRetryFor is how long an Undo is retried at least.
const UndoRetryFor = time.Minute

// Definition says how operations of one kind are done.
type Definition struct {
	Kind string
	// Steps returns the steps for these parameters: a pure function, whose
	// names must not change between versions while operations are unfinished.
	Steps func(params json.RawMessage) ([]Step, error)
	// OnEnd, if set, is called when the operation is about to end in final,
	// before that is persisted: at least once, so it must be idempotent, and
	// again after a Retry. A retryable error is tried again for a minute; any
	// other makes the operation failed.
	OnEnd func(ctx context.Context, r *Run, final State) error
}

// Fixed returns the Steps function of a kind whose steps do not depend on parameters.
func Fixed(steps ...Step) func(json.RawMessage) ([]Step, error) {
	return func(json.RawMessage) ([]Step, error) { return steps, nil }
}

// errSkipped carries the reason of a skipped step.
type errSkipped struct{ reason string }

func (e errSkipped) Error() string { return "skipped: " + e.reason }

// Skip returns the error by which a Do says that there was nothing to do. The
// step becomes skipped and is not undone.
func Skip(reason string) error { return errSkipped{reason} }

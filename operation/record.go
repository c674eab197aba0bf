package operation

import (
	"encoding/json"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// State is where an operation stands.
type State string

const (
	// StateQueued: persisted, nothing has happened. Left when a Runner takes it
	// (to running) or by Cancel (to cancelled).
	StateQueued State = "queued"
	// StateAwaiting: persisted, nothing has happened, and nothing will until
	// another person agrees. Left by Approve (to queued) or by Cancel (to
	// cancelled, by way of queued). It works on its protection as others do: none
	// else is begun meanwhile.
	StateAwaiting State = "awaiting-approval"
	// StateRunning: steps are done in order. Left to succeeded when all are
	// done, to undoing or failed when one fails, to undoing or cancelled by Cancel.
	StateRunning State = "running"
	// StateUndoing: steps that began are undone in reverse order. Left to undone
	// or cancelled when all are, to failed when an Undo fails.
	StateUndoing State = "undoing"
	// StateSucceeded: every step is done. Final.
	StateSucceeded State = "succeeded"
	// StateFailed: stopped at a step, or at an Undo, that failed; what was done
	// before stays. Left by Retry (to running or undoing) or Cancel (to undoing),
	// as long as no newer operation works on the same protection.
	StateFailed State = "failed"
	// StateCancelled: stopped on request, everything that could be undone is. Final.
	StateCancelled State = "cancelled"
	// StateUndone: a step failed and everything that could be undone is. Final.
	StateUndone State = "undone"
)

// Finished reports whether no Runner works on an operation in state s.
func (s State) Finished() bool {
	switch s {
	case StateAwaiting, StateQueued, StateRunning, StateUndoing:
		return false
	}
	return true
}

// UnfinishedStates are the states for which State.Finished is false.
func UnfinishedStates() []State {
	return []State{StateAwaiting, StateQueued, StateRunning, StateUndoing}
}

// ActiveStates are those in which a Runner works on an operation.
func ActiveStates() []State { return []State{StateQueued, StateRunning, StateUndoing} }

// StepState is where a step stands.
type StepState string

const (
	// StepPending: has not begun.
	StepPending StepState = "pending"
	// StepRunning: its intention is persisted; its effect may have happened.
	StepRunning StepState = "running"
	// StepWaiting: failed in a way that may pass; tried again at RetryAt.
	StepWaiting StepState = "waiting"
	// StepDone: its effect happened.
	StepDone StepState = "done"
	// StepSkipped: it found that there was nothing to do.
	StepSkipped StepState = "skipped"
	// StepFailed: it failed or was cancelled; its effect may have happened in part.
	StepFailed StepState = "failed"
	// StepUndoing: its Undo runs, or waits for RetryAt.
	StepUndoing StepState = "undoing"
	// StepUndone: its Undo succeeded.
	StepUndone StepState = "undone"
	// StepUndoFailed: its Undo failed; Retry runs it again.
	StepUndoFailed StepState = "undo-failed"
)

// Progress is how far a step is. Zero fields are unknown.
type Progress struct {
	Percent            float64 `json:"percent"`
	DoneBytes          int64   `json:"done_bytes,omitempty"`
	TotalBytes         int64   `json:"total_bytes,omitempty"`
	RateBytesPerSecond float64 `json:"rate_bytes_per_second,omitempty"`
	// ETA is the time to go, in nanoseconds on the wire.
	ETA     time.Duration `json:"eta,omitempty"`
	Message string        `json:"message,omitempty"`
}

// StepRecord is the durable part of a step.
type StepRecord struct {
	Name  string    `json:"name"`
	Title string    `json:"title"`
	State StepState `json:"state"`
	// StartedAt is when Do was first begun (since the last Retry); the time for
	// retries counts from it. EndedAt is when Do ended for good.
	StartedAt time.Time `json:"started_at,omitzero"`
	EndedAt   time.Time `json:"ended_at,omitzero"`
	// UndoStartedAt and UndoEndedAt are the same for Undo.
	UndoStartedAt time.Time `json:"undo_started_at,omitzero"`
	UndoEndedAt   time.Time `json:"undo_ended_at,omitzero"`
	// Attempts and UndoAttempts count how often Do and Undo were begun.
	Attempts     int `json:"attempts,omitempty"`
	UndoAttempts int `json:"undo_attempts,omitempty"`
	// RetryAt is when a waiting Do or Undo is tried again.
	RetryAt time.Time `json:"retry_at,omitzero"`
	// Result is what Run.SetResult stored.
	Result json.RawMessage `json:"result,omitempty"`
	// Error is Do's last error, or why it was skipped; UndoError is Undo's.
	Error     *switchback.Error `json:"error,omitempty"`
	UndoError *switchback.Error `json:"undo_error,omitempty"`
	Progress  *Progress         `json:"progress,omitempty"`
}

// Lease says which Runner works on an operation, and until when.
type Lease struct {
	Owner string `json:"owner,omitempty"`
	// Epoch grows with every taking of the lease.
	Epoch int64     `json:"epoch,omitempty"`
	Until time.Time `json:"until,omitzero"`
}

// Record is one operation, complete: what was asked, by whom, and what became of it.
type Record struct {
	ID   switchback.OperationID `json:"id"`
	Kind string                 `json:"kind"`
	// Protection is what the operation works on; empty for one that works on
	// several or none.
	Protection switchback.ProtectionID `json:"protection,omitempty"`
	// Lane separates operations that may work on one protection at the same
	// time: at most one unfinished in each. "" is that of all which move the VM.
	Lane        string          `json:"lane,omitempty"`
	Title       string          `json:"title"`
	Params      json.RawMessage `json:"params,omitempty"`
	RequestedBy string          `json:"requested_by,omitempty"`
	// Approval is set where the operation takes a second person's.
	Approval *Approval `json:"approval,omitempty"`
	// Request is the one that asked for it.
	Request Origin       `json:"request,omitzero"`
	State   State        `json:"state"`
	Steps   []StepRecord `json:"steps"`
	// CancelRequested stands from Cancel on; never together with a begun
	// irreversible step.
	CancelRequested bool `json:"cancel_requested,omitempty"`
	// Irreversible stands once an irreversible step has begun: from there the
	// operation can only go forward.
	Irreversible bool      `json:"irreversible,omitempty"`
	CreatedAt    time.Time `json:"created_at"`
	StartedAt    time.Time `json:"started_at,omitzero"`
	EndedAt      time.Time `json:"ended_at,omitzero"`
	// Error is why the operation did not succeed; nil while unknown and after success.
	Error *switchback.Error `json:"error,omitempty"`
	// Result is the final summary that Run.SetSummary stored.
	Result json.RawMessage `json:"result,omitempty"`
	Lease  Lease           `json:"lease"`
}

// Origin names the request that asked for an operation.
type Origin struct {
	// ID is the one in the audit log.
	ID string `json:"id,omitempty"`
	// Key is unique among all operations: a request that is repeated under it
	// begins no second one. Digest tells whether it asks the same.
	Key    string `json:"key,omitempty"`
	Digest string `json:"digest,omitempty"`
}

// Approval is the consent of a second person that an operation takes.
type Approval struct {
	// Role is what that person needs.
	Role switchback.AccessRole `json:"role"`
	// Until is when the operation is cancelled if nobody has agreed.
	Until time.Time `json:"until,omitzero"`
	// By agreed at At; Note is what they said.
	By   string    `json:"by,omitempty"`
	At   time.Time `json:"at,omitzero"`
	Note string    `json:"note,omitempty"`
	// BreakGlass is why who asked went on alone.
	BreakGlass string `json:"break_glass,omitempty"`
}

// Given reports whether the operation may go on.
func (a *Approval) Given() bool { return a == nil || !a.At.IsZero() }

// Clone returns a copy that shares nothing that is ever changed in place.
func (r Record) Clone() Record {
	r.Steps = slices.Clone(r.Steps)
	for i, s := range r.Steps {
		if s.Progress != nil {
			p := *s.Progress
			r.Steps[i].Progress = &p
		}
	}
	return r
}

// Step returns the step's record, or nil.
func (r *Record) Step(name string) *StepRecord {
	for i := range r.Steps {
		if r.Steps[i].Name == name {
			return &r.Steps[i]
		}
	}
	return nil
}

// CanCancel returns nil where Cancel has an effect or was asked before, else
// the reason why not.
func (r Record) CanCancel() error {
	if r.State == StateUndoing || r.CancelRequested && !r.State.Finished() {
		return nil
	}
	if r.State.Finished() && r.State != StateFailed {
		return switchback.Errorf(switchback.CodeRefused, "operation %s has ended: %s", r.ID, r.State)
	}
	if r.Irreversible {
		return switchback.Errorf(switchback.CodeRefused, "operation %s can no longer be cancelled: it has begun what cannot be undone", r.ID).
			WithHint("let it finish; if it failed, retry it")
	}
	if r.State == StateFailed && r.undoBegan() {
		return switchback.Errorf(switchback.CodeRefused, "operation %s failed while being undone", r.ID).
			WithHint("retry it to go on undoing")
	}
	return nil
}

// CanRetry returns nil where Retry has an effect, else the reason why not.
func (r Record) CanRetry() error {
	if r.State == StateFailed && !r.Approval.Given() {
		return switchback.Errorf(switchback.CodeRefused, "operation %s was never approved", r.ID).WithHint("ask for it again")
	}
	if r.State == StateFailed {
		return nil
	}
	err := switchback.Errorf(switchback.CodeRefused, "operation %s has not failed: %s", r.ID, r.State)
	if r.State == StateUndone || r.State == StateCancelled {
		return err.WithHint("what it did is undone: start a new operation")
	}
	return err
}

func (r Record) undoBegan() bool {
	return slices.ContainsFunc(r.Steps, func(s StepRecord) bool { return !s.UndoStartedAt.IsZero() })
}

// LogLine is one line of an operation's log.
type LogLine struct {
	// Sequence is given by the store: 1 for an operation's first line.
	Sequence int64     `json:"sequence"`
	Time     time.Time `json:"time"`
	// Level is that of log/slog: "DEBUG", "INFO", "WARN" or "ERROR".
	Level   string            `json:"level"`
	Step    string            `json:"step,omitempty"`
	Message string            `json:"message"`
	Attrs   map[string]string `json:"attrs,omitempty"`
}

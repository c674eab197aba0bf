package operation

import (
	"context"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"github.com/google/go-cmp/cmp"
)

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func nop(context.Context, *Run) error { return nil }

// plain has no Undo; undoable has; see the tables.
var (
	plain        = Step{Do: nop}
	retried      = Step{Do: nop, RetryFor: 10 * time.Second}
	cancellable  = Step{Do: nop, Cancellable: true}
	undoable     = Step{Do: nop, Undo: nop}
	irreversible = Step{Do: nop, Irreversible: true}
)

func TestNext(t *testing.T) {
	broken := &switchback.Error{Code: switchback.CodeInvalid, Message: "broken"}
	away := &switchback.Error{Code: switchback.CodeUnavailable, Message: "away"}
	resumed, succeeded := Event{Kind: EventResumed}, Event{Kind: EventSucceeded}
	failed, passing := Event{EventFailed, broken}, Event{EventFailed, away}

	for _, c := range []struct {
		name         string
		steps        []Step
		state        State
		was          []StepState
		cancel       bool
		irreversible bool
		ev           Event
		after        time.Duration // since the running step began

		want      Effect
		wantState State
		wantSteps []StepState
		wantError switchback.Code
	}{
		{name: "queued begins", steps: []Step{plain, plain}, state: StateQueued, was: []StepState{StepPending, StepPending}, ev: resumed,
			want: Effect{Kind: EffectDo, Step: 0}, wantState: StateRunning, wantSteps: []StepState{StepRunning, StepPending}},
		{name: "queued and cancelled does nothing", steps: []Step{plain}, state: StateQueued, was: []StepState{StepPending}, cancel: true, ev: resumed,
			want: Effect{Kind: EffectEnd, State: StateCancelled}, wantState: StateRunning, wantSteps: []StepState{StepPending}, wantError: switchback.CodeCancelled},
		{name: "no steps", steps: nil, state: StateQueued, ev: resumed,
			want: Effect{Kind: EffectEnd, State: StateSucceeded}, wantState: StateRunning},
		{name: "one done, next", steps: []Step{plain, plain}, state: StateRunning, was: []StepState{StepRunning, StepPending}, ev: succeeded,
			want: Effect{Kind: EffectDo, Step: 1}, wantState: StateRunning, wantSteps: []StepState{StepDone, StepRunning}},
		{name: "last done", steps: []Step{plain}, state: StateRunning, was: []StepState{StepRunning}, ev: succeeded,
			want: Effect{Kind: EffectEnd, State: StateSucceeded}, wantState: StateRunning, wantSteps: []StepState{StepDone}},
		{name: "skipped counts as done", steps: []Step{plain}, state: StateRunning, was: []StepState{StepRunning}, ev: Event{EventSkipped, broken},
			want: Effect{Kind: EffectEnd, State: StateSucceeded}, wantState: StateRunning, wantSteps: []StepState{StepSkipped}},
		{name: "died in a step: again", steps: []Step{plain, plain}, state: StateRunning, was: []StepState{StepDone, StepRunning}, ev: resumed,
			want: Effect{Kind: EffectDo, Step: 1}, wantState: StateRunning, wantSteps: []StepState{StepDone, StepRunning}},
		{name: "died before the end was stored", steps: []Step{plain}, state: StateRunning, was: []StepState{StepDone}, ev: resumed,
			want: Effect{Kind: EffectEnd, State: StateSucceeded}, wantState: StateRunning, wantSteps: []StepState{StepDone}},

		{name: "retryable waits", steps: []Step{retried}, state: StateRunning, was: []StepState{StepRunning}, ev: passing, after: time.Second,
			want: Effect{Kind: EffectWait, Step: 0, Until: t0.Add(2 * time.Second)}, wantState: StateRunning, wantSteps: []StepState{StepWaiting}},
		{name: "retryable waits no longer than allowed", steps: []Step{retried}, state: StateRunning, was: []StepState{StepRunning}, ev: passing, after: 9500 * time.Millisecond,
			want: Effect{Kind: EffectWait, Step: 0, Until: t0.Add(10 * time.Second)}, wantState: StateRunning, wantSteps: []StepState{StepWaiting}},
		{name: "wait is over", steps: []Step{retried}, state: StateRunning, was: []StepState{StepWaiting}, ev: resumed, after: 5 * time.Second,
			want: Effect{Kind: EffectDo, Step: 0}, wantState: StateRunning, wantSteps: []StepState{StepRunning}},
		{name: "died waiting", steps: []Step{retried}, state: StateRunning, was: []StepState{StepWaiting}, ev: resumed, after: time.Second,
			want: Effect{Kind: EffectWait, Step: 0, Until: t0.Add(2 * time.Second)}, wantState: StateRunning, wantSteps: []StepState{StepWaiting}},
		{name: "retryable for too long", steps: []Step{retried}, state: StateRunning, was: []StepState{StepRunning}, ev: passing, after: 10 * time.Second,
			want: Effect{Kind: EffectEnd, State: StateFailed}, wantState: StateRunning, wantSteps: []StepState{StepFailed}, wantError: switchback.CodeUnavailable},
		{name: "retryable where no retry is allowed", steps: []Step{plain}, state: StateRunning, was: []StepState{StepRunning}, ev: passing,
			want: Effect{Kind: EffectEnd, State: StateFailed}, wantState: StateRunning, wantSteps: []StepState{StepFailed}, wantError: switchback.CodeUnavailable},
		{name: "not retryable", steps: []Step{retried}, state: StateRunning, was: []StepState{StepRunning}, ev: failed,
			want: Effect{Kind: EffectEnd, State: StateFailed}, wantState: StateRunning, wantSteps: []StepState{StepFailed}, wantError: switchback.CodeInvalid},
		{name: "cancelled while waiting", steps: []Step{undoable, retried}, state: StateRunning, was: []StepState{StepDone, StepWaiting}, cancel: true, ev: resumed,
			want: Effect{Kind: EffectUndo, Step: 0}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing, StepFailed}, wantError: switchback.CodeCancelled},

		{name: "failure undoes, the failed step first", steps: []Step{undoable, undoable, undoable}, state: StateRunning, was: []StepState{StepDone, StepRunning, StepPending}, ev: failed,
			want: Effect{Kind: EffectUndo, Step: 1}, wantState: StateUndoing, wantSteps: []StepState{StepDone, StepUndoing, StepPending}, wantError: switchback.CodeInvalid},
		{name: "what cannot be undone is passed over", steps: []Step{undoable, plain, plain}, state: StateRunning, was: []StepState{StepDone, StepDone, StepRunning}, ev: failed,
			want: Effect{Kind: EffectUndo, Step: 0}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing, StepDone, StepFailed}, wantError: switchback.CodeInvalid},
		{name: "a skipped step is not undone", steps: []Step{undoable, undoable, plain}, state: StateRunning, was: []StepState{StepDone, StepSkipped, StepRunning}, ev: failed,
			want: Effect{Kind: EffectUndo, Step: 0}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing, StepSkipped, StepFailed}, wantError: switchback.CodeInvalid},
		{name: "undo goes on", steps: []Step{undoable, undoable}, state: StateUndoing, was: []StepState{StepDone, StepUndoing}, ev: succeeded,
			want: Effect{Kind: EffectUndo, Step: 0}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing, StepUndone}},
		{name: "undo ends", steps: []Step{undoable, undoable}, state: StateUndoing, was: []StepState{StepUndoing, StepUndone}, ev: succeeded,
			want: Effect{Kind: EffectEnd, State: StateUndone}, wantState: StateUndoing, wantSteps: []StepState{StepUndone, StepUndone}},
		{name: "undo of a cancelled one ends", steps: []Step{undoable}, state: StateUndoing, was: []StepState{StepUndoing}, cancel: true, ev: succeeded,
			want: Effect{Kind: EffectEnd, State: StateCancelled}, wantState: StateUndoing, wantSteps: []StepState{StepUndone}, wantError: switchback.CodeCancelled},
		{name: "died undoing: again", steps: []Step{undoable, undoable}, state: StateUndoing, was: []StepState{StepUndoing, StepUndone}, ev: resumed,
			want: Effect{Kind: EffectUndo, Step: 0}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing, StepUndone}},
		{name: "undo is retried without being asked", steps: []Step{undoable}, state: StateUndoing, was: []StepState{StepUndoing}, ev: passing, after: time.Second,
			want: Effect{Kind: EffectWait, Step: 0, Until: t0.Add(2 * time.Second)}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing}},
		{name: "undo retried for too long", steps: []Step{undoable}, state: StateUndoing, was: []StepState{StepUndoing}, ev: passing, after: UndoRetryFor,
			want: Effect{Kind: EffectEnd, State: StateFailed}, wantState: StateUndoing, wantSteps: []StepState{StepUndoFailed}, wantError: switchback.CodeUnavailable},
		{name: "undo fails", steps: []Step{undoable}, state: StateUndoing, was: []StepState{StepUndoing}, ev: failed,
			want: Effect{Kind: EffectEnd, State: StateFailed}, wantState: StateUndoing, wantSteps: []StepState{StepUndoFailed}, wantError: switchback.CodeInvalid},

		{name: "irreversible begins", steps: []Step{undoable, irreversible}, state: StateRunning, was: []StepState{StepRunning, StepPending}, ev: succeeded,
			want: Effect{Kind: EffectDo, Step: 1}, wantState: StateRunning, wantSteps: []StepState{StepDone, StepRunning}},
		{name: "irreversible fails: nothing is undone", steps: []Step{undoable, irreversible}, state: StateRunning, irreversible: true, was: []StepState{StepDone, StepRunning}, ev: failed,
			want: Effect{Kind: EffectEnd, State: StateFailed}, wantState: StateRunning, wantSteps: []StepState{StepDone, StepFailed}, wantError: switchback.CodeInvalid},
		{name: "fails after the irreversible", steps: []Step{irreversible, undoable}, state: StateRunning, irreversible: true, was: []StepState{StepDone, StepRunning}, ev: failed,
			want: Effect{Kind: EffectEnd, State: StateFailed}, wantState: StateRunning, wantSteps: []StepState{StepDone, StepFailed}, wantError: switchback.CodeInvalid},
		{name: "cancelled before the irreversible", steps: []Step{undoable, irreversible}, state: StateRunning, cancel: true, was: []StepState{StepRunning, StepPending}, ev: succeeded,
			want: Effect{Kind: EffectUndo, Step: 0}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing, StepPending}, wantError: switchback.CodeCancelled},

		{name: "cancel takes effect after the step", steps: []Step{plain, plain}, state: StateRunning, cancel: true, was: []StepState{StepRunning, StepPending}, ev: succeeded,
			want: Effect{Kind: EffectEnd, State: StateCancelled}, wantState: StateUndoing, wantSteps: []StepState{StepDone, StepPending}, wantError: switchback.CodeCancelled},
		{name: "cancel after the last step", steps: []Step{undoable}, state: StateRunning, cancel: true, was: []StepState{StepRunning}, ev: succeeded,
			want: Effect{Kind: EffectUndo, Step: 0}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing}, wantError: switchback.CodeCancelled},
		{name: "died in a step not to be interrupted, cancelled: finish it", steps: []Step{undoable}, state: StateRunning, cancel: true, was: []StepState{StepRunning}, ev: resumed,
			want: Effect{Kind: EffectDo, Step: 0}, wantState: StateRunning, wantSteps: []StepState{StepRunning}},
		{name: "died in a cancellable step, cancelled", steps: []Step{undoable, cancellable}, state: StateRunning, cancel: true, was: []StepState{StepDone, StepRunning}, ev: resumed,
			want: Effect{Kind: EffectUndo, Step: 0}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing, StepFailed}, wantError: switchback.CodeCancelled},
		{name: "step interrupted by cancel", steps: []Step{undoable, cancellable}, state: StateRunning, cancel: true, was: []StepState{StepDone, StepRunning}, ev: Event{EventFailed, errCancelled},
			want: Effect{Kind: EffectUndo, Step: 0}, wantState: StateUndoing, wantSteps: []StepState{StepUndoing, StepFailed}, wantError: switchback.CodeCancelled},
	} {
		t.Run(c.name, func(t *testing.T) {
			rec := Record{ID: "op-1", State: c.state, CancelRequested: c.cancel, Irreversible: c.irreversible}
			for _, s := range c.was {
				step := StepRecord{Name: "s", State: s}
				switch s {
				case StepRunning:
					step.StartedAt, step.Attempts = t0, 1
				case StepWaiting:
					step.StartedAt, step.Attempts, step.RetryAt, step.Error = t0, 1, t0.Add(2*time.Second), away
				case StepUndoing:
					step.StartedAt, step.UndoStartedAt, step.UndoAttempts = t0, t0, 1
				}
				rec.Steps = append(rec.Steps, step)
			}
			before := rec.Clone()
			m := Machine{Steps: c.steps, RetryMin: time.Second, RetryMax: 8 * time.Second}
			got, effect := m.Next(rec, c.ev, t0.Add(c.after))

			if diff := cmp.Diff(before, rec); diff != "" {
				t.Errorf("the argument was changed:\n%s", diff)
			}
			if diff := cmp.Diff(c.want, effect); diff != "" {
				t.Errorf("effect (-want +got):\n%s", diff)
			}
			if got.State != c.wantState {
				t.Errorf("state is %s, want %s", got.State, c.wantState)
			}
			var states []StepState
			for _, s := range got.Steps {
				states = append(states, s.State)
			}
			if diff := cmp.Diff(c.wantSteps, states); diff != "" {
				t.Errorf("steps (-want +got):\n%s", diff)
			}
			code := switchback.Code("")
			if got.Error != nil {
				code = got.Error.Code
			}
			if code != c.wantError {
				t.Errorf("error is %v, want code %q", got.Error, c.wantError)
			}
			if wantIrreversible := c.irreversible || effect.Kind == EffectDo && c.steps[effect.Step].Irreversible; got.Irreversible != wantIrreversible {
				t.Errorf("irreversible is %v", got.Irreversible)
			}
		})
	}
}

func TestRetryWaits(t *testing.T) {
	m := Machine{RetryMin: time.Second, RetryMax: 8 * time.Second}
	for attempts, want := range map[int]time.Duration{1: 1, 2: 2, 3: 4, 4: 8, 5: 8, 60: 8} {
		if got := m.retryAt(attempts, t0, t0.Add(time.Hour)).Sub(t0); got != want*time.Second {
			t.Errorf("after attempt %d: %v", attempts, got)
		}
	}
}

// TestReopen follows a failure, a failed Undo and the way back.
func TestReopen(t *testing.T) {
	m := Machine{Steps: []Step{undoable, undoable}, RetryMin: time.Second, RetryMax: time.Second}
	broken := Event{EventFailed, &switchback.Error{Code: switchback.CodeInvalid, Message: "broken"}}
	stuck := Event{EventFailed, &switchback.Error{Code: switchback.CodeConflict, Message: "stuck"}}
	rec := Record{ID: "op-1", State: StateQueued, Steps: []StepRecord{{Name: "a", State: StepPending}, {Name: "b", Title: "B", State: StepPending}}}
	next := func(ev Event, want Effect) {
		t.Helper()
		var effect Effect
		if rec, effect = m.Next(rec, ev, t0); effect != want {
			t.Fatalf("effect is %+v, want %+v", effect, want)
		}
		if effect.Kind == EffectEnd {
			rec = End(rec, effect.State, t0)
		}
	}
	next(Event{Kind: EventResumed}, Effect{Kind: EffectDo, Step: 0})
	next(Event{Kind: EventSucceeded}, Effect{Kind: EffectDo, Step: 1})
	next(broken, Effect{Kind: EffectUndo, Step: 1})
	next(stuck, Effect{Kind: EffectEnd, State: StateFailed})
	if rec.Error.Message != `undoing "B": stuck` {
		t.Errorf("error is %v", rec.Error)
	}
	if err := rec.CanCancel(); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("cancel of a failed undo: %v", err)
	}
	if err := rec.CanRetry(); err != nil {
		t.Error(err)
	}
	rec = Reopen(rec)
	next(Event{Kind: EventResumed}, Effect{Kind: EffectUndo, Step: 1})
	next(Event{Kind: EventSucceeded}, Effect{Kind: EffectUndo, Step: 0})
	next(Event{Kind: EventSucceeded}, Effect{Kind: EffectEnd, State: StateUndone})
	if rec.Error.Message != "broken" {
		t.Errorf("error is %v", rec.Error)
	}
	if rec.CanRetry() == nil || rec.CanCancel() == nil {
		t.Error("an undone operation can be retried or cancelled")
	}
}

func TestReopenForward(t *testing.T) {
	m := Machine{Steps: []Step{plain, plain}}
	rec := Record{State: StateRunning, Steps: []StepRecord{{Name: "a", State: StepDone}, {Name: "b", State: StepRunning, Attempts: 1}}}
	rec, effect := m.Next(rec, Event{EventFailed, &switchback.Error{Code: switchback.CodeInvalid}}, t0)
	rec = Reopen(End(rec, effect.State, t0))
	rec, effect = m.Next(rec, Event{Kind: EventResumed}, t0.Add(time.Hour))
	if effect != (Effect{Kind: EffectDo, Step: 1}) || rec.State != StateRunning || rec.Error != nil {
		t.Errorf("retry: %+v %+v", effect, rec)
	}
	if s := rec.Steps[1]; s.Attempts != 2 || !s.StartedAt.Equal(t0.Add(time.Hour)) || s.Error != nil {
		t.Errorf("retried step: %+v", s)
	}
}

// TestAbandon cancels what failed.
func TestAbandon(t *testing.T) {
	m := Machine{Steps: []Step{plain}}
	rec := Record{State: StateFailed, Steps: []StepRecord{{Name: "a", State: StepFailed}}}
	_, effect := m.Next(Abandon(rec), Event{Kind: EventResumed}, t0)
	if effect != (Effect{Kind: EffectEnd, State: StateCancelled}) {
		t.Errorf("effect is %+v", effect)
	}
}

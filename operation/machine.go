package operation

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// EventKind says what happened since the last decision.
type EventKind string

const (
	// EventResumed: the operation was taken over, a wait is over, or a cancel was requested.
	EventResumed EventKind = "resumed"
	// EventSucceeded: the Do or Undo asked for last returned nil.
	EventSucceeded EventKind = "succeeded"
	// EventSkipped: the Do asked for last had nothing to do; Err says why.
	EventSkipped EventKind = "skipped"
	// EventFailed: the Do or Undo asked for last returned Err.
	EventFailed EventKind = "failed"
)

// Event is what is fed to Machine.Next.
type Event struct {
	Kind EventKind
	Err  *switchback.Error
}

// EffectKind says what is to be done.
type EffectKind string

const (
	// EffectDo: call Do of Step.
	EffectDo EffectKind = "do"
	// EffectUndo: call Undo of Step.
	EffectUndo EffectKind = "undo"
	// EffectWait: nothing until the instant Until, or until a cancel is requested.
	EffectWait EffectKind = "wait"
	// EffectEnd: call OnEnd, then persist End(record, State).
	EffectEnd EffectKind = "end"
)

// Effect is what Machine.Next asks for.
type Effect struct {
	Kind  EffectKind
	Step  int
	Until time.Time
	State State
}

// Machine decides what an operation does next. It is pure: the record goes in
// and comes out, time is an argument.
type Machine struct {
	// Steps are those of the definition, in the order of the record's.
	Steps []Step
	// RetryMin is the wait after a first failure; each further one doubles it, up to RetryMax.
	RetryMin, RetryMax time.Duration
}

// Next records what happened and returns what to do now. The returned record
// must be durable before the effect is begun: it holds both the outcome of the
// last effect and the intention of the next.
func (m Machine) Next(rec Record, ev Event, now time.Time) (Record, Effect) {
	rec = rec.Clone()
	if ev.Kind != EventResumed {
		m.apply(&rec, ev, now)
	}
	if rec.State == StateQueued {
		rec.State = StateRunning
		rec.StartedAt = now
		if rec.CancelRequested {
			return rec, m.end(&rec, StateCancelled)
		}
	}
	if rec.State == StateUndoing {
		return rec, m.undo(&rec, now)
	}
	return rec, m.forward(&rec, ev, now)
}

// apply writes the outcome of the effect asked for last into its step.
func (m Machine) apply(rec *Record, ev Event, now time.Time) {
	for i := range rec.Steps {
		s := &rec.Steps[i]
		switch s.State {
		case StepRunning:
			s.EndedAt = now
			s.Error = ev.Err
			switch {
			case ev.Kind == EventSucceeded:
				s.State = StepDone
			case ev.Kind == EventSkipped:
				s.State = StepSkipped
			case switchback.IsRetryable(ev.Err) && now.Before(s.StartedAt.Add(m.Steps[i].RetryFor)):
				s.State = StepWaiting
				s.EndedAt = time.Time{}
				s.RetryAt = m.retryAt(s.Attempts, now, s.StartedAt.Add(m.Steps[i].RetryFor))
			default:
				s.State = StepFailed
			}
			return
		case StepUndoing:
			s.UndoEndedAt = now
			s.UndoError = ev.Err
			limit := s.UndoStartedAt.Add(max(UndoRetryFor, m.Steps[i].RetryFor))
			switch {
			case ev.Kind == EventSucceeded || ev.Kind == EventSkipped:
				s.State = StepUndone
				s.UndoError = nil
			case switchback.IsRetryable(ev.Err) && now.Before(limit):
				s.UndoEndedAt = time.Time{}
				s.RetryAt = m.retryAt(s.UndoAttempts, now, limit)
			default:
				s.State = StepUndoFailed
			}
			return
		}
	}
}

func (m Machine) retryAt(attempts int, now, limit time.Time) time.Time {
	wait := m.RetryMin << min(max(attempts-1, 0), 16)
	at := now.Add(min(wait, m.RetryMax))
	if at.After(limit) {
		return limit
	}
	return at
}

func (m Machine) forward(rec *Record, ev Event, now time.Time) Effect {
	for i := range rec.Steps {
		s := &rec.Steps[i]
		if s.State == StepDone || s.State == StepSkipped {
			continue
		}
		// A step that must not be interrupted and was (its process died) is
		// finished first; the cancel takes effect after it.
		mustFinish := s.State == StepRunning && !m.Steps[i].Cancellable
		if rec.CancelRequested && !mustFinish {
			return m.startUndo(rec, now)
		}
		switch s.State {
		case StepFailed:
			rec.Error = s.Error
			if rec.Irreversible || !m.canUndo(rec) {
				return m.end(rec, StateFailed)
			}
			return m.startUndo(rec, now)
		case StepWaiting:
			if now.Before(s.RetryAt) {
				return Effect{Kind: EffectWait, Step: i, Until: s.RetryAt}
			}
		case StepPending:
			s.StartedAt = now
		}
		s.State = StepRunning
		s.RetryAt = time.Time{}
		s.Attempts++
		if m.Steps[i].Irreversible {
			rec.Irreversible = true
		}
		return Effect{Kind: EffectDo, Step: i}
	}
	if rec.CancelRequested {
		return m.startUndo(rec, now)
	}
	return m.end(rec, StateSucceeded)
}

// canUndo reports whether a step that began has an Undo.
func (m Machine) canUndo(rec *Record) bool {
	for i, s := range rec.Steps {
		if s.State != StepPending && s.State != StepSkipped && m.Steps[i].Undo != nil {
			return true
		}
	}
	return false
}

func (m Machine) startUndo(rec *Record, now time.Time) Effect {
	if rec.CancelRequested {
		rec.Error = &switchback.Error{Code: switchback.CodeCancelled, Message: "cancelled on request"}
	}
	rec.State = StateUndoing
	return m.undo(rec, now)
}

func (m Machine) undo(rec *Record, now time.Time) Effect {
	for i := len(rec.Steps) - 1; i >= 0; i-- {
		s := &rec.Steps[i]
		if s.State == StepPending || s.State == StepSkipped || s.State == StepUndone {
			continue
		}
		if m.Steps[i].Undo == nil {
			if s.State == StepRunning || s.State == StepWaiting {
				s.State, s.EndedAt, s.RetryAt = StepFailed, now, time.Time{}
				s.Error = rec.Error
			}
			continue
		}
		switch s.State {
		case StepUndoFailed:
			e := *s.UndoError
			e.Message = "undoing " + quoteTitle(s.Title, s.Name) + ": " + e.Message
			rec.Error = &e
			return m.end(rec, StateFailed)
		case StepUndoing:
			if now.Before(s.RetryAt) {
				return Effect{Kind: EffectWait, Step: i, Until: s.RetryAt}
			}
		default:
			s.State = StepUndoing
			s.UndoStartedAt = now
			if s.EndedAt.IsZero() {
				s.EndedAt = now
			}
		}
		s.RetryAt = time.Time{}
		s.UndoAttempts++
		return Effect{Kind: EffectUndo, Step: i}
	}
	if rec.CancelRequested {
		return m.end(rec, StateCancelled)
	}
	return m.end(rec, StateUndone)
}

func (m Machine) end(rec *Record, s State) Effect {
	if s == StateSucceeded {
		rec.Error = nil
	}
	if s == StateCancelled && rec.Error == nil {
		rec.Error = &switchback.Error{Code: switchback.CodeCancelled, Message: "cancelled on request"}
	}
	return Effect{Kind: EffectEnd, State: s}
}

// End returns the record as it ends in state s.
func End(rec Record, s State, now time.Time) Record {
	rec = rec.Clone()
	rec.State = s
	rec.EndedAt = now
	return rec
}

// Reopen returns a failed record as Retry leaves it: running again from the
// step that failed, or undoing again from the Undo that failed; one that was
// never approved awaits that again.
func Reopen(rec Record) Record {
	rec = rec.Clone()
	undoing := rec.undoBegan()
	rec.State, rec.Error, rec.EndedAt = StateRunning, nil, time.Time{}
	switch {
	case undoing:
		rec.State = StateUndoing
	case !rec.Approval.Given():
		rec.State = StateAwaiting
	}
	for i := range rec.Steps {
		s := &rec.Steps[i]
		switch {
		case s.State == StepUndoFailed:
			// Back to before its Undo, so that the time for retries starts anew.
			s.State, s.UndoStartedAt, s.UndoEndedAt, s.UndoError = StepFailed, time.Time{}, time.Time{}, nil
			if s.Error == nil {
				s.State = StepDone
			}
		case s.State == StepFailed && !undoing:
			s.State, s.StartedAt, s.EndedAt, s.Error = StepPending, time.Time{}, time.Time{}, nil
		}
		if undoing && s.Error != nil && s.State != StepSkipped {
			rec.Error = s.Error
		}
	}
	rec.Lease.Owner, rec.Lease.Until = "", time.Time{}
	return rec
}

// Abandon returns a failed record as Cancel leaves it: to be undone.
func Abandon(rec Record) Record {
	rec = rec.Clone()
	rec.State, rec.CancelRequested, rec.EndedAt = StateRunning, true, time.Time{}
	rec.Lease.Owner, rec.Lease.Until = "", time.Time{}
	return rec
}

func quoteTitle(title, name string) string {
	if title == "" {
		title = name
	}
	return "\"" + title + "\""
}

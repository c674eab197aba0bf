package operation

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/internal/killpoint"
)

// EndStep names the end of an operation, where OnEnd is called, among the steps
// at which tests kill.
const EndStep = "end"

var (
	errStopped   = &switchback.Error{Code: switchback.CodeUnavailable, Message: "the operation runner is stopping"}
	errLeaseLost = &switchback.Error{Code: switchback.CodeConflict, Message: "another runner has taken the operation over"}
	errCancelled = &switchback.Error{Code: switchback.CodeCancelled, Message: "cancelled on request"}
)

// live is one operation in the hands of this Runner.
type live struct {
	runner  *Runner
	def     Definition
	machine Machine
	// ctx is done when the Runner stops or the lease is lost.
	ctx  context.Context
	stop context.CancelCauseFunc

	saving sync.Mutex // held over each write to the store; taken before mu

	mu         sync.Mutex
	rec        Record      // as last persisted, plus newer progress
	expiry     *time.Timer // stops the operation well before the lease ends
	savedAt    time.Time
	dirty      bool // progress is newer than the store's
	cancelled  chan struct{}
	changed    chan struct{}
	cancelStep context.CancelCauseFunc // of the Do that may be interrupted now
}

func (l *live) snapshot() Record {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rec.Clone()
}

// watch returns the record and a channel that is closed when it has changed.
func (l *live) watch() (Record, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rec.Clone(), l.changed
}

// publish makes rec what everybody sees; l.mu is held.
func (l *live) publish(rec Record) {
	l.rec = rec
	close(l.changed)
	l.changed = make(chan struct{})
}

// save applies update to the record and makes it durable, extending the lease,
// before anybody sees it. It works also after ctx is done: the store refuses
// it if the lease is another's.
func (l *live) save(update func(*Record)) error {
	l.saving.Lock()
	defer l.saving.Unlock()
	rec := l.snapshot()
	l.mu.Lock()
	l.dirty = false
	l.mu.Unlock()
	if update != nil {
		update(&rec)
	}
	now := l.runner.cfg.Now()
	rec.Lease.Until = now.Add(l.runner.cfg.LeaseDuration)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.ctx), l.runner.cfg.LeaseDuration/2)
	defer cancel()
	cancelRequested, err := l.runner.cfg.Store.SaveOperation(ctx, rec)
	if err != nil {
		switch switchback.CodeOf(err) {
		case switchback.CodeConflict:
			l.stop(errLeaseLost)
		case switchback.CodeCancelled:
			l.requestCancel()
		}
		return err
	}
	l.mu.Lock()
	for i := range rec.Steps { // progress may have moved on meanwhile
		if rec.Steps[i].State == l.rec.Steps[i].State && l.dirty {
			rec.Steps[i].Progress = l.rec.Steps[i].Progress
		}
	}
	rec.CancelRequested = rec.CancelRequested || l.rec.CancelRequested
	l.savedAt = now
	l.expiry.Reset(l.runner.cfg.LeaseDuration * 3 / 4)
	l.publish(rec)
	l.mu.Unlock()
	if cancelRequested {
		l.requestCancel()
	}
	return nil
}

// requestCancel tells the step and the waiting.
func (l *live) requestCancel() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rec.CancelRequested && l.isCancelled() {
		return
	}
	rec := l.rec.Clone()
	rec.CancelRequested = true
	l.publish(rec)
	if !l.isCancelled() {
		close(l.cancelled)
	}
	if l.cancelStep != nil {
		l.cancelStep(errCancelled)
	}
}

func (l *live) isCancelled() bool {
	select {
	case <-l.cancelled:
		return true
	default:
		return false
	}
}

func (l *live) progress(step int, p Progress) {
	l.mu.Lock()
	defer l.mu.Unlock()
	rec := l.rec.Clone()
	rec.Steps[step].Progress = &p
	l.dirty = true
	l.publish(rec)
}

func (l *live) log(level slog.Level, step, msg string, kv ...any) {
	rec := l.snapshot()
	line := LogLine{Time: l.runner.cfg.Now().UTC(), Level: level.String(), Step: step, Message: msg, Attrs: logAttrs(kv)}
	l.runner.cfg.Logger.With("operation", rec.ID, "kind", rec.Kind, "step", step).Log(l.ctx, level, msg, kv...)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.ctx), l.runner.cfg.LeaseDuration/2)
	defer cancel()
	if err := l.runner.cfg.Store.AppendOperationLog(ctx, rec.ID, line); err != nil {
		l.runner.cfg.Logger.Warn("operation log line not stored", "operation", rec.ID, "error", err)
	}
}

// keep renews the lease and stores progress until ctx is done.
func (l *live) keep(ctx context.Context) {
	ticker := time.NewTicker(min(l.runner.cfg.ProgressInterval, l.runner.cfg.LeaseDuration/6))
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		l.mu.Lock()
		age := l.runner.cfg.Now().Sub(l.savedAt)
		due := l.dirty && age >= l.runner.cfg.ProgressInterval || age >= l.runner.cfg.LeaseDuration/3
		l.mu.Unlock()
		if !due {
			continue
		}
		if err := l.save(nil); err != nil && ctx.Err() == nil {
			l.runner.cfg.Logger.Warn("operation not stored, trying again", "operation", l.snapshot().ID, "error", err)
		}
	}
}

// run works on the operation until it ends or ctx is done.
func (l *live) run() {
	keepCtx, stopKeeping := context.WithCancel(l.ctx)
	var keeper sync.WaitGroup
	keeper.Go(func() { l.keep(keepCtx) })
	defer keeper.Wait()
	defer stopKeeping()

	ev := Event{Kind: EventResumed}
	performed := "" // the step whose outcome the next record holds
	for {
		if l.ctx.Err() != nil {
			if ev.Kind != EventResumed { // the outcome is known, nothing more is begun
				rec := l.snapshot()
				l.machine.apply(&rec, ev, l.runner.cfg.Now())
				_ = l.persist(rec)
			}
			return
		}
		rec, effect := l.machine.Next(l.snapshot(), ev, l.runner.cfg.Now())
		if err := l.persist(rec); err != nil {
			if switchback.CodeOf(err) == switchback.CodeCancelled {
				continue // decide again, knowing of the cancel
			}
			return
		}
		if performed != "" {
			l.line(performed, killpoint.AfterOutcome)
		}
		if l.ctx.Err() != nil {
			return
		}
		performed = l.effectName(effect)
		var ok bool
		if ev, ok = l.perform(effect); !ok {
			return
		}
	}
}

// effectName is a step's name, of its undo followed by "/undo"; "" for other effects.
func (l *live) effectName(e Effect) string {
	switch e.Kind {
	case EffectDo:
		return l.machine.Steps[e.Step].Name
	case EffectUndo:
		return l.machine.Steps[e.Step].Name + "/undo"
	}
	return ""
}

// line is a place where tests kill the process; see internal/killpoint.
func (l *live) line(step string, at killpoint.Line) {
	killpoint.At("server", l.def.Kind, step, at)
}

// persist writes the machine's decision, trying until the store takes it or refuses it.
func (l *live) persist(rec Record) error {
	for attempt := 0; ; attempt++ {
		err := l.save(func(r *Record) {
			rec.CancelRequested = rec.CancelRequested || r.CancelRequested
			rec.Lease = r.Lease
			*r = rec.Clone()
		})
		switch switchback.CodeOf(err) {
		case "", switchback.CodeConflict, switchback.CodeCancelled, switchback.CodeNotFound:
			return err
		}
		l.runner.cfg.Logger.Warn("operation not stored, trying again", "operation", rec.ID, "error", err)
		if !l.sleep(l.machine.retryAt(attempt+1, l.runner.cfg.Now(), l.runner.cfg.Now().Add(time.Second)), nil) {
			return l.ctx.Err()
		}
	}
}

// sleep waits until the instant, or until wake is closed; false when ctx is done.
func (l *live) sleep(until time.Time, wake <-chan struct{}) bool {
	timer := time.NewTimer(until.Sub(l.runner.cfg.Now()))
	defer timer.Stop()
	select {
	case <-l.ctx.Done():
		return false
	case <-timer.C:
	case <-wake:
	}
	return true
}

// perform does the effect. False: the operation has ended, or was interrupted
// and no outcome is known.
func (l *live) perform(effect Effect) (Event, bool) {
	switch effect.Kind {
	case EffectWait:
		wake := l.cancelled
		if l.snapshot().State == StateUndoing {
			wake = nil
		}
		return Event{Kind: EventResumed}, l.sleep(effect.Until, wake)
	case EffectDo:
		step := l.machine.Steps[effect.Step]
		return l.call(step.Do, &Run{live: l, step: effect.Step}, step.Cancellable)
	case EffectUndo:
		return l.call(l.machine.Steps[effect.Step].Undo, &Run{live: l, step: effect.Step, undo: true}, false)
	default:
		l.finish(effect.State)
		return Event{}, false
	}
}

// call runs one Do or Undo and turns its outcome into an event.
func (l *live) call(fn func(context.Context, *Run) error, run *Run, cancellable bool) (Event, bool) {
	ctx, cancel := context.WithCancelCause(l.ctx)
	defer cancel(nil)
	if cancellable {
		l.mu.Lock()
		l.cancelStep = cancel
		if l.rec.CancelRequested {
			cancel(errCancelled)
		}
		l.mu.Unlock()
		defer func() {
			l.mu.Lock()
			l.cancelStep = nil
			l.mu.Unlock()
		}()
	}
	name := l.machine.Steps[run.step].Name
	if run.undo {
		name += "/undo"
	}
	l.line(name, killpoint.BeforeEffect)
	err := l.protect(run, func() error { return fn(ctx, run) })
	l.line(name, killpoint.AfterEffect)

	var skipped errSkipped
	switch {
	case err == nil:
		return Event{Kind: EventSucceeded}, true
	case errors.As(err, &skipped):
		return Event{Kind: EventSkipped, Err: &switchback.Error{Message: skipped.reason}}, true
	case l.ctx.Err() != nil:
		return Event{}, false
	case errors.Is(context.Cause(ctx), errCancelled):
		run.Log(slog.LevelInfo, "step cancelled", "error", err)
		return Event{Kind: EventFailed, Err: errCancelled}, true
	}
	e := switchback.Flatten(err)
	run.Log(slog.LevelWarn, "step failed", "code", e.Code, "error", e.Error(), "undo", run.undo)
	return Event{Kind: EventFailed, Err: e}, true
}

// protect turns a panic into an error: one defective step must not take down
// the operations of other VMs.
func (l *live) protect(run *Run, fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			run.Log(slog.LevelError, "step panicked", "panic", p, "stack", string(debug.Stack()))
			err = switchback.Errorf(switchback.CodeInternal, "panic: %v", p)
		}
	}()
	return fn()
}

// finish calls OnEnd and persists the final state.
func (l *live) finish(final State) {
	var endErr error
	l.line(EndStep, killpoint.BeforeEffect)
	if l.def.OnEnd != nil {
		began := l.runner.cfg.Now()
		for attempt := 1; ; attempt++ {
			run := &Run{live: l, step: -1}
			endErr = l.protect(run, func() error { return l.def.OnEnd(l.ctx, run, final) })
			if l.ctx.Err() != nil && endErr != nil {
				return
			}
			limit := began.Add(time.Minute)
			if !switchback.IsRetryable(endErr) || !l.runner.cfg.Now().Before(limit) {
				break
			}
			if !l.sleep(l.machine.retryAt(attempt, l.runner.cfg.Now(), limit), nil) {
				return
			}
		}
	}
	l.line(EndStep, killpoint.AfterEffect)
	rec := l.snapshot()
	if endErr != nil {
		final = StateFailed
		e := switchback.Flatten(fmt.Errorf("ending the operation: %w", endErr))
		rec.Error = e
	}
	rec = End(rec, final, l.runner.cfg.Now())
	level, attrs := slog.LevelInfo, []any{"state", final, "duration", rec.EndedAt.Sub(rec.StartedAt).Round(time.Millisecond)}
	if rec.Error != nil {
		level = slog.LevelWarn
		attrs = append(attrs, "error", rec.Error.Error())
	}
	l.log(level, "", "operation ended", attrs...)
	_ = l.persist(rec) // the error is the lease's loss: whoever has it ends the operation
	l.line(EndStep, killpoint.AfterOutcome)
}

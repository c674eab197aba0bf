package operation

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Run is what a step sees of its operation. Its methods may be called from
// several goroutines, until Do, Undo or OnEnd returns.
type Run struct {
	live *live
	step int // -1 in OnEnd
	undo bool
}

// ID returns the operation's ID.
func (r *Run) ID() switchback.OperationID { return r.live.snapshot().ID }

// Protection returns what the operation works on; may be empty.
func (r *Run) Protection() switchback.ProtectionID { return r.live.snapshot().Protection }

// Record returns the operation as it is now.
func (r *Run) Record() Record { return r.live.snapshot() }

// Key names the effect of this step, "operation/step" or "operation/step/undo":
// the same at every repetition, different from every other effect.
func (r *Run) Key() string {
	rec := r.live.snapshot()
	key := string(rec.ID) + "/end"
	if r.step >= 0 {
		key = string(rec.ID) + "/" + rec.Steps[r.step].Name
	}
	if r.undo {
		key += "/undo"
	}
	return key
}

// Fence returns the epoch of the lease this run holds. It grows with every
// change of owner: a receiver that has seen a higher one must refuse.
func (r *Run) Fence() int64 { return r.live.snapshot().Lease.Epoch }

// Params decodes the operation's parameters.
func (r *Run) Params(into any) error {
	return decode(r.live.snapshot().Params, into, "parameters")
}

// StepResult decodes what a step (this one, too) has stored by SetResult.
// CodeNotFound: nothing yet.
func (r *Run) StepResult(name string, into any) error {
	rec := r.live.snapshot()
	s := rec.Step(name)
	if s == nil || s.Result == nil {
		return switchback.Errorf(switchback.CodeNotFound, "step %q has no result", name)
	}
	return decode(s.Result, into, "the result of step "+name)
}

// SetResult stores v as this step's result. It is durable when SetResult
// returns nil, also if the step is interrupted afterwards.
func (r *Run) SetResult(v any) error {
	if r.step < 0 {
		return r.SetSummary(v)
	}
	return r.store(v, func(rec *Record, data json.RawMessage) { rec.Steps[r.step].Result = data })
}

// SetSummary stores v as the operation's final summary, as durable as SetResult.
func (r *Run) SetSummary(v any) error {
	return r.store(v, func(rec *Record, data json.RawMessage) { rec.Result = data })
}

func (r *Run) store(v any, set func(*Record, json.RawMessage)) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode result: %w", err)
	}
	return r.live.save(func(rec *Record) { set(rec, data) })
}

// Log writes a line to the operation's log and to the process's. Attributes
// are alternating keys and values as in log/slog.
func (r *Run) Log(level slog.Level, msg string, kv ...any) {
	rec := r.live.snapshot()
	step := ""
	if r.step >= 0 {
		step = rec.Steps[r.step].Name
	}
	r.live.log(level, step, msg, kv...)
}

// Progress says how far the step is. It does not block on the store and may be
// called as often as convenient: it is shown at once to those who Watch in this
// process, and stored about once a second.
func (r *Run) Progress(p Progress) {
	if r.step >= 0 {
		r.live.progress(r.step, p)
	}
}

// CancelRequested reports whether somebody asked to cancel.
func (r *Run) CancelRequested() bool { return r.live.snapshot().CancelRequested }

func decode(data json.RawMessage, into any, what string) error {
	if len(data) == 0 {
		data = json.RawMessage("null")
	}
	if err := json.Unmarshal(data, into); err != nil {
		return switchback.Errorf(switchback.CodeInvalid, "decode %s: %v", what, err)
	}
	return nil
}

// logAttrs turns key-value pairs into text, as log/slog would print them.
func logAttrs(kv []any) map[string]string {
	if len(kv) == 0 {
		return nil
	}
	attrs := map[string]string{}
	rec := slog.NewRecord(time.Time{}, 0, "", 0)
	rec.Add(kv...)
	rec.Attrs(func(a slog.Attr) bool {
		attrs[a.Key] = a.Value.Resolve().String()
		return true
	})
	return attrs
}

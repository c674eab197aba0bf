package agent

import (
	"context"
	"encoding/json"
	"strings"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/replicator"
)

// task is one run of an action.
type task struct {
	req   agentapi.Task
	mu    sync.Mutex
	state agentapi.TaskState
	done  chan struct{}
	ended time.Time
	stop  context.CancelFunc
}

func (t *task) snapshot() agentapi.TaskState {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.state
}

// Report shows how far the action is.
func (t *task) Report(message string, p *replicator.Progress) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.state.Message, t.state.Progress = message, p
}

type action func(ctx context.Context, t *task, req agentapi.Task) (any, error)

// handle adapts a typed action.
func handle[P any](f func(ctx context.Context, t *task, req agentapi.Task, p P) (any, error)) action {
	return func(ctx context.Context, t *task, req agentapi.Task) (any, error) {
		var p P
		if len(req.Params) > 0 {
			if err := json.Unmarshal(req.Params, &p); err != nil {
				return nil, switchback.Errorf(switchback.CodeInvalid, "parameters of %s: %w", req.Action, err)
			}
		}
		return f(ctx, t, req, p)
	}
}

// onVM adapts a typed action on a VM that the agent has a part in: one at a
// time for each VM, not with an older epoch than is known, and only in one of
// the roles (none named: any).
func onVM[P any](a *Agent, f func(ctx context.Context, t *task, v *vm, req agentapi.Task, p P) (any, error), roles ...agentapi.Role) action {
	return handle(func(ctx context.Context, t *task, req agentapi.Task, p P) (any, error) {
		v, err := a.vm(req.Protection)
		if err != nil {
			return nil, err
		}
		v.act.Lock()
		defer v.act.Unlock()
		if err := v.checkEpoch(req.Epoch); err != nil {
			return nil, err
		}
		if len(roles) > 0 {
			if err := v.roleIs(roles...); err != nil {
				return nil, err
			}
		}
		return f(ctx, t, v, req, p)
	})
}

// taskTable runs tasks and remembers the finished ones for a while.
type taskTable struct {
	ctx   context.Context // ends with the agent
	wg    sync.WaitGroup
	mu    sync.Mutex
	tasks map[string]*task
}

// keepFinished is how long a finished task answers without being done again.
const keepFinished = 10 * time.Minute

// start attaches to the task of this key, or runs it. A failed one runs again.
func (tt *taskTable) start(req agentapi.Task, act action) *task {
	tt.mu.Lock()
	defer tt.mu.Unlock()
	now := time.Now()
	for k, t := range tt.tasks {
		s := t.snapshot()
		if s.Done && (now.Sub(t.ended) > keepFinished || (k == req.Key && s.Error != nil)) {
			delete(tt.tasks, k)
		}
	}
	if t, ok := tt.tasks[req.Key]; ok {
		return t
	}
	ctx, cancel := context.WithCancel(tt.ctx)
	t := &task{req: req, done: make(chan struct{}), stop: cancel}
	t.state.Key = req.Key
	tt.tasks[req.Key] = t
	tt.wg.Go(func() {
		defer cancel()
		taskLine(req, killpoint.BeforeEffect)
		result, err := act(ctx, t, req)
		taskLine(req, killpoint.AfterEffect)
		var raw json.RawMessage
		if err == nil && result != nil {
			raw, err = json.Marshal(result)
		}
		t.mu.Lock()
		t.state.Done, t.state.Result = true, raw
		if err != nil {
			t.state.Error = switchback.Flatten(err)
		}
		t.ended = time.Now()
		t.mu.Unlock()
		close(t.done)
	})
	return t
}

// taskLine is a place where tests kill the process; see internal/killpoint. The
// scope is the action; the step is in the key, "operation/step[/undo]/action".
func taskLine(req agentapi.Task, at killpoint.Line) {
	if !killpoint.Armed() {
		return
	}
	if _, rest, ok := strings.Cut(strings.TrimSuffix(req.Key, "/"+req.Action), "/"); ok {
		killpoint.At("agent", req.Action, rest, at)
	}
}

func (tt *taskTable) cancel(key string) {
	tt.mu.Lock()
	t := tt.tasks[key]
	tt.mu.Unlock()
	if t != nil {
		t.stop()
	}
}

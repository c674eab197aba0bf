package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
)

// TestTasks: the same key is the same effect, once, unless it failed or was
// forgotten long after its end.
func TestTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		tt := &taskTable{ctx: ctx, tasks: map[string]*task{}}
		runs := 0
		var fail error
		act := func(ctx context.Context, _ *task, _ agentapi.Task) (any, error) {
			runs++
			time.Sleep(time.Minute)
			if ctx.Err() != nil {
				return nil, ctx.Err()
			}
			return map[string]int{"run": runs}, fail
		}
		req := agentapi.Task{Key: "op-1/start/start"}
		first := tt.start(req, act)
		synctest.Wait()
		if again := tt.start(req, act); again != first || runs != 1 {
			t.Errorf("asking again while it runs: another task %v, %d runs", again != first, runs)
		}
		<-first.done
		var result map[string]int
		if s := first.snapshot(); !s.Done || s.Error != nil || json.Unmarshal(s.Result, &result) != nil || result["run"] != 1 {
			t.Errorf("ended as %+v", s)
		}
		time.Sleep(keepFinished)
		if tt.start(req, act) != first {
			t.Error("a finished task is done again within the time it is kept")
		}
		time.Sleep(time.Second)
		second := tt.start(req, act)
		if second == first {
			t.Error("a finished task is kept for ever")
		}
		<-second.done

		fail = fmt.Errorf("wrapped: %w", switchback.Errorf(switchback.CodeNoSpace, "full"))
		req.Key = "op-1/fold/fold"
		failed := tt.start(req, act)
		<-failed.done
		if s := failed.snapshot(); !s.Done || switchback.CodeOf(s.Error) != switchback.CodeNoSpace || s.Result != nil {
			t.Errorf("failed as %+v", s)
		}
		retried := tt.start(req, act)
		if retried == failed {
			t.Error("a failed task is not done again")
		}
		tt.cancel(req.Key)
		tt.cancel("unknown")
		<-retried.done
		if s := retried.snapshot(); s.Error == nil {
			t.Error("a cancelled task ends without an error")
		}
		cancel()
		tt.wg.Wait()
	})
}

func TestTaskParameters(t *testing.T) {
	act := handle(func(_ context.Context, _ *task, _ agentapi.Task, p agentapi.RetireParams) (any, error) {
		return p.Undefine, nil
	})
	for raw, want := range map[string]any{`{"undefine":true}`: true, ``: false, `{}`: false} {
		if got, err := act(context.Background(), nil, agentapi.Task{Params: json.RawMessage(raw)}); err != nil || got != want {
			t.Errorf("parameters %q give %v, %v", raw, got, err)
		}
	}
	if _, err := act(context.Background(), nil, agentapi.Task{Action: "retire", Params: json.RawMessage(`{"undefine":7}`)}); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("bad parameters: %v", err)
	}
}

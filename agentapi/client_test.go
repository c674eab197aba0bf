package agentapi

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/replicator"
	"github.com/switchback-dr/switchback/transport"
)

// agent answers tasks with the states in turn, the last one for ever.
type agent struct {
	t      *testing.T
	states []TaskState
	mu     sync.Mutex
	asked  []Task
	gone   []string
	hang   chan struct{} // the answer waits for it
}

func (a *agent) client() *Client {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/tasks", func(w http.ResponseWriter, r *http.Request) {
		var t Task
		if err := transport.ReadJSON(r, &t); err != nil {
			a.t.Error(err)
		}
		a.mu.Lock()
		s := a.states[min(len(a.asked), len(a.states)-1)]
		a.asked = append(a.asked, t)
		a.mu.Unlock()
		if a.hang != nil {
			select {
			case <-a.hang:
			case <-r.Context().Done():
			}
		}
		transport.WriteJSON(w, http.StatusOK, s)
	})
	mux.HandleFunc("DELETE /v1/tasks/{key...}", func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		a.gone = append(a.gone, r.PathValue("key"))
		w.WriteHeader(http.StatusNoContent)
	})
	srv := httptest.NewTLSServer(mux)
	a.t.Cleanup(srv.Close)
	return &Client{HTTP: srv.Client(), Address: strings.TrimPrefix(srv.URL, "https://")}
}

func TestRun(t *testing.T) {
	a := &agent{t: t, states: []TaskState{
		{Progress: &replicator.Progress{Percent: 10}, Message: "seed"},
		{Progress: &replicator.Progress{Percent: 90}},
		{Done: true, Result: json.RawMessage(`{"bytes":7}`)},
	}}
	task := Task{Key: "op-1/fold/fold", Action: ActionFold, Protection: "p-1", Epoch: 3}
	var seen []float64
	var out FoldResult
	err := a.client().Run(context.Background(), task, FenceParams{ActiveSite: "riga"}, &out, func(s TaskState) { seen = append(seen, s.Progress.Percent) })
	if err != nil || out.Bytes != 7 {
		t.Errorf("result %+v, %v", out, err)
	}
	if d := cmp.Diff([]float64{10, 90}, seen); d != "" {
		t.Errorf("progress: %s", d)
	}
	task.Params = json.RawMessage(`{"active_site":"riga"}`)
	if d := cmp.Diff([]Task{task, task, task}, a.asked); d != "" {
		t.Errorf("asked: %s", d)
	}
}

func TestRunFails(t *testing.T) {
	a := &agent{t: t, states: []TaskState{{Done: true, Error: &switchback.Error{Code: switchback.CodeStaleEpoch, Message: "epoch 3 is over", Hint: "look again"}}}}
	err := a.client().Run(context.Background(), Task{Key: "k"}, nil, nil, nil)
	var e *switchback.Error
	if !errors.As(err, &e) || e.Code != switchback.CodeStaleEpoch || e.Hint != "look again" {
		t.Errorf("error %v", err)
	}
	gone := &Client{HTTP: http.DefaultClient, Address: "127.0.0.1:1"}
	if err := gone.Run(context.Background(), Task{Key: "k"}, nil, nil, nil); switchback.CodeOf(err) != switchback.CodeUnavailable {
		t.Errorf("an agent that is away: %v", err)
	}
	if a.gone != nil {
		t.Errorf("cancelled: %v", a.gone)
	}
}

// TestRunCancelled: a task that was cancelled on request is cancelled at the
// agent; one whose caller merely ends goes on there.
func TestRunCancelled(t *testing.T) {
	asked := switchback.Errorf(switchback.CodeCancelled, "cancelled on request")
	for _, c := range []struct {
		name  string
		cause error
		want  error
		gone  []string
	}{
		{"on request", asked, asked, []string{"op-1/check/check"}},
		{"the caller ends", nil, context.Canceled, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := &agent{t: t, states: []TaskState{{}}, hang: make(chan struct{})}
			ctx, cancel := context.WithCancelCause(context.Background())
			time.AfterFunc(20*time.Millisecond, func() { cancel(c.cause) })
			if err := a.client().Run(ctx, Task{Key: "op-1/check/check"}, nil, nil, nil); !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
			a.mu.Lock()
			defer a.mu.Unlock()
			if d := cmp.Diff(c.gone, a.gone); d != "" {
				t.Errorf("cancelled at the agent: %s", d)
			}
		})
	}
}

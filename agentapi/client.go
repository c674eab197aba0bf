package agentapi

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/transport"
)

// PollWait is how long an agent keeps a request for an unfinished task before
// it answers how far it is.
const PollWait = time.Second

// Client talks to one agent on behalf of the server.
type Client struct {
	HTTP    *http.Client
	Address string
}

func (c *Client) url(path string) string { return "https://" + c.Address + path }

// Inventory asks what the agent's hypervisor has.
func (c *Client) Inventory(ctx context.Context) (Inventory, error) {
	return transport.Call[Inventory](ctx, c.HTTP, http.MethodGet, c.url("/v1/inventory"), nil)
}

// Status asks how the agent stands.
func (c *Client) Status(ctx context.Context) (AgentStatus, error) {
	return transport.Call[AgentStatus](ctx, c.HTTP, http.MethodGet, c.url("/v1/status"), nil)
}

// Points lists the points of the replica that the agent keeps.
func (c *Client) Points(ctx context.Context, id switchback.ProtectionID) ([]switchback.MarkedPoint, error) {
	return transport.Call[[]switchback.MarkedPoint](ctx, c.HTTP, http.MethodGet, c.url("/v1/points/"+url.PathEscape(string(id))), nil)
}

// Run carries out a task and waits for its end, decoding the result into out
// (nil = none wanted). progress is called with what the agent reports. When ctx
// ends first with the cause CodeCancelled the task is cancelled at the agent, if
// it can be reached; when it merely ends (this process does), the task goes on.
func (c *Client) Run(ctx context.Context, t Task, params, out any, progress func(TaskState)) error {
	if params != nil {
		raw, err := json.Marshal(params)
		if err != nil {
			return err
		}
		t.Params = raw
	}
	for {
		s, err := transport.Call[TaskState](ctx, c.HTTP, http.MethodPost, c.url("/v1/tasks"), t)
		if ctx.Err() != nil {
			if switchback.CodeOf(context.Cause(ctx)) != switchback.CodeCancelled {
				return ctx.Err() // this process ends; the task goes on and is found again
			}
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			// Best effort: a task that cannot be reached ends or is undone by the operation.
			_, _ = transport.Call[struct{}](stop, c.HTTP, http.MethodDelete, c.url("/v1/tasks/"+t.Key), nil)
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
		if !s.Done {
			if progress != nil {
				progress(s)
			}
			continue
		}
		if s.Error != nil {
			return s.Error
		}
		if out != nil && len(s.Result) > 0 {
			return json.Unmarshal(s.Result, out)
		}
		return nil
	}
}

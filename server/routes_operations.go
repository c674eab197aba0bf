package server

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/transport"
)

// OperationIn names an operation.
type OperationIn struct {
	ID switchback.OperationID `path:"id"`
}

func (s *Server) routeOperations(rt *routes) {
	handle(rt, route{ID: "list-operations", Tag: "Operations", Pattern: "GET /v1/operations", Summary: "List operations, newest first", Need: switchback.Viewer},
		func(ctx context.Context, in *struct {
			Paging
			VM         string          `query:"vm" doc:"only those of a VM: name, UUID or protection ID"`
			Kind       string          `query:"kind" doc:"only those of a kind"`
			State      operation.State `query:"state" doc:"only those in a state"`
			Unfinished bool            `query:"unfinished" doc:"only those that have not ended"`
		}) (page api.Page[operation.Record], err error) {
			f := operation.Filter{Kind: in.Kind, State: in.State, Unfinished: in.Unfinished}
			if in.VM != "" {
				p, err := s.find(ctx, in.VM)
				if err != nil {
					return page, err
				}
				f.Protection = p.ID
			}
			page.Items, page.Next, err = s.operationPage(ctx, f, in.Paging)
			return page, err
		})
	handle(rt, route{ID: "get-operation", Tag: "Operations", Pattern: "GET /v1/operations/{id}", Summary: "One operation, with its steps", Need: switchback.Viewer},
		func(ctx context.Context, in *OperationIn) (operation.Record, error) { return s.runner.Get(ctx, in.ID) })
	handle(rt, route{ID: "get-operation-log", Tag: "Operations", Pattern: "GET /v1/operations/{id}/log", Summary: "The log of an operation", Need: switchback.Viewer},
		func(ctx context.Context, in *struct {
			OperationIn
			Paging
		}) (page api.Page[operation.LogLine], err error) {
			after, err := logCursor(in.After)
			if err != nil {
				return page, err
			}
			lines, err := s.store.OperationLog(ctx, in.ID, after)
			page.Items = lines[:min(len(lines), in.size())]
			if page.Items == nil {
				page.Items = []operation.LogLine{}
			}
			if len(page.Items) < len(lines) {
				page.Next = sequenceText(page.Items[len(page.Items)-1].Sequence)
			}
			return page, err
		})
	handle(rt, route{ID: "cancel-operation", Tag: "Operations", Pattern: "POST /v1/operations/{id}/cancel", Summary: "Stop an operation and undo what it did", Need: switchback.Operator},
		func(ctx context.Context, in *OperationIn) (struct{}, error) {
			return struct{}{}, s.cancelOperation(ctx, in.ID)
		})
	handle(rt, route{ID: "retry-operation", Tag: "Operations", Pattern: "POST /v1/operations/{id}/retry", Summary: "Let a failed operation go on", Need: switchback.Operator},
		func(ctx context.Context, in *OperationIn) (struct{}, error) {
			return struct{}{}, s.retryOperation(ctx, in.ID)
		})
	handle(rt, route{ID: "get-drill-screenshot", Tag: "Operations", Pattern: "GET /v1/operations/{id}/screenshot", Summary: "The picture of a drill's screen", Need: switchback.Viewer},
		func(ctx context.Context, in *OperationIn) (api.DrillPicture, error) {
			rec, err := s.runner.Get(ctx, in.ID)
			if err != nil {
				return api.DrillPicture{}, err
			}
			b, err := readPicture(s.pictureFile(rec.ID))
			return api.DrillPicture{PNG: b}, err
		})
	s.routeWatch(rt)
}

// logCursor is a place in an operation's log; "" is its begin.
func logCursor(after string) (int64, error) {
	if after == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(after, 10, 64)
	if err != nil {
		return 0, badCursor(after)
	}
	return n, nil
}

// operationPage lists operations that the caller sees, and where the next page begins.
func (s *Server) operationPage(ctx context.Context, f operation.Filter, p Paging) (list []operation.Record, next string, err error) {
	in, err := s.seesOperations(ctx, callOf(ctx).who.Scope)
	if err != nil {
		return nil, "", err
	}
	list = []operation.Record{}
	f.Before, f.Limit = switchback.OperationID(p.After), p.size()+1
	for {
		more, err := s.store.Operations(ctx, f)
		if err != nil {
			return nil, "", err
		}
		for _, rec := range more {
			if !in(rec) {
				continue
			}
			if len(list) == p.size() {
				return list, string(list[len(list)-1].ID), nil
			}
			list = append(list, rec)
		}
		if len(more) < f.Limit {
			return list, "", nil
		}
		f.Before = more[len(more)-1].ID
	}
}

// seesOperations returns what tells the operations of a scope: those of its
// VMs, as long as these are protected.
func (s *Server) seesOperations(ctx context.Context, scope switchback.Scope) (func(operation.Record) bool, error) {
	if scope.All() {
		return func(operation.Record) bool { return true }, nil
	}
	mine, err := s.protectionsIn(ctx, scope)
	if err != nil {
		return nil, err
	}
	return func(rec operation.Record) bool {
		id := rec.Protection
		if id == "" { // one that only reads has it among its parameters
			var params struct {
				Protection switchback.ProtectionID `json:"protection"`
			}
			if json.Unmarshal(rec.Params, &params) == nil {
				id = params.Protection
			}
		}
		_, ok := mine[id]
		return ok
	}, nil
}

// keepAliveEvery is how often a stream in which nothing happens says that it lives.
const keepAliveEvery = 10 * time.Second

// routeWatch registers the stream of an operation's events.
func (s *Server) routeWatch(rt *routes) {
	x := route{ID: "watch-operation", Tag: "Operations", Pattern: "GET /v1/operations/{id}/events", Need: switchback.Viewer,
		Summary: "Follow an operation until it ends: server-sent events"}
	op := x.operation()
	op.Description += " Event operation: the operation (OperationRecord), as it is now and whenever it changes; the last one has ended. " +
		"Event log: a line of its log (OperationLogLine), with its sequence as ID. A stream that broke is asked for again with Last-Event-ID: " +
		"it goes on with the next line of the log and the operation as it is then. Where nothing happens comments keep the connection."
	op.Parameters = append(op.Parameters,
		&huma.Param{Name: "id", In: "path", Required: true, Schema: &huma.Schema{Type: huma.TypeString}},
		&huma.Param{Name: "Last-Event-ID", In: "header", Schema: &huma.Schema{Type: huma.TypeString}, Description: "the ID of the last event that was received"})
	op.Responses = map[string]*huma.Response{"200": {Description: "events", Content: map[string]*huma.MediaType{"text/event-stream": {Schema: &huma.Schema{Type: huma.TypeString}}}}}
	rt.api.OpenAPI().AddOperation(&op)
	rt.known[x.Pattern] = x
	rt.HandleFunc(x.Pattern, s.watch)
}

// watch streams what happens to an operation.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) {
	ctx, id := r.Context(), switchback.OperationID(r.PathValue("id"))
	logged, err := logCursor(r.Header.Get("Last-Event-ID"))
	if err != nil {
		transport.WriteError(w, err)
		return
	}
	records, err := s.runner.Watch(ctx, id)
	if err != nil {
		transport.WriteError(w, err)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/event-stream")
	h.Set("Cache-Control", "no-store")
	var last []byte
	said := time.Now()
	send := func(event, eventID string, v any) error {
		data, err := json.Marshal(v)
		if err != nil || eventID == "" && bytes.Equal(data, last) {
			return err
		}
		if eventID == "" {
			last = data
		} else {
			eventID = "id: " + eventID + "\n"
		}
		said = time.Now()
		_, err = fmt.Fprintf(w, "event: %s\n%sdata: %s\n\n", event, eventID, data)
		return err
	}
	for rec := range records {
		lines, err := s.store.OperationLog(ctx, id, logged)
		if err != nil {
			return // the watcher asks again
		}
		for _, l := range lines {
			if send("log", sequenceText(l.Sequence), l) != nil {
				return // the watcher left
			}
			logged = l.Sequence
		}
		if send("operation", "", rec) != nil {
			return
		}
		if time.Since(said) > keepAliveEvery {
			said = time.Now()
			if _, err := fmt.Fprint(w, ": alive\n\n"); err != nil {
				return
			}
		}
		if http.NewResponseController(w).Flush() != nil {
			return
		}
	}
}

func sequenceText(n int64) string { return strconv.FormatInt(n, 10) }

package server

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// maxAuditDetail bounds what an entry repeats of a request or its error.
const maxAuditDetail = 4 << 10

// audit adds an entry. An ended context does not keep it out.
func (s *Server) audit(ctx context.Context, e audit.Entry) error {
	e.At = s.store.Now()
	e.Detail = strings.ToValidUTF8(e.Detail[:min(len(e.Detail), maxAuditDetail)], "")
	_, err := s.store.AppendAudit(context.WithoutCancel(ctx), e)
	return err
}

func auditEntry(r *http.Request, x route, c asked) audit.Entry {
	return audit.Entry{Request: c.id, Who: c.who.Name, Role: c.who.Role, Via: c.who.Via, Action: x.ID, Object: strings.TrimPrefix(r.URL.Path, "/v1/")}
}

func (s *Server) auditRefused(r *http.Request, x route, c asked, why error) error {
	e := auditEntry(r, x, c)
	e.Outcome, e.Code, e.Detail = audit.Refused, switchback.CodeOf(why), why.Error()
	return s.audit(r.Context(), e)
}

// audited has next answer a request that changes something, with an entry before
// and one after it: a request that cannot be noted is not carried out, and one
// that a crash ended has no second entry.
func (s *Server) audited(w http.ResponseWriter, r *http.Request, x route, c asked, next http.Handler) {
	e := auditEntry(r, x, c)
	head, err := io.ReadAll(io.LimitReader(r.Body, maxAuditDetail))
	if err != nil {
		transport.WriteError(w, switchback.Errorf(switchback.CodeUnavailable, "read request: %w", err))
		return
	}
	r.Body = rest{io.MultiReader(bytes.NewReader(head), r.Body), r.Body}
	e.Outcome, e.Detail = audit.Asked, string(head)
	if err := s.audit(r.Context(), e); err != nil {
		transport.WriteError(w, err)
		return
	}
	seen := &seenAnswer{ResponseWriter: w, status: http.StatusOK}
	next.ServeHTTP(seen, r)
	e.Outcome, e.Detail = audit.Done, *c.came
	if seen.status >= 400 {
		var p transport.Problem
		e.Outcome, e.Code, e.Detail = audit.Failed, switchback.CodeInternal, http.StatusText(seen.status)
		if json.Unmarshal(seen.problem.Bytes(), &p) == nil && p.Code != "" {
			e.Code, e.Detail = p.Code, p.Detail
		}
	}
	if err := s.audit(r.Context(), e); err != nil {
		s.log.Error("the outcome of a request is not in the audit log", "request", c.id, "action", e.Action, "outcome", e.Outcome, "error", err)
	}
}

// rest reads what was read already, and what comes after it.
type rest struct {
	io.Reader
	io.Closer
}

// seenAnswer keeps the status of an answer, and the body of an error.
type seenAnswer struct {
	http.ResponseWriter
	status  int
	problem bytes.Buffer
}

// Unwrap lets http.ResponseController reach the writer.
func (w *seenAnswer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *seenAnswer) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *seenAnswer) Write(data []byte) (int, error) {
	if w.status >= 400 && w.problem.Len() < 64<<10 {
		w.problem.Write(data)
	}
	return w.ResponseWriter.Write(data)
}

// auditBegun notes the operation for the entry of its request. One that the
// server begins by itself, for a policy, gets an entry of its own; it has begun,
// whatever becomes of that.
func (s *Server) auditBegun(ctx context.Context, c asked, rec operation.Record) {
	if c.came != nil {
		c.note(string(rec.ID))
		return
	}
	err := s.audit(ctx, audit.Entry{Who: rec.RequestedBy, Via: "server", Action: "begin-" + rec.Kind, Object: "operations/" + string(rec.ID), Outcome: audit.Done, Detail: rec.Title})
	if err != nil {
		s.log.Error("an operation that began by itself is not in the audit log", "operation", rec.ID, "error", err)
	}
}

func (s *Server) routeAudit(rt *routes) {
	handle(rt, route{ID: "list-audit", Tag: "Audit", Pattern: "GET /v1/audit", Summary: "List the audit log", Need: switchback.Administrator},
		func(ctx context.Context, in *struct {
			Paging
			Who     string    `query:"who" doc:"only what this person or program asked"`
			Action  string    `query:"action" doc:"only one action"`
			Object  string    `query:"object" doc:"only what has this text in its object"`
			Outcome string    `query:"outcome" enum:"asked,done,failed,refused"`
			Request string    `query:"request" doc:"only one request"`
			Since   time.Time `query:"since"`
			Until   time.Time `query:"until"`
			Newest  bool      `query:"newest" doc:"newest first"`
		}) (page api.Page[audit.Entry], err error) {
			after, err := logCursor(in.After)
			if err != nil {
				return page, err
			}
			page.Items, err = s.store.Audit(ctx, store.AuditFilter{Who: in.Who, Action: in.Action, Object: in.Object, Outcome: in.Outcome, Request: in.Request,
				Since: in.Since, Until: in.Until, NewestFirst: in.Newest, After: after, Limit: in.size() + 1})
			if err == nil && len(page.Items) > in.size() {
				page.Items = page.Items[:in.size()]
				page.Next = sequenceText(page.Items[in.size()-1].Sequence)
			}
			return page, err
		})
	handle(rt, route{ID: "verify-audit", Tag: "Audit", Pattern: "GET /v1/audit/verify", Summary: "Read the whole audit log and say whether it is what it was", Need: switchback.Administrator},
		func(ctx context.Context, in *struct {
			Expect []string `query:"expect,explode" doc:"heads that were noted before, SEQUENCE:HASH"`
		}) (v audit.Verdict, err error) {
			var heads []audit.Head
			for _, text := range in.Expect {
				h, err := audit.ParseHead(text)
				if err != nil {
					return v, err
				}
				heads = append(heads, h)
			}
			return s.store.VerifyAudit(ctx, heads)
		})
}

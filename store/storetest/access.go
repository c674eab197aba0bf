package storetest

import (
	"strings"
	"sync"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/store"
)

// operationOfRequest: a key belongs to one operation, for ever.
func operationOfRequest(t *testing.T, s *store.Store) {
	rec := operation.Record{ID: "op-1", State: operation.StateQueued, Request: operation.Origin{ID: "r", Key: "alice k", Digest: "d"}}
	ok(t, s.CreateOperation(ctx, rec))
	got := must(s.OperationByRequest(ctx, "alice k"))(t)
	same(t, got.Request, rec.Request)
	rec.ID = "op-2"
	code(t, s.CreateOperation(ctx, rec), switchback.CodeConflict)
	rec.Request.Key = "bob k"
	ok(t, s.CreateOperation(ctx, rec))
	ok(t, s.CreateOperation(ctx, operation.Record{ID: "op-3", State: operation.StateQueued}))
	ok(t, s.CreateOperation(ctx, operation.Record{ID: "op-4", State: operation.StateQueued}))
	for _, key := range []string{"", "carol k"} {
		_, err := s.OperationByRequest(ctx, key)
		code(t, err, switchback.CodeNotFound)
	}
}

func apiToken(t *testing.T, s *store.Store) {
	tok := store.APIToken{ID: "1", Hash: "h", Person: "alice", Role: switchback.Operator, Scope: switchback.Scope{Sites: []switchback.SiteID{"riga"}, Tags: []string{"db"}},
		Note: "laptop", CreatedAt: t0, CreatedBy: "admin", ExpiresAt: t0.Add(time.Hour)}
	ok(t, s.CreateAPIToken(ctx, tok))
	code(t, s.CreateAPIToken(ctx, tok), switchback.CodeConflict)
	same(t, must(s.APIToken(ctx, "1"))(t), tok)
	_, err := s.APIToken(ctx, "2")
	code(t, err, switchback.CodeNotFound)
	ok(t, s.UseAPIToken(ctx, "1", t0.Add(time.Minute)))
	ok(t, s.UseAPIToken(ctx, "1", t0.Add(90*time.Second))) // within the minute
	tok.UsedAt = t0.Add(time.Minute)
	same(t, must(s.APIToken(ctx, "1"))(t), tok)
	ok(t, s.RevokeAPIToken(ctx, "1", "admin", t0.Add(2*time.Minute)))
	ok(t, s.RevokeAPIToken(ctx, "1", "bob", t0.Add(3*time.Minute)))
	tok.RevokedAt, tok.RevokedBy = t0.Add(2*time.Minute), "admin"
	same(t, must(s.APITokens(ctx))(t), []store.APIToken{tok})
	code(t, s.RevokeAPIToken(ctx, "2", "admin", t0), switchback.CodeNotFound)
}

func auditLog(t *testing.T, s *store.Store) {
	same(t, must(s.VerifyAudit(ctx, nil))(t).Entries, int64(0))
	for i, e := range []audit.Entry{
		{Who: "alice", Action: "failover", Object: "vms/web_1", Outcome: audit.Asked, Request: "r1", Role: switchback.Operator, Via: "token 1", Detail: "{}"},
		{Who: "alice", Action: "failover", Object: "vms/web_1", Outcome: audit.Failed, Request: "r1", Code: switchback.CodeRefused},
		{Who: "bob", Action: "commit", Object: "vms/webs1", Outcome: audit.Refused, Request: "r2"},
	} {
		e.At = t0.Add(time.Duration(i) * time.Minute)
		got := must(s.AppendAudit(ctx, e))(t)
		same(t, got.Sequence, int64(i+1))
	}
	for want, f := range map[string]store.AuditFilter{
		"123": {}, "321": {NewestFirst: true}, "12": {Who: "alice"}, "3": {Outcome: audit.Refused}, "1": {Limit: 1}, "23": {After: 1}, "21": {After: 3, NewestFirst: true},
		"12 ": {Object: "b_1"}, "2": {Since: t0.Add(time.Minute), Until: t0.Add(2 * time.Minute)}, "12  ": {Request: "r1"}, "3 ": {Action: "commit"},
	} {
		got := ""
		for _, e := range must(s.Audit(ctx, f))(t) {
			got += string(rune('0' + e.Sequence))
		}
		same(t, got, strings.TrimSpace(want))
	}
	v := must(s.VerifyAudit(ctx, nil))(t)
	same(t, len(v.Problems), 0)
	same(t, v.Entries, int64(3))
	same(t, len(must(s.VerifyAudit(ctx, []audit.Head{v.Head}))(t).Problems), 0)
	same(t, len(must(s.VerifyAudit(ctx, []audit.Head{{Sequence: 2, Hash: "other"}}))(t).Problems), 1)
}

// auditLogRaced: entries written at once stand one after another.
func auditLogRaced(t *testing.T, s *store.Store) {
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				if _, err := s.AppendAudit(ctx, audit.Entry{At: t0, Who: "alice", Action: "x", Outcome: audit.Done}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	v := must(s.VerifyAudit(ctx, nil))(t)
	same(t, v.Entries, int64(40))
	same(t, v.Problems, []audit.Problem(nil))
}

// awaitingApproval: nobody works on it, it keeps others away, and it is released once.
func awaitingApproval(t *testing.T, s *store.Store) {
	rec := operation.Record{ID: "op-1", Protection: "p", State: operation.StateAwaiting, CreatedAt: t0, Approval: &operation.Approval{Role: switchback.Operator, Until: t0.Add(time.Hour)}}
	ok(t, s.CreateOperation(ctx, rec))
	code(t, s.CreateOperation(ctx, operation.Record{ID: "op-2", Protection: "p", State: operation.StateQueued}), switchback.CodeConflict)
	same(t, len(must(s.ClaimableOperations(ctx, "a", t0))(t)), 0)
	_, err := s.ClaimOperation(ctx, "op-1", "a", t0, t0.Add(time.Minute))
	code(t, err, switchback.CodeConflict)
	same(t, len(must(s.Operations(ctx, operation.Filter{State: operation.StateAwaiting, Unfinished: true}))(t)), 1)
	rec.State, rec.Approval = operation.StateQueued, &operation.Approval{Role: switchback.Operator, By: "bob", At: t0}
	ok(t, s.ReleaseOperation(ctx, rec))
	other := rec
	other.CancelRequested = true
	code(t, s.ReleaseOperation(ctx, other), switchback.CodeConflict)
	same(t, must(s.Operation(ctx, "op-1"))(t), rec)
	same(t, len(must(s.ClaimableOperations(ctx, "a", t0))(t)), 1)
	// A restore fails what was approved, and cancels what was not: also where its
	// cancel was on its way.
	for id, state := range map[switchback.OperationID]operation.State{"op-3": operation.StateAwaiting, "op-4": operation.StateQueued} {
		ok(t, s.CreateOperation(ctx, operation.Record{ID: id, State: state, CreatedAt: t0, CancelRequested: state == operation.StateQueued, Approval: &operation.Approval{Until: t0}}))
	}
	same(t, len(must(s.SuspendOperations(ctx, &switchback.Error{Code: switchback.CodeRefused, Message: "restored"}, t0))(t)), 3)
	for id, want := range map[switchback.OperationID]operation.State{"op-1": operation.StateFailed, "op-3": operation.StateCancelled, "op-4": operation.StateCancelled} {
		got := must(s.Operation(ctx, id))(t)
		same(t, got.State, want)
		same(t, strings.HasPrefix(got.Error.Message, "restored"), true)
	}
	// One that has failed is ended once, unless it goes on.
	ended := operation.End(must(s.Operation(ctx, "op-1"))(t), operation.StateCancelled, t0)
	ok(t, s.EndFailed(ctx, ended))
	same(t, must(s.Operation(ctx, "op-1"))(t), ended)
	code(t, s.EndFailed(ctx, ended), switchback.CodeConflict)
}

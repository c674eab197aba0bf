package operation_test

import (
	"context"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
)

// TestApproval: an operation that awaits approval does nothing until it has it,
// ends without a step when it is cancelled or not approved in time.
func TestApproval(t *testing.T) {
	for _, x := range []struct {
		name  string
		until time.Duration
		then  func(r *operation.Runner, id switchback.OperationID) error
		want  operation.State
		did   int
		code  switchback.Code // of the operation's error
	}{
		{"approved", time.Hour, func(r *operation.Runner, id switchback.OperationID) error {
			_, err := r.Approve(context.Background(), id, "bob", "go")
			return err
		}, operation.StateSucceeded, 1, ""},
		{"cancelled", time.Hour, func(r *operation.Runner, id switchback.OperationID) error { return r.Cancel(context.Background(), id) },
			operation.StateCancelled, 0, switchback.CodeCancelled},
		{"too late", -time.Second, func(r *operation.Runner, id switchback.OperationID) error {
			if _, err := r.Approve(context.Background(), id, "bob", ""); switchback.CodeOf(err) != switchback.CodeRefused {
				t.Errorf("approved too late: %v", err)
			}
			expired, err := r.Expire(context.Background())
			if len(expired) != 1 {
				t.Errorf("%d expired", len(expired))
			}
			return err
		}, operation.StateCancelled, 0, switchback.CodeCancelled},
	} {
		t.Run(x.name, func(t *testing.T) {
			did, ended := 0, operation.State("")
			r := newRunner(t, openStore(t), "a", operation.Definition{Kind: "move",
				Steps: operation.Fixed(operation.Step{Name: "move", Do: func(context.Context, *operation.Run) error { did++; return nil }}),
				OnEnd: func(_ context.Context, _ *operation.Run, final operation.State) error { ended = final; return nil }})
			stop := run(t, r)
			rec, err := r.Submit(t.Context(), operation.Record{Kind: "move", Protection: "p", RequestedBy: "alice",
				Approval: &operation.Approval{Role: switchback.Operator, Until: time.Now().Add(x.until)}})
			if err != nil || rec.State != operation.StateAwaiting {
				t.Fatalf("%s, %v", rec.State, err)
			}
			if x.until > 0 {
				if expired, err := r.Expire(t.Context()); err != nil || len(expired) > 0 {
					t.Fatal(expired, err)
				}
			}
			if _, err := r.Submit(t.Context(), operation.Record{Kind: "move", Protection: "p"}); switchback.CodeOf(err) != switchback.CodeConflict {
				t.Errorf("another one beside it: %v", err)
			}
			if err := x.then(r, rec.ID); err != nil {
				t.Fatal(err)
			}
			records, err := r.Watch(t.Context(), rec.ID)
			if err != nil {
				t.Fatal(err)
			}
			for rec = range records {
			}
			stop()
			if rec.State != x.want || did != x.did || ended != x.want || switchback.CodeOf(errorOf(rec)) != x.code {
				t.Errorf("%s, %d steps done, ended %s, error %v", rec.State, did, ended, rec.Error)
			}
			if x.did > 0 && (rec.Approval.By != "bob" || rec.Approval.Note != "go" || rec.Approval.At.IsZero()) {
				t.Errorf("%+v", rec.Approval)
			}
			if _, err := r.Approve(t.Context(), rec.ID, "bob", ""); switchback.CodeOf(err) != switchback.CodeRefused {
				t.Errorf("approved when it has ended: %v", err)
			}
		})
	}
}

func errorOf(rec operation.Record) error {
	if rec.Error == nil {
		return nil
	}
	return rec.Error
}

// TestNeverApproved: failed before anybody approved it, an operation cannot go on by a retry.
func TestNeverApproved(t *testing.T) {
	for name, x := range map[string]struct {
		approval *operation.Approval
		want     operation.State
		code     switchback.Code
	}{
		"takes none": {nil, operation.StateRunning, ""},
		"given":      {&operation.Approval{At: time.Now()}, operation.StateRunning, ""},
		"not given":  {&operation.Approval{Until: time.Now()}, operation.StateAwaiting, switchback.CodeRefused},
	} {
		rec := operation.Record{State: operation.StateFailed, Approval: x.approval}
		if err := rec.CanRetry(); switchback.CodeOf(err) != x.code {
			t.Errorf("%s: %v", name, err)
		}
		if got := operation.Reopen(rec).State; got != x.want {
			t.Errorf("%s: reopened it is %s", name, got)
		}
	}
}

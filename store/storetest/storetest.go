// Package storetest is the conformance suite of the store: whatever database
// stands behind it must pass. Each test gets a fresh, empty store.
package storetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/store"

	"github.com/google/go-cmp/cmp"
)

// Run judges a database. The store that open returns is empty; open also
// arranges for its end.
func Run(t *testing.T, open func(t *testing.T) *store.Store) {
	for name, test := range map[string]func(*testing.T, *store.Store){
		"settings":                  settings,
		"sites and agents":          sitesAndAgents,
		"join token":                joinToken,
		"join token raced":          joinTokenRaced,
		"protection":                protection,
		"protection raced":          protectionRaced,
		"protection adopted":        protectionAdopted,
		"operation":                 operationRoundTrip,
		"operation per protection":  operationPerProtection,
		"operation lease":           operationLease,
		"operation claimed by one":  operationClaimedByOne,
		"cancel or irreversible":    cancelOrIrreversible,
		"operation reopened":        operationReopened,
		"operation log":             operationLog,
		"operation log raced":       operationLogRaced,
		"reopened or superseded":    reopenedOrSuperseded,
		"operations listed by page": operationsListed,
		"operation of a request":    operationOfRequest,
		"awaiting approval":         awaitingApproval,
		"API token":                 apiToken,
		"audit log":                 auditLog,
		"audit log raced":           auditLogRaced,
	} {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

var (
	ctx = context.Background()
	t0  = time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC)
)

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func ok(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func code(t *testing.T, err error, want switchback.Code) {
	t.Helper()
	var e *switchback.Error
	if !errors.As(err, &e) || e.Code != want {
		t.Fatalf("error is %v (%s), want code %s", err, switchback.CodeOf(err), want)
	}
}

func same(t *testing.T, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("(-want +got):\n%s", diff)
	}
}

func settings(t *testing.T, s *store.Store) {
	_, err := s.Setting(ctx, "installation")
	code(t, err, switchback.CodeNotFound)
	same(t, must(s.EnsureSetting(ctx, "installation", "one"))(t), "one")
	same(t, must(s.EnsureSetting(ctx, "installation", "two"))(t), "one")
	ok(t, s.SetSetting(ctx, "installation", "three"))
	same(t, must(s.Setting(ctx, "installation"))(t), "three")
	ok(t, s.SwapSetting(ctx, "installation", "three", "four"))
	code(t, s.SwapSetting(ctx, "installation", "three", "five"), switchback.CodeConflict)
	code(t, s.SwapSetting(ctx, "none", "", "one"), switchback.CodeConflict)
	same(t, must(s.Setting(ctx, "installation"))(t), "four")
	ok(t, s.SetSetting(ctx, "list/one", "1"))
	ok(t, s.SetSetting(ctx, "list/two%", "2"))
	ok(t, s.SetSetting(ctx, "lists", "3"))
	same(t, must(s.SettingsUnder(ctx, "list/"))(t), map[string]string{"one": "1", "two%": "2"})
	ok(t, s.DeleteSetting(ctx, "list/one"))
	ok(t, s.DeleteSetting(ctx, "list/one"))
	same(t, must(s.SettingsUnder(ctx, "list/"))(t), map[string]string{"two%": "2"})
}

func sitesAndAgents(t *testing.T, s *store.Store) {
	a := store.Agent{ID: "a-1", Site: "east", Address: "10.0.0.1:7443", Version: "1.0", CertificateSerial: "01", JoinedAt: t0}
	code(t, s.SaveAgent(ctx, a), switchback.CodeNotFound) // no such site
	east := store.Site{ID: "east", Name: "East", CreatedAt: t0}
	ok(t, s.CreateSite(ctx, east))
	ok(t, s.CreateSite(ctx, store.Site{ID: "west", CreatedAt: t0}))
	code(t, s.CreateSite(ctx, east), switchback.CodeConflict)
	same(t, must(s.Site(ctx, "east"))(t), east)
	same(t, len(must(s.Sites(ctx))(t)), 2)

	ok(t, s.SaveAgent(ctx, a))
	same(t, must(s.Agent(ctx, "a-1"))(t), a)
	a.Address, a.Version, a.LastSeen, a.Status = "10.0.0.9:7443", "1.1", t0.Add(time.Minute), json.RawMessage(`{"healthy":true}`)
	ok(t, s.TouchAgent(ctx, a.ID, a.Address, a.Version, a.LastSeen, a.Status))
	same(t, must(s.Agents(ctx, "east"))(t), []store.Agent{a})
	same(t, must(s.Agents(ctx, "west"))(t), []store.Agent{})
	a.CertificateSerial, a.CertificateExpires = "02", t0.Add(24*time.Hour)
	ok(t, s.SaveAgent(ctx, a))
	same(t, must(s.Agent(ctx, "a-1"))(t), a)

	moved := a
	moved.Site = "west"
	code(t, s.SaveAgent(ctx, moved), switchback.CodeConflict)
	code(t, s.TouchAgent(ctx, "a-2", "", "", t0, nil), switchback.CodeNotFound)
	code(t, s.DeleteSite(ctx, "east"), switchback.CodeConflict)
	ok(t, s.DeleteAgent(ctx, "a-1"))
	code(t, s.DeleteAgent(ctx, "a-1"), switchback.CodeNotFound)
	ok(t, s.CreateJoinToken(ctx, store.JoinToken{Hash: "h", Site: "east", CreatedAt: t0, ExpiresAt: t0.Add(time.Hour)}))
	ok(t, s.DeleteSite(ctx, "east"))
	code(t, s.DeleteSite(ctx, "east"), switchback.CodeNotFound)
	_, err := s.Site(ctx, "east")
	code(t, err, switchback.CodeNotFound)
}

func joinToken(t *testing.T, s *store.Store) {
	code(t, s.CreateJoinToken(ctx, store.JoinToken{Hash: "x", Site: "east"}), switchback.CodeNotFound)
	ok(t, s.CreateSite(ctx, store.Site{ID: "east", CreatedAt: t0}))
	token := store.JoinToken{Hash: "aa", Site: "east", CreatedAt: t0, ExpiresAt: t0.Add(time.Hour)}
	ok(t, s.CreateJoinToken(ctx, token))

	_, err := s.RedeemJoinToken(ctx, "bb", "a-1", t0)
	code(t, err, switchback.CodeUnauthorized)
	_, err = s.RedeemJoinToken(ctx, "aa", "a-1", t0.Add(time.Hour))
	code(t, err, switchback.CodeUnauthorized) // expired, and not used up by that
	token.UsedAt, token.UsedBy = t0.Add(time.Minute), "a-1"
	same(t, must(s.RedeemJoinToken(ctx, "aa", "a-1", t0.Add(time.Minute)))(t), token)
	same(t, must(s.RedeemJoinToken(ctx, "aa", "a-1", t0.Add(2*time.Minute)))(t), token) // the same agent again
	_, err = s.RedeemJoinToken(ctx, "aa", "a-2", t0.Add(2*time.Minute))
	code(t, err, switchback.CodeUnauthorized)
}

func joinTokenRaced(t *testing.T, s *store.Store) {
	ok(t, s.CreateSite(ctx, store.Site{ID: "east", CreatedAt: t0}))
	ok(t, s.CreateJoinToken(ctx, store.JoinToken{Hash: "aa", Site: "east", CreatedAt: t0, ExpiresAt: t0.Add(time.Hour)}))
	var winners atomic.Int32
	race(8, func(i int) {
		if _, err := s.RedeemJoinToken(ctx, "aa", switchback.AgentID(fmt.Sprint("a-", i)), t0); err == nil {
			winners.Add(1)
		} else if switchback.CodeOf(err) != switchback.CodeUnauthorized {
			t.Error(err)
		}
	})
	same(t, winners.Load(), int32(1))
}

func race(n int, fn func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { fn(i) })
	}
	wg.Wait()
}

func protection(t *testing.T, s *store.Store) {
	p := switchback.Protection{
		ID: "p-1", VM: "vm-1", Name: "db", Home: "east", Source: "east", Target: "west", Phase: switchback.PhaseSeeding, Epoch: 1,
		Policy: switchback.DefaultPolicy(), Disks: []switchback.Disk{{Name: "vda", SizeBytes: 1 << 30}}, CreatedAt: t0,
	}
	p1 := must(s.CreateProtection(ctx, p))(t)
	p.Version = 1
	same(t, p1, p)
	same(t, must(s.Protection(ctx, "p-1"))(t), p)
	same(t, must(s.ProtectionOfVM(ctx, "vm-1"))(t), p)

	_, err := s.CreateProtection(ctx, p)
	code(t, err, switchback.CodeConflict) // the ID
	second := p
	second.ID = "p-2"
	_, err = s.CreateProtection(ctx, second)
	code(t, err, switchback.CodeConflict) // the VM

	p.Phase = switchback.PhaseProtected
	p2 := must(s.UpdateProtection(ctx, p))(t)
	same(t, p2.Version, int64(2))
	same(t, must(s.Protection(ctx, "p-1"))(t), p2)
	_, err = s.UpdateProtection(ctx, p) // version 1 again
	code(t, err, switchback.CodeConflict)
	_, err = s.UpdateProtection(ctx, second)
	code(t, err, switchback.CodeNotFound)

	p2.Phase = switchback.PhaseUnprotected
	p3 := must(s.UpdateProtection(ctx, p2))(t)
	_, err = s.ProtectionOfVM(ctx, "vm-1")
	code(t, err, switchback.CodeNotFound)
	must(s.CreateProtection(ctx, second))(t) // the VM is free again
	p3.Phase = switchback.PhaseSeeding
	_, err = s.UpdateProtection(ctx, p3)
	code(t, err, switchback.CodeConflict) // and now it is not
	same(t, len(must(s.Protections(ctx))(t)), 2)

	code(t, s.DeleteProtection(ctx, "p-1", 1), switchback.CodeConflict)
	ok(t, s.DeleteProtection(ctx, "p-1", 3))
	code(t, s.DeleteProtection(ctx, "p-1", 3), switchback.CodeNotFound)
	_, err = s.Protection(ctx, "p-1")
	code(t, err, switchback.CodeNotFound)
}

// protectionRaced: of increments by compare-and-swap none is lost.
func protectionRaced(t *testing.T, s *store.Store) {
	must(s.CreateProtection(ctx, switchback.Protection{ID: "p-1", VM: "vm-1", Phase: switchback.PhaseProtected}))(t)
	race(4, func(int) {
		for done := 0; done < 5; {
			p, err := s.Protection(ctx, "p-1")
			if err != nil {
				t.Error(err)
				return
			}
			p.Epoch++
			_, err = s.UpdateProtection(ctx, p)
			switch switchback.CodeOf(err) {
			case "":
				done++
			case switchback.CodeConflict:
			default:
				t.Error(err)
				return
			}
		}
	})
	same(t, must(s.Protection(ctx, "p-1"))(t).Epoch, switchback.Epoch(20))
}

func record(id switchback.OperationID, p switchback.ProtectionID) operation.Record {
	return operation.Record{
		ID: id, Kind: "failover", Protection: p, Title: "fail over db", Params: json.RawMessage(`{"point":7}`), RequestedBy: "ann",
		State: operation.StateQueued, CreatedAt: t0,
		Steps: []operation.StepRecord{{Name: "one", Title: "One", State: operation.StepPending}},
	}
}

func operationRoundTrip(t *testing.T, s *store.Store) {
	rec := record("op-1", "p-1")
	ok(t, s.CreateOperation(ctx, rec))
	code(t, s.CreateOperation(ctx, record("op-1", "")), switchback.CodeConflict)
	same(t, must(s.Operation(ctx, "op-1"))(t), rec)
	_, err := s.Operation(ctx, "op-9")
	code(t, err, switchback.CodeNotFound)

	rec = must(s.ClaimOperation(ctx, "op-1", "srv", t0, t0.Add(time.Minute)))(t)
	rec.State, rec.StartedAt = operation.StateRunning, t0
	rec.Steps[0] = operation.StepRecord{
		Name: "one", Title: "One", State: operation.StepFailed, StartedAt: t0, EndedAt: t0.Add(time.Second), Attempts: 2,
		Result:   json.RawMessage(`{"epoch":3}`),
		Error:    &switchback.Error{Code: switchback.CodeTimeout, Message: "no answer", Hint: "wait"},
		Progress: &operation.Progress{Percent: 50, DoneBytes: 1, TotalBytes: 2, ETA: time.Second},
	}
	must(s.SaveOperation(ctx, rec))(t)
	same(t, must(s.Operation(ctx, "op-1"))(t), rec)
}

func operationPerProtection(t *testing.T, s *store.Store) {
	ok(t, s.CreateOperation(ctx, record("op-1", "p-1")))
	code(t, s.CreateOperation(ctx, record("op-2", "p-1")), switchback.CodeConflict)
	ok(t, s.CreateOperation(ctx, record("op-3", "p-2")))
	ok(t, s.CreateOperation(ctx, record("op-4", "")))
	ok(t, s.CreateOperation(ctx, record("op-5", "")))
	// Lanes do not meet: neither when they begin nor when one is opened again.
	drill := record("op-6", "p-1")
	drill.Lane = "drill"
	ok(t, s.CreateOperation(ctx, drill))
	same(t, must(s.Operation(ctx, "op-6"))(t), drill)
	drill.ID = "op-7"
	err := s.CreateOperation(ctx, drill)
	code(t, err, switchback.CodeConflict)
	if !strings.Contains(err.Error(), "op-6") {
		t.Errorf("the operation in the way is op-6: %v", err)
	}
	end(t, s, "op-1", operation.StateFailed)
	ok(t, s.ReopenOperation(ctx, operation.Reopen(must(s.Operation(ctx, "op-1"))(t))))
	end(t, s, "op-1", operation.StateSucceeded)
	ok(t, s.CreateOperation(ctx, record("op-2", "p-1")))
}

func end(t *testing.T, s *store.Store, id switchback.OperationID, state operation.State) {
	t.Helper()
	rec := must(s.ClaimOperation(ctx, id, "srv", t0, t0.Add(time.Minute)))(t)
	must(s.SaveOperation(ctx, operation.End(rec, state, t0)))(t)
}

func operationLease(t *testing.T, s *store.Store) {
	ok(t, s.CreateOperation(ctx, record("op-1", "p-1")))
	claimable := func(owner string, now time.Time) int {
		return len(must(s.ClaimableOperations(ctx, owner, now))(t))
	}
	same(t, claimable("a", t0), 1)
	a := must(s.ClaimOperation(ctx, "op-1", "a", t0, t0.Add(10*time.Second)))(t)
	same(t, a.Lease, operation.Lease{Owner: "a", Epoch: 1, Until: t0.Add(10 * time.Second)})

	// Another owner waits for the expiry; the same owner need not.
	same(t, claimable("b", t0.Add(10*time.Second)), 0)
	_, err := s.ClaimOperation(ctx, "op-1", "b", t0.Add(10*time.Second), t0.Add(20*time.Second))
	code(t, err, switchback.CodeConflict)
	same(t, claimable("a", t0.Add(time.Second)), 1)
	a2 := must(s.ClaimOperation(ctx, "op-1", "a", t0.Add(time.Second), t0.Add(11*time.Second)))(t)
	same(t, a2.Lease.Epoch, int64(2))
	_, err = s.SaveOperation(ctx, a) // the process that was a
	code(t, err, switchback.CodeConflict)

	// A save prolongs the lease.
	a2.Lease.Until = t0.Add(30 * time.Second)
	must(s.SaveOperation(ctx, a2))(t)
	same(t, claimable("b", t0.Add(20*time.Second)), 0)
	b := must(s.ClaimOperation(ctx, "op-1", "b", t0.Add(31*time.Second), t0.Add(40*time.Second)))(t)
	same(t, b.Lease.Epoch, int64(3))
	_, err = s.SaveOperation(ctx, a2)
	code(t, err, switchback.CodeConflict)

	// What has ended stays so.
	must(s.SaveOperation(ctx, operation.End(b, operation.StateSucceeded, t0)))(t)
	_, err = s.SaveOperation(ctx, b)
	code(t, err, switchback.CodeConflict)
	same(t, claimable("b", t0.Add(time.Hour)), 0)
	_, err = s.ClaimOperation(ctx, "op-1", "b", t0.Add(time.Hour), t0.Add(2*time.Hour))
	code(t, err, switchback.CodeConflict)
	_, err = s.ClaimOperation(ctx, "op-9", "b", t0, t0)
	code(t, err, switchback.CodeNotFound)
}

func operationClaimedByOne(t *testing.T, s *store.Store) {
	ok(t, s.CreateOperation(ctx, record("op-1", "p-1")))
	var winners atomic.Int32
	race(8, func(i int) {
		_, err := s.ClaimOperation(ctx, "op-1", fmt.Sprint("server-", i), t0, t0.Add(time.Minute))
		if err == nil {
			winners.Add(1)
		} else if switchback.CodeOf(err) != switchback.CodeConflict {
			t.Error(err)
		}
	})
	same(t, winners.Load(), int32(1))
}

func cancelOrIrreversible(t *testing.T, s *store.Store) {
	code(t, s.RequestCancel(ctx, "op-9"), switchback.CodeNotFound)

	ok(t, s.CreateOperation(ctx, record("op-1", "")))
	first := must(s.ClaimOperation(ctx, "op-1", "srv", t0, t0.Add(time.Minute)))(t)
	first.State = operation.StateRunning
	same(t, must(s.SaveOperation(ctx, first))(t), false)
	ok(t, s.RequestCancel(ctx, "op-1"))
	ok(t, s.RequestCancel(ctx, "op-1"))
	same(t, must(s.SaveOperation(ctx, first))(t), true) // learns of it, does not undo it
	same(t, must(s.Operation(ctx, "op-1"))(t).CancelRequested, true)
	irreversible := first.Clone()
	irreversible.Irreversible = true
	irreversible.Steps[0].State = operation.StepRunning
	_, err := s.SaveOperation(ctx, irreversible)
	code(t, err, switchback.CodeCancelled)
	same(t, must(s.Operation(ctx, "op-1"))(t).Steps[0].State, operation.StepPending)

	ok(t, s.CreateOperation(ctx, record("op-2", "")))
	second := must(s.ClaimOperation(ctx, "op-2", "srv", t0, t0.Add(time.Minute)))(t)
	second.State, second.Irreversible = operation.StateRunning, true
	must(s.SaveOperation(ctx, second))(t)
	code(t, s.RequestCancel(ctx, "op-2"), switchback.CodeRefused)
	must(s.SaveOperation(ctx, operation.End(second, operation.StateSucceeded, t0)))(t)
	code(t, s.RequestCancel(ctx, "op-2"), switchback.CodeRefused)
}

func operationReopened(t *testing.T, s *store.Store) {
	ok(t, s.CreateOperation(ctx, record("op-1", "p-1")))
	rec := must(s.Operation(ctx, "op-1"))(t)
	code(t, s.ReopenOperation(ctx, rec), switchback.CodeConflict) // not failed
	end(t, s, "op-1", operation.StateFailed)
	rec = must(s.Operation(ctx, "op-1"))(t)
	ok(t, s.ReopenOperation(ctx, operation.Reopen(rec)))
	rec = must(s.ClaimOperation(ctx, "op-1", "other", t0, t0.Add(time.Minute)))(t) // no lease stands in the way
	same(t, rec.Lease.Epoch, int64(2))
	must(s.SaveOperation(ctx, operation.End(rec, operation.StateFailed, t0)))(t)

	ok(t, s.CreateOperation(ctx, record("op-2", "p-1")))
	code(t, s.ReopenOperation(ctx, operation.Reopen(rec)), switchback.CodeConflict) // at work
	end(t, s, "op-2", operation.StateSucceeded)
	code(t, s.ReopenOperation(ctx, operation.Reopen(rec)), switchback.CodeConflict) // superseded
}

func operationLog(t *testing.T, s *store.Store) {
	line := operation.LogLine{Time: t0, Level: "INFO", Step: "one", Message: "hello", Attrs: map[string]string{"bytes": "7"}}
	code(t, s.AppendOperationLog(ctx, "op-9", line), switchback.CodeNotFound)
	ok(t, s.CreateOperation(ctx, record("op-1", "")))
	ok(t, s.CreateOperation(ctx, record("op-2", "")))
	for _, id := range []switchback.OperationID{"op-1", "op-2", "op-1"} {
		ok(t, s.AppendOperationLog(ctx, id, line))
	}
	one, two := line, line
	one.Sequence, two.Sequence = 1, 2
	same(t, must(s.OperationLog(ctx, "op-1", 0))(t), []operation.LogLine{one, two})
	same(t, must(s.OperationLog(ctx, "op-1", 1))(t), []operation.LogLine{two})
	same(t, must(s.OperationLog(ctx, "op-2", 0))(t), []operation.LogLine{one})
}

// operationLogRaced: of lines written at once none is lost, and none has another's sequence.
func operationLogRaced(t *testing.T, s *store.Store) {
	ok(t, s.CreateOperation(ctx, record("op-1", "")))
	race(4, func(i int) {
		for range 10 {
			if err := s.AppendOperationLog(ctx, "op-1", operation.LogLine{Time: t0, Message: fmt.Sprint(i)}); err != nil {
				t.Error(err)
			}
		}
	})
	lines := must(s.OperationLog(ctx, "op-1", 0))(t)
	same(t, len(lines), 40)
	for i, line := range lines {
		same(t, line.Sequence, int64(i+1))
	}
}

// reopenedOrSuperseded: a failed operation is not retried beside a newer one of
// its VM, also when that one comes and ends at the same moment.
func reopenedOrSuperseded(t *testing.T, s *store.Store) {
	for i := range 12 {
		p := switchback.ProtectionID(fmt.Sprint("p-", i))
		old, newer := switchback.OperationID(fmt.Sprintf("op-%02d-a", i)), switchback.OperationID(fmt.Sprintf("op-%02d-b", i))
		ok(t, s.CreateOperation(ctx, record(old, p)))
		end(t, s, old, operation.StateFailed)
		rec := must(s.Operation(ctx, old))(t)
		var reopened, created error
		race(2, func(which int) {
			if which == 0 {
				reopened = s.ReopenOperation(ctx, operation.Reopen(rec))
				return
			}
			if created = s.CreateOperation(ctx, record(newer, p)); created == nil {
				rec, err := s.ClaimOperation(ctx, newer, "srv", t0, t0.Add(time.Minute))
				if err == nil {
					_, err = s.SaveOperation(ctx, operation.End(rec, operation.StateSucceeded, t0))
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
		for _, err := range []error{reopened, created} {
			if err != nil {
				code(t, err, switchback.CodeConflict)
			}
		}
		if (reopened == nil) == (created == nil) {
			t.Fatalf("reopened: %v, superseded: %v", reopened, created)
		}
	}
}

func operationsListed(t *testing.T, s *store.Store) {
	for i := range 5 {
		rec := record(switchback.OperationID(fmt.Sprint("op-", i)), "")
		if i == 2 {
			rec.Kind, rec.Protection = "commit", "p-1"
		}
		ok(t, s.CreateOperation(ctx, rec))
	}
	end(t, s, "op-4", operation.StateSucceeded)
	for _, c := range []struct {
		filter operation.Filter
		want   []switchback.OperationID
	}{
		{operation.Filter{}, []switchback.OperationID{"op-4", "op-3", "op-2", "op-1", "op-0"}},
		{operation.Filter{Limit: 2}, []switchback.OperationID{"op-4", "op-3"}},
		{operation.Filter{Limit: 2, Before: "op-3"}, []switchback.OperationID{"op-2", "op-1"}},
		{operation.Filter{Unfinished: true, Limit: 1}, []switchback.OperationID{"op-3"}},
		{operation.Filter{Kind: "commit"}, []switchback.OperationID{"op-2"}},
		{operation.Filter{Protection: "p-1"}, []switchback.OperationID{"op-2"}},
		{operation.Filter{Protection: "p-7"}, nil},
	} {
		var got []switchback.OperationID
		for _, rec := range must(s.Operations(ctx, c.filter))(t) {
			got = append(got, rec.ID)
		}
		same(t, got, c.want)
	}
}

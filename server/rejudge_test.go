package server

import (
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

var another = caller{Principal: api.Principal{Name: "ada", Role: switchback.Administrator}}

// contest lets web start by hand at riga, or takes that back.
func (f *fleet) contest(is bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.agents["riga"].override = nil
	if is {
		f.agents["riga"].override = &agentapi.Override{Reason: "a fire", By: "olga", At: time.Now()}
	}
}

// TestApprovalJudgesAgain: what was possible when it was asked for may not be any more.
func TestApprovalJudgesAgain(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	f.run(recovery.Protect, api.OperationRequest{})
	f.approvals(time.Hour, "failover")
	id := f.begin(recovery.Failover, api.OperationRequest{})
	phase := func(x switchback.Phase) {
		if _, err := f.s.update(ctx, f.web().ID, func(p *switchback.Protection) error { p.Phase = x; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	f.contest(true)
	_, err := f.s.approve(ctx, another, id, "")
	wantCode(t, "contested", err, switchback.CodeRefused, "contested")
	f.contest(false)
	phase(switchback.PhaseCommitted)
	_, err = f.s.approve(ctx, another, id, "")
	wantCode(t, "committed", err, switchback.CodeRefused, "committed")
	phase(switchback.PhaseProtected)
	if _, err = f.s.approve(ctx, another, id, ""); err != nil {
		t.Fatal(err)
	}
	if rec := f.wait(id); rec.State != operation.StateSucceeded {
		t.Errorf("it is %s: %v", rec.State, rec.Error)
	}
}

// TestApprovalAfterFailure: a cancel that a failed change of the point allows can be approved.
func TestApprovalAfterFailure(t *testing.T) {
	f := switched(t, switchback.CommitPolicy{})
	asked := 0
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionChangePoint {
			if asked++; asked > 1 { // the first is the check
				return switchback.Errorf(switchback.CodeInternal, "no")
			}
		}
		return nil
	})
	if rec := f.wait(f.begin(recovery.ChangePoint, api.OperationRequest{Point: "2"})); rec.State != operation.StateFailed || f.web().Phase != switchback.PhaseSwitching {
		t.Fatalf("%s, web is %s", rec.State, f.web().Phase)
	}
	f.approvals(time.Hour, "cancel")
	id := f.begin(recovery.Cancel, api.OperationRequest{})
	if _, err := f.s.approve(t.Context(), another, id, ""); err != nil {
		t.Fatal(err)
	}
	if rec := f.wait(id); rec.State != operation.StateSucceeded {
		t.Errorf("it is %s: %v", rec.State, rec.Error)
	}
}

// TestRetryWhileContested: nothing that moves the VM goes on before a winner is named.
func TestRetryWhileContested(t *testing.T) {
	f, id, _ := restoredInSwitch(t)
	f.contest(true)
	wantCode(t, "by the operation", f.s.retryOperation(t.Context(), id), switchback.CodeRefused, "contested")
	_, err := f.ask(recovery.Retry, api.OperationRequest{})
	wantCode(t, "by the VM", err, switchback.CodeRefused, "contested")
	f.contest(false)
	if err := f.s.cancelOperation(t.Context(), id); err != nil {
		t.Error(err)
	}
	f.wait(id)
}

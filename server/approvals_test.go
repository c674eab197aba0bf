package server

import (
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// TestSecondApprover: a failover waits for another person with the role; nothing
// happens at any site before, also over a restart of the server.
func TestSecondApprover(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	f.run(recovery.Protect, api.OperationRequest{})
	address := f.listen()
	admin := f.admin(address)
	otto, _ := f.token(address, "otto", switchback.Operator, switchback.Scope{})
	again, _ := f.token(address, "otto", switchback.Administrator, switchback.Scope{}) // the same person
	olga, _ := f.token(address, "olga", switchback.Operator, switchback.Scope{})
	vera, _ := f.token(address, "vera", switchback.Viewer, switchback.Scope{})
	ada, _ := f.token(address, "ada", switchback.Administrator, switchback.Scope{})
	policy := api.ApprovalPolicy{Operations: []string{"failover", "commit", "delete-point"}, Role: switchback.Administrator, ValidFor: time.Hour}
	_, err := olga.SetApprovalPolicy(ctx, policy)
	wantCode(t, "the policy by an operator", err, switchback.CodeUnauthorized)
	if _, err := admin.SetApprovalPolicy(ctx, policy); err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]api.ApprovalPolicy{
		"kind": {Operations: []string{"dance"}, Role: "operator", ValidFor: time.Hour},
		"role": {Role: "viewer", ValidFor: time.Hour}, "time": {Role: "operator"},
	} {
		if bad.Operations == nil {
			bad.Operations = []string{}
		}
		_, err := admin.SetApprovalPolicy(ctx, bad)
		wantCode(t, name, err, switchback.CodeInvalid)
	}

	f.report()
	f.took()
	a, err := otto.Request(ctx, "web", recovery.Failover, api.OperationRequest{})
	if err != nil {
		t.Fatal(err)
	}
	id := a.Operation.ID
	if a.Operation.State != operation.StateAwaiting {
		t.Fatalf("it is %s", a.Operation.State)
	}
	v, err := otto.VM(ctx, "web")
	if err != nil || v.Current == nil || v.Current.ID != id || len(v.Conditions) == 0 || v.Health != "normal" {
		t.Errorf("%+v, %v", v.Conditions, err)
	}
	_, err = olga.Request(ctx, "web", recovery.TakePoint, api.OperationRequest{})
	wantCode(t, "another operation meanwhile", err, switchback.CodeRefused, string(id))
	for _, x := range []struct {
		who  string
		c    *api.Client
		says string
	}{{"the same person", otto, "somebody else"}, {"the same person by another token", again, "somebody else"}, {"a viewer", vera, "takes the role operator"}, {"an operator", olga, "takes the role administrator"}} {
		_, err := x.c.ApproveOperation(ctx, id, "")
		wantCode(t, x.who, err, switchback.CodeUnauthorized, x.says)
	}
	f.close()
	f.open()
	address = f.listen()
	if f.at().Phase != switchback.PhaseProtected || f.running() != "berlin" || strings.Contains(f.took(), "shutdown") {
		t.Error("something happened before it was approved")
	}
	// The policy's answer counts that stood when it was asked for.
	rec, err := f.s.approve(ctx, caller{Principal: api.Principal{Name: "ada", Role: switchback.Administrator}}, id, "seen")
	if err != nil || rec.Approval.By != "ada" {
		t.Fatalf("%+v, %v", rec.Approval, err)
	}
	if rec = f.wait(id); rec.State != operation.StateSucceeded || rec.RequestedBy != "otto" || rec.Approval.Note != "seen" || f.running() != "riga" {
		t.Errorf("%s, web runs at %q", rec.State, f.running())
	}

	// Breaking the glass: at once, with a reason, noted.
	f.report()
	c := f.admin(address)
	c.BreakGlass = "berlin burns"
	a, err = c.Request(ctx, "web", recovery.Commit, api.OperationRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if rec := f.wait(a.Operation.ID); rec.State != operation.StateSucceeded || rec.Approval == nil || rec.Approval.BreakGlass != "berlin burns" || rec.Approval.By != "" {
		t.Errorf("%s %+v", rec.State, rec.Approval)
	}
	entries, err := c.Audit(ctx, api.AuditFilter{Action: "break-glass"})
	if err != nil || len(entries) != 1 || entries[0].Who != "admin" || entries[0].Detail != "berlin burns" {
		t.Errorf("%+v, %v", entries, err)
	}
	_ = ada
}

// TestApprovalRefused: cancelled by somebody, it leaves the VM as it was.
func TestApprovalRefused(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	f.run(recovery.Protect, api.OperationRequest{})
	if _, err := f.s.setApprovalPolicy(ctx, api.ApprovalPolicy{Operations: []string{"commit", "failover"}, Role: switchback.Operator, ValidFor: time.Hour}); err != nil {
		t.Fatal(err)
	}
	id := f.begin(recovery.Failover, api.OperationRequest{})
	f.took()
	if err := f.s.runner.Cancel(ctx, id); err != nil {
		t.Fatal(err)
	}
	if rec := f.wait(id); rec.State != operation.StateCancelled {
		t.Errorf("it is %s", rec.State)
	}
	f.want("cancelled", at{switchback.PhaseProtected, "berlin", "riga", 1, false, ""}, "")
	// A failback that commits takes the approval of the commit; a dry run takes none.
	rec := operation.Record{Kind: "failback", Params: []byte(`{"and_commit":true}`)}
	if a, err := f.s.approval(ctx, rec); err != nil || a == nil {
		t.Errorf("%+v, %v", a, err)
	}
	rec.Params = []byte(`{}`)
	if a, err := f.s.approval(ctx, rec); err != nil || a != nil {
		t.Errorf("%+v, %v", a, err)
	}
	if a, err := f.ask(recovery.Failover, api.OperationRequest{DryRun: true}); err != nil || a.Plan == nil {
		t.Errorf("%+v, %v", a, err)
	}
}

package server

import (
	"context"
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
)

// approvals has kinds take an approval, for so long.
func (f *fleet) approvals(validFor time.Duration, kinds ...string) {
	f.t.Helper()
	text, err := json.Marshal(api.ApprovalPolicy{Operations: kinds, Role: switchback.Operator, ValidFor: validFor})
	if err == nil {
		err = f.s.store.SetSetting(context.Background(), settingApprovals, string(text))
	}
	if err != nil {
		f.t.Fatal(err)
	}
}

// TestPolicyNotApproved: where nobody approves what the commit policy asks for in
// time that is shown, and it asks again; likewise after a restore.
func TestPolicyNotApproved(t *testing.T) {
	ctx := t.Context()
	ask := func(f *fleet, validFor time.Duration) operation.Record {
		t.Helper()
		f.approvals(validFor, "commit")
		f.report()
		if err := f.s.beginDue(ctx, time.Now().Add(2*time.Hour), map[switchback.ProtectionID]time.Time{}); err != nil {
			t.Fatal(err)
		}
		list, err := f.s.store.Operations(ctx, operation.Filter{State: operation.StateAwaiting})
		if err != nil || len(list) != 1 || list[0].RequestedBy != policyName || !f.web().Switch.Deadline.IsZero() {
			t.Fatalf("%+v, %v", list, err)
		}
		return list[0]
	}
	shown := func(f *fleet, id switchback.OperationID, why string) {
		t.Helper()
		if rec := f.wait(id); rec.State != operation.StateCancelled {
			t.Errorf("it is %s", rec.State)
		}
		p := f.web()
		if p.Operation != "" || p.Switch.Deadline.IsZero() || !due(p, time.Now()) || !strings.Contains(p.Switch.Overdue, why) {
			t.Errorf("operation %q, %+v", p.Operation, p.Switch)
		}
	}
	f := switched(t, switchback.CommitPolicy{Action: switchback.CommitCommit, After: time.Hour})
	first := ask(f, time.Millisecond)
	time.Sleep(5 * time.Millisecond)
	if _, err := f.s.runner.Expire(ctx); err != nil {
		t.Fatal(err)
	}
	shown(f, first.ID, "nobody approved it")

	second := ask(f, time.Hour)
	file := filepath.Join(memoryDir(t), "backup")
	if _, err := WriteBackup(ctx, f.dir, file, "v1"); err != nil {
		t.Fatal(err)
	}
	f.close()
	f.dir = filepath.Join(memoryDir(t), "new")
	b, err := Restore(ctx, file, f.dir)
	if err != nil || len(b.Suspended) != 0 {
		t.Fatalf("%v, %v", b.Suspended, err)
	}
	f.open()
	shown(f, second.ID, "restored")

	// A person who cancels it has decided.
	third := ask(f, time.Hour)
	if err := f.s.cancelOperation(ctx, third.ID); err != nil {
		t.Fatal(err)
	}
	if rec := f.wait(third.ID); rec.State != operation.StateCancelled || !f.web().Switch.Deadline.IsZero() {
		t.Errorf("%s, %+v", rec.State, f.web().Switch)
	}
}

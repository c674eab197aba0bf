package server

import (
	"path/filepath"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// restoredInSwitch makes web's switch outlive a backup that was made in the middle of it.
func restoredInSwitch(t *testing.T) (f *fleet, id switchback.OperationID, now switchback.Protection) {
	t.Helper()
	f = newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	file := filepath.Join(memoryDir(t), "backup")
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionShutdown {
			if _, err := WriteBackup(t.Context(), f.dir, file, "v1"); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	id = f.run(recovery.Failover, api.OperationRequest{}).ID
	now = f.web()
	f.close()
	f.dir = filepath.Join(memoryDir(t), "new")
	if _, err := Restore(t.Context(), file, f.dir); err != nil {
		t.Fatal(err)
	}
	f.open()
	return f, id, now
}

// TestSuperseded: an operation that failed with a restore cannot undo what the
// agents have since said has happened.
func TestSuperseded(t *testing.T) {
	f, id, now := restoredInSwitch(t)
	ctx := t.Context()
	f.took()
	if rec := f.wait(id); rec.State != operation.StateFailed {
		t.Fatalf("it is %s", rec.State)
	}
	now.Operation = ""
	vm := api.AdoptedVM{ID: now.ID, Name: now.Name, Outcome: api.VMLearned, Adopted: recovery.Adopted{Protection: now}}
	if err := f.s.take(ctx, "test", &vm); err != nil {
		t.Fatal(err)
	}
	rec := f.wait(id)
	if rec.State != operation.StateCancelled || rec.Error == nil || rec.Error.Code != switchback.CodeConflict {
		t.Errorf("it is %s: %v", rec.State, rec.Error)
	}
	wantCode(t, "retry", f.s.retryOperation(ctx, id), switchback.CodeConflict, "superseded")
	wantCode(t, "cancel", f.s.cancelOperation(ctx, id), switchback.CodeConflict, "superseded")
	if p := f.web(); p.Phase != switchback.PhaseSwitched || p.Source != "riga" || f.running() != "riga" || f.took() != "" {
		t.Errorf("%s at %s, runs at %s", p.Phase, p.Source, f.running())
	}
}

// TestSupersededOtherwise: also one that nobody has ended is refused once the VM
// is not its any more; one that is, goes on.
func TestSupersededOtherwise(t *testing.T) {
	f, id, _ := restoredInSwitch(t)
	ctx := t.Context()
	link := func(to switchback.OperationID) {
		if _, err := f.s.update(ctx, f.web().ID, func(p *switchback.Protection) error { p.Operation = to; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	link("")
	f.took()
	wantCode(t, "retry", f.s.retryOperation(ctx, id), switchback.CodeConflict, "superseded")
	wantCode(t, "cancel", f.s.cancelOperation(ctx, id), switchback.CodeConflict, "superseded")
	if did := f.took(); did != "" {
		t.Errorf("it did %s", did)
	}
	link(id)
	if err := f.s.cancelOperation(ctx, id); err != nil {
		t.Error(err)
	}
	f.wait(id)
}

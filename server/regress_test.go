package server

import (
	"sync/atomic"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
)

// Once a defect (stop-cancels): a server that is stopped in order cancels what its agents are doing.
func TestOnceStopCancels(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	reached, goOn := make(chan struct{}), make(chan struct{})
	var once atomic.Bool
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionShutdown && !once.Swap(true) {
			close(reached)
			<-goOn
		}
		return nil
	})
	id := f.begin(recovery.Failover, api.OperationRequest{})
	<-reached
	f.close()
	close(goOn)
	f.open()
	f.wait(id)
	if len(f.deleted) > 0 {
		t.Errorf("cancelled at the agents: %v", f.deleted)
	}
}

// Once a defect (preflight-leaves): a protect that fails in its first step leaves a protection.
func TestOnceProtectPreflightLeaves(t *testing.T) {
	f := newFleet(t)
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionDescribe {
			return switchback.Errorf(switchback.CodeInternal, "fails")
		}
		return nil
	})
	rec := f.wait(f.begin(recovery.Protect, api.OperationRequest{}))
	f.setHook(func(switchback.SiteID, string) error { return nil })
	if _, err := f.ask(recovery.Protect, api.OperationRequest{To: "riga"}); err != nil {
		t.Errorf("after a protect that ended %s: %v", rec.State, err)
	}
}

// Once a defect (dry-point): a dry run takes a point that the run itself refuses.
func TestOnceDryRunPoint(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	if _, err := f.ask(recovery.Failover, api.OperationRequest{Point: "99", DryRun: true}); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("error %v", err)
	}
}

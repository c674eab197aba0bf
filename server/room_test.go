package server

import (
	"context"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
)

// TestFirstCopiesInOrder: who has passed is ahead, and who has waited longer.
func TestFirstCopiesInOrder(t *testing.T) {
	ctx := context.Background()
	f := newFleet(t)
	f.stop() // nobody works on these operations
	f.stop = func() {}
	for _, x := range []struct {
		id     string
		target switchback.AgentID
		state  operation.StepState
		kind   string
	}{{"1", "a-riga", operation.StepDone, "protect"}, {"2", "a-riga", operation.StepWaiting, "protect"}, {"3", "a-oslo", operation.StepWaiting, "protect"},
		{"4", "a-riga", operation.StepDone, "protect"}, {"5", "a-riga", operation.StepWaiting, "protect"}, {"6", "a-riga", operation.StepDone, "edit"}} {
		p := switchback.Protection{ID: switchback.ProtectionID("p-" + x.id), VM: switchback.VMUUID(x.id), SourceAgent: "a-berlin", TargetAgent: x.target, Phase: switchback.PhaseUnprotected}
		if _, err := f.s.store.CreateProtection(ctx, p); err != nil {
			t.Fatal(err)
		}
		rec := operation.Record{ID: switchback.OperationID("op-" + x.id), Kind: x.kind, Protection: p.ID, State: operation.StateRunning, Steps: []operation.StepRecord{{Name: roomStepName, State: x.state}}}
		if err := f.s.store.CreateOperation(ctx, rec); err != nil {
			t.Fatal(err)
		}
	}
	for id, want := range map[switchback.OperationID][2]int{"op-1": {1, 1}, "op-2": {2, 2}, "op-3": {3, 3}, "op-5": {4, 3}} {
		ahead, err := f.s.copiesAhead(ctx, id)
		if err != nil || ahead["a-berlin"] != want[0] || ahead["a-riga"] != want[1] {
			t.Errorf("ahead of %s: %v, %v; want %v", id, ahead, err, want)
		}
	}
}

func TestDiskRoom(t *testing.T) {
	for name, c := range map[string]struct {
		has, limit, more int
		code             switchback.Code
	}{
		"no limit": {has: 900, more: 5},
		"room":     {has: 3, limit: 5, more: 2},
		"too many": {has: 4, limit: 5, more: 2, code: switchback.CodeRefused},
	} {
		t.Run(name, func(t *testing.T) {
			a := api.Agent{ID: "a", Site: "s", Status: &agentapi.AgentStatus{Capacity: agentapi.Capacity{Disks: c.has, MaxDisks: c.limit}}}
			if err := diskRoom(a, c.more); switchback.CodeOf(err) != c.code {
				t.Errorf("got %v, want %q", err, c.code)
			}
		})
	}
}

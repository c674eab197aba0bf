package server

import (
	"encoding/json"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/store"
)

// TestLearnEnds: after a restore it ends once all agents have answered that can;
// nothing is dropped of which one could not be asked.
func TestLearnEnds(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	f.run(recovery.Protect, api.OperationRequest{})
	dead := store.Agent{ID: "a-dead", Site: "riga", Address: "127.0.0.1:1", JoinedAt: time.Now()}
	named := store.Agent{ID: "a-named", Site: "riga", Address: "127.0.0.1:1"}
	for _, a := range []store.Agent{dead, named} {
		if err := f.s.store.SaveAgent(ctx, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := markRestored(ctx, f.s.store, time.Now()); err != nil {
		t.Fatal(err)
	}
	learn := func(more bool) {
		t.Helper()
		if err := f.s.learn(ctx, true); err != nil {
			t.Fatal(err)
		}
		if restored, err := f.s.restored(ctx); err != nil || restored != more {
			t.Fatalf("it learns on: %v, %v", restored, err)
		}
	}
	link := func(target switchback.AgentID) {
		t.Helper()
		if _, err := f.s.update(ctx, f.web().ID, func(p *switchback.Protection) error { p.TargetAgent = target; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	learn(true)
	text, err := json.Marshal(agentapi.Revocation{Agent: dead.ID, Site: dead.Site, At: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	if err := f.s.store.SetSetting(ctx, settingRevoked+string(dead.ID), string(text)); err != nil {
		t.Fatal(err)
	}
	for _, target := range []switchback.AgentID{dead.ID, named.ID} {
		link(target)
		if err := markRestored(ctx, f.s.store, time.Now()); err != nil {
			t.Fatal(err)
		}
		learn(false)
		f.web() // is still there
	}
	link("a-riga")
	if err := markRestored(ctx, f.s.store, time.Now()); err != nil {
		t.Fatal(err)
	}
	learn(false)
	if _, err := f.s.find(ctx, "web"); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("unprotected since the backup: %v", err)
	}
}

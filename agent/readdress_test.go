package agent

import (
	"context"
	"os"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/transport"
)

func TestLearnPeers(t *testing.T) {
	ca, err := transport.NewCA("sb-test")
	if err != nil {
		t.Fatal(err)
	}
	own, err := ca.Issue(transport.Identity{Installation: "sb-test", Role: transport.RoleAgent, Site: "riga", ID: "a-own"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	run, err := os.MkdirTemp("", "sb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	dir := t.TempDir()
	a, err := New(Config{StateDir: dir, RunDir: run, Address: "127.0.0.1:1", Credentials: own, Hypervisor: silent{}, Executable: "none"})
	if err != nil {
		t.Fatal(err)
	}
	a.tasks = &taskTable{ctx: context.Background(), tasks: map[string]*task{}}
	for _, id := range []switchback.ProtectionID{"p-1", "p-2", "p-busy"} {
		peer := agentapi.Peer{Agent: "a-peer", Site: "berlin", Address: "old:1"}
		if id == "p-2" {
			peer.Agent = "a-other"
		}
		if err := a.ensureVM(id).change(func(x *Assignment) { x.Epoch, x.Role, x.Peer = 1, agentapi.RoleTarget, peer }); err != nil {
			t.Fatal(err)
		}
	}
	busy, err := a.vm("p-busy")
	if err != nil {
		t.Fatal(err)
	}
	busy.act.Lock()
	name := transport.AgentName("a-peer")
	learn := func() map[switchback.ProtectionID]string {
		t.Helper()
		a.learnPeers(map[switchback.AgentID]string{"a-peer": name})
		a.tasks.wg.Wait()
		list, err := loadAssignments(a.assignmentDir())
		if err != nil {
			t.Fatal(err)
		}
		on := map[switchback.ProtectionID]string{}
		for _, x := range list {
			on[x.Protection] = x.Peer.Address
		}
		return on
	}
	if on := learn(); on["p-1"] != name || on["p-2"] != "old:1" || on["p-busy"] != "old:1" {
		t.Errorf("on disk: %v", on)
	}
	busy.act.Unlock()
	if on := learn(); on["p-busy"] != name {
		t.Errorf("afterwards: %v", on)
	}
}

package simlab_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
)

// agentOf returns the ID of a site's agent.
func (b *bed) agentOf(site string) switchback.AgentID {
	b.t.Helper()
	c, err := b.Client()
	b.must(err)
	agents, err := c.Agents(b.t.Context())
	b.must(err)
	for _, a := range agents {
		if string(a.Site) == site {
			return a.ID
		}
	}
	b.t.Fatalf("no agent at %s", site)
	return ""
}

// TestRotation replaces the CA of an installation that replicates, and kills
// server and agents where it hurts. A copy of the administrator's credentials
// that was made before does not work any more afterwards.
func TestRotation(t *testing.T) {
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	old := filepath.Join(memoryDir(t), "admin")
	if out, err := exec.Command("cp", "-r", b.ConfigDir(), old).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	before, err := b.client.CA(t.Context())
	b.must(err)

	kills := []struct{ process, spec string }{
		{simlab.Server, killpoint.Spec("server", "ca-rotate", "introducing", killpoint.BeforeEffect)},
		{simlab.Server, killpoint.Spec("server", "ca-rotate", "introducing", killpoint.AfterEffect)},
		{simlab.Primary, killpoint.Spec("agent", "trust", "authorities", killpoint.AfterEffect)},
		{simlab.Server, killpoint.Spec("server", "ca-rotate", "replacing", killpoint.BeforeEffect)},
		{simlab.Server, killpoint.Spec("server", "ca-rotate", "replacing", killpoint.AfterEffect)},
		{simlab.Primary, killpoint.Spec("agent", "trust", "certificate", killpoint.BeforeEffect)},
		{simlab.Recovery, killpoint.Spec("agent", "trust", "certificate", killpoint.AfterEffect)},
		{simlab.Server, killpoint.Spec("server", "ca-rotate", "done", killpoint.BeforeEffect)},
		{simlab.Server, killpoint.Spec("server", "ca-rotate", "done", killpoint.AfterEffect)},
	}
	var hits []string
	for i, k := range kills {
		hits = append(hits, b.spec(k.process, fmt.Sprintf("k%d", i), k.spec))
	}
	// Whoever has died is started again; a rotation that was not begun is asked for again.
	b.until("the rotation ends", func() (bool, string) {
		for _, name := range []string{simlab.Server, simlab.Primary, simlab.Recovery} {
			if !b.Process(name).Alive() {
				b.must(b.Start(t.Context(), name))
			}
		}
		c, err := b.Client()
		if err != nil {
			return false, err.Error()
		}
		st, err := c.CA(t.Context())
		if err != nil {
			return false, err.Error()
		}
		if st.Signing == before.Signing && st.Rotation.Phase == transport.RotationNone {
			_, _ = b.cli("server", "ca", "rotate") // killed in the middle of it, perhaps
			return false, "not begun"
		}
		return st.Rotation.Phase == transport.RotationNone && len(st.Waiting()) == 0, fmt.Sprintf("%+v", st)
	})
	for i, hit := range hits {
		if _, err := os.Stat(hit); err != nil {
			t.Errorf("%s was not killed at %s", kills[i].process, kills[i].spec)
		}
	}
	if b.client, err = b.Client(); err != nil {
		t.Fatal(err)
	}
	after, err := b.client.CA(t.Context())
	b.must(err)
	if after.Signing == before.Signing || len(after.Agents) != 2 {
		t.Errorf("CA %+v", after)
	}
	for _, a := range after.Agents {
		if len(a.Believes) != 1 || a.Believes[0] != after.Signing || a.Issuer != after.Signing {
			t.Errorf("agent %+v", a)
		}
	}
	if out, err := exec.Command(executable, "--config", old, "vm", "list").CombinedOutput(); err == nil {
		t.Errorf("the old credentials still work: %s", out)
	}
	// Everything goes on under the new one.
	b.operate(recovery.Failover, api.OperationRequest{})
	b.cutOver(simlab.Primary, simlab.Recovery)
	b.operate(recovery.Commit, api.OperationRequest{})
	b.operate(recovery.Reprotect, api.OperationRequest{})
	b.runsAt(simlab.Recovery)
}

// TestRevocation shuts out an agent that works: server and peer refuse it.
func TestRevocation(t *testing.T) {
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	id := b.agentOf(simlab.Primary)
	if out, err := b.cli("agent", "remove", string(id)); err == nil || !strings.Contains(out, "works for vm") {
		t.Errorf("an agent with work is removed: %s", out)
	}
	out, err := b.cli("agent", "revoke", string(id))
	if err != nil {
		t.Fatal(out)
	}
	began := time.Now()
	refused := func(process string) bool {
		text, err := os.ReadFile(filepath.Join(b.LogDir(), process+".log"))
		b.must(err)
		return strings.Contains(string(text), "agent "+string(id)+" of site primary was revoked")
	}
	b.until("the server refuses its reports", func() (bool, string) { return refused(simlab.Primary), "" })
	b.until("the peer hears of it", func() (bool, string) {
		text, err := os.ReadFile(filepath.Join(b.StateDir(simlab.Recovery), "identity", "revoked.json"))
		return err == nil && strings.Contains(string(text), string(id)), fmt.Sprint(err)
	})
	t.Logf("refused by server and peer after %v", time.Since(began).Round(10*time.Millisecond))
	// What was under way is over when the peer knows. From then on no point arrives, also after a
	// restart of the peer with the server away.
	last := func() switchback.Sequence {
		v, err := b.client.VM(t.Context(), "vm")
		b.must(err)
		if v.AtTarget == nil || v.AtTarget.Replica == nil {
			t.Fatal("no replica")
		}
		return v.AtTarget.Replica.Newest.Sequence
	}
	count := last()
	b.must(b.Kill(simlab.Server, syscall.SIGKILL))
	b.must(b.Kill(simlab.Recovery, syscall.SIGKILL))
	b.must(b.Start(t.Context(), simlab.Recovery))
	time.Sleep(3 * time.Second)
	b.must(b.Start(t.Context(), simlab.Server))
	b.must(b.AwaitAgent(t.Context(), simlab.Recovery, time.Now()))
	if now := last(); now != count {
		t.Errorf("points still arrive: %d, then %d", count, now)
	}
	if out, err := b.cli("agent", "show", string(id)); err != nil || !strings.Contains(out, "revoked") {
		t.Errorf("agent show: %v: %s", err, out)
	}
}

package agent

import (
	"encoding/json"
	"os"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/transport"
)

// TestRevocationsAreKept: a server that says nothing of revocations, as one that
// was restored, takes none back; what is kept is among the holdings, also after a restart.
func TestRevocationsAreKept(t *testing.T) {
	ca, err := transport.NewCA("sb-test")
	if err != nil {
		t.Fatal(err)
	}
	run, err := os.MkdirTemp("", "sb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(run) })
	dir := t.TempDir()
	start := func() *Agent {
		own, err := ca.Issue(transport.Identity{Installation: "sb-test", Role: transport.RoleAgent, Site: "riga", ID: "a-own"}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		a, err := New(Config{StateDir: dir, RunDir: run, Address: "127.0.0.1:1", Credentials: own, Hypervisor: silent{}, Executable: "none"})
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	a := start()
	if err := os.MkdirAll(IdentityDir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	bad := agentapi.Revocation{Agent: "a-bad", Site: "berlin", At: time.Unix(1e9, 0).UTC(), By: "admin"}
	for _, c := range []struct {
		says string
		told []agentapi.Revocation
		want []agentapi.Revocation
	}{
		{"one", []agentapi.Revocation{bad}, []agentapi.Revocation{bad}},
		{"nothing", nil, []agentapi.Revocation{bad}},
		{"none", []agentapi.Revocation{}, nil},
		{"nothing again", nil, nil},
		{"one again", []agentapi.Revocation{bad}, []agentapi.Revocation{bad}},
	} {
		text, err := json.Marshal(agentapi.ReportAnswer{TrustUpdate: agentapi.TrustUpdate{Revoked: c.told}})
		if err != nil {
			t.Fatal(err)
		}
		var answer agentapi.ReportAnswer
		if err := json.Unmarshal(text, &answer); err != nil {
			t.Fatal(err)
		}
		if err := a.learnTrust(t.Context(), answer.TrustUpdate); err != nil {
			t.Fatal(err)
		}
		for when, x := range map[string]*Agent{"at once": a, "after a restart": start()} {
			held := x.holdings(t.Context()).Revoked
			ids := []switchback.AgentID{}
			for _, r := range c.want {
				ids = append(ids, r.Agent)
			}
			if len(held) != len(c.want) || len(held) == 1 && held[0] != bad || !x.cfg.Credentials.RevokedAre(ids) {
				t.Errorf("the server says %s, %s: held are %+v", c.says, when, held)
			}
		}
	}
}

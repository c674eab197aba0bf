package server

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

func revocation(id switchback.AgentID, ago time.Duration) agentapi.Revocation {
	return agentapi.Revocation{Agent: id, Site: "oslo", At: time.Now().Add(-ago).UTC(), By: "ada"}
}

// told is what agents are told of revocations; nil = nothing.
func (f *fleet) told() []agentapi.Revocation {
	f.t.Helper()
	u, err := f.s.trustUpdate(f.t.Context(), agentapi.AgentStatus{})
	if err != nil {
		f.t.Fatal(err)
	}
	return u.Revoked
}

// TestRestoredRevocations: what was revoked since the backup is learned from the
// agents, and until then nobody is told that nothing was.
func TestRestoredRevocations(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	if list := f.told(); list == nil || len(list) != 0 {
		t.Errorf("told %+v", list)
	}
	// Without a restore the server knows better than an agent.
	f.agents["berlin"].holds.Revoked = []agentapi.Revocation{revocation("a-riga", time.Hour)}
	if err := f.s.learn(ctx, false); err != nil {
		t.Fatal(err)
	}
	if list := f.told(); len(list) != 0 {
		t.Errorf("an agent revokes another one: %+v", list)
	}
	f.agents["berlin"].holds.Revoked = []agentapi.Revocation{revocation("a-bad", time.Hour)}
	if err := markRestored(ctx, f.s.store, time.Now()); err != nil {
		t.Fatal(err)
	}
	if list := f.told(); list != nil {
		t.Errorf("told %+v before the agents were asked", list)
	}
	if err := f.s.learn(ctx, true); err != nil {
		t.Fatal(err)
	}
	if list := f.told(); len(list) != 1 || list[0].Agent != "a-bad" || list[0].Elsewhere || !f.s.creds.RevokedAre([]switchback.AgentID{"a-bad"}) {
		t.Errorf("told %+v", list)
	}
	list, err := f.s.store.Audit(ctx, store.AuditFilter{Action: "learn-revocation", Limit: 9})
	if err != nil || len(list) != 1 || list[0].Object != "agents/a-bad" {
		t.Errorf("noted %+v, %v", list, err)
	}
	_, err = f.s.enrol(ctx, "test", store.Agent{ID: "a-bad", Site: "riga", Address: "x:1"}, "")
	wantCode(t, "join", err, switchback.CodeUnauthorized, "revoked")
}

// TestAdoptRevoked: whom an adopted agent does not believe any more is not
// adopted, and stays refused.
func TestAdoptRevoked(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	lost, err := transport.NewCA("lost")
	if err != nil {
		t.Fatal(err)
	}
	enrolled := map[switchback.AgentID]bool{}
	serve := func(id switchback.AgentID, h *agentapi.Holdings) string {
		creds, err := lost.Issue(transport.Identity{Installation: "lost", Role: transport.RoleAgent, Site: "oslo", ID: string(id)}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		key, csr, err := transport.NewKeyAndCSR()
		if err != nil {
			t.Fatal(err)
		}
		ln, err := transport.Listen(ctx, "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		h.Installation, h.Agent, h.CSRPEM = "lost", recovery.Keeper{Agent: id, Site: "oslo", Address: ln.Addr().String()}, string(csr)
		srv := transport.NewHTTPServer(creds, nil, slog.New(slog.DiscardHandler))
		srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			var req agentapi.AdoptionRequest
			if r.URL.Path != agentapi.AdoptionPath {
				transport.WriteJSON(w, http.StatusOK, h)
				return
			}
			if err := transport.ReadJSON(r, &req); err != nil {
				transport.WriteError(w, err)
				return
			}
			enrolled[id] = enrolled[id] || req.Do != agentapi.AdoptionInspect
			if req.Do == agentapi.AdoptionInstall {
				fresh, err := transport.NewCredentials([]byte(req.Joined.CertificatePEM), key, []byte(req.Joined.CAPEM))
				if err == nil {
					err = creds.Adopt(fresh)
				}
				if err != nil {
					t.Error(err)
				}
			}
			transport.WriteJSON(w, http.StatusOK, h)
		})
		go srv.ServeTLS(ln, "", "")
		t.Cleanup(func() { srv.Close() })
		return h.Agent.Address
	}
	var good, bad agentapi.Holdings
	goodAt, badAt := serve("a-good", &good), serve("a-bad", &bad)
	good.VMs = []recovery.Holding{{Protection: "p-9", VM: "v-9", Name: "db", Epoch: 1, Role: "source", Power: "running", Peer: bad.Agent}}
	good.Revoked = []agentapi.Revocation{revocation("a-bad", 30*24*time.Hour), revocation("a-moved", 0), revocation("a-berlin", 24*time.Hour)}
	if err := f.s.ensureSite(ctx, "oslo"); err != nil {
		t.Fatal(err)
	}
	// It was adopted before its old installation revoked it.
	if err := f.s.store.SaveAgent(ctx, store.Agent{ID: "a-moved", Site: "oslo", Address: "127.0.0.1:1", JoinedAt: time.Now().Add(-time.Hour)}); err != nil {
		t.Fatal(err)
	}
	proof := transport.NewRecoveryKey(lost).Prove(f.s.ca.Fingerprint(), time.Now().Add(time.Hour))
	req := api.AdoptRequest{Agents: []string{goodAt, badAt}, Proof: &proof, JoinSites: true}
	_, err = f.s.adopt(ctx, "admin", req)
	wantCode(t, "named", err, switchback.CodeUnauthorized, "a-bad was revoked", "ada", "says agent a-good")
	if len(enrolled) != 2 || enrolled["a-good"] || enrolled["a-bad"] {
		t.Errorf("enrolled %v", enrolled)
	}
	req.Agents = req.Agents[:1]
	said := new(string)
	a, err := f.s.adopt(context.WithValue(ctx, askedKey{}, asked{came: said}), "admin", req)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []string{"agent a-good of lost", "agent at " + badAt + " missing", "VM db " + api.VMAdopted} {
		if !strings.Contains(*said, x) {
			t.Errorf("its entry says %q, not %q", *said, x)
		}
	}
	if len(a.Agents) != 2 || !enrolled["a-good"] || enrolled["a-bad"] {
		t.Errorf("enrolled %v, %+v", enrolled, a.Agents)
	}
	if err := f.s.trustOnce(ctx); err != nil { // old ones of another installation stay
		t.Fatal(err)
	}
	refused := map[switchback.AgentID]bool{}
	for _, r := range f.told() {
		refused[r.Agent] = r.Elsewhere
	}
	if len(refused) != 2 || !refused["a-bad"] || !refused["a-berlin"] {
		text, _ := json.Marshal(f.told())
		t.Errorf("told %s", text)
	}
}

package server

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
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

// foreign is an agent of another installation, as far as an adoption can tell.
type foreign struct {
	csr       []byte
	id        switchback.AgentID
	installed *agentapi.AdoptionRequest
}

// foreignAgent serves one at site oslo.
func foreignAgent(t *testing.T) (*foreign, contact) {
	t.Helper()
	_, csr, err := transport.NewKeyAndCSR()
	if err != nil {
		t.Fatal(err)
	}
	a := &foreign{csr: csr}
	if a.id, err = transport.AgentIDFor(csr); err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req agentapi.AdoptionRequest
		if err := transport.ReadJSON(r, &req); err != nil {
			transport.WriteError(w, err)
			return
		}
		if req.Do == agentapi.AdoptionInstall {
			a.installed = &req
		}
		transport.WriteJSON(w, http.StatusOK, agentapi.Holdings{CSRPEM: string(csr)})
	}))
	t.Cleanup(srv.Close)
	address := strings.TrimPrefix(srv.URL, "https://")
	return a, contact{client: &agentapi.Client{HTTP: srv.Client(), Address: address},
		holdings: agentapi.Holdings{Agent: recovery.Keeper{Agent: a.id, Site: "oslo", Address: address}, Installation: "lost"}}
}

// TestAdoptedAgentsServers: an adopted agent is told what one is told that is admitted by hand.
func TestAdoptedAgentsServers(t *testing.T) {
	for name, c := range map[string]struct {
		unreachable bool
		want        []string
	}{
		"dialled":     {false, []string{"one:1", "two:2"}},
		"not dialled": {true, []string{transport.ServerName}},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(t.Context(), Config{StateDir: memoryDir(t), Listen: []string{"127.0.0.1:0"}, Addresses: []string{"one:1", "two:2"}, Unreachable: c.unreachable})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			a, met := foreignAgent(t)
			if err := s.enrolAdopted(t.Context(), met, transport.AdoptionProof{}, false); err != nil {
				t.Fatal(err)
			}
			if a.installed == nil || !slices.Equal(a.installed.Servers, c.want) {
				t.Errorf("installed %+v, want servers %v", a.installed, c.want)
			}
		})
	}
}

// TestAdoptWhoCannotBeDialled: a peer that only dials out is named with the remedy.
func TestAdoptWhoCannotBeDialled(t *testing.T) {
	f := newFleet(t)
	c := f.s.ask1(t.Context(), transport.AgentName("a-far"), &transport.AdoptionProof{})
	wantCode(t, "an agent without an address", c.err, switchback.CodeUnavailable, "a-far", "agent readdress --address")
}

// TestEnrolAdopted: an agent that is adopted is judged, and noted, like one that joins.
func TestEnrolAdopted(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	for name, c := range map[string]struct {
		spoil func(id switchback.AgentID, met *contact)
		code  switchback.Code
		says  string
	}{
		"as it is": {func(switchback.AgentID, *contact) {}, "", ""},
		"revoked": {func(id switchback.AgentID, _ *contact) {
			if _, err := f.s.store.EnsureSetting(ctx, settingRevoked+string(id), `{"agent":"`+string(id)+`"}`); err != nil {
				t.Fatal(err)
			}
		}, switchback.CodeUnauthorized, "revoked"},
		"another one's address": {func(_ switchback.AgentID, met *contact) {
			met.holdings.Agent.Address = transport.AgentName("a-riga")
		}, switchback.CodeInvalid, "a-riga"},
	} {
		t.Run(name, func(t *testing.T) {
			a, met := foreignAgent(t)
			c.spoil(a.id, &met)
			err := f.s.enrolAdopted(ctx, met, transport.AdoptionProof{}, false)
			if switchback.CodeOf(err) != c.code || err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, want %q", err, c.code)
			}
			if joined := c.code == ""; joined != (a.installed != nil) {
				t.Errorf("installed %+v", a.installed)
			}
			list, err := f.s.store.Audit(ctx, store.AuditFilter{Who: "agent " + string(a.id), Action: "join", Limit: 9})
			if err != nil || len(list) > 1 || (len(list) == 1) != (c.code == "") {
				t.Fatalf("noted %+v, %v", list, err)
			}
			if len(list) == 1 && (list[0].Via != "adopted from lost" || list[0].Object != "sites/oslo") {
				t.Errorf("noted %+v", list[0])
			}
		})
	}
}

// TestAskOwn: an agent speaks for itself only, whether it is known at its address or not.
func TestAskOwn(t *testing.T) {
	for name, known := range map[string]string{"known there": "", "known elsewhere": "127.0.0.1:1"} {
		t.Run(name, func(t *testing.T) {
			f := newFleet(t)
			berlin := f.agents["berlin"]
			if known != "" {
				if err := f.s.store.SaveAgent(t.Context(), store.Agent{ID: berlin.id, Site: "berlin", Address: known}); err != nil {
					t.Fatal(err)
				}
			}
			if c := f.s.askOwn(t.Context(), berlin.addr, contact{}); c.err != nil || !c.own || c.holdings.Agent.Agent != "a-berlin" {
				t.Errorf("as itself: %+v", c)
			}
			for what, as := range map[string]recovery.Keeper{"another agent": {Agent: "a-riga", Site: "riga"}, "another site": {Agent: "a-berlin", Site: "riga"}} {
				berlin.holds.Agent = as
				wantCode(t, "as "+what, f.s.askOwn(t.Context(), berlin.addr, contact{}).err, switchback.CodeUnauthorized, string("agent "+as.Agent+" of site "+switchback.AgentID(as.Site)))
			}
		})
	}
}

// TestRebuildBelievesItsAgents: of a VM that is known, agents without a part in it have no say.
func TestRebuildBelievesItsAgents(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	p := f.web()
	newer := p
	newer.Version, newer.Phase, newer.Epoch = p.Version+5, switchback.PhaseCommitted, 9
	for agent, outcome := range map[switchback.AgentID]string{"a-berlin": api.VMLearned, "a-other": api.VMKnown} {
		k := recovery.Keeper{Agent: agent, Site: "berlin"}
		h := recovery.Holding{Keeper: recovery.Keeper{Agent: "a-berlin", Site: "berlin"}, Protection: p.ID, VM: p.VM, Name: "web", Epoch: 9, Role: "source", Peer: recovery.Keeper{Agent: "a-riga", Site: "riga"},
			Disks: p.Disks, Record: &recovery.Record{Protection: newer}}
		vms, err := f.s.rebuild(t.Context(), map[string]contact{"x": {own: true, holdings: agentapi.Holdings{Agent: k, VMs: []recovery.Holding{h}}}}, false)
		if err != nil || len(vms) != 1 || vms[0].Outcome != outcome {
			t.Errorf("by %s: %+v, %v", agent, vms, err)
		}
	}
}

// TestLearnedIsNoted: what a restored server makes of what agents know stands in
// the audit log: records that are replaced, VMs that are forgotten.
func TestLearnedIsNoted(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	f.run(recovery.Protect, api.OperationRequest{})
	p := f.web()
	gone := p
	gone.ID, gone.VM, gone.Name = "p-gone", "v-gone", "gone"
	if err := f.s.store.AdoptProtection(ctx, gone, 0); err != nil {
		t.Fatal(err)
	}
	newer := p
	newer.Version = p.Version + 5
	riga := recovery.Keeper{Agent: "a-riga", Site: "riga", Address: f.agents["riga"].addr}
	f.mu.Lock()
	f.agents["berlin"].holds.VMs = []recovery.Holding{{Protection: p.ID, VM: p.VM, Name: "web", Epoch: p.Epoch, Role: "source", Power: "running", Peer: riga,
		Disks: p.Disks, Newest: &f.points[0], Record: &recovery.Record{Protection: newer}}}
	f.agents["riga"].holds.VMs = []recovery.Holding{{Protection: p.ID, VM: p.VM, Name: "web", Epoch: p.Epoch, Role: "target", Replica: true, Points: 1,
		Peer: recovery.Keeper{Agent: "a-berlin", Site: "berlin"}}}
	f.mu.Unlock()
	if err := markRestored(ctx, f.s.store, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := f.s.learn(ctx, true); err != nil {
		t.Fatal(err)
	}
	for action, want := range map[string][2]string{
		"adopt-vm":  {"vms/web", fmt.Sprintf("version %d in the place of %d", f.web().Version, p.Version)},
		"forget-vm": {"vms/gone", "p-gone"},
	} {
		list, err := f.s.store.Audit(ctx, store.AuditFilter{Action: action, Limit: 9})
		if err != nil || len(list) != 1 || list[0].Object != want[0] || !strings.Contains(list[0].Detail, want[1]) || list[0].Who != learner {
			t.Errorf("%s: %+v, %v", action, list, err)
		}
	}
	if v, err := f.s.store.VerifyAudit(ctx, nil); err != nil || len(v.Problems) != 0 {
		t.Errorf("the log: %+v, %v", v, err)
	}
}

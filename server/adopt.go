package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// contactTime bounds one question to an agent.
const contactTime = 10 * time.Second

// contact is an agent that was asked what it holds.
type contact struct {
	holdings agentapi.Holdings
	client   *agentapi.Client
	// own: it belongs to this installation.
	own bool
	// seen is whom its certificate speaks for, where it is not own.
	seen transport.Identity
	err  error
}

func (s *Server) routeAdoption(admin func(pattern string, f func(r *http.Request) (any, error))) {
	admin("POST /v1/adoptions", func(r *http.Request) (any, error) {
		var req api.AdoptRequest
		if err := transport.ReadJSON(r, &req); err != nil {
			return nil, err
		}
		id, err := transport.PeerIdentity(r)
		if err != nil {
			return nil, err
		}
		// A client that leaves does not stop it halfway.
		return s.adopt(context.WithoutCancel(r.Context()), id.ID, req)
	})
}

// adopt makes this server know what agents hold: agents of another installation
// join this one, with the proof that they demand, and the VMs that they protect
// are rebuilt. Repeated, it goes on where it was interrupted.
func (s *Server) adopt(ctx context.Context, who string, req api.AdoptRequest) (api.Adoption, error) {
	s.learning.mu.Lock()
	defer s.learning.mu.Unlock()
	answer := api.Adoption{DryRun: req.DryRun, Agents: []api.AdoptedAgent{}, VMs: []api.AdoptedVM{}}
	contacts, err := s.gather(ctx, req)
	if err != nil {
		return answer, err
	}
	revoked, err := s.refuseRevoked(ctx, contacts)
	if err != nil {
		return answer, err
	}
	for address, c := range contacts {
		if _, is := revoked[c.holdings.Agent.Agent]; is && c.err != nil && slices.Contains(req.Agents, address) {
			return answer, c.err
		}
		if err := s.mayJoin(ctx, c, contacts, req.JoinSites); err != nil {
			return answer, err
		}
		answer.Agents = append(answer.Agents, adoptedAgent(address, c))
	}
	slices.SortFunc(answer.Agents, func(x, y api.AdoptedAgent) int {
		return compareStrings(string(x.Site)+x.Address, string(y.Site)+y.Address)
	})
	if answer.VMs, err = s.rebuild(ctx, contacts, false); err != nil {
		return answer, err
	}
	if !req.DryRun {
		// What cannot be taken is said before anything is changed.
		for _, vm := range answer.VMs {
			if vm.Outcome == api.VMRefused && vm.Error.Code == switchback.CodeConflict {
				return answer, vm.Error
			}
		}
		if err := s.takeRevocations(ctx, who, revoked); err != nil {
			return answer, err
		}
		for address, c := range contacts {
			if c.err != nil || c.own {
				continue
			}
			if err := s.enrolAdopted(ctx, c, *req.Proof, req.TakeOver); err != nil {
				return answer, switchback.Errorf(switchback.CodeOf(err), "agent at %s: %w", address, err).WithHint("mend the cause and adopt again: what was adopted stays, the rest follows")
			}
		}
		// They hold what they held; asked again, since points came meanwhile.
		for address, c := range contacts {
			if c.err == nil {
				contacts[address] = s.askOwn(ctx, c.holdings.Agent.Address, c)
			}
		}
		if answer.VMs, err = s.rebuild(ctx, contacts, false); err != nil {
			return answer, err
		}
		for i := range answer.VMs {
			if err := s.take(ctx, who, &answer.VMs[i]); err != nil {
				return answer, err
			}
		}
	}
	callOf(ctx).note(adoptionNote(answer)) // in the place of the last operation that was begun: it names all
	return answer, nil
}

// adoptionNote is what the audit log says of an adoption.
func adoptionNote(a api.Adoption) string {
	var said []string
	if a.DryRun {
		said = append(said, "dry run")
	}
	for _, x := range a.Agents {
		switch {
		case x.Missing != "":
			said = append(said, "agent at "+x.Address+" missing")
		case x.Own:
			said = append(said, "agent "+string(x.Agent)+" own")
		default:
			said = append(said, "agent "+string(x.Agent)+" of "+x.Installation)
		}
	}
	for _, vm := range a.VMs {
		text := "VM " + vm.Name + " " + vm.Outcome
		if vm.Operation != "" {
			text += ", operation " + string(vm.Operation)
		}
		said = append(said, text)
	}
	return strings.Join(said, "; ")
}

func compareStrings(x, y string) int {
	if x < y {
		return -1
	}
	if x > y {
		return 1
	}
	return 0
}

func adoptedAgent(address string, c contact) api.AdoptedAgent {
	a := api.AdoptedAgent{Keeper: c.holdings.Agent, Version: c.holdings.Version, Installation: c.holdings.Installation,
		CertificateExpires: c.holdings.CertificateExpires, Own: c.own}
	if c.err != nil {
		a.Address, a.Missing = address, c.err.Error()
	}
	return a
}

// gather asks the named agents what they hold, and those that they work with.
// One that was named must answer; another one may be missing.
func (s *Server) gather(ctx context.Context, req api.AdoptRequest) (map[string]contact, error) {
	contacts := map[string]contact{}
	asked := map[string]bool{}
	queue := slices.Clone(req.Agents)
	if len(req.Agents) == 0 {
		agents, err := s.store.Agents(ctx, "")
		if err != nil {
			return nil, err
		}
		for _, a := range agents {
			queue = append(queue, a.Address)
		}
		if len(queue) == 0 {
			return nil, switchback.Errorf(switchback.CodeInvalid, "this installation has no agents, and none was named").
				WithHint("switchback site adopt --recovery-key FILE HOST:PORT")
		}
	}
	for len(queue) > 0 {
		address := queue[0]
		queue = queue[1:]
		if asked[address] || address == "" {
			continue
		}
		asked[address] = true
		c := s.ask1(ctx, address, req.Proof)
		if c.err != nil && slices.Contains(req.Agents, address) {
			e := switchback.Flatten(c.err)
			return nil, &switchback.Error{Code: e.Code, Message: "agent at " + address + ": " + e.Message, Hint: e.Hint}
		}
		contacts[address] = c
		for _, vm := range c.holdings.VMs {
			queue = append(queue, vm.Peer.Address)
		}
	}
	return contacts, nil
}

// ask1 asks one agent, of this installation or of another.
func (s *Server) ask1(ctx context.Context, address string, proof *transport.AdoptionProof) contact {
	if id, dialsIn := transport.NamedAgent(address); dialsIn {
		a, err := s.store.Agent(ctx, id)
		if switchback.CodeOf(err) == switchback.CodeNotFound || err == nil && a.JoinedAt.IsZero() {
			err = switchback.Errorf(switchback.CodeUnavailable, "agent %s cannot be dialled, and opens connections to servers of its own installation only", id).
				WithHint("to adopt it, too, give it an address first: on its host 'switchback agent readdress --address HOST:PORT', restart it, and adopt it at that address")
		}
		if err != nil {
			return contact{err: err}
		}
	}
	c := s.askOwn(ctx, address, contact{})
	if c.err == nil || proof == nil || switchback.CodeOf(c.err) != switchback.CodeUnauthorized {
		if c.err != nil && proof == nil && switchback.CodeOf(c.err) == switchback.CodeUnauthorized {
			c.err = switchback.Errorf(switchback.CodeUnauthorized, "%w", c.err).
				WithHint("an agent of another installation is adopted with the proof of that installation's recovery key: --recovery-key FILE")
		}
		return c
	}
	ctx, cancel := context.WithTimeout(ctx, contactTime)
	defer cancel()
	c = contact{}
	c.client = &agentapi.Client{Address: address, HTTP: transport.AdoptionClient(s.creds, proof.FromCA, func(id transport.Identity, _ time.Time) { c.seen = id })}
	c.holdings, c.err = c.client.Adoption(ctx, agentapi.AdoptionRequest{Proof: *proof, Do: agentapi.AdoptionInspect})
	if c.err == nil && (string(c.holdings.Agent.Agent) != c.seen.ID || c.holdings.Agent.Site != c.seen.Site) {
		c.err = switchback.Errorf(switchback.CodeUnauthorized, "%s says that it is agent %s of site %s", c.seen, c.holdings.Agent.Agent, c.holdings.Agent.Site)
	}
	return c
}

// askOwn asks an agent of this installation.
func (s *Server) askOwn(ctx context.Context, address string, was contact) contact {
	ctx, cancel := context.WithTimeout(ctx, contactTime)
	defer cancel()
	h, err := s.ownHoldings(ctx, address)
	if err != nil {
		h = was.holdings
	}
	return contact{holdings: h, own: true, err: err}
}

// ownHoldings asks the agent at an address, and believes it only what it says as
// the agent that its certificate speaks for: the one that is known to be there, or,
// where none or several are, the one that it says it is.
func (s *Server) ownHoldings(ctx context.Context, address string) (agentapi.Holdings, error) {
	var none agentapi.Holdings
	agents, err := s.store.Agents(ctx, "")
	if err != nil {
		return none, err
	}
	agents = slices.DeleteFunc(agents, func(a store.Agent) bool {
		return a.JoinedAt.IsZero() || a.Address != address && transport.AgentName(a.ID) != address
	})
	if len(agents) == 1 {
		a := agents[0]
		h, err := s.agentClient(a.ID).Holdings(ctx)
		if err == nil && (h.Agent.Agent != a.ID || h.Agent.Site != a.Site) {
			err = switchback.Errorf(switchback.CodeUnauthorized, "agent %s of site %s says that it is agent %s of site %s", a.ID, a.Site, h.Agent.Agent, h.Agent.Site)
		}
		return h, err
	}
	says, err := (&agentapi.Client{Address: address, HTTP: s.addressed}).Holdings(ctx)
	if err != nil {
		return none, err
	}
	as := func(id transport.Identity) error {
		if id.Role != transport.RoleAgent || id.ID != string(says.Agent.Agent) || id.Site != says.Agent.Site {
			return switchback.Errorf(switchback.CodeUnauthorized, "%s says that it is agent %s of site %s", id, says.Agent.Agent, says.Agent.Site)
		}
		return nil
	}
	client := transport.NewHTTPClient(transport.ClientConfig{Credentials: s.creds, Want: as, Inbound: s.inbound})
	defer client.CloseIdleConnections()
	h, err := (&agentapi.Client{Address: address, HTTP: client}).Holdings(ctx)
	if err == nil && (h.Agent.Agent != says.Agent.Agent || h.Agent.Site != says.Agent.Site) {
		err = switchback.Errorf(switchback.CodeUnauthorized, "agent %s of site %s says that it is agent %s of site %s", says.Agent.Agent, says.Agent.Site, h.Agent.Agent, h.Agent.Site)
	}
	return h, err
}

// mayJoin refuses an agent whose site is another one of the same name here.
func (s *Server) mayJoin(ctx context.Context, c contact, all map[string]contact, joinSites bool) error {
	if c.err != nil || c.own {
		return nil
	}
	me := c.holdings.Agent
	here, err := s.store.Agents(ctx, me.Site)
	if err != nil {
		return err
	}
	for _, a := range here {
		if a.ID == me.Agent || joinSites || a.JoinedAt.IsZero() {
			continue
		}
		adopted := false
		for _, x := range all {
			adopted = adopted || x.own && x.err == nil && x.holdings.Agent.Agent == a.ID
		}
		if !adopted {
			return switchback.Errorf(switchback.CodeConflict, "this installation has a site %s of its own, with agent %s", me.Site, a.ID).
				WithHint("if it is the same place as the adopted site of that name, add --join-sites")
		}
	}
	return nil
}

// rebuild finds out what the agents' holdings make, and what of it is not known
// here. With restored, a record that is as new as ours counts, too: ours is of a backup.
func (s *Server) rebuild(ctx context.Context, contacts map[string]contact, restored bool) ([]api.AdoptedVM, error) {
	byVM := map[switchback.ProtectionID][]recovery.Holding{}
	answered := map[switchback.AgentID]bool{}
	for _, c := range contacts {
		if c.err != nil {
			continue
		}
		answered[c.holdings.Agent.Agent] = true
		for _, h := range c.holdings.VMs {
			h.Keeper = c.holdings.Agent // whatever it says
			byVM[h.Protection] = append(byVM[h.Protection], h)
		}
	}
	vms := []api.AdoptedVM{}
	for id, list := range byVM {
		slices.SortFunc(list, func(x, y recovery.Holding) int { return compareStrings(string(x.Keeper.Agent), string(y.Keeper.Agent)) })
		vm := api.AdoptedVM{ID: id, Name: list[0].Name, Outcome: api.VMAdopted}
		known, err := s.store.Protection(ctx, id)
		switch {
		case switchback.CodeOf(err) == switchback.CodeNotFound:
		case err != nil:
			return nil, err
		default:
			vm.Name, vm.Outcome = known.Name, api.VMLearned
			if list = s.ofItsAgents(known, list); len(list) == 0 {
				vm.Outcome, vm.Adopted = api.VMKnown, recovery.Adopted{Protection: known}
				vms = append(vms, vm)
				continue
			}
			more, err := s.knowMore(ctx, known, list, restored)
			if err != nil {
				return nil, err
			}
			if !more {
				vm.Outcome, vm.Adopted = api.VMKnown, recovery.Adopted{Protection: known}
				vms = append(vms, vm)
				continue
			}
		}
		out, err := recovery.Rebuild(list, func(a switchback.AgentID) bool { return answered[a] }, time.Now())
		vm.Adopted = out
		if err != nil {
			vm.Outcome, vm.Error = api.VMRefused, switchback.Flatten(err)
		} else if other, err := s.store.ProtectionOfVM(ctx, out.Protection.VM); err == nil && other.ID != id {
			vm.Outcome = api.VMRefused
			vm.Error = switchback.Errorf(switchback.CodeConflict, "VM %s is protected here already (%s, %s)", other.Name, other.ID, other.Phase).WithHint("unprotect one of the two")
		} else if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
			return nil, err
		}
		vms = append(vms, vm)
	}
	slices.SortFunc(vms, func(x, y api.AdoptedVM) int { return compareStrings(x.Name+string(x.ID), y.Name+string(y.ID)) })
	return vms, nil
}

// ofItsAgents leaves out what agents say of a VM that they have no part in: a VM
// keeps its two agents for as long as it is protected.
func (s *Server) ofItsAgents(known switchback.Protection, list []recovery.Holding) []recovery.Holding {
	return slices.DeleteFunc(slices.Clone(list), func(h recovery.Holding) bool {
		strange := h.Keeper.Agent != known.SourceAgent && h.Keeper.Agent != known.TargetAgent
		if strange {
			s.log.Warn("an agent says that it holds a VM that it has no part in", "agent", h.Keeper.Agent, "vm", known.Name, "protection", known.ID)
		}
		return strange
	})
}

// knowMore reports whether agents know what this server does not: it was
// restored, or an agent was missing when it adopted the VM.
func (s *Server) knowMore(ctx context.Context, known switchback.Protection, list []recovery.Holding, restored bool) (bool, error) {
	for _, h := range list {
		if h.Epoch > known.Epoch {
			return true, nil
		}
		if h.Record == nil {
			continue
		}
		if h.Record.Newer(recovery.Record{Protection: known}) || restored && h.Record.Protection.Version == known.Version && !sameRecord(h.Record.Protection, known) {
			return true, nil
		}
	}
	switch known.Phase {
	case switchback.PhaseProtected, switchback.PhaseSwitched, switchback.PhaseCommitted:
		return known.MintAbove > known.Epoch && len(list) > 1, nil
	}
	if known.Operation != "" {
		return false, nil
	}
	return true, nil // on its way, and nothing leads it on
}

// sameRecord compares all but what a restore changes.
func sameRecord(x, y switchback.Protection) bool {
	x.Operation, y.Operation, x.Ended, y.Ended, x.Version, y.Version = "", "", "", "", 0, 0
	a, err1 := json.Marshal(x)
	b, err2 := json.Marshal(y)
	return err1 == nil && err2 == nil && string(a) == string(b)
}

// enrolAdopted makes an agent of another installation one of this. It is known
// here before it can speak for itself.
func (s *Server) enrolAdopted(ctx context.Context, c contact, proof transport.AdoptionProof, takeOver bool) error {
	me := c.holdings.Agent
	ctx, cancel := context.WithTimeout(ctx, 3*contactTime)
	defer cancel()
	asked, err := c.client.Adoption(ctx, agentapi.AdoptionRequest{Proof: proof, Do: agentapi.AdoptionEnrol, TakeOver: takeOver})
	if err != nil {
		return err
	}
	if err := s.ensureSite(ctx, me.Site); err != nil {
		return err
	}
	joined, err := s.enrol(ctx, "adopted from "+c.holdings.Installation, store.Agent{ID: me.Agent, Site: me.Site, Address: me.Address, Version: c.holdings.Version}, asked.CSRPEM)
	if err != nil {
		return err
	}
	_, err = c.client.Adoption(ctx, agentapi.AdoptionRequest{Proof: proof, Do: agentapi.AdoptionInstall, TakeOver: takeOver, Joined: &joined, Servers: s.calledAt()})
	if err == nil {
		s.log.Info("agent adopted", "agent", me.Agent, "site", me.Site, "address", me.Address, "from", c.holdings.Installation)
	}
	return err
}

// ensureSite makes a site where it is missing.
func (s *Server) ensureSite(ctx context.Context, id switchback.SiteID) error {
	err := s.store.CreateSite(ctx, store.Site{ID: id, Name: string(id), CreatedAt: s.store.Now()})
	if switchback.CodeOf(err) == switchback.CodeConflict {
		return nil
	}
	return err
}

// take stores what was rebuilt of one VM and begins what leads on from there.
func (s *Server) take(ctx context.Context, who string, vm *api.AdoptedVM) error {
	if vm.Outcome != api.VMAdopted && vm.Outcome != api.VMLearned {
		return nil
	}
	if m := vm.Missing; m != nil {
		// Known by name and address only, until it is adopted itself.
		if _, err := s.store.Agent(ctx, m.Agent); switchback.CodeOf(err) == switchback.CodeNotFound {
			if err := s.ensureSite(ctx, m.Site); err != nil {
				return err
			}
			if err := s.store.SaveAgent(ctx, store.Agent{ID: m.Agent, Site: m.Site, Address: m.Address}); err != nil {
				return err
			}
		} else if err != nil {
			return err
		}
	}
	was := int64(0)
	if vm.Outcome == api.VMLearned {
		known, err := s.store.Protection(ctx, vm.ID)
		if err != nil {
			return err
		}
		if known.Operation != "" {
			rec, err := s.runner.Get(ctx, known.Operation)
			if err == nil && rec.State == operation.StateFailed {
				err = s.supersede(ctx, rec)
			}
			switch code := switchback.CodeOf(err); {
			case code == switchback.CodeConflict, err == nil && !rec.State.Finished():
				vm.Outcome = api.VMKnown // somebody has begun something since: it finds out itself
				return nil
			case err != nil && code != switchback.CodeNotFound:
				return err
			}
		}
		was = known.Version
		vm.Protection.Version = max(vm.Protection.Version, was+1)
	}
	p := vm.Protection
	if err := s.store.AdoptProtection(ctx, p, was); err != nil {
		return err
	}
	if err := s.audit(ctx, audit.Entry{Who: who, Via: "server", Action: "adopt-vm", Object: "vms/" + p.Name, Outcome: audit.Done,
		Detail: fmt.Sprintf("%s: protection %s, %s at %s with target %s, epoch %d, version %d in the place of %d", vm.Outcome, p.ID, p.Phase, p.Source, p.Target, p.Epoch, p.Version, was)}); err != nil {
		return err
	}
	s.log.Info("VM adopted", "vm", p.Name, "protection", p.ID, "phase", p.Phase, "epoch", p.Epoch, "source", p.Source, "target", p.Target, "points", vm.Points, "next", vm.Next)
	if vm.Next == "" {
		return nil
	}
	var params any
	if len(vm.Params) > 0 {
		params = vm.Params
	}
	rec, err := s.submit(ctx, who, p, string(vm.Next), string(vm.Next), params)
	if switchback.CodeOf(err) == switchback.CodeConflict {
		return nil // it was begun before
	}
	vm.Operation = rec.ID
	return err
}

// recordOf is what agents are told of a VM.
func (s *Server) recordOf(ctx context.Context, id switchback.ProtectionID) (recovery.Record, error) {
	p, err := s.store.Protection(ctx, id)
	if err != nil || p.Operation == "" {
		return recovery.Record{Protection: p}, err
	}
	rec := recovery.Record{Protection: p}
	op, err := s.runner.Get(ctx, p.Operation)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return rec, nil
	}
	if err == nil && !op.State.Finished() {
		rec.Operation, rec.Params = recovery.Kind(op.Kind), op.Params
	}
	return rec, err
}

// reportAnswer tells an agent what it does not know yet: the addresses of the
// servers and of peers that have moved, whom to trust, the recovery key, and the
// records of its VMs.
func (s *Server) reportAnswer(ctx context.Context, st agentapi.AgentStatus) (agentapi.ReportAnswer, error) {
	answer := agentapi.ReportAnswer{Servers: s.announced, RecoveryKey: s.recovery}
	var err error
	if answer.TrustUpdate, err = s.trustUpdate(ctx, st); err != nil {
		return answer, err
	}
	if answer.Peers, err = s.movedPeers(ctx, st.Peers); err != nil {
		return answer, err
	}
	versions, err := s.store.ProtectionVersions(ctx)
	if err != nil {
		return answer, err
	}
	stale, ahead := agentapi.StaleRecords(st.VMs, versions)
	if ahead {
		s.learning.wanted.Store(true)
	}
	for _, id := range stale {
		rec, err := s.recordOf(ctx, id)
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			continue // unprotected a moment ago
		}
		if err != nil {
			return answer, errors.Join(err)
		}
		answer.Records = append(answer.Records, rec)
	}
	return answer, nil
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/transport"
)

const (
	// lookEvery is how often it is decided anew what may run here.
	lookEvery = 500 * time.Millisecond
	// askEvery is how often it is asked who is active; askSoon, where a VM waits for
	// the answer or lives by it.
	askEvery = 5 * time.Second
	askSoon  = time.Second
	// askTimeout bounds a question to the server or a peer.
	askTimeout = 3 * time.Second
	// beginPatience is how long a start that failed is not tried again.
	beginPatience = 10 * time.Second
)

// asks is what is known of the asking itself.
type asks struct {
	mu sync.Mutex
	// err is why the server does not answer; nil = it does.
	err   error
	peers map[switchback.AgentID]*http.Client
}

// peerClient believes this one agent only.
func (a *Agent) peerClient(id switchback.AgentID) *http.Client {
	a.asks.mu.Lock()
	defer a.asks.mu.Unlock()
	c, ok := a.asks.peers[id]
	if !ok {
		if a.asks.peers == nil {
			a.asks.peers = map[switchback.AgentID]*http.Client{}
		}
		c = transport.NewHTTPClient(transport.ClientConfig{Credentials: a.cfg.Credentials, Want: transport.Agent(id)})
		a.asks.peers[id] = c
	}
	return c
}

// askOwnership asks the server, and where that does not answer the peers, until ctx ends.
func (a *Agent) askOwnership(ctx context.Context) {
	for ctx.Err() == nil {
		next := askEvery
		var owned []*vm
		for _, v := range a.all() {
			if s := v.standing(); s.Role.Owns() {
				owned = append(owned, v)
				if d := fencing.Decide(s, v.moment(false)); !d.MayStart || s.Policy.Lease > 0 {
					next = askSoon
				}
			}
		}
		a.ask(ctx, owned)
		sleep(ctx, next)
	}
}

// ask asks about these VMs once, and takes the answers in.
func (a *Agent) ask(ctx context.Context, vms []*vm) {
	if len(vms) == 0 {
		return
	}
	missing := slices.Clone(vms)
	if a.cfg.ServerAddress != "" {
		address := a.servers.address()
		err := a.askOne(ctx, a.server, "https://"+address+"/v1/agents/ownership", "server", &missing)
		a.servers.answered(address, err)
		a.asks.mu.Lock()
		if (err != nil) != (a.asks.err != nil) && ctx.Err() == nil {
			a.log.Info("who is active: the server answers", "answers", err == nil, "error", err)
		}
		a.asks.err = err
		a.asks.mu.Unlock()
	}
	byPeer := map[agentapi.Peer][]*vm{}
	for _, v := range missing {
		if p := v.assignment().Peer; p.Agent != "" {
			byPeer[p] = append(byPeer[p], v)
		}
	}
	var wg sync.WaitGroup
	for p, list := range byPeer {
		wg.Go(func() {
			if err := a.askOne(ctx, a.peerClient(p.Agent), "https://"+p.Address+"/v1/ownership", string(p.Agent), &list); err != nil {
				a.log.Debug("a peer does not say who is active", "peer", p.Agent, "error", err)
			}
		})
	}
	wg.Wait()
}

// askOne asks one party, and leaves in vms those it had nothing to say of.
func (a *Agent) askOne(ctx context.Context, client *http.Client, url, by string, vms *[]*vm) error {
	q := agentapi.OwnershipQuestion{Held: map[switchback.ProtectionID]switchback.Epoch{}}
	for _, v := range *vms {
		as := v.assignment()
		q.Held[as.Protection] = as.Epoch
	}
	c, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	asked := hostClock() // a lease runs from the question
	answer, err := transport.Call[agentapi.OwnershipAnswer](c, client, http.MethodPost, url, q)
	if err != nil {
		return err
	}
	var left []*vm
	for _, v := range *vms {
		r, ok := answer.Rulings[v.assignment().Protection]
		if !ok {
			left = append(left, v)
		} else if err := v.hear(ctx, r, asked, by); err != nil {
			a.log.Error("an answer of who is active cannot be kept", "vm", v.assignment().Name, "error", err)
		}
	}
	*vms = left
	return nil
}

// hear takes in what somebody says of who is active. With asked, when the
// question left, an answer that confirms is a grant.
func (v *vm) hear(_ context.Context, r fencing.Ruling, asked fencing.Instant, by string) error {
	next, heard := v.standing().Hear(r)
	if next.Heard != v.standing().Heard {
		v.agent.log.Warn("heard of a newer epoch", "vm", v.assignment().Name, "epoch", r.Epoch, "active", r.Site, "from", by, "means", heard)
		if err := v.change(func(x *Assignment) { x.Heard = x.with(v.agent.site(), r) }); err != nil {
			return err
		}
	}
	if heard != fencing.HeardConfirmed || asked == 0 {
		return nil
	}
	v.mu.Lock()
	v.confirmed, v.confirmedBy = time.Now(), by
	v.mu.Unlock()
	if next.Contested {
		return nil
	}
	return v.setGrant(v.assignment().VM, fencing.Confirm(next, v.agent.boot.name, asked, by), false)
}

// with is what has been heard, once r was.
func (x *Assignment) with(site switchback.SiteID, r fencing.Ruling) fencing.Ruling {
	next, _ := x.standing(site).Hear(r)
	return next.Heard
}

// setGrant writes a grant, unless the one that stands is better. always replaces any.
func (v *vm) setGrant(id switchback.VMUUID, g fencing.Grant, always bool) error {
	v.granting.Lock()
	defer v.granting.Unlock()
	v.mu.Lock()
	old := v.grant
	v.mu.Unlock()
	if !always && !g.Renews(old) {
		return nil
	}
	if err := v.agent.writeGrant(id, g); err != nil {
		return err
	}
	if old.Epoch != g.Epoch || old.By != g.By && g.Until == 0 {
		v.agent.log.Info("granted", "vm", v.assignment().Name, "epoch", g.Epoch, "by", g.By)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.grant = g
	return nil
}

// dropGrant takes guard and grant of a VM away that is not active here.
func (v *vm) dropGrant() error {
	v.granting.Lock()
	defer v.granting.Unlock()
	if err := v.agent.unguard(v.assignment().VM); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.grant, v.guard = fencing.Grant{}, ""
	return nil
}

// allow grants a VM that a command of the server makes active here, or keeps so.
// With the policy of a lease that is asked for, and CodeUnavailable where nobody
// gives it.
func (v *vm) allow(ctx context.Context, id switchback.VMUUID, next fencing.Standing) error {
	if next.Contested {
		return nil
	}
	a := v.agent
	if err := a.markRun("begun", id); err != nil { // the command says whether it starts
		return err
	}
	if err := a.removeRun("ended", id); err != nil {
		return err
	}
	if next.Policy.Lease == 0 {
		return v.setGrant(id, fencing.Grant{Epoch: next.Epoch, Boot: a.boot.name, By: fencing.ByCommand}, true)
	}
	peer := v.assignment().Peer
	asked := hostClock()
	q := agentapi.OwnershipQuestion{Held: map[switchback.ProtectionID]switchback.Epoch{v.assignment().Protection: next.Epoch}}
	try := func(client *http.Client, url, by string) error {
		c, cancel := context.WithTimeout(ctx, askTimeout)
		defer cancel()
		answer, err := transport.Call[agentapi.OwnershipAnswer](c, client, http.MethodPost, url, q)
		if err != nil {
			return err
		}
		r := answer.Rulings[v.assignment().Protection]
		if _, heard := next.Hear(r); heard != fencing.HeardConfirmed {
			return switchback.Errorf(switchback.CodeUnavailable, "%s says that VM is active at site %q under epoch %d", by, r.Site, r.Epoch)
		}
		return v.setGrant(id, fencing.Confirm(next, a.boot.name, asked, by), true)
	}
	err := errors.New("the agent knows no server")
	if a.cfg.ServerAddress != "" {
		if err = try(a.server, "https://"+a.servers.address()+"/v1/agents/ownership", "server"); err == nil {
			return nil
		}
	}
	if peer.Agent != "" {
		perr := try(a.peerClient(peer.Agent), "https://"+peer.Address+"/v1/ownership", string(peer.Agent))
		if perr == nil {
			return nil
		}
		err = errors.Join(err, perr)
	}
	return switchback.Errorf(switchback.CodeUnavailable, "nobody gives a lease for %s: %w", v.assignment().Name, err).
		WithHint("mend the way from this agent to the server or to the agent of site %s", peer.Site)
}

// awaitTakeover waits until the old side's lease has ended, where it was not seen off.
func (v *vm) awaitTakeover(ctx context.Context, t *task) error {
	for ctx.Err() == nil {
		s, m := v.standing(), v.moment(false)
		if s.Takeover == nil {
			return nil
		}
		left := s.Takeover.Remaining(m.Boot, m.Up, m.Now)
		if left <= 0 {
			return nil
		}
		t.Report(fmt.Sprintf("waiting for the end of the lease that the other side may still have: %d s", int(left.Seconds())), nil)
		sleep(ctx, min(left, 200*time.Millisecond))
	}
	return ctx.Err()
}

// routeOwnership answers peers that ask whether this side stands in their way.
func (a *Agent) routeOwnership(mux *http.ServeMux) {
	mux.Handle("POST /v1/ownership", transport.RequireRole(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, err := a.answerOwnership(r)
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, answer)
	}), transport.RoleAgent))
}

func (a *Agent) answerOwnership(r *http.Request) (agentapi.OwnershipAnswer, error) {
	answer := agentapi.OwnershipAnswer{Rulings: map[switchback.ProtectionID]fencing.Ruling{}}
	id, err := transport.PeerIdentity(r)
	if err != nil {
		return answer, err
	}
	var q agentapi.OwnershipQuestion
	if err := transport.ReadJSON(r, &q); err != nil {
		return answer, err
	}
	for p, epoch := range q.Held {
		v, err := a.vm(p)
		if err != nil || string(v.assignment().Peer.Agent) != id.ID {
			continue // not known here, or not the asker's business
		}
		answer.Rulings[p] = v.standing().Answer(switchback.SiteID(id.Site), epoch)
	}
	return answer, nil
}

// watchOwnership carries out what is decided, until ctx ends.
func (a *Agent) watchOwnership(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, lookEvery) {
		for _, v := range a.all() {
			if s := v.standing(); s.Role.Owns() && s.Policy.Lease > 0 {
				if err := a.ensureLeaseGuard(); err != nil {
					a.log.Error("leases are not guarded", "error", err)
				}
			}
			if err := v.look(ctx); err != nil && ctx.Err() == nil {
				a.log.Warn("what may run here is not seen to, trying again", "vm", v.assignment().Name, "error", err)
			}
		}
	}
}

// look decides about one VM and acts. Actions have their own order of things: but
// for the end of a lease nothing is done while one is at work.
func (v *vm) look(ctx context.Context) error {
	a, as := v.agent, v.assignment()
	if as.VM == "" || as.Role == "" {
		return nil
	}
	s := v.standing()
	d := fencing.Decide(s, v.moment(false))
	if s.Policy.Lease > 0 && !d.MayStart && d.State != fencing.StateElsewhere {
		if err := v.endLease(ctx, s); err != nil {
			return err
		}
	}
	if !v.act.TryLock() {
		return nil
	}
	defer v.act.Unlock()
	s, as = v.standing(), v.assignment()
	if a.isForgotten(as.Protection) {
		return nil
	}
	if d = fencing.Decide(s, v.moment(false)); d.Act == fencing.ActGrant {
		a.log.Warn("granted without confirmation", "vm", as.Name, "by", d.Grant.By, "epoch", d.Grant.Epoch)
		if err := v.setGrant(as.VM, d.Grant, true); err != nil {
			return err
		}
		d = fencing.Decide(s, v.moment(false))
	}
	switch d.State {
	case fencing.StateElsewhere:
		return v.dropGrant()
	case fencing.StateSuperseded:
		if as.Role == agentapi.RoleSource {
			a.log.Warn("the VM is active elsewhere: this site is fenced", "vm", as.Name, "active", s.Heard.Site, "epoch", s.Heard.Epoch)
			return v.fenceHere(ctx, s.Heard.Epoch, s.Heard.Site, true)
		}
		if err := v.writeGuard(); err != nil {
			return err
		}
		dom, err := a.hv.Domain(ctx, as.VM)
		if err != nil || dom.State == hypervisor.StateOff {
			return ignoreMissing(err)
		}
		a.log.Warn("stopping a VM that is active elsewhere", "vm", as.Name, "active", s.Heard.Site, "epoch", s.Heard.Epoch)
		return a.hv.Destroy(ctx, as.VM)
	}
	if err := v.writeGuard(); err != nil {
		return err
	}
	v.mu.Lock()
	flagged := v.autostart
	v.mu.Unlock()
	if flagged {
		dom, err := a.hv.Domain(ctx, as.VM)
		if err != nil {
			return ignoreMissing(err)
		}
		if err := v.keepAutostart(ctx, dom); err != nil {
			return err
		}
	}
	switch d.State {
	case fencing.StateGranted:
		return v.begin(ctx)
	case fencing.StateContested:
		return v.grantContested()
	}
	return nil
}

func ignoreMissing(err error) error {
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return nil
	}
	return err
}

// isForgotten: released since it was listed.
func (a *Agent) isForgotten(id switchback.ProtectionID) bool {
	_, err := a.vm(id)
	return err != nil
}

// endLease turns off, or pauses, a VM whose lease has ended. It is noted before,
// so that it comes back with the lease.
func (v *vm) endLease(ctx context.Context, s fencing.Standing) error {
	a, as := v.agent, v.assignment()
	dom, err := a.hv.Domain(ctx, as.VM)
	if err != nil {
		return ignoreMissing(err)
	}
	d := fencing.Decide(s, v.moment(dom.State != hypervisor.StateOff))
	if d.Act != fencing.ActStop && d.Act != fencing.ActSuspend || d.Act == fencing.ActSuspend && dom.State == hypervisor.StatePaused {
		return nil
	}
	a.log.Warn("the VM may not run on without a lease", "vm", as.Name, "state", d.State, "why", d.Why, "act", d.Act)
	if !s.Leaving && !s.Superseded() {
		if err := a.markRun("ended", as.VM); err != nil {
			return err
		}
	}
	// Paused first: that is at once, whatever else takes time.
	if dom.State == hypervisor.StateRunning {
		if err := a.hv.Suspend(ctx, as.VM); err != nil {
			a.log.Warn("a VM without lease cannot be paused", "vm", as.Name, "error", err)
		}
	}
	if d.Act == fencing.ActSuspend {
		return nil
	}
	return a.hv.Destroy(ctx, as.VM)
}

// begin starts what is to start with its host, once in each boot, and what the
// end of a lease had stopped. It holds the VM's lock.
func (v *vm) begin(ctx context.Context) error {
	a, as := v.agent, v.assignment()
	v.mu.Lock()
	known, again := v.begun && as.Policy.Fencing.Lease == 0, v.beginAgain
	v.mu.Unlock()
	if known || time.Now().Before(again) {
		return nil
	}
	begun, ended := a.markedRun("begun", as.VM), a.markedRun("ended", as.VM)
	if begun && !ended {
		v.mu.Lock()
		v.begun = true
		v.mu.Unlock()
		return nil
	}
	if run := as.Run; as.Role == agentapi.RoleActive && (as.Change != nil || run != nil && !run.Started) {
		return nil // an operation is at work, which starts it
	}
	dom, err := a.hv.Domain(ctx, as.VM)
	if err != nil {
		return ignoreMissing(err)
	}
	if err := v.keepAutostart(ctx, dom); err != nil {
		return err
	}
	switch wanted := !begun && v.assignment().Autostart || ended; {
	case wanted && dom.State == hypervisor.StateOff:
		if err := v.ensureView(ctx); err != nil {
			return err
		}
		a.log.Info("starting the VM", "vm", as.Name, "autostart", !begun, "lease_renewed", ended)
		if err := a.hv.Start(ctx, as.VM, false); err != nil && switchback.CodeOf(err) != switchback.CodeConflict {
			v.mu.Lock()
			v.beginAgain = time.Now().Add(beginPatience)
			v.mu.Unlock()
			return err
		}
	case ended && dom.State == hypervisor.StatePaused:
		a.log.Info("letting the VM go on: its lease is renewed", "vm", as.Name)
		if err := a.hv.Resume(ctx, as.VM); err != nil {
			return err
		}
	}
	if err := a.markRun("begun", as.VM); err != nil {
		return err
	}
	return a.removeRun("ended", as.VM)
}

// keepAutostart takes over libvirt's flag: libvirt would try the start before
// anybody can have confirmed it, and not again.
func (v *vm) keepAutostart(ctx context.Context, dom hypervisor.Domain) error {
	if !dom.Autostart {
		return nil
	}
	if !v.assignment().Autostart {
		if err := v.change(func(x *Assignment) { x.Autostart = true }); err != nil {
			return err
		}
	}
	v.mu.Lock()
	v.autostart = false
	v.mu.Unlock()
	v.agent.log.Info("autostart is the agent's from now on", "vm", v.assignment().Name)
	return v.agent.hv.SetAutostart(ctx, v.assignment().VM, false)
}

// noteDomain remembers what was last seen of the VM's domain, where it matters.
func (v *vm) noteDomain(autostart, running bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.autostart, v.powered = autostart && v.a.Role.Owns(), running
}

// autostarts reports whether the agent starts a VM with its host.
func (a *Agent) autostarts(id switchback.VMUUID) bool {
	return slices.ContainsFunc(a.all(), func(v *vm) bool {
		as := v.assignment()
		return as.VM == id && as.Role.Owns() && as.Autostart
	})
}

// writeGuard makes the hook ask for the grant that the VM needs now.
func (v *vm) writeGuard() error {
	as, s := v.assignment(), v.standing()
	d := fencing.Decide(s, v.moment(false))
	epoch := fmt.Sprint(uint64(s.Epoch))
	switch d.State {
	case fencing.StateLeaving, fencing.StateSuperseded, fencing.StateTakingOver:
		epoch = "none"
	}
	text := fmt.Sprintf("epoch %s\nVM %s is protected by Switchback (epoch %d): %s\n", epoch, as.Name, s.Epoch, v.remedy(as, d))
	v.granting.Lock()
	defer v.granting.Unlock()
	v.mu.Lock()
	same := v.guard == text
	v.mu.Unlock()
	if same {
		return nil
	}
	if err := v.agent.writeGuardFile(as.VM, text); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.guard = text
	return nil
}

// remedy says what to do about a VM that may not be started.
func (v *vm) remedy(as Assignment, d fencing.Decision) string {
	switch d.State {
	case fencing.StateSuperseded:
		return fmt.Sprintf("%s; to run it here, fail back with 'switchback vm failback %s'", d.Why, as.Name)
	case fencing.StateLeaving:
		return d.Why + ": wait for the operation, or cancel it: 'switchback vm cancel " + as.Name + "'"
	case fencing.StateTakingOver:
		return "another site may still run it until its lease has ended: wait for the operation that moves it (switchback operation list)"
	}
	return fmt.Sprintf("before a start the server or the agent of site %s must confirm that it is active here. Start the switchback agent and mend its way to one of them; "+
		"where nobody can be reached and nobody else runs it: switchback agent override %s --reason WHY", as.Peer.Site, as.Name)
}

// releaseGrant ends what stood in the way of libvirt's own starts.
func (v *vm) releaseGrant(ctx context.Context, defined bool) error {
	a, as := v.agent, v.assignment()
	if as.VM == "" {
		return nil
	}
	if defined && as.Role.Owns() && as.Autostart {
		if err := a.hv.SetAutostart(ctx, as.VM, true); err != nil {
			return err
		}
	}
	for _, kind := range []string{"begun", "ended"} {
		if err := a.removeRun(kind, as.VM); err != nil {
			return err
		}
	}
	return v.dropGrant()
}

// ownership is how the VM stands with its right to run, and what is wrong with it.
func (v *vm) ownership() (*agentapi.Ownership, []switchback.Condition) {
	as, s := v.assignment(), v.standing()
	if as.VM == "" || !s.Role.Owns() && !s.Contested {
		return nil, nil
	}
	m := v.moment(false)
	d := fencing.Decide(s, m)
	v.mu.Lock()
	powered := v.powered
	o := &agentapi.Ownership{State: d.State, Why: d.Why, ConfirmedBy: m.Grant.By, ConfirmedAt: v.confirmed, Autostart: as.Autostart}
	v.mu.Unlock()
	if m.Grant.Until != 0 {
		o.LeaseSeconds = max(0, m.Grant.Until.Sub(m.Now).Seconds())
	}
	since := as.heldSince(m)
	var list []switchback.Condition
	add := func(name string, severity switchback.Severity, cause, remedy string, at time.Time) {
		list = append(list, switchback.Condition{Name: name, Severity: severity, Cause: cause, Remedy: remedy, Since: at})
	}
	switch d.State {
	case fencing.StateHeld:
		if powered {
			add("running-unconfirmed", switchback.SeverityWarning, "the VM runs, though "+d.Why, "mend the way of this agent to the server or to its peer", since)
			break
		}
		remedy := v.remedy(as, d)
		if after := s.Policy.StartUnconfirmedAfter; after > 0 {
			remedy += fmt.Sprintf("; by its policy it may start unconfirmed %v after the boot", after)
		}
		add("start-held", switchback.SeverityWarning, "the VM is held: "+d.Why, remedy, since)
	case fencing.StateLeaseEnded:
		add("lease-ended", switchback.SeverityCritical, "the VM does not run: "+d.Why, v.remedy(as, d), since)
	case fencing.StateSuperseded:
		add("superseded", switchback.SeverityCritical, d.Why, "it is fenced here; nothing is to be done", since)
	case fencing.StateContested:
		o.Override = &agentapi.Override{Reason: as.Override.Reason, By: as.Override.By, At: as.Override.At, Epoch: as.Override.Epoch}
		add("contested", switchback.SeverityCritical, fmt.Sprintf("the VM was let start at site %s by hand, by %s, with nobody's confirmation: %s", v.agent.site(), as.Override.By, as.Override.Reason),
			fmt.Sprintf("look at both copies and name the winner: switchback vm resolve %s --winner SITE", as.Name), as.Override.At)
	case fencing.StateGranted:
		if m.Grant.By == fencing.ByPolicy {
			add("running-unconfirmed", switchback.SeverityWarning, "nobody has confirmed that the VM is active here; its policy lets it start all the same",
				"mend the way of this agent to the server or to its peer", since)
		}
	}
	return o, list
}

// heldSince is when this boot began, as a time of day.
func (x *Assignment) heldSince(m fencing.Moment) time.Time {
	return time.Now().Add(-m.Now.Sub(m.Up)).Truncate(time.Second)
}

// serverError is why the server does not say who is active; nil when it does.
func (a *Agent) serverError() error {
	a.asks.mu.Lock()
	defer a.asks.mu.Unlock()
	return a.asks.err
}

// serverReached asks the server anything.
func (a *Agent) serverReached() bool {
	c, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	_, err := transport.Call[agentapi.OwnershipAnswer](c, a.server, http.MethodPost, "https://"+a.servers.address()+"/v1/agents/ownership", agentapi.OwnershipQuestion{})
	return err == nil
}

func ruling(e switchback.Epoch, site switchback.SiteID) fencing.Ruling {
	return fencing.Ruling{Epoch: e, Site: site}
}

// grantContested lets the hook pass what an override allows.
func (v *vm) grantContested() error {
	as, s := v.assignment(), v.standing()
	if d := fencing.Decide(s, v.moment(false)); d.Act == fencing.ActGrant {
		if err := v.setGrant(as.VM, d.Grant, true); err != nil {
			return err
		}
	}
	if err := v.writeGuard(); err != nil {
		return err
	}
	return v.agent.clearFence(as.VM)
}

// named finds a VM by name, UUID or protection.
func (a *Agent) named(name string) (*vm, error) {
	var found []*vm
	for _, v := range a.all() {
		if as := v.assignment(); as.Name == name || string(as.VM) == name || string(as.Protection) == name {
			found = append(found, v)
		}
	}
	if len(found) != 1 {
		known := map[string]bool{}
		for _, v := range a.all() {
			known[v.assignment().Name] = true
		}
		return nil, switchback.Errorf(switchback.CodeNotFound, "%d VMs of this agent are called %q", len(found), name).
			WithHint("it looks after %v", slices.Sorted(maps.Keys(known)))
	}
	return found[0], nil
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/transport"
)

// setGrant writes a grant, unless the one that stands is better. always replaces any.
func (v *vm) setGrant(id switchback.VMUUID, g fencing.Grant, always bool) error {
	v.granting.Lock()
	defer v.granting.Unlock()
	return v.putGrant(id, g, always)
}

// putGrant is setGrant for who holds v.granting.
func (v *vm) putGrant(id switchback.VMUUID, g fencing.Grant, always bool) error {
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

// setFencing changes the policy of a VM that is active here, and its grant with it:
// at no moment does the policy of a lease stand beside a grant without one.
// next is how it is to stand; of that only the policy is written.
func (v *vm) setFencing(ctx context.Context, next fencing.Standing) error {
	p := next.Policy
	write := func() error { return v.change(func(x *Assignment) { x.Policy.Fencing = p }) }
	if next.Contested {
		return write()
	}
	g, err := v.seekGrant(ctx, next)
	if err != nil {
		return err
	}
	v.granting.Lock()
	defer v.granting.Unlock()
	if p.Lease == 0 { // one that had a lease: until its grant is written it goes on
		if err := write(); err != nil {
			return err
		}
		return v.putGrant(v.assignment().VM, g, true)
	}
	if err := v.putGrant(v.assignment().VM, g, true); err != nil {
		return err
	}
	return write()
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
	g, err := v.seekGrant(ctx, next)
	if err != nil {
		return err
	}
	return v.setGrant(id, g, true)
}

// seekGrant is the grant for a VM that stands as next by a command of the server.
func (v *vm) seekGrant(ctx context.Context, next fencing.Standing) (g fencing.Grant, err error) {
	a := v.agent
	if next.Policy.Lease == 0 {
		return fencing.Grant{Epoch: next.Epoch, Boot: a.boot.name, By: fencing.ByCommand}, nil
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
		g = fencing.Confirm(next, a.boot.name, asked, by)
		return nil
	}
	err = errors.New("the agent knows no server")
	if a.cfg.ServerAddress != "" {
		if err = try(a.server, "https://"+a.servers.address()+"/v1/agents/ownership", "server"); err == nil {
			return g, nil
		}
	}
	if peer.Agent != "" {
		perr := try(a.peerClient(peer.Agent), "https://"+peer.Address+"/v1/ownership", string(peer.Agent))
		if perr == nil {
			return g, nil
		}
		err = errors.Join(err, perr)
	}
	return g, switchback.Errorf(switchback.CodeUnavailable, "nobody gives a lease for %s: %w", v.assignment().Name, err).
		WithHint("mend the way from this agent to the server or to the agent of site %s", peer.Site)
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

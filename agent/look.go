package agent

import (
	"context"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/hypervisor"
)

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

// look decides about one VM and acts. Actions have their own order of things:
// nothing is done while one is at work. Leases end elsewhere (watchLeases).
func (v *vm) look(ctx context.Context) error {
	a := v.agent
	if as := v.assignment(); as.VM == "" || as.Role == "" {
		return nil
	}
	if !v.act.TryLock() {
		return nil
	}
	defer v.act.Unlock()
	s, as := v.standing(), v.assignment()
	if a.isForgotten(as.Protection) {
		return nil
	}
	v.mu.Lock()
	powered, flagged := v.powered, v.autostart
	v.mu.Unlock()
	d := fencing.Decide(s, v.moment(powered))
	if d.Act == fencing.ActGrant {
		a.log.Warn("granted without confirmation", "vm", as.Name, "by", d.Grant.By, "epoch", d.Grant.Epoch)
		if err := v.setGrant(as.VM, d.Grant, true); err != nil {
			return err
		}
		d = fencing.Decide(s, v.moment(powered))
	}
	switch d.State {
	case fencing.StateElsewhere:
		if err := v.dropGrant(); err != nil || d.Act != fencing.ActStop {
			return err
		}
		return v.enforceFence(ctx) // again, where it failed before
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

// begin starts what is to start with its host, once in each boot, and what the
// end of a lease had stopped. It holds the VM's lock.
func (v *vm) begin(ctx context.Context) error {
	v.beginning.Lock()
	defer v.beginning.Unlock()
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
func (v *vm) noteDomain(autostart, powered bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.autostart, v.powered = autostart && v.a.Role.Owns(), powered
}

func (v *vm) notePower(on bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.powered = on
}

// autostarts reports whether the agent starts a VM with its host.
func (a *Agent) autostarts(id switchback.VMUUID) bool {
	return slices.ContainsFunc(a.all(), func(v *vm) bool {
		as := v.assignment()
		return as.VM == id && as.Role.Owns() && as.Autostart
	})
}

package agent

import (
	"context"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/replicator"
)

func (a *Agent) describe(ctx context.Context, _ *task, _ agentapi.Task, p agentapi.DescribeParams) (any, error) {
	r := agentapi.DescribeResult{Storage: a.storage()}
	dom, err := a.hv.Domain(ctx, p.VM)
	if switchback.CodeOf(err) == switchback.CodeNotFound && !p.MustExist {
		return r, nil
	}
	if err != nil {
		return nil, err
	}
	r.Domain = dom
	r.Domain.Autostart = dom.Autostart || a.autostarts(p.VM)
	if p.AskAgent && dom.State == hypervisor.StateRunning {
		r.GuestAgent = a.hv.AgentPing(ctx, p.VM, time.Second) == nil
	}
	r.Definition, err = a.hv.Definition(ctx, p.VM, false)
	return r, err
}

// roleIs refuses an action that does not fit what the agent does for the VM.
func (v *vm) roleIs(roles ...agentapi.Role) error {
	a := v.assignment()
	for _, r := range roles {
		if a.Role == r {
			return nil
		}
	}
	return switchback.Errorf(switchback.CodeConflict, "the agent's role for %s is %q under epoch %d, the action needs %v", a.Name, a.Role, a.Epoch, roles)
}

func (a *Agent) replicate(ctx context.Context, _ *task, req agentapi.Task, p agentapi.ReplicateParams) (any, error) {
	v := a.ensureVM(req.Protection)
	v.act.Lock()
	defer v.act.Unlock()
	if err := v.checkEpoch(req.Epoch); err != nil {
		return nil, err
	}
	dom, err := a.hv.Domain(ctx, p.VM)
	if err != nil {
		return nil, err
	}
	disks, err := hypervisor.Protectable(dom)
	if err != nil {
		return nil, err
	}
	if v.assignment().Role == "" { // a VM that is here already takes no more room
		if err := a.diskRoom(req.Protection, len(disks)); err != nil {
			return nil, err
		}
	}
	v.stopEngine()
	// Granted before it counts: a VM under a lease is not to be without one for a moment.
	next := v.standing()
	next.Policy = p.Policy.Fencing
	next = next.Become(agentapi.RoleSource, req.Epoch)
	if s := v.standing(); s.Role.Owns() && s.Policy != next.Policy {
		if err := v.setFencing(ctx, next); err != nil {
			return nil, err
		}
	}
	if err := v.allow(ctx, p.VM, next); err != nil {
		return nil, err
	}
	err = v.change(func(as *Assignment) {
		must := map[string]extent.Set{}
		for _, d := range disks {
			if p.SendAll {
				must[d.Name] = extent.NewSet(extent.Range{Length: d.SizeBytes})
			} else {
				must[d.Name] = as.MustSend[d.Name]
			}
		}
		as.VM, as.Name, as.Peer = p.VM, p.Name, p.Peer
		as.become(agentapi.RoleSource, req.Epoch)
		as.Autostart = as.Autostart || dom.Autostart
		as.Policy, as.Held, as.Disks, as.MustSend, as.Rest, as.Run = p.Policy, false, disks, must, nil, nil
		as.ReplicaDir, as.ShutdownUntil = "", time.Time{}
	})
	if err != nil {
		return nil, err
	}
	if err := v.writeGuard(); err != nil {
		return nil, err
	}
	if err := a.clearFence(p.VM); err != nil {
		return nil, err
	}
	if err := v.keepAutostart(ctx, dom); err != nil {
		return nil, err
	}
	return nil, v.startEngine(a.tasks.ctx)
}

func joinReasons(list []string) string {
	s := list[0]
	for _, x := range list[1:] {
		s += "; " + x
	}
	return s
}

func (a *Agent) awaitPoint(ctx context.Context, t *task, req agentapi.Task, _ struct{}) (any, error) {
	v, err := a.vm(req.Protection)
	if err != nil {
		return nil, err
	}
	for {
		if err := v.checkEpoch(req.Epoch); err != nil {
			return nil, err
		}
		if err := v.roleIs(agentapi.RoleSource); err != nil {
			return nil, err
		}
		e := v.running()
		if e == nil {
			return nil, switchback.Errorf(switchback.CodeUnavailable, "replication of %s does not run", v.assignment().Name)
		}
		s := e.Status()
		if s.LastPoint != nil && s.LastPoint.Epoch == req.Epoch && s.LastCycle != nil {
			return agentapi.AwaitPointResult{Point: *s.LastPoint, Report: *s.LastCycle}, nil
		}
		message := "waiting for the first point"
		if len(s.Conditions) > 0 {
			message = s.Conditions[0].Cause
		}
		t.Report(message, s.Progress)
		sleep(ctx, 200*time.Millisecond)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
}

// engineFor returns the engine, made if the agent has none (held source after a restart).
func (v *vm) engineFor() (*replicator.Engine, error) {
	if e := v.running(); e != nil {
		return e, nil
	}
	if err := v.startEngine(v.agent.tasks.ctx); err != nil {
		return nil, err
	}
	if e := v.running(); e != nil {
		return e, nil
	}
	return nil, switchback.Errorf(switchback.CodeRefused, "no points are taken of %s: it is contested, or active elsewhere", v.assignment().Name).
		WithHint("see 'switchback vm show'")
}

func (a *Agent) takePoint(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.TakePointParams) (any, error) {
	e, err := v.engineFor()
	if err != nil {
		return nil, err
	}
	defer a.showProgress(ctx, t, e)()
	r, err := e.Cycle(ctx, replicator.CycleOptions{ApplicationConsistent: p.ApplicationConsistent})
	return agentapi.PointResult{Report: r}, err
}

// showProgress copies the engine's progress to the task until the returned function is called.
func (a *Agent) showProgress(ctx context.Context, t *task, e *replicator.Engine) func() {
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		for ctx.Err() == nil {
			s := e.Status()
			t.Report(s.Activity, s.Progress)
			sleep(ctx, 200*time.Millisecond)
		}
	}()
	return cancel
}

func (a *Agent) hold(ctx context.Context, _ *task, v *vm, req agentapi.Task, _ struct{}) (any, error) {
	if err := v.change(func(as *Assignment) { as.Held = true }); err != nil {
		return nil, err
	}
	v.holdEngine()
	return nil, nil
}

func (a *Agent) shutdown(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.ShutdownParams) (any, error) {
	as := v.assignment()
	if err := v.change(func(x *Assignment) { x.Leaving = true }); err != nil {
		return nil, err
	}
	if err := v.writeGuard(); err != nil {
		return nil, err
	}
	dom, err := a.hv.Domain(ctx, as.VM)
	if err != nil {
		return nil, err
	}
	r := agentapi.ShutdownResult{WasRunning: dom.State != hypervisor.StateOff}
	t.Report("waiting for the guest to power off", nil)
	if dom.State == hypervisor.StatePaused {
		if err := a.hv.Resume(ctx, as.VM); err != nil {
			return nil, err
		}
	}
	// Durable before the guest is asked: it may go down long after we gave up.
	until := time.Now().Add(p.Deadline)
	if err := v.change(func(x *Assignment) { x.ShutdownUntil = until }); err != nil {
		return nil, err
	}
	if err := a.hv.Shutdown(ctx, as.VM, hypervisor.ShutdownOptions{Deadline: p.Deadline, Force: p.Force}); err != nil {
		return nil, err
	}
	if dom, err = a.hv.Domain(ctx, as.VM); err != nil {
		return nil, err
	}
	if dom.State != hypervisor.StateOff {
		return nil, switchback.Errorf(switchback.CodeConflict, "VM %s is %s after its shutdown", as.Name, dom.State)
	}
	r.OffAt = time.Now()
	return r, nil
}

func (a *Agent) finalPoint(ctx context.Context, t *task, v *vm, req agentapi.Task, _ struct{}) (any, error) {
	v.holdEngine()
	e, err := v.engineFor()
	if err != nil {
		return nil, err
	}
	as := v.assignment()
	stop := a.showProgress(ctx, t, e)
	before, err := identifyAll(as.Disks)
	if err != nil {
		return nil, err
	}
	r, err := e.Cycle(ctx, replicator.CycleOptions{Offline: true})
	stop()
	if err != nil {
		return nil, err
	}
	after, err := identifyAll(as.Disks)
	if err != nil {
		return nil, err
	}
	for name := range before {
		if before[name] != after[name] {
			return nil, switchback.Errorf(switchback.CodeConflict, "disk %s of %s was written while its last changes were read", name, as.Name).
				WithHint("find out what else uses the disk, then try again")
		}
	}
	err = v.change(func(as *Assignment) { as.Rest = &Rest{Point: r.Point, Files: after} })
	return agentapi.PointResult{Report: r}, err
}

func identifyAll(disks []switchback.Disk) (map[string]FileIdentity, error) {
	m := map[string]FileIdentity{}
	for _, d := range disks {
		id, err := identify(d.Path)
		if err != nil {
			return nil, err
		}
		m[d.Name] = id
	}
	return m, nil
}

func (a *Agent) fence(ctx context.Context, _ *task, v *vm, req agentapi.Task, p agentapi.FenceParams) (any, error) {
	return nil, v.fenceHere(ctx, req.Epoch, p.ActiveSite, false)
}

// fenceHere makes this the side where the VM is not active. One that runs is
// turned off where stop says so, and otherwise a refusal.
func (v *vm) fenceHere(ctx context.Context, epoch switchback.Epoch, active switchback.SiteID, stop bool) error {
	a, as := v.agent, v.assignment()
	v.stopEngine()
	dom, err := a.hv.Domain(ctx, as.VM)
	absent := switchback.CodeOf(err) == switchback.CodeNotFound
	if err != nil && !absent {
		return err
	}
	if as.Role == agentapi.RoleSource && !absent && dom.State != hypervisor.StateOff && !stop {
		return switchback.Errorf(switchback.CodeConflict, "VM %s is %s: it must be off before it is fenced", as.Name, dom.State)
	}
	message := fmt.Sprintf("VM %s is active at site %s (epoch %d); to run it here, fail back to this site with 'switchback vm failback %s'",
		as.Name, active, epoch, as.Name)
	if err := a.setFence(as.VM, message); err != nil {
		return err
	}
	// Off before the role changes: who is still superseded tries the whole again.
	if !absent {
		if err := v.enforceFence(ctx); err != nil {
			return err
		}
		if err := v.keepAutostart(ctx, dom); err != nil {
			return err
		}
	}
	err = v.change(func(x *Assignment) {
		x.become(agentapi.RoleFenced, epoch)
		x.Held = false
	})
	if err != nil {
		return err
	}
	return v.dropGrant()
}

func (a *Agent) reinstate(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.ReinstateParams) (any, error) {
	v.stopEngine()
	as := v.assignment()
	if err := v.allow(ctx, as.VM, v.standing().Become(agentapi.RoleSource, req.Epoch)); err != nil {
		return nil, err
	}
	if err := v.change(func(x *Assignment) { x.become(agentapi.RoleSource, req.Epoch); x.Held, x.Rest = false, nil }); err != nil {
		return nil, err
	}
	if err := v.writeGuard(); err != nil {
		return nil, err
	}
	if err := a.clearFence(as.VM); err != nil {
		return nil, err
	}
	if p.Start {
		dom, err := v.settleShutdown(ctx, t)
		if err != nil {
			return nil, err
		}
		switch dom.State {
		case hypervisor.StateOff:
			if err := a.hv.Start(ctx, as.VM, false); err != nil {
				return nil, err
			}
		case hypervisor.StatePaused:
			if err := a.hv.Resume(ctx, as.VM); err != nil {
				return nil, err
			}
		}
	}
	if err := v.change(func(x *Assignment) { x.ShutdownUntil = time.Time{} }); err != nil {
		return nil, err
	}
	return nil, v.startEngine(a.tasks.ctx)
}

// settleShutdown waits, as long as the guest was given, for one that has been
// asked to power off and still runs: it will be off soon, and a start now would
// find it running.
func (v *vm) settleShutdown(ctx context.Context, t *task) (hypervisor.Domain, error) {
	as := v.assignment()
	until := as.ShutdownUntil
	if least := time.Now().Add(3 * time.Second); !until.IsZero() && until.Before(least) {
		until = least
	}
	for {
		dom, err := v.agent.hv.Domain(ctx, as.VM)
		if err != nil || dom.State == hypervisor.StateOff || dom.State == hypervisor.StatePaused || time.Now().After(until) {
			return dom, err
		}
		t.Report("the guest was asked to power off: waiting for that, to start it again", nil)
		sleep(ctx, 200*time.Millisecond)
		if ctx.Err() != nil {
			return dom, ctx.Err()
		}
	}
}

func (a *Agent) setPolicy(ctx context.Context, _ *task, v *vm, req agentapi.Task, p agentapi.SetPolicyParams) (any, error) {
	as := v.assignment()
	if as.Role == agentapi.RoleTarget {
		if err := a.checkStorage(p.Policy); err != nil {
			return nil, err
		}
	}
	if as.Role.Owns() && p.Policy.Fencing != as.Policy.Fencing {
		next := v.standing()
		next.Policy = p.Policy.Fencing
		if err := v.setFencing(ctx, next); err != nil {
			return nil, err
		}
	}
	if err := v.change(func(x *Assignment) { x.Policy, x.Held = p.Policy, p.Paused }); err != nil {
		return nil, err
	}
	if as.Role == agentapi.RoleTarget && as.ReplicaDir != "" {
		replica, err := v.openReplica()
		if err != nil {
			return nil, err
		}
		return nil, a.applySealing(replica, p.Policy)
	}
	if as.Role != agentapi.RoleSource {
		return nil, nil
	}
	v.stopEngine()
	return nil, v.startEngine(a.tasks.ctx)
}

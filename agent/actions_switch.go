package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/qemu"
)

// freeze keeps every point from now on: one of them is about to be chosen.
func (a *Agent) freeze(_ context.Context, _ *task, v *vm, req agentapi.Task, _ struct{}) (any, error) {
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	if err := replica.SetRetentionFrozen(true); err != nil {
		return nil, err
	}
	v.stopFolding() // what runs would drop points that can be seen now
	return nil, nil
}

// activate makes the new side own the epoch, durably, before anything starts.
func (a *Agent) activate(ctx context.Context, _ *task, v *vm, req agentapi.Task, p agentapi.ActivateParams) (any, error) {
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	// A drill that slipped in keeps nothing waiting: it is tried again later.
	if err := v.clearDrills(ctx); err != nil {
		a.log.Error("a drill cannot be cleared before the VM becomes active", "protection", req.Protection, "error", err)
	}
	if err := replica.SetEpoch(req.Epoch); err != nil {
		return nil, err
	}
	return nil, v.change(func(x *Assignment) {
		if x.Role == agentapi.RoleActive && x.Epoch == req.Epoch {
			if !p.Unproven {
				x.Takeover = nil // the old side was seen off since
			}
			return // its wait has begun
		}
		x.become(agentapi.RoleActive, req.Epoch)
		if wait := fencing.TakeoverWait(x.Policy.Fencing); p.Unproven && wait > 0 {
			x.Takeover = &fencing.Takeover{Epoch: req.Epoch, Boot: a.boot.name, Since: hostClock(), Wait: wait}
		}
	})
}

// start runs the VM from the view at a point. Each part finds out whether it
// was done before.
func (a *Agent) start(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.StartParams) (any, error) {
	as := v.assignment()
	if as.Run != nil && as.Run.Sequence != p.Sequence {
		return nil, switchback.Errorf(switchback.CodeConflict, "VM %s was started from point %d, not %d", as.Name, as.Run.Sequence, p.Sequence)
	}
	if as.Run == nil {
		if err := v.planRun(ctx, req.Epoch, p); err != nil {
			return nil, err
		}
	}
	r, err := a.launch(ctx, t, v, p.Definition, p.Networks)
	if err != nil {
		return nil, err
	}
	return r, nil
}

// launch lets the guest run on what its run names. Each part finds out whether
// it was done before; a guest that runs is left alone.
func (a *Agent) launch(ctx context.Context, t *task, v *vm, definition string, networks map[string]string) (r agentapi.StartResult, err error) {
	as := v.assignment()
	run := as.Run
	if run.Started {
		dom, err := a.hv.Domain(ctx, as.VM)
		if err != nil {
			return r, err
		}
		if dom.State == hypervisor.StatePaused { // killed just before it was let run
			if err := v.allow(ctx, as.VM, v.standing()); err != nil {
				return r, err
			}
			if err := a.hv.Resume(ctx, as.VM); err != nil {
				return r, err
			}
		}
		if dom.State != hypervisor.StateOff {
			return agentapi.StartResult{RunningAt: run.StartedAt, Socket: run.Socket}, nil
		}
	}
	t.Report("opening the view", nil)
	if err := v.ensureView(ctx); err != nil {
		return r, err
	}
	// A half-started VM of an earlier attempt never ran: it was paused.
	dom, err := a.hv.Domain(ctx, as.VM)
	if err == nil && dom.State != hypervisor.StateOff && !run.Started {
		if err := a.hv.Destroy(ctx, as.VM); err != nil {
			return r, err
		}
	}
	if err == nil && !run.Started {
		if err := a.hv.DeleteCheckpoint(ctx, as.VM, run.Checkpoint); err != nil {
			return r, err
		}
	}
	written := map[string]extent.Set{} // by earlier runs, below the overlays
	if run.Snapshot != "" && !run.Started {
		if written, err = journal.BranchChanged(as.ReplicaDir, run.Snapshot); err != nil {
			return r, err
		}
	}
	sources := map[string]hypervisor.DiskSource{}
	for _, d := range as.Disks {
		path := run.Overlays[d.Name]
		backing := backingURI(d.Name, run.Socket)
		if !run.Started {
			os.Remove(path)
			if err := qemu.Create(ctx, path, qemu.CreateOptions{Format: "qcow2", SizeBytes: d.SizeBytes, Backing: backing, BackingFormat: "raw"}); err != nil {
				return r, err
			}
		}
		sources[d.Name] = hypervisor.DiskSource{Path: path, Format: "qcow2", BackingSocket: run.Socket, BackingExport: d.Name}
	}
	definition, err = a.hv.Translate(definition, hypervisor.Translation{Disks: sources, Networks: networks})
	if err != nil {
		return r, err
	}
	if err := v.awaitTakeover(ctx, t); err != nil {
		return r, err
	}
	if err := v.allow(ctx, as.VM, v.standing()); err != nil {
		return r, err
	}
	if err := v.writeGuard(); err != nil {
		return r, err
	}
	if err := a.clearFence(as.VM); err != nil {
		return r, err
	}
	if _, err := a.hv.Define(ctx, definition); err != nil {
		return r, err
	}
	t.Report("starting the guest", nil)
	if err := a.hv.Start(ctx, as.VM, true); err != nil {
		return r, err
	}
	now := time.Now()
	if !run.Started { // otherwise it was turned off since, and its bitmaps are in its images
		if err := a.hv.CreateCheckpoint(ctx, as.VM, run.Checkpoint, diskNames(as.Disks)); err != nil {
			return r, err
		}
		taskLine(t.req, killpoint.Within)
		// Started is made durable before the guest may write: from here on the
		// overlays are never made anew.
		if err := v.changeRun(func(r *Run) { r.Started, r.StartedAt, r.Written = true, now, written }); err != nil {
			return r, err
		}
	}
	if err := a.hv.Resume(ctx, as.VM); err != nil {
		return r, err
	}
	if as.Takeover != nil { // it has waited, and need not again
		if err := v.change(func(x *Assignment) { x.Takeover = nil }); err != nil {
			return r, err
		}
	}
	v.clearCondition("view-lost") // it has a view again, and has begun anew on it
	a.tasks.wg.Go(func() { v.superviseView(a.tasks.ctx, run.Epoch) })
	return agentapi.StartResult{RunningAt: now, Socket: run.Socket}, nil
}

// backingURI is where an overlay finds the view of a disk.
func backingURI(disk, socket string) string {
	return fmt.Sprintf("nbd+unix:///%s?socket=%s", disk, socket)
}

func diskNames(disks []switchback.Disk) []string {
	var names []string
	for _, d := range disks {
		names = append(names, d.Name)
	}
	return names
}

// planRun decides what the VM will run on and makes that durable, with the pin
// and the definition that stood here before.
func (v *vm) planRun(ctx context.Context, epoch switchback.Epoch, p agentapi.StartParams) error {
	a, as := v.agent, v.assignment()
	replica, err := v.openReplica()
	if err != nil {
		return err
	}
	run := v.newRun(epoch, p.Sequence)
	if err := replica.Pin(run.Pin, p.Sequence, map[string]string{"vm": as.Name, "for": "uncommitted VM"}); err != nil {
		return err
	}
	old, err := a.hv.Definition(ctx, as.VM, false)
	if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
		return err
	}
	run.Previous, run.ConsoleFrom = old, a.consoleSize(p.Definition)
	return v.change(func(x *Assignment) { x.Run, x.Autostart = run, p.Autostart })
}

// ensureView serves the view of an uncommitted VM from a process of its own
// that outlives this agent. A view that is being served is left alone.
func (v *vm) ensureView(ctx context.Context) error {
	as := v.assignment()
	if as.Run == nil || as.Run.Viewless || as.Change != nil {
		return nil
	}
	return v.serveView(ctx, as.Run.Sequence, as.Run.Snapshot, as.Run.Socket, "switchback-view-"+string(as.Protection))
}

// serveView serves the view of a point of the VM's replica, or of a snapshot
// that left it, on a socket, unless it is served already. name is of the process's unit and log.
func (v *vm) serveView(ctx context.Context, point switchback.Sequence, snapshot, socket, name string) error {
	if c, err := net.Dial("unix", socket); err == nil {
		return c.Close()
	}
	os.Remove(socket)
	args := []string{v.agent.cfg.Executable, "export", "--replica", v.assignment().ReplicaDir, "--point", fmt.Sprint(point), "--socket", socket,
		"--pid-file", socket + ".pid"}
	if snapshot != "" {
		args = append(args, "--snapshot", snapshot)
	}
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		// A scope of its own: stopping the agent's unit must not take the view away.
		args = append([]string{"systemd-run", "--scope", "--quiet", "--collect", "--unit", name}, args...)
	}
	logFile, err := os.OpenFile(filepath.Join(v.agent.cfg.LogDir, name+".log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the view: %w", err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	deadline := time.Now().Add(15 * time.Second)
	for {
		if c, err := net.Dial("unix", socket); err == nil {
			return c.Close()
		}
		select {
		case err := <-exited:
			return switchback.Errorf(switchback.CodeInternal, "the process that serves the view ended: %v", err).
				WithHint("see %s", logFile.Name())
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return switchback.Errorf(switchback.CodeTimeout, "the view does not answer on %s", socket).WithHint("see %s", logFile.Name())
		}
	}
}

// superviseView serves the view again when its process died, as long as the VM
// runs from it under that epoch. QEMU does not connect again by itself: the guest has met I/O
// errors and must be restarted, which the condition says.
func (v *vm) superviseView(ctx context.Context, epoch switchback.Epoch) {
	for ; ctx.Err() == nil; sleep(ctx, time.Second) {
		as := v.assignment()
		if as.Run == nil || as.Run.Viewless || as.Role != agentapi.RoleActive || as.Run.Epoch != epoch {
			return
		}
		if as.Change != nil {
			continue // it ends the view, and starts another
		}
		if c, err := net.Dial("unix", as.Run.Socket); err == nil {
			c.Close()
			continue
		}
		if !v.act.TryLock() {
			continue // an action is at work on the VM, perhaps just this
		}
		err := v.ensureView(ctx)
		v.act.Unlock()
		cause := "the process that serves the VM's disks died and was started again; the guest has met I/O errors since"
		if err != nil {
			cause = "the process that serves the VM's disks died and cannot be started again: " + err.Error()
		}
		v.agent.log.Error("the view was lost", "protection", as.Protection, "restarted", err == nil, "error", err)
		v.setCondition(&switchback.Condition{Name: "view-lost", Severity: switchback.SeverityCritical, Cause: cause, Since: time.Now(),
			Remedy: "power the VM off and on again (virsh destroy, virsh start), or cancel the switch; commit as soon as it is well"})
	}
}

// stopView ends the process that serves the view and waits until it is gone.
func (v *vm) stopView(run *Run) error { return stopExport(run.Socket) }

func stopExport(socket string) error {
	pidFile := socket + ".pid"
	b, err := os.ReadFile(pidFile)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return err
	}
	var pid int
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		return fmt.Errorf("pid file %s: %w", pidFile, err)
	}
	for i := 0; ; i++ {
		cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || !strings.Contains(string(cmdline), socket) {
			break // gone, or the number is another process's now
		}
		if i == 0 {
			if err := syscall.Kill(pid, syscall.SIGTERM); err != nil && err != syscall.ESRCH {
				return err
			}
		}
		if i > 1000 {
			return switchback.Errorf(switchback.CodeTimeout, "the process %d that serves the view does not end", pid)
		}
		time.Sleep(5 * time.Millisecond)
	}
	os.Remove(socket)
	return durable.Remove(pidFile)
}

func (a *Agent) check(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.CheckParams) (any, error) {
	as := v.assignment()
	r := agentapi.CheckResult{GuestAgent: "not asked"}
	until := time.Now().Add(p.Settle)
	for {
		dom, err := a.hv.Domain(ctx, as.VM)
		if err != nil {
			return nil, err
		}
		if dom.State != hypervisor.StateRunning {
			return nil, switchback.Errorf(switchback.CodeRefused, "VM %s is %s %s after its start", as.Name, dom.State, dom.PauseReason).
				WithHint("cancel the failover, or look at the guest's console and retry")
		}
		r.Running = true
		if time.Now().After(until) {
			break
		}
		t.Report("watching the guest", nil)
		sleep(ctx, 200*time.Millisecond)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	if p.AgentTimeout > 0 {
		t.Report("waiting for the guest agent", nil)
		r.GuestAgent = "silent"
		for until := time.Now().Add(p.AgentTimeout); time.Now().Before(until) && ctx.Err() == nil; sleep(ctx, 100*time.Millisecond) {
			if a.hv.AgentPing(ctx, as.VM, time.Second) == nil {
				r.GuestAgent = "answered"
				break
			}
		}
		dom, err := a.hv.Domain(ctx, as.VM)
		if err != nil {
			return nil, err
		}
		if dom.State != hypervisor.StateRunning {
			return nil, switchback.Errorf(switchback.CodeRefused, "VM %s is %s %s while it boots", as.Name, dom.State, dom.PauseReason).
				WithHint("cancel the failover, or look at the guest's console and retry")
		}
	}
	return r, ctx.Err()
}

// abandon turns the new side off again (undo): its writes are kept beside the
// replica, the definition that stood here before returns, the replica takes
// points under the new epoch.
func (a *Agent) abandon(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.FenceParams) (any, error) {
	as := v.assignment()
	message := fmt.Sprintf("VM %s is active at site %s (epoch %d); this site is its recovery target", as.Name, p.ActiveSite, req.Epoch)
	if err := a.setFence(as.VM, message); err != nil {
		return nil, err
	}
	if run := as.Run; run != nil {
		t.Report("stopping the guest", nil)
		if err := a.hv.Destroy(ctx, as.VM); err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
			return nil, err
		}
		if err := a.hv.Undefine(ctx, as.VM); err != nil {
			return nil, err
		}
		if run.Previous != "" {
			if _, err := a.hv.Define(ctx, run.Previous); err != nil {
				return nil, err
			}
			if err := a.hv.SetAutostart(ctx, as.VM, false); err != nil {
				return nil, err
			}
		}
		if err := v.stopView(run); err != nil {
			return nil, err
		}
		kept, ok, err := v.setAside(ctx, as, run)
		if err != nil {
			return nil, err
		}
		taskLine(t.req, killpoint.Within)
		err = v.change(func(x *Assignment) {
			if ok {
				x.Snapshots = append(without(x.Snapshots, kept.Name), kept)
			}
			x.Run, x.Change = nil, nil
		})
		if err != nil {
			return nil, err
		}
	}
	if err := v.tidyPins(); err != nil {
		return nil, err
	}
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	if err := replica.SetEpoch(req.Epoch); err != nil {
		return nil, err
	}
	if err := replica.SetRetentionFrozen(false); err != nil {
		return nil, err
	}
	if err := v.change(func(x *Assignment) { x.become(agentapi.RoleTarget, req.Epoch); x.Run, x.Change = nil, nil }); err != nil {
		return nil, err
	}
	v.branchLater()
	return nil, v.dropGrant()
}

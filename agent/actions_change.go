package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/replicator"
)

// Change is the intention of moving an uncommitted VM to another state. It is
// durable from before its guest is stopped until the next run is planned. A
// newer one, under a newer epoch, replaces it.
type Change struct {
	Epoch    switchback.Epoch    `json:"epoch"`
	Sequence switchback.Sequence `json:"sequence"`
	// Snapshot names the kept writes to go on from; empty: the point as it is.
	Snapshot string `json:"snapshot,omitempty"`
	// Definition is the VM's, as it stood here before the change.
	Definition string `json:"definition"`
}

// changePoint stops an uncommitted VM, keeps what it wrote as a snapshot, and
// runs it from another point, or on from the writes of an earlier run. Each part
// finds out whether it was done before.
func (a *Agent) changePoint(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.ChangePointParams) (any, error) {
	as := v.assignment()
	if as.Run == nil || as.Run.Folded || as.Run.Abandoned != nil {
		return nil, switchback.Errorf(switchback.CodeRefused, "VM %s does not run from a recovery point here, or a commit has begun", as.Name).
			WithHint("a committed VM has no points: reprotect it and fail over to get new ones")
	}
	began := time.Now()
	keep := func() error {
		return v.keepBranches(ctx, func(done, total int64) { t.Report("moving the snapshot into the journal", rates(began, done, total)) })
	}
	if p.DryRun {
		// Now, while the guest runs and no epoch is minted: this may take longer than a lease.
		if p.Snapshot != "" {
			if err := keep(); err != nil {
				return nil, err
			}
		}
		_, err := v.checkChange(p)
		return agentapi.ChangePointResult{}, err
	}
	if as.Run.Epoch != req.Epoch {
		if p.Snapshot != "" { // the guest still runs: this costs no outage
			if err := keep(); err != nil {
				return nil, err
			}
		}
		if err := v.planChange(ctx, req.Epoch, p); err != nil {
			return nil, err
		}
		if err := v.nextRun(ctx, t, p); err != nil {
			return nil, err
		}
	}
	if err := v.tidyPins(); err != nil {
		return nil, err
	}
	run := v.assignment().Run
	started, err := a.launch(ctx, t, v, run.Definition, nil)
	if err != nil {
		return nil, err
	}
	v.branchLater()
	r := agentapi.ChangePointResult{RunningAt: started.RunningAt, OffAt: run.OffAt, Sequence: run.Sequence, SetAside: run.SetAside}
	return r, nil
}

// checkChange finds what would be in the way of a change, and the point that it leads to.
func (v *vm) checkChange(p agentapi.ChangePointParams) (switchback.Sequence, error) {
	as, seq := v.assignment(), p.Sequence
	if p.Snapshot != "" {
		s, ok := as.snapshot(p.Snapshot)
		switch {
		case !ok:
			return 0, switchback.Errorf(switchback.CodeNotFound, "there is no snapshot %s of %s here", p.Snapshot, as.Name).WithHint("'vm snapshots' lists them")
		case s.Dir != "":
			return 0, switchback.Errorf(switchback.CodeRefused, "snapshot %s is of before a commit: its point is gone", p.Snapshot).WithHint("it holds whole disks: switchback points export %s --snapshot %s", as.Name, p.Snapshot)
		case s.File != "":
			view, err := journal.OpenBranch(as.ReplicaDir, p.Snapshot)
			if err != nil {
				return 0, err
			}
			return s.Sequence, view.Close()
		}
		for disk, path := range s.Files {
			if _, err := os.Stat(path); err != nil {
				return 0, switchback.Errorf(switchback.CodeCorrupt, "snapshot %s lacks disk %s: %w", p.Snapshot, disk, err).WithHint("drop the snapshot, choose another")
			}
		}
		seq = s.Sequence
	}
	view, err := journal.OpenView(as.ReplicaDir, seq)
	if err != nil {
		return 0, err
	}
	return seq, view.Close()
}

// planChange checks what can be checked while the guest still runs and makes
// the intention durable.
func (v *vm) planChange(ctx context.Context, epoch switchback.Epoch, p agentapi.ChangePointParams) error {
	as := v.assignment()
	if as.Change != nil && as.Change.Epoch == epoch {
		return nil
	}
	seq, err := v.checkChange(p)
	if err != nil {
		return err
	}
	c := &Change{Epoch: epoch, Sequence: seq, Snapshot: p.Snapshot}
	replica, err := v.openReplica()
	if err != nil {
		return err
	}
	if err := replica.Pin(runPin(epoch), c.Sequence, map[string]string{"vm": as.Name, "for": "uncommitted VM"}); err != nil {
		return err
	}
	if as.Change != nil {
		c.Definition = as.Change.Definition // the domain may be gone already
	} else if c.Definition, err = v.agent.hv.Definition(ctx, as.VM, false); err != nil {
		return err
	}
	return v.change(func(x *Assignment) { x.Change = c; x.become(x.Role, epoch) })
}

// nextRun ends the present run and plans the one that the change asks for.
func (v *vm) nextRun(ctx context.Context, t *task, p agentapi.ChangePointParams) error {
	a, as := v.agent, v.assignment()
	run, c := as.Run, as.Change
	t.Report("stopping the guest", nil)
	dom, err := a.hv.Domain(ctx, as.VM)
	if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
		return err
	}
	if err == nil {
		if dom.State == hypervisor.StateRunning && p.ShutdownDeadline > 0 && run.Started {
			err = a.hv.Shutdown(ctx, as.VM, hypervisor.ShutdownOptions{Deadline: p.ShutdownDeadline, Force: true})
		} else if dom.State != hypervisor.StateOff {
			err = a.hv.Destroy(ctx, as.VM)
		}
		if err != nil {
			return err
		}
		if err := a.hv.Undefine(ctx, as.VM); err != nil { // its checkpoints go with it
			return err
		}
	}
	off := time.Now()
	if err := v.stopView(run); err != nil {
		return err
	}
	t.Report("setting aside what the guest wrote", nil)
	kept, ok, err := v.setAside(ctx, as, run)
	if err != nil {
		return err
	}
	replica, err := v.openReplica()
	if err != nil {
		return err
	}
	if err := replica.SetEpoch(c.Epoch); err != nil {
		return err
	}
	next := v.newRun(c.Epoch, c.Sequence)
	next.Previous, next.Definition, next.Snapshot, next.OffAt = run.Previous, c.Definition, c.Snapshot, off
	if ok {
		next.SetAside = kept.Name
	}
	return v.change(func(x *Assignment) {
		if ok {
			x.Snapshots = append(without(x.Snapshots, kept.Name), kept)
		}
		x.Run, x.Change = next, nil
		x.become(x.Role, c.Epoch)
	})
}

// newRun names what a VM will run on under an epoch.
func (v *vm) newRun(epoch switchback.Epoch, seq switchback.Sequence) *Run {
	a, as := v.agent, v.assignment()
	run := &Run{Epoch: epoch, Sequence: seq, Pin: runPin(epoch), Overlays: map[string]string{},
		Socket: filepath.Join(a.cfg.RunDir, string(as.Protection)+".view"), Checkpoint: replicator.CheckpointName(epoch, 0)}
	for _, d := range as.Disks {
		run.Overlays[d.Name] = filepath.Join(as.Dir, fmt.Sprintf("overlay-%d-%s.qcow2", epoch, d.Name))
	}
	return run
}

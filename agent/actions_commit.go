package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/qemu"
)

func (v *vm) changeRun(f func(*Run)) error {
	return v.change(func(x *Assignment) {
		r := *x.Run
		f(&r)
		x.Run = &r
	})
}

// fold makes the base stand for the chosen point. What later points had
// changed is fixed first: the way home needs it.
func (a *Agent) fold(ctx context.Context, t *task, v *vm, req agentapi.Task, _ struct{}) (any, error) {
	run := v.assignment().Run // nil: settled before
	if run == nil || run.Folded {
		return agentapi.FoldResult{}, nil
	}
	if err := v.settled(v.assignment()); err != nil {
		return nil, err
	}
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	if run.Snapshot != "" {
		if err := replica.CheckFoldBranch(run.Snapshot, run.Pin); err != nil {
			return nil, err
		}
	}
	if run.Abandoned == nil {
		if err := v.fixAbandoned(replica, run); err != nil {
			return nil, err
		}
	}
	t.Report("folding points into the base", nil)
	var bytes int64
	for _, p := range replica.Points() {
		if p.Sequence <= run.Sequence && p.Sequence > replica.Manifest().Base.Sequence {
			bytes += p.ChangedBytes
		}
	}
	if replica.Manifest().FoldedBranch == "" { // else it was done before a restart
		if err := replica.Fold(ctx, run.Sequence, v.openFoldWriter); err != nil {
			return nil, err
		}
	}
	if run.Snapshot != "" {
		t.Report("folding the snapshot into the base", nil)
		if err := replica.FoldBranch(ctx, run.Snapshot, v.openFoldWriter, run.Pin); err != nil {
			return nil, err
		}
		if s, ok := v.assignment().snapshot(run.Snapshot); ok {
			bytes += s.ChangedBytes
		}
	}
	taskLine(req, killpoint.Within)
	return agentapi.FoldResult{Bytes: bytes}, v.changeRun(func(r *Run) { r.Folded = true })
}

// collapse moves the VM from overlay and view onto the plain base, while it
// runs or at rest. Where each disk stands is read from its definition.
func (a *Agent) collapse(ctx context.Context, t *task, v *vm, req agentapi.Task, _ struct{}) (any, error) {
	run := v.assignment().Run // nil: settled before
	if run == nil {
		return agentapi.CollapseResult{}, nil
	}
	as := v.assignment()
	dom, err := a.hv.Domain(ctx, as.VM)
	if err != nil {
		return nil, err
	}
	r := agentapi.CollapseResult{Live: dom.State != hypervisor.StateOff}
	// The fold's writers of the bases are closed; QEMU takes them over.
	if err := v.closeBases(); err != nil {
		return nil, err
	}
	if !r.Live {
		if err := v.collapseAtRest(ctx, as, run); err != nil {
			return nil, err
		}
		return v.collapsed(r)
	}
	for _, d := range as.Disks {
		t.Report("moving disk "+d.Name+" off the view", nil)
		if err := v.copyOffView(ctx, d, run); err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	// Nobody reads the view any more: it goes before the base is written.
	if err := v.changeRun(func(r *Run) { r.Viewless = true }); err != nil {
		return nil, err
	}
	if err := v.stopView(run); err != nil {
		return nil, err
	}
	taskLine(req, killpoint.Within)
	for _, d := range as.Disks {
		t.Report("merging disk "+d.Name+" into its base", nil)
		if err := v.mergeIntoBase(ctx, d, run); err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	return v.collapsed(r)
}

func (v *vm) collapsed(r agentapi.CollapseResult) (any, error) {
	for _, n := range v.assignment().Run.CopiedBytes {
		r.CopiedBytes += n
	}
	return r, nil
}

func middlePath(run *Run, disk string) string { return run.Overlays[disk] + ".commit" }

// diskState returns the image a disk is on, and the images below.
func (v *vm) diskState(ctx context.Context, name string) (hypervisor.Disk, error) {
	dom, err := v.agent.hv.Domain(ctx, v.assignment().VM)
	if err != nil {
		return hypervisor.Disk{}, err
	}
	if dom.State == hypervisor.StateOff {
		return hypervisor.Disk{}, switchback.Errorf(switchback.CodeUnavailable, "VM %s was turned off during the commit; it goes on at rest", dom.Name)
	}
	for _, d := range dom.Disks {
		if d.Name == name {
			return d, nil
		}
	}
	return hypervisor.Disk{}, switchback.Errorf(switchback.CodeNotFound, "disk %s is not in VM %s", name, dom.Name)
}

// jobOf returns where a running disk stands and whether a block job works on it.
// The job is asked for first: one that a killed agent had told to pivot may end
// at any moment, and without a job the disk stays where it is.
func (v *vm) jobOf(ctx context.Context, disk string) (now hypervisor.Disk, job bool, err error) {
	_, err = v.agent.hv.BlockJob(ctx, v.assignment().VM, disk)
	if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
		return now, false, err
	}
	job = err == nil
	now, err = v.diskState(ctx, disk)
	return now, job, err
}

// copyOffView moves a running disk from overlay-on-view to a new image on the base.
func (v *vm) copyOffView(ctx context.Context, d switchback.Disk, run *Run) error {
	hv, vmID := v.agent.hv, v.assignment().VM
	now, job, err := v.jobOf(ctx, d.Name)
	if err != nil || now.Path != run.Overlays[d.Name] {
		return err
	}
	middle := middlePath(run, d.Name)
	if !job {
		if err := os.Remove(middle); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := qemu.Create(ctx, middle, qemu.CreateOptions{Format: "qcow2", Backing: d.Path, BackingFormat: "qcow2", SizeBytes: d.SizeBytes}); err != nil {
			return err
		}
		to := hypervisor.CopyTarget{Path: middle, Format: "qcow2", Backing: d.Path, BackingFormat: "qcow2", Shallow: true}
		if err := hv.BlockCopy(ctx, vmID, d.Name, to); err != nil {
			return err
		}
	}
	n, err := v.finishJob(ctx, d.Name)
	if err != nil {
		return err
	}
	if now, err = v.diskState(ctx, d.Name); err != nil {
		return err
	}
	if now.Path != middle {
		return switchback.Errorf(switchback.CodeInternal, "disk %s is on %s after the copy, expected %s", d.Name, now.Path, middle)
	}
	return v.changeRun(func(r *Run) {
		copied := map[string]int64{}
		for k, b := range r.CopiedBytes {
			copied[k] = b
		}
		copied[d.Name] += n
		r.CopiedBytes = copied
	})
}

// mergeIntoBase merges the image that a running disk is on into the base.
func (v *vm) mergeIntoBase(ctx context.Context, d switchback.Disk, run *Run) error {
	hv, vmID := v.agent.hv, v.assignment().VM
	now, job, err := v.jobOf(ctx, d.Name)
	if err != nil || now.Path == d.Path {
		return err
	}
	if !job {
		if err := hv.BlockCommit(ctx, vmID, d.Name); err != nil {
			return err
		}
	}
	if _, err := v.finishJob(ctx, d.Name); err != nil {
		return err
	}
	now, err = v.diskState(ctx, d.Name)
	if err != nil {
		return err
	}
	if now.Path != d.Path || len(now.Backing) > 0 {
		return switchback.Errorf(switchback.CodeInternal, "disk %s is on %s (backing %v) after the merge, expected %s alone", d.Name, now.Path, now.Backing, d.Path)
	}
	return nil
}

// pivotPatience is how long a pivot that a killed agent began may take.
const pivotPatience = 30 * time.Second

// finishJob waits for a block job to be ready and pivots; it returns what it
// copied. A job that is gone was pivoted, or failed, under an earlier run of the
// agent: the caller looks where the disk is.
func (v *vm) finishJob(ctx context.Context, disk string) (int64, error) {
	hv, vmID := v.agent.hv, v.assignment().VM
	var total int64
	var refused time.Time
	for {
		p, err := hv.BlockJob(ctx, vmID, disk)
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			return total, nil
		}
		if err != nil {
			return 0, err
		}
		total = p.Total
		if p.Ready {
			err := hv.BlockPivot(ctx, vmID, disk)
			if code := switchback.CodeOf(err); code != switchback.CodeConflict && code != switchback.CodeNotFound {
				return total, err
			}
			// The pivot of an earlier run is under way.
			if refused.IsZero() {
				refused = time.Now()
			} else if time.Since(refused) > pivotPatience {
				return 0, err
			}
		}
		sleep(ctx, 20*time.Millisecond)
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
}

// collapseAtRest does the same for a VM that is off, on the files.
func (v *vm) collapseAtRest(ctx context.Context, as Assignment, run *Run) error {
	definition, err := v.agent.hv.Definition(ctx, as.VM, false)
	if err != nil {
		return err
	}
	dom, err := v.agent.hv.Domain(ctx, as.VM)
	if err != nil {
		return err
	}
	sources := map[string]hypervisor.DiskSource{}
	copied := map[string]int64{}
	for _, d := range as.Disks {
		sources[d.Name] = hypervisor.DiskSource{Path: d.Path, Format: "qcow2"}
		top := ""
		for _, x := range dom.Disks {
			if x.Name == d.Name {
				top = x.Path
			}
		}
		if top == d.Path {
			continue
		}
		info, err := qemu.Info(ctx, top)
		if err != nil {
			return err
		}
		copied[d.Name] = info.ActualSizeBytes
		if err := qemu.Rebase(ctx, top, d.Path, "qcow2"); err != nil {
			return err
		}
		if err := qemu.Commit(ctx, top, d.Path); err != nil {
			return err
		}
		// The bitmap that knows what this life wrote moves to the base.
		for _, b := range info.Bitmaps {
			if b.Name != run.Checkpoint {
				continue
			}
			baseInfo, err := qemu.Info(ctx, d.Path)
			if err != nil {
				return err
			}
			if _, ok := baseInfo.Bitmap(b.Name); !ok {
				if err := qemu.AddBitmap(ctx, d.Path, b.Name, 0); err != nil {
					return err
				}
			}
			if err := qemu.MergeBitmap(ctx, d.Path, b.Name, b.Name, top); err != nil {
				return err
			}
		}
	}
	plain, err := v.agent.hv.Translate(definition, hypervisor.Translation{Disks: sources})
	if err != nil {
		return err
	}
	if _, err := v.agent.hv.Define(ctx, plain); err != nil {
		return err
	}
	if err := v.changeRun(func(r *Run) { r.Viewless, r.CopiedBytes = true, copied }); err != nil {
		return err
	}
	return v.stopView(run)
}

// settle ends the commit: the definition names the plain disks, what the way
// home must carry is durable, and the journal goes.
func (a *Agent) settle(ctx context.Context, _ *task, v *vm, req agentapi.Task, _ struct{}) (any, error) {
	run := v.assignment().Run // nil: settled before
	as := v.assignment()
	r := agentapi.SettleResult{Disks: as.Disks}
	for _, s := range as.MustSend {
		r.AbandonedBytes += s.Bytes()
	}
	if run == nil {
		return r, v.sweep(ctx) // what a crash after the change below has left
	}
	definition, err := a.hv.Definition(ctx, as.VM, false)
	if err != nil {
		return nil, err
	}
	sources := map[string]hypervisor.DiskSource{}
	for _, d := range as.Disks {
		sources[d.Name] = hypervisor.DiskSource{Path: d.Path, Format: "qcow2"}
	}
	plain, err := a.hv.Translate(definition, hypervisor.Translation{Disks: sources})
	if err != nil {
		return nil, err
	}
	dom, err := a.hv.Define(ctx, plain)
	if err != nil {
		return nil, err
	}
	for _, d := range dom.Disks {
		if own, ok := diskNamed(as.Disks, d.Name); ok && (d.Path != own.Path || len(d.Backing) > 0) {
			return nil, switchback.Errorf(switchback.CodeInternal, "disk %s is on %s (backing %v), expected %s alone", d.Name, d.Path, d.Backing, own.Path)
		}
	}
	if run.Snapshot != "" && as.Kept != nil { // else it goes with the journal
		if err := v.dropBranch(run.Snapshot); err != nil {
			return nil, err
		}
	}
	r.AbandonedBytes = 0
	for _, s := range run.Abandoned {
		r.AbandonedBytes += s.Bytes()
	}
	err = v.change(func(x *Assignment) {
		x.MustSend, x.Run, x.ReplicaDir, x.Session, x.Rest = run.Abandoned, nil, "", "", nil
		x.Snapshots = without(x.Snapshots, run.Snapshot) // it is in the disks now
	})
	if err != nil {
		return nil, err
	}
	taskLine(req, killpoint.Within)
	v.closeReplica()
	return r, v.sweep(ctx)
}

// sweep removes the journals and overlays of a VM that runs on plain disks. Kept
// snapshots and points stay, and a journal whose objects cannot be removed now:
// the next sweep tries again.
func (v *vm) sweep(ctx context.Context) error {
	as := v.assignment()
	dir := as.Dir
	if dir == "" {
		return nil
	}
	const journals = "journal-*"
	for _, pattern := range []string{journals, "overlay-*"} {
		paths, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return err
		}
		for _, path := range paths {
			if as.Kept != nil && path == as.Kept.Dir {
				continue
			}
			if pattern == journals {
				if err := journal.RemoveObjects(ctx, path); err != nil {
					v.agent.log.Warn("a journal that is not needed any more stays: its objects are not removed", "dir", path, "error", err)
					continue
				}
			}
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// retire leaves the old side after a commit: kept, off and fenced at home;
// undefined elsewhere, its disks kept as seed of the next reprotect.
func (a *Agent) retire(ctx context.Context, _ *task, v *vm, req agentapi.Task, p agentapi.RetireParams) (any, error) {
	as := v.assignment()
	if p.Undefine {
		if err := a.hv.Undefine(ctx, as.VM); err != nil {
			return nil, err
		}
	}
	return agentapi.RetireResult{Seeds: as.Disks}, nil
}

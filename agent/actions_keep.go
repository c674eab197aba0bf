package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/qemu"
)

// KeptPoints are the recovery points that a commit has kept, read-only: a
// journal of their own with bases of their own, which nothing writes any more.
type KeptPoints struct {
	Dir    string                   `json:"dir"`
	Bases  []string                 `json:"bases"`
	Points []switchback.MarkedPoint `json:"points"`
}

// result says what was kept; k is nil where nothing was. disks are the VM's own now.
func (k *KeptPoints) result(disks []switchback.Disk) (r agentapi.KeepPointsResult) {
	if k == nil {
		return r
	}
	r.Points = len(k.Points)
	for _, d := range disks {
		r.Bytes += occupied(d.Path)
	}
	return r
}

// keptBase is where the base of a disk goes that the kept points need.
func keptBase(path string, epoch switchback.Epoch) string {
	return fmt.Sprintf("%s.kept-%d", path, epoch)
}

// wholeBytes is what the content of a point occupies at most.
func wholeBytes(disks []switchback.Disk, points []switchback.Point, seq switchback.Sequence) (n int64) {
	for _, d := range disks {
		n += occupied(d.Path)
	}
	for _, p := range points {
		if p.Sequence <= seq {
			n += p.ChangedBytes
		}
	}
	return n
}

// keepPoints gives the VM bases of its own that hold the chosen point, so that
// the journal and the bases below it stay as they are. It stands in for the
// fold: after it the commit goes on as ever. Each part may be repeated.
//
// A base file gets a second name, which the journal knows it by from then on;
// only then its first name, which is the VM's, is given to the new image.
func (a *Agent) keepPoints(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.KeepPointsParams) (any, error) {
	as := v.assignment()
	run := as.Run                 // nil: settled before
	if run == nil || run.Folded { // done before a restart, or settled before
		return as.Kept.result(as.Disks), nil
	}
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	r := agentapi.KeepPointsResult{Bytes: wholeBytes(as.Disks, replica.Points(), run.Sequence)}
	if s, ok := as.snapshot(run.Snapshot); ok {
		r.Bytes += s.ChangedBytes
	}
	if p.DryRun {
		for _, d := range as.Disks {
			if free, _ := freeBytes(filepath.Dir(d.Path)); r.Bytes+a.cfg.StorageReserveBytes > free {
				return nil, switchback.Errorf(switchback.CodeNoSpace, "to keep the points %d MiB at most are written beside %s, where %d MiB are left",
					r.Bytes>>20, d.Path, free>>20).WithHint("make room there, or delete the points: --points delete")
			}
		}
		return r, nil
	}
	if err := v.settled(as); err != nil {
		return nil, err
	}
	if run.Abandoned == nil {
		if err := v.fixAbandoned(replica, run); err != nil {
			return nil, err
		}
	}
	if err := v.closeBases(); err != nil {
		return nil, err
	}
	for _, d := range as.Disks {
		if err := v.renameBase(replica, d, run.Epoch); err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	if err := v.ensureView(ctx); err != nil {
		return nil, err
	}
	for _, d := range as.Disks {
		t.Report("copying the chosen point of disk "+d.Name, nil)
		if err := copyChosen(ctx, d, keptBase(d.Path, run.Epoch), backingURI(d.Name, run.Socket)); err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Name, err)
		}
	}
	if err := replica.DropAfter(run.Sequence); err != nil {
		return nil, err
	}
	kept := &KeptPoints{Dir: as.ReplicaDir, Points: replica.MarkedPoints()}
	for _, d := range as.Disks {
		kept.Bases = append(kept.Bases, keptBase(d.Path, run.Epoch))
	}
	return kept.result(as.Disks), v.change(func(x *Assignment) {
		next := *x.Run
		next.Folded, x.Run, x.Kept = true, &next, kept
	})
}

// settled refuses a commit that would take points away from somebody.
func (v *vm) settled(as Assignment) error {
	if as.Change != nil {
		return switchback.Errorf(switchback.CodeRefused, "a change of the point of %s is under way", as.Name).WithHint("let it end, or retry it")
	}
	for _, s := range as.Snapshots {
		if s.Dir == "" && !as.inUse(s.Name) {
			return switchback.Errorf(switchback.CodeRefused, "snapshot %s needs point %d, which the commit takes away", s.Name, s.Sequence).WithHint("drop it, or make it self-contained")
		}
	}
	return nil
}

// fixAbandoned makes durable what the way home has to carry beside the run's
// bitmap, as long as it can be found out.
func (v *vm) fixAbandoned(replica *journal.Replica, run *Run) error {
	abandoned, err := replica.ChangedAfter(run.Sequence)
	if err != nil {
		return err
	}
	// So does what earlier runs wrote to the images that this one goes on with.
	for disk, written := range run.Written {
		abandoned[disk] = abandoned[disk].Union(written)
	}
	return v.changeRun(func(r *Run) { r.Abandoned = abandoned })
}

// renameBase lets the journal know a base by its second name.
func (v *vm) renameBase(replica *journal.Replica, d switchback.Disk, epoch switchback.Epoch) error {
	kept := keptBase(d.Path, epoch)
	for _, known := range replica.Manifest().Disks {
		if known.Name != d.Name || known.BasePath == kept {
			continue
		}
		if err := os.Link(known.BasePath, kept); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := durable.SyncDir(filepath.Dir(kept)); err != nil {
			return err
		}
		known.BasePath = kept
		return replica.SetDisk(known)
	}
	return nil
}

// copyChosen replaces the VM's disk by a new image with the content of a view,
// owned as the old one is. Whether it was done is seen by the names: they are
// two of one file before.
func copyChosen(ctx context.Context, d switchback.Disk, kept, view string) error {
	old, err := os.Stat(kept)
	if err != nil {
		return err
	}
	if now, err := os.Stat(d.Path); err != nil {
		return err
	} else if !os.SameFile(old, now) {
		return nil // before a restart
	}
	tmp := d.Path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := qemu.Convert(ctx, qemu.Image{Path: view, Format: "raw"}, qemu.Image{Path: tmp, Format: "qcow2"}, qemu.ConvertOptions{}); err != nil {
		return err
	}
	if owner, ok := old.Sys().(*syscall.Stat_t); ok {
		if err := os.Chown(tmp, int(owner.Uid), int(owner.Gid)); err != nil {
			return err
		}
	}
	if err := errors.Join(os.Chmod(tmp, old.Mode().Perm()), syncFile(tmp)); err != nil {
		return err
	}
	if err := os.Rename(tmp, d.Path); err != nil {
		return err
	}
	return durable.SyncDir(filepath.Dir(d.Path))
}

// dropKept deletes the points that a commit has kept. Done before is no error.
func (a *Agent) dropKept(ctx context.Context, _ *task, v *vm, _ agentapi.Task, _ struct{}) (any, error) {
	as := v.assignment()
	if as.Kept == nil {
		return nil, nil
	}
	if as.Run != nil {
		return nil, switchback.Errorf(switchback.CodeConflict, "the commit of %s is not complete", as.Name).WithHint("let it end, or retry it")
	}
	if err := journal.RemoveObjects(ctx, as.Kept.Dir); err != nil {
		return nil, err
	}
	for _, path := range append([]string{as.Kept.Dir}, as.Kept.Bases...) {
		if err := os.RemoveAll(path); err != nil {
			return nil, err
		}
	}
	return nil, v.change(func(x *Assignment) { x.Kept = nil })
}

// status is what is reported of kept points.
func (k *KeptPoints) status() *agentapi.KeptPoints {
	if k == nil {
		return nil
	}
	r := &agentapi.KeptPoints{Dir: k.Dir, Points: len(k.Points)}
	for _, p := range k.Points {
		r.SizeBytes += p.StoredBytes
	}
	for _, path := range k.Bases {
		r.SizeBytes += occupied(path)
	}
	return r
}

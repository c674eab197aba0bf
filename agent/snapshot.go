package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/qemu"
)

// Snapshot is what a run that was abandoned wrote. At first it is the run's
// overlays, set aside; then a branch of the journal, which takes them in; and,
// once made self-contained, a replica of its own that holds nothing else.
type Snapshot struct {
	Name string `json:"name"`
	// Sequence and PointTime are the parent point's; Epoch is the run's.
	Sequence  switchback.Sequence `json:"sequence"`
	PointTime time.Time           `json:"point_time,omitzero"`
	Epoch     switchback.Epoch    `json:"epoch"`
	// Pin keeps the parent point; empty once the snapshot needs it no more.
	Pin string `json:"pin,omitempty"`
	// Files are the overlays, by disk, until there is a branch; they hold the
	// written clusters and nothing else, over the snapshot Over where the run went on from one.
	Files map[string]string `json:"files,omitempty"`
	Over  string            `json:"over,omitempty"`
	// File is the branch's segment, of Bytes, which holds ChangedBytes of the disks.
	File         string `json:"file,omitempty"`
	Bytes        int64  `json:"bytes,omitempty"`
	ChangedBytes int64  `json:"changed_bytes,omitempty"`
	// Dir is its own replica, once it is self-contained.
	Dir string `json:"dir,omitempty"`
	// Time is when it was set aside.
	Time time.Time `json:"time"`
}

// snapshotPin is the name of the pin of a snapshot's parent point.
func snapshotPin(name string) string { return "snapshot-" + name }

// runPin is the name of a run's pin.
func runPin(epoch switchback.Epoch) string { return fmt.Sprintf("run-%d", epoch) }

// tidyPins removes the pins of runs and snapshots that are no more, or never
// came about. Those that are there belong to the run, the change or a snapshot.
func (v *vm) tidyPins() error {
	as := v.assignment()
	replica, err := v.openReplica()
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	if as.Run != nil {
		keep[as.Run.Pin] = true
	}
	if as.Change != nil {
		keep[runPin(as.Change.Epoch)] = true
	}
	for _, s := range as.Snapshots {
		keep[s.Pin] = true
	}
	for _, p := range replica.Pins() {
		if ours := strings.HasPrefix(p.Name, "run-") || strings.HasPrefix(p.Name, snapshotPin("")); ours && !keep[p.Name] {
			if err := replica.DropBranch(strings.TrimPrefix(p.Name, snapshotPin(""))); err != nil {
				return err
			}
			if err := replica.Unpin(p.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (a Assignment) snapshot(name string) (Snapshot, bool) {
	for _, s := range a.Snapshots {
		if s.Name == name {
			return s, true
		}
	}
	return Snapshot{}, false
}

// without returns the snapshots but the one of that name, in a list of its own.
func without(list []Snapshot, name string) []Snapshot {
	return slices.DeleteFunc(slices.Clone(list), func(s Snapshot) bool { return s.Name == name })
}

// snapshotDir is the replica of a self-contained snapshot, and writesDir where
// the overlays of one stand that is no branch yet.
func snapshotDir(as Assignment, name string) string { return filepath.Join(as.Dir, "snapshots", name) }
func writesDir(as Assignment, name string) string   { return snapshotDir(as, name) + ".writes" }

// inUse reports whether the run, or the one to come, goes on from the snapshot.
func (a Assignment) inUse(name string) bool {
	return a.Run != nil && a.Run.Snapshot == name || a.Change != nil && a.Change.Snapshot == name
}

// setAside turns the images of a run whose guest is off into a snapshot whose
// parent point is pinned. The caller makes the record durable, together with
// the end of the run; until then all of it may be repeated. A run whose guest
// never ran leaves nothing: ok is false. Nothing is copied: that follows in the
// background (branchLater), once nobody waits.
func (v *vm) setAside(ctx context.Context, as Assignment, run *Run) (s Snapshot, ok bool, err error) {
	if !run.Started {
		for _, path := range run.Overlays {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return s, false, err
			}
		}
		return s, false, nil
	}
	name := fmt.Sprintf("epoch-%d-from-point-%d", run.Epoch, run.Sequence)
	s = Snapshot{Name: name, Sequence: run.Sequence, Epoch: run.Epoch, Pin: snapshotPin(name), Over: run.Snapshot, Files: map[string]string{}, Time: time.Now()}
	replica, err := v.openReplica()
	if err != nil {
		return s, false, err
	}
	for _, p := range replica.Points() {
		if p.Sequence == run.Sequence {
			s.PointTime = p.Time
		}
	}
	if err := replica.Pin(s.Pin, s.Sequence, map[string]string{"vm": as.Name, "for": "snapshot " + name}); err != nil {
		return s, false, err
	}
	dir := writesDir(as, name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return s, false, err
	}
	for _, d := range as.Disks {
		from, to := run.Overlays[d.Name], filepath.Join(dir, d.Name+".qcow2")
		s.Files[d.Name] = to
		if _, err := os.Stat(from); errors.Is(err, fs.ErrNotExist) {
			if _, err := os.Stat(to); err != nil {
				return s, false, fmt.Errorf("the writes of disk %s are gone: %w", d.Name, err)
			}
			continue // moved before
		}
		if err := qemu.Rebase(ctx, from, "", ""); err != nil {
			return s, false, err
		}
		if err := os.Rename(from, to); err != nil {
			return s, false, err
		}
	}
	return s, true, errors.Join(durable.SyncDir(dir), durable.SyncDir(filepath.Dir(dir)), durable.SyncDir(as.Dir))
}

// dropSnapshot deletes one snapshot. Done before is no error.
func (a *Agent) dropSnapshot(ctx context.Context, _ *task, v *vm, _ agentapi.Task, p agentapi.DropSnapshotParams) (any, error) {
	return agentapi.DropSnapshotResult{}, v.removeSnapshot(ctx, p.Name)
}

// removeSnapshot removes the data first: the record stays until nothing is left.
func (v *vm) removeSnapshot(ctx context.Context, name string) error {
	v.stopBranching()
	defer v.branchLater()
	v.branching.Lock()
	defer v.branching.Unlock()
	as := v.assignment()
	s, ok := as.snapshot(name)
	if !ok {
		return nil
	}
	if as.inUse(name) {
		return switchback.Errorf(switchback.CodeRefused, "%s runs from snapshot %s", as.Name, name).WithHint("change to another point first; a commit takes the snapshot in, and nothing of it is left")
	}
	for _, other := range as.Snapshots {
		if other.Over == name && len(other.Files) > 0 { // its overlays stand on this one
			if err := v.branch(ctx, other, nil); err != nil {
				return err
			}
		}
	}
	if s.Dir == "" {
		if err := v.dropBranch(name); err != nil {
			return err
		}
	}
	for _, dir := range []string{writesDir(as, name), snapshotDir(as, name)} {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return v.change(func(x *Assignment) { x.Snapshots = without(x.Snapshots, name) })
}

// settleSnapshots readies the snapshots for a commit, which deletes the points
// that they stand on: each is made self-contained, or dropped. The one that the
// VM runs from goes into its disks.
func (a *Agent) settleSnapshots(ctx context.Context, t *task, v *vm, _ agentapi.Task, p agentapi.SettleSnapshotsParams) (any, error) {
	var r agentapi.SettleSnapshotsResult
	if p.Keep {
		t.Report("moving snapshots into the journal", nil)
		if err := v.keepBranches(ctx, nil); err != nil {
			return nil, err
		}
	}
	list := slices.Clone(v.assignment().Snapshots)
	slices.SortStableFunc(list, func(a, b Snapshot) int { return len(b.Files) - len(a.Files) }) // what stands on another goes first
	for _, s := range list {
		switch {
		case v.assignment().inUse(s.Name):
		case s.Dir != "" || p.Keep:
			t.Report("making snapshot "+s.Name+" self-contained", nil)
			n, err := v.makeWhole(ctx, t, s)
			if err != nil {
				return nil, fmt.Errorf("snapshot %s: %w", s.Name, err)
			}
			r.Kept, r.Bytes = append(r.Kept, s.Name), r.Bytes+n
		default:
			if err := v.removeSnapshot(ctx, s.Name); err != nil {
				return nil, err
			}
			r.Dropped = append(r.Dropped, s.Name)
		}
	}
	return r, nil
}

func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// occupied is the space that a file takes; 0 for one that is not there.
func occupied(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return sys.Blocks * 512
	}
	return st.Size()
}

// snapshots lists kept writes of abandoned runs. points are those of the
// replica here, if there is one.
func (a Assignment) snapshots(points []switchback.Point) []agentapi.Snapshot {
	var list []agentapi.Snapshot
	for _, s := range a.Snapshots {
		r := agentapi.Snapshot{Name: s.Name, Point: s.Sequence, PointTime: s.PointTime, Epoch: s.Epoch, Pin: s.Pin, SelfContained: s.Dir != "", Time: s.Time,
			Pending: len(s.Files) > 0, InUse: a.inUse(s.Name), Over: s.Over, Dir: s.Dir, SizeBytes: s.Bytes, ChangedBytes: s.ChangedBytes}
		for _, d := range a.Disks {
			if path, ok := s.Files[d.Name]; ok {
				r.Files = append(r.Files, path)
				r.SizeBytes += occupied(path)
				r.ChangedBytes = r.SizeBytes
			}
		}
		if s.File != "" {
			r.Files = []string{s.File}
		}
		if r.Dir == "" {
			r.Dir = a.ReplicaDir
		}
		r.WholeBytes = r.SizeBytes
		if s.Dir == "" {
			r.WholeBytes = r.ChangedBytes + wholeBytes(a.Disks, points, s.Sequence)
		}
		list = append(list, r)
	}
	return list
}

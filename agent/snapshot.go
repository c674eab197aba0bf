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

// Snapshot is what a run that was abandoned wrote: images that hold the written
// clusters and nothing else, each to be laid over the view of the parent point;
// or, once made self-contained, whole disks. Files stand beside the replica.
type Snapshot struct {
	Name string `json:"name"`
	// Sequence and PointTime are the parent point's; Epoch is the run's.
	Sequence  switchback.Sequence `json:"sequence"`
	PointTime time.Time           `json:"point_time,omitzero"`
	Epoch     switchback.Epoch    `json:"epoch"`
	// Pin keeps the parent point; empty once the snapshot needs it no more.
	Pin   string            `json:"pin,omitempty"`
	Files map[string]string `json:"files"` // by disk
	// Time is when it was set aside.
	Time          time.Time `json:"time"`
	SelfContained bool      `json:"self_contained,omitempty"`
}

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
		if ours := strings.HasPrefix(p.Name, "run-") || strings.HasPrefix(p.Name, "snapshot-"); ours && !keep[p.Name] {
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

func snapshotDir(as Assignment, name string) string { return filepath.Join(as.Dir, "snapshots", name) }

// setAside turns the images of a run whose guest is off into a snapshot whose
// parent point is pinned. The caller makes the record durable, together with
// the end of the run; until then all of it may be repeated. A run whose guest
// never ran leaves nothing (ok is false), or the snapshot that it was to run on.
func (v *vm) setAside(ctx context.Context, as Assignment, run *Run) (s Snapshot, ok bool, err error) {
	if !run.Started && run.Snapshot == "" {
		for _, path := range run.Overlays {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return s, false, err
			}
		}
		return s, false, nil
	}
	name := fmt.Sprintf("epoch-%d-from-point-%d", run.Epoch, run.Sequence)
	if !run.Started {
		name = run.Snapshot
	}
	s = Snapshot{Name: name, Sequence: run.Sequence, Epoch: run.Epoch, Pin: "snapshot-" + name, Files: map[string]string{}, Time: time.Now()}
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
	dir := snapshotDir(as, name)
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

// takeUpSnapshot moves the images of the snapshot that a run is to go on with
// into the run's place, without bitmaps of their former life.
func takeUpSnapshot(ctx context.Context, as Assignment, run *Run) error {
	for _, d := range as.Disks {
		from, to := filepath.Join(snapshotDir(as, run.Snapshot), d.Name+".qcow2"), run.Overlays[d.Name]
		if _, err := os.Stat(from); err == nil {
			if err := os.Rename(from, to); err != nil {
				return err
			}
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := removeBitmaps(ctx, to); err != nil {
			return err
		}
	}
	return errors.Join(os.RemoveAll(snapshotDir(as, run.Snapshot)), durable.SyncDir(as.Dir))
}

// dropSnapshot deletes one snapshot. Done before is no error.
func (a *Agent) dropSnapshot(_ context.Context, _ *task, v *vm, _ agentapi.Task, p agentapi.DropSnapshotParams) (any, error) {
	return agentapi.DropSnapshotResult{}, v.removeSnapshot(p.Name)
}

// removeSnapshot removes the files first: the record stays until nothing is left.
func (v *vm) removeSnapshot(name string) error {
	as := v.assignment()
	s, ok := as.snapshot(name)
	if !ok {
		return nil
	}
	if err := os.RemoveAll(snapshotDir(as, name)); err != nil {
		return err
	}
	if err := v.unpin(s.Pin); err != nil {
		return err
	}
	return v.change(func(x *Assignment) { x.Snapshots = without(x.Snapshots, name) })
}

// unpin removes a pin from the replica, if one is kept here.
func (v *vm) unpin(pin string) error {
	if pin == "" || v.assignment().ReplicaDir == "" {
		return nil
	}
	replica, err := v.openReplica()
	if err != nil {
		return err
	}
	return replica.Unpin(pin)
}

// settleSnapshots readies the snapshots for a commit, which deletes the points
// that they stand on: each is made self-contained, or dropped.
func (a *Agent) settleSnapshots(ctx context.Context, t *task, v *vm, _ agentapi.Task, p agentapi.SettleSnapshotsParams) (any, error) {
	var r agentapi.SettleSnapshotsResult
	for _, s := range v.assignment().Snapshots {
		if s.SelfContained {
			r.Kept = append(r.Kept, s.Name)
			continue
		}
		if !p.Keep {
			if err := v.removeSnapshot(s.Name); err != nil {
				return nil, err
			}
			r.Dropped = append(r.Dropped, s.Name)
			continue
		}
		t.Report("making snapshot "+s.Name+" self-contained", nil)
		n, err := v.makeWhole(ctx, s)
		if err != nil {
			return nil, fmt.Errorf("snapshot %s: %w", s.Name, err)
		}
		r.Kept, r.Bytes = append(r.Kept, s.Name), r.Bytes+n
	}
	return r, nil
}

// makeWhole gives a snapshot the content that it has read from its parent
// point so far. Each disk becomes a new image, which counts once it has its name.
func (v *vm) makeWhole(ctx context.Context, s Snapshot) (int64, error) {
	as := v.assignment()
	socket := filepath.Join(v.agent.cfg.RunDir, string(as.Protection)+".keep")
	whole := map[string]string{}
	var bytes int64
	served := false
	defer func() {
		if served {
			if err := stopExport(socket); err != nil {
				v.agent.log.Error("a view is still served", "socket", socket, "error", err)
			}
		}
	}()
	for _, d := range as.Disks {
		out := filepath.Join(snapshotDir(as, s.Name), d.Name+".whole.qcow2")
		whole[d.Name] = out
		if _, err := os.Stat(out); err == nil {
			continue // before a restart
		}
		if !served {
			if err := stopExport(socket); err != nil { // of an earlier run of the agent
				return 0, err
			}
			if err := v.serveView(ctx, s.Sequence, socket, "switchback-keep-"+string(v.assignment().Protection)); err != nil {
				return 0, err
			}
			served = true
		}
		tmp := out + ".tmp"
		if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		if err := qemu.Rebase(ctx, s.Files[d.Name], backingURI(d.Name, socket), "raw"); err != nil {
			return 0, err
		}
		if err := qemu.Convert(ctx, qemu.Image{Path: s.Files[d.Name], Format: "qcow2"}, qemu.Image{Path: tmp, Format: "qcow2"}, qemu.ConvertOptions{}); err != nil {
			return 0, err
		}
		if err := syncFile(tmp); err != nil {
			return 0, err
		}
		if err := os.Rename(tmp, out); err != nil {
			return 0, err
		}
		if err := durable.SyncDir(filepath.Dir(out)); err != nil {
			return 0, err
		}
	}
	for _, path := range whole {
		bytes += occupied(path)
	}
	if err := v.unpin(s.Pin); err != nil {
		return 0, err
	}
	err := v.change(func(x *Assignment) {
		list := slices.Clone(x.Snapshots)
		for i := range list {
			if list[i].Name == s.Name {
				list[i].Files, list[i].Pin, list[i].SelfContained = whole, "", true
			}
		}
		x.Snapshots = list
	})
	if err != nil {
		return 0, err
	}
	for _, old := range s.Files {
		if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
	}
	return bytes, nil
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
		r := agentapi.Snapshot{Name: s.Name, Point: s.Sequence, PointTime: s.PointTime, Epoch: s.Epoch, Pin: s.Pin, SelfContained: s.SelfContained, Time: s.Time}
		for _, d := range a.Disks {
			if path, ok := s.Files[d.Name]; ok {
				r.Files = append(r.Files, path)
				r.SizeBytes += occupied(path)
			}
		}
		r.WholeBytes = r.SizeBytes
		if !s.SelfContained {
			r.WholeBytes += wholeBytes(a.Disks, points, s.Sequence)
		}
		list = append(list, r)
	}
	return list
}

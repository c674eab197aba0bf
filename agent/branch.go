package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/qcow2"
	"github.com/switchback-dr/switchback/qemu"
)

// branchAgain is how long a snapshot that cannot be moved into the journal is left alone.
const branchAgain = 20 * time.Second

// branchLater moves snapshots that are still overlays into the journal, in the
// background, until all are there.
func (v *vm) branchLater() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.branched != nil || v.a.ReplicaDir == "" || !slices.ContainsFunc(v.a.Snapshots, func(s Snapshot) bool { return s.Dir == "" }) {
		return
	}
	branched := make(chan struct{})
	ctx, cancel := context.WithCancel(v.agent.tasks.ctx)
	v.branched, v.stopBranch = branched, cancel
	go func() {
		defer close(branched)
		defer cancel()
		for ctx.Err() == nil {
			err := v.keepBranches(ctx, nil)
			if err == nil {
				break
			}
			if ctx.Err() == nil {
				v.agent.log.Error("what a run wrote cannot be moved into the journal, trying again", "protection", v.assignment().Protection, "error", err)
			}
			sleep(ctx, branchAgain)
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		v.branched, v.stopBranch = nil, nil
	}()
}

// stopBranching ends branchLater, which begins anew another time.
func (v *vm) stopBranching() {
	v.mu.Lock()
	stop, branched := v.stopBranch, v.branched
	v.mu.Unlock()
	if stop != nil {
		stop()
		<-branched
	}
}

// keepBranches moves every snapshot that is still overlays into the journal.
func (v *vm) keepBranches(ctx context.Context, progress func(done, total int64)) error {
	v.branching.Lock()
	defer v.branching.Unlock()
	as := v.assignment()
	for _, s := range as.Snapshots {
		if s.Dir != "" {
			continue
		}
		if len(s.Files) > 0 {
			if err := v.branch(ctx, s, progress); err != nil {
				return err
			}
		}
		// The branch is durable, and so is the record that names it.
		if err := os.RemoveAll(writesDir(as, s.Name)); err != nil {
			return err
		}
	}
	return nil
}

// branch makes a branch of the journal of a snapshot that is overlays. The
// caller holds v.branching, and removes the overlays.
func (v *vm) branch(ctx context.Context, s Snapshot, progress func(done, total int64)) error {
	replica, err := v.openReplica()
	if err != nil {
		return err
	}
	spec := journal.BranchSpec{Name: s.Name, Point: s.Sequence, Pin: s.Pin, Over: s.Over, Epoch: s.Epoch, Kind: switchback.CrashConsistent, Time: s.Time.UTC(),
		Disks: map[string]journal.Written{}}
	for disk, path := range s.Files {
		ranges, err := qemu.Allocated(ctx, path)
		if err != nil {
			return err
		}
		im, err := qcow2.Open(path)
		if err != nil {
			return err
		}
		defer im.Close()
		spec.Disks[disk] = journal.Written{Ranges: ranges, Content: im}
	}
	began := time.Now()
	info, err := replica.WriteBranch(ctx, spec, progress)
	if err != nil {
		return err
	}
	err = v.change(func(x *Assignment) {
		x.Snapshots = slices.Clone(x.Snapshots)
		for i := range x.Snapshots {
			if k := &x.Snapshots[i]; k.Name == s.Name {
				k.Files, k.Over, k.File, k.Bytes, k.ChangedBytes = nil, "", info.File, info.StoredBytes, info.ChangedBytes
			}
		}
	})
	v.agent.log.Info("snapshot moved into the journal", "protection", v.assignment().Protection, "snapshot", s.Name, "bytes", info.StoredBytes, "changed_bytes", info.ChangedBytes, "took", time.Since(began), "error", err)
	return err
}

// dropBranch removes a branch from the replica, if one is kept here, and lets go
// of its point.
func (v *vm) dropBranch(name string) error {
	if v.assignment().ReplicaDir == "" {
		return nil
	}
	replica, err := v.openReplica()
	if err != nil {
		return err
	}
	return errors.Join(replica.DropBranch(name), replica.Unpin(snapshotPin(name)))
}

// makeWhole gives a snapshot that is a branch a replica of its own, with the
// content that it has read from its parent point so far.
func (v *vm) makeWhole(ctx context.Context, t *task, s Snapshot) (int64, error) {
	as := v.assignment()
	if now, ok := as.snapshot(s.Name); ok {
		s = now
	}
	if s.Dir == "" {
		replica, err := v.openReplica()
		if err != nil {
			return 0, err
		}
		dir, began := snapshotDir(as, s.Name), time.Now()
		if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
			return 0, err
		}
		err = replica.DetachBranch(ctx, s.Name, dir, func(done, total int64) {
			t.Report("making snapshot "+s.Name+" self-contained", rates(began, done, total))
		})
		if err != nil {
			return 0, err
		}
		whole, err := journal.InspectBranch(dir, s.Name)
		if err != nil {
			return 0, err
		}
		err = v.change(func(x *Assignment) {
			x.Snapshots = slices.Clone(x.Snapshots)
			for i := range x.Snapshots {
				if k := &x.Snapshots[i]; k.Name == s.Name {
					k.Dir, k.Pin, k.File, k.Bytes, k.ChangedBytes = dir, "", whole.File, whole.StoredBytes, whole.ChangedBytes
					s = *k
				}
			}
		})
		if err != nil {
			return 0, err
		}
	}
	return s.Bytes, v.dropBranch(s.Name) // again where a crash came between
}

// rewrapSnapshots has the keys of self-contained snapshots wrapped by the key
// source that the agent was started with, as those of replicas are.
func (v *vm) rewrapSnapshots() {
	as := v.assignment()
	for _, s := range as.Snapshots {
		if s.Dir == "" || v.agent.cfg.KeySource == nil {
			continue
		}
		err := func() error {
			r, err := journal.Open(s.Dir)
			if err != nil {
				return err
			}
			if st := r.Storage(); st.Keyring != nil {
				err = r.SetSealing(v.agent.tasks.ctx, st.Seal, v.agent.cfg.KeySource)
			}
			return errors.Join(err, r.Close())
		}()
		if err != nil {
			v.agent.log.Error("the keys of a snapshot are not wrapped anew", "protection", as.Protection, "snapshot", s.Name, "error", err)
		}
	}
}

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
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/journal"
)

// removeEmpty removes a folder in which nothing is left.
func removeEmpty(dir string) error {
	err := os.Remove(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EEXIST) {
		return nil
	}
	return err
}

// release ends the protection at this agent and says what it removed and left.
func (a *Agent) release(ctx context.Context, _ *task, req agentapi.Task, p agentapi.ReleaseParams) (any, error) {
	v, err := a.vm(req.Protection)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return agentapi.ReleaseResult{}, nil
	}
	v.act.Lock()
	defer v.act.Unlock()
	if err := v.checkEpoch(req.Epoch); err != nil {
		return nil, err
	}
	as := v.assignment()
	if as.Run != nil {
		return nil, switchback.Errorf(switchback.CodeConflict, "VM %s runs from a recovery point here", as.Name).WithHint("commit or cancel first")
	}
	if err := v.clearDrills(ctx); err != nil {
		return nil, err
	}
	v.stopEngine()
	v.closeReplica()
	var r agentapi.ReleaseResult
	var dom hypervisor.Domain
	defined := false
	if as.VM != "" { // otherwise nothing was made before it failed
		dom, err = a.hv.Domain(ctx, as.VM)
		defined = err == nil
		if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
			return nil, err
		}
	}
	if defined {
		if dom.State != hypervisor.StateOff {
			if err := a.hv.EndBackup(ctx, as.VM); err != nil {
				return nil, err
			}
		}
		if err := a.dropCheckpoints(ctx, as.VM); err != nil {
			return nil, err
		}
		if dom.State == hypervisor.StateOff && as.Role != agentapi.RoleTarget {
			for _, d := range as.Disks {
				if err := removeBitmaps(ctx, d.Path); err != nil {
					return nil, err
				}
			}
		}
		r.Left = append(r.Left, fmt.Sprintf("VM %s, %s, as it is", as.Name, dom.State))
	}
	remove := func(path string) error {
		if _, err := os.Stat(path); err != nil {
			return nil
		}
		if !p.RemoveData {
			r.Left = append(r.Left, path)
			return nil
		}
		r.Removed = append(r.Removed, path)
		return os.RemoveAll(path)
	}
	if as.ReplicaDir != "" && p.RemoveData {
		if err := journal.RemoveObjects(ctx, as.ReplicaDir); err != nil {
			return nil, err
		}
	}
	switch {
	case as.Role == agentapi.RoleSource || as.Role == agentapi.RoleActive:
		// The VM lives here: nothing of it is touched but what was set aside of
		// switches that were taken back.
		if as.Dir != "" {
			snapshots := filepath.Join(as.Dir, "snapshots")
			if err := remove(snapshots); err != nil {
				return nil, err
			}
			if err := removeEmpty(as.Dir); err != nil {
				return nil, err
			}
		}
	case defined:
		// The disks belong to a VM that is defined here: only the journal is ours.
		if as.ReplicaDir != "" {
			if err := remove(as.ReplicaDir); err != nil {
				return nil, err
			}
		}
	case as.Dir != "":
		if err := remove(as.Dir); err != nil {
			return nil, err
		}
	}
	if as.Kept != nil {
		if p.RemoveData {
			if err := journal.RemoveObjects(ctx, as.Kept.Dir); err != nil {
				return nil, err
			}
		}
		for _, path := range append([]string{as.Kept.Dir}, as.Kept.Bases...) {
			if err := remove(path); err != nil {
				return nil, err
			}
		}
	}
	for _, s := range as.Snapshots {
		for _, dir := range []string{snapshotDir(as, s.Name), writesDir(as, s.Name)} {
			if err := remove(dir); err != nil {
				return nil, err
			}
		}
	}
	if (as.Role == agentapi.RoleFenced || as.Role == agentapi.RoleTarget) && defined {
		r.Left = append(r.Left, fmt.Sprintf("the fence of %s: its disks here are older than the active copy's; remove %s to allow a start", as.Name, a.fencePath(as.VM)))
	} else if err := a.clearFence(as.VM); err != nil {
		return nil, err
	}
	if err := v.releaseGrant(ctx, defined); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(indexDir(a.cfg.StateDir, req.Protection)); err != nil {
		return nil, err
	}
	return r, a.forget(req.Protection)
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/internal/durable"
)

// drillClean clears a drill, or all of the VM. It is not bound to an epoch:
// clearing a copy is right whoever owns the VM.
func (a *Agent) drillClean(ctx context.Context, t *task, req agentapi.Task, p agentapi.DrillParams) (any, error) {
	var r agentapi.DrillCleanResult
	v, err := a.vm(req.Protection)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return r, nil
	}
	t.Report("clearing the drill", nil)
	v.act.Lock()
	defer v.act.Unlock()
	for _, d := range v.assignment().Drills {
		if p.Drill != "" && d.ID != p.Drill {
			continue
		}
		r.BytesWritten += d.written()
		removed, err := v.clearDrill(ctx, d)
		if err != nil {
			return nil, err
		}
		r.Removed = append(r.Removed, removed...)
	}
	return r, nil
}

// clearDrills clears every drill of the VM; the caller holds act.
func (v *vm) clearDrills(ctx context.Context) error {
	var errs []error
	for _, d := range v.assignment().Drills {
		_, err := v.clearDrill(ctx, d)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// clearDrill removes every trace of a drill, as far as it can: what is in use
// by something that does not go stays. Then, or where nothing is left, it is
// forgotten. CodeConflict lists what is left, each with the remedy; it is tried
// again by whoever asked, and by the agent itself once the drill has expired.
func (v *vm) clearDrill(ctx context.Context, d Drill) (removed []string, err error) {
	a, as := v.agent, v.assignment()
	var left []string
	keep := func(what string, err error, remedy string, args ...any) {
		left = append(left, fmt.Sprintf("%s: %v (remedy: %s)", what, err, fmt.Sprintf(remedy, args...)))
	}
	gone := true
	err = a.hv.Destroy(ctx, d.VM)
	if err == nil || switchback.CodeOf(err) == switchback.CodeNotFound {
		err = a.hv.Undefine(ctx, d.VM)
	}
	if err != nil {
		gone = false
		keep("domain "+d.Name, err, "virsh destroy %s; virsh undefine %s --nvram --checkpoints-metadata", d.Name, d.Name)
	} else {
		removed = append(removed, "domain "+d.Name)
	}
	if !gone {
		// Its disks, its view and its point are in use.
		keep("disks "+d.Dir, errors.New("in use by the domain"), "they go with the domain")
		keep("view of point "+fmt.Sprint(d.Sequence), errors.New("in use by the domain"), "it goes with the domain")
	} else {
		if err := v.stopView(&Run{Socket: d.Socket}); err != nil {
			gone = false
			keep("the process that serves the view on "+d.Socket, err, "kill the process whose number is in %s.pid", d.Socket)
		} else {
			removed = append(removed, "view of point "+fmt.Sprint(d.Sequence))
		}
		if err := errors.Join(removeAllDurably(d.Dir), os.RemoveAll(filepath.Join(a.cfg.LogDir, d.unit()+".log"))); err != nil {
			gone = false
			keep("files in "+d.Dir, err, "remove the directory")
		} else {
			removed = append(removed, d.Dir)
		}
	}
	if gone {
		switch replica, err := v.openReplica(); {
		case switchback.CodeOf(err) == switchback.CodeNotFound: // and the pin with it
		case err != nil:
			gone = false
			keep("pin "+d.Pin, err, "mend the replica %s", as.ReplicaDir)
		default:
			if err := replica.Unpin(d.Pin); err != nil {
				gone = false
				keep("pin "+d.Pin, err, "mend the file system of %s", as.ReplicaDir)
			} else {
				removed = append(removed, "pin "+d.Pin)
			}
		}
	}
	if gone {
		a.log.Info("drill cleared", "protection", as.Protection, "drill", d.ID, "domain", d.Name)
		return removed, v.setDrill(d, true)
	}
	d.Left = left
	if err := v.setDrill(d, false); err != nil {
		return removed, err
	}
	return removed, switchback.Errorf(switchback.CodeUnavailable, "the drill cannot be cleared, this is left: %s", joinReasons(left)).
		WithHint("it is tried again by itself")
}

func removeAllDurably(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := durable.SyncDir(filepath.Dir(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// written is what the drill's overlays occupy.
func (d Drill) written() int64 {
	files, _ := filepath.Glob(filepath.Join(d.Dir, "*.qcow2")) // the pattern is well formed
	total := int64(0)
	for _, f := range files {
		var st unix.Stat_t
		if unix.Stat(f, &st) == nil {
			total += st.Blocks * 512
		}
	}
	return total
}

const expireEvery = 5 * time.Second

// expireDrills clears what nobody else has cleared in time: the server may have
// died for good. It goes on trying until ctx ends.
func (a *Agent) expireDrills(ctx context.Context) {
	said := map[switchback.OperationID]bool{}
	for ; ctx.Err() == nil; sleep(ctx, expireEvery) {
		for _, v := range a.all() {
			for _, d := range v.assignment().Drills {
				if time.Now().Before(d.ExpiresAt) || !v.act.TryLock() {
					continue
				}
				_, err := v.clearDrill(ctx, d)
				v.act.Unlock()
				if err != nil && !said[d.ID] && ctx.Err() == nil {
					said[d.ID] = true
					a.log.Error("an expired drill cannot be cleared, trying again", "drill", d.ID, "error", err)
				}
			}
		}
	}
}

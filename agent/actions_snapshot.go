package agent

import (
	"context"
	"path/filepath"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/export"
	"github.com/switchback-dr/switchback/journal"
)

// snapshotSource is where a snapshot is read.
type snapshotSource struct {
	Snapshot
	dir     string
	replica *journal.Replica // nil where it is self-contained
}

// onSnapshot adapts a typed action that reads a kept snapshot, beside whatever
// else is done to the VM. One that is overlays still is moved into the journal first;
// its point is kept meanwhile, also if it is dropped.
func onSnapshot[P any](a *Agent, name func(P) string, f func(ctx context.Context, t *task, v *vm, s snapshotSource, p P) (any, error)) action {
	return handle(func(ctx context.Context, t *task, req agentapi.Task, p P) (_ any, err error) {
		v, err := a.vm(req.Protection)
		if err != nil {
			return nil, err
		}
		s, ok := v.assignment().snapshot(name(p))
		if ok && len(s.Files) > 0 {
			began := time.Now()
			err := v.keepBranches(ctx, func(done, total int64) { t.Report("moving the snapshot into the journal", rates(began, done, total)) })
			if err != nil {
				return nil, err
			}
			s, ok = v.assignment().snapshot(name(p))
		}
		if !ok {
			return nil, switchback.Errorf(switchback.CodeNotFound, "there is no snapshot %q of %s here", name(p), v.assignment().Name).WithHint("'vm snapshots' lists them")
		}
		if s.Dir != "" {
			return f(ctx, t, v, snapshotSource{s, s.Dir, nil}, p)
		}
		replica, err := v.openReplica()
		if err != nil {
			return nil, err
		}
		pin := exportPinOf(req)
		if err := replica.Pin(pin, s.Sequence, map[string]string{"for": "a reader of snapshot " + s.Name}); err != nil {
			return nil, err
		}
		defer func() {
			if uerr := replica.Unpin(pin); err == nil {
				err = uerr
			}
		}()
		return f(ctx, t, v, snapshotSource{s, replica.Dir(), replica}, p)
	})
}

func (a *Agent) exportSnapshot(ctx context.Context, t *task, v *vm, s snapshotSource, p agentapi.ExportParams) (any, error) {
	format, err := export.ParseFormat(p.Format)
	if err != nil {
		return nil, err
	}
	began := time.Now()
	result, err := export.Run(ctx, export.Request{Replica: s.dir, Snapshot: s.Name, Format: format, To: filepath.Clean(p.To),
		Definition: p.Definition, Rewrite: a.rewriteDisks, ReserveBytes: a.cfg.StorageReserveBytes, SocketDir: a.cfg.RunDir,
		Progress: func(done, total int64) { t.Report("copying", rates(began, done, total)) }})
	if err != nil {
		return nil, err
	}
	v.agent.log.Info("snapshot exported", "protection", v.assignment().Protection, "snapshot", s.Name, "to", result.Path, "bytes", result.Bytes)
	return result, nil
}

func (a *Agent) checkSnapshot(ctx context.Context, t *task, v *vm, s snapshotSource, p agentapi.CheckReplicaParams) (any, error) {
	began := time.Now()
	o := journal.CheckOptions{Branch: s.Name, BytesPerSecond: p.BytesPerSecond, Progress: func(st journal.CheckState) {
		t.Report("checking", rates(began, st.DoneBytes, st.TotalBytes))
	}}
	var st journal.CheckState
	var err error
	if s.replica == nil {
		st, err = journal.Check(ctx, s.dir, o)
	} else if err = v.checkable(); err == nil {
		st, err = s.replica.Check(ctx, o)
	}
	if err != nil {
		return nil, err
	}
	return checkResult(began, s.Sequence, st), nil
}

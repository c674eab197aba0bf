package replicator

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/hypervisor"
)

// CycleOptions vary one cycle.
type CycleOptions struct {
	// Offline takes the point of a domain that is off: the last one before a
	// switch. Without it a domain that is off is CodeConflict.
	Offline bool
	// ApplicationConsistent requires the guest's file systems to be frozen at
	// the point's instant. CodeRefused: no guest agent answers.
	ApplicationConsistent bool
}

// Cycle takes one point now and returns when it is durable at the target. It
// waits for a cycle under way.
func (e *Engine) Cycle(ctx context.Context, o CycleOptions) (CycleReport, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	report, err := e.cycle(ctx, o)
	if errors.As(err, new(refusal)) { // the next point comes as ever
		e.history.finish(nil)
		return report, err
	}
	changed := ctx.Err() == nil && e.setCondition(err)
	if err != nil {
		e.indexReady, e.jobsClear = false, false
		e.history.finish(nil)
		// The guest must not stay paused until the next try.
		if !o.Offline && switchback.CodeOf(err) == switchback.CodeNoSpace {
			c, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			if cerr := e.clearJob(c); cerr != nil {
				e.log.Error("cannot see to the guest after a cycle that failed for space", "error", cerr)
			}
			cancel()
		}
		if changed {
			e.log.Warn("cycle failed, it is tried again", "mode", report.Mode, "error", err)
		}
		return report, err
	}
	e.history.finish(&report)
	level := e.log.Debug
	if report.Mode != ModeIncremental || changed {
		level = e.log.Info
	}
	level("point taken", "sequence", report.Point.Sequence, "mode", report.Mode, "reason", report.Reason,
		"changed_bytes", report.ChangedBytes, "sent_bytes", report.SentBytes, "seconds", report.Total.Seconds())
	return report, nil
}

func (e *Engine) cycle(ctx context.Context, o CycleOptions) (CycleReport, error) {
	report := CycleReport{StartedAt: e.now()}
	var state TargetState
	var dom hypervisor.Domain
	facts := Facts{Epoch: e.cfg.Epoch}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) { state, err = e.cfg.Target.State(gctx); return err })
	g.Go(func() (err error) { dom, err = e.cfg.Hypervisor.Domain(gctx, e.cfg.VM); return atSource(err) })
	g.Go(func() (err error) { facts.Checkpoints, err = e.checkpointNames(gctx); return atSource(err) })
	err := g.Wait()
	if state.Epoch > e.cfg.Epoch {
		return report, switchback.Errorf(switchback.CodeStaleEpoch, "the target knows epoch %d, this source holds %d", state.Epoch, e.cfg.Epoch)
	}
	if err != nil {
		return report, err
	}
	facts.Target = state
	off := dom.State == hypervisor.StateOff
	if off != o.Offline {
		return report, atSource(switchback.Errorf(switchback.CodeConflict, "VM %s is %s", dom.Name, dom.State))
	}
	if !off && (!e.jobsClear || dom.State == hypervisor.StatePaused) {
		if err := e.clearJob(ctx); err != nil {
			return report, atSource(err)
		}
		e.jobsClear = true
	}
	want := e.wants(o)
	if !off {
		e.noteFrozen(ThawLeft(ctx, e.cfg.Dir, e.cfg.Hypervisor, e.cfg.VM))
		if err := e.awaitAgent(ctx, dom); err != nil {
			return report, atSource(err)
		}
		if want != crashWillDo {
			if dom, err = e.cfg.Hypervisor.Domain(ctx, e.cfg.VM); err != nil {
				return report, atSource(err)
			}
			if err := guestAnswers(dom); err != nil && want == appRequired {
				return report, refusal{err}
			} else if err != nil {
				e.missedApp(err)
				want = crashWillDo
			}
		}
	}
	if state.Seeded && !e.indexReady {
		valid, err := e.index.Recover(state.Head.Digest)
		if err != nil {
			return report, err
		}
		if !valid {
			if err := e.index.SetStamp(state.Head.Digest); err != nil { // empty: all unknown, suppresses nothing
				return report, err
			}
			e.log.Info("block index is void, it starts anew", "head", state.Head.Sequence)
		}
		e.indexReady = true
	}
	d := Decide(facts)
	if d.Mode == ModeSeed {
		if off {
			return report, atSource(switchback.Errorf(switchback.CodeConflict, "VM %s is off and the target has no complete copy yet", dom.Name).
				WithHint("start the VM and wait for the first point"))
		}
		if want == appRequired {
			return report, refusal{switchback.Errorf(switchback.CodeRefused, "the first full copy of VM %s is not complete", dom.Name).WithHint("wait for the first point")}
		}
		return e.seed(ctx, report, state, d)
	}
	report, err = e.point(ctx, report, state, d, off, want)
	if switchback.CodeOf(err) == switchback.CodeBitmapLost && d.Mode == ModeIncremental {
		facts.BitmapLost = true
		d = Decide(facts)
		return e.point(ctx, report, state, d, off, want)
	}
	return report, err
}

// clearJob ends a backup job that a dead agent or a failed cycle left, and
// resumes a guest that its full scratch space has paused.
func (e *Engine) clearJob(ctx context.Context) error {
	open, err := e.cfg.Hypervisor.HasBackup(ctx, e.cfg.VM)
	if err != nil {
		return err
	}
	if open {
		e.log.Info("ending a backup job left by an earlier run")
		if err := e.cfg.Hypervisor.EndBackup(ctx, e.cfg.VM); err != nil {
			return err
		}
	}
	dom, err := e.cfg.Hypervisor.Domain(ctx, e.cfg.VM)
	if err != nil {
		return err
	}
	if dom.State == hypervisor.StatePaused && dom.PauseReason == hypervisor.PauseIOError {
		e.log.Warn("resuming the guest after an I/O error during a backup job")
		return e.cfg.Hypervisor.Resume(ctx, e.cfg.VM)
	}
	return nil
}

// agentPatience is how long a cycle waits for the guest agent of a guest that boots.
const agentPatience = 15 * time.Second

// awaitAgent lets a guest agent connect before a backup job is open. Libvirt 9.0
// handles the connection in a thread that all its domains share, and has it wait
// 30 s for a job that is open; the end of that very job then waits behind it
// (seen). A guest whose agent does not come is waited for once.
func (e *Engine) awaitAgent(ctx context.Context, dom hypervisor.Domain) error {
	for begin := e.now(); dom.GuestAgent == hypervisor.AgentDisconnected && !e.agentMissed; {
		if e.now().Sub(begin) >= agentPatience {
			e.agentMissed = true
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(300 * time.Millisecond):
		}
		var err error
		if dom, err = e.cfg.Hypervisor.Domain(ctx, e.cfg.VM); err != nil {
			return err
		}
	}
	if dom.GuestAgent == hypervisor.AgentConnected {
		e.agentMissed = false
	}
	return nil
}

func (e *Engine) checkpointNames(ctx context.Context) ([]string, error) {
	list, err := e.cfg.Hypervisor.Checkpoints(ctx, e.cfg.VM)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(list))
	for i, c := range list {
		names[i] = c.Name
	}
	return names, nil
}

// point takes an incremental or resync point and makes it durable at the target.
func (e *Engine) point(ctx context.Context, report CycleReport, state TargetState, d Decision, off bool, want consistency) (_ CycleReport, err error) {
	report.Mode, report.Reason = d.Mode, d.Reason
	if d.Mode == ModeResync {
		e.log.Warn("resync: reading whole disks", "reason", d.Reason)
	}
	hv := e.cfg.Hypervisor
	p := switchback.Point{Protection: e.cfg.Protection, Sequence: d.Sequence, Epoch: e.cfg.Epoch, Kind: switchback.CrashConsistent,
		Checkpoint: CheckpointName(e.cfg.Epoch, d.Sequence), Parent: state.Head.Digest,
		Resync: d.Mode == ModeResync, ResyncReason: d.Reason}
	var must map[string]extent.Set
	if state.Head.Sequence == 0 {
		must = e.cfg.MustSend
	}
	must, resend, err := e.resendToo(must)
	if err != nil {
		return report, err
	}
	var f *frozen
	if off {
		p.Kind, p.Checkpoint = switchback.ShutdownConsistent, d.From
		f, err = e.openOffline(ctx, d, must)
	} else {
		for _, name := range d.Drop {
			if err := hv.DeleteCheckpoint(ctx, e.cfg.VM, name); err != nil {
				return report, atSource(fmt.Errorf("delete checkpoint %s: %w", name, err))
			}
		}
		f, err = e.freeze(ctx, d.From, p.Checkpoint, want)
	}
	err = atSource(err)
	unsure := false // the target may have made the point, whose checkpoint must then stay
	release := sync.OnceValue(func() error {
		if f == nil {
			return nil
		}
		c, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		return f.release(c)
	})
	defer func() {
		rerr := release()
		if err == nil {
			err = rerr
		}
		if err != nil && f != nil && !off && !unsure {
			// The new checkpoint merges into its parent; the next cycle carries both.
			c, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			if derr := hv.DeleteCheckpoint(c, e.cfg.VM, p.Checkpoint); derr != nil {
				e.log.Warn("checkpoint of a failed cycle is left, the next cycle drops it", "checkpoint", p.Checkpoint, "error", derr)
			}
		}
	}()
	if err != nil {
		return report, err
	}
	p.Time = f.time
	if f.app {
		p.Kind = switchback.ApplicationConsistent
	}
	report.Frozen = f.frozen
	report.Begin = e.now().Sub(report.StartedAt)

	if !off {
		guarded, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		go e.guardScratch(guarded, cancel)
		ctx = guarded
		if err := f.mapRanges(ctx, e.cfg.Disks, d.Mode == ModeIncremental, must); err != nil {
			return report, causeOf(ctx, err)
		}
	}
	begin := e.now()
	acked, err := e.send(ctx, &report, p, f, release, &unsure)
	if err != nil {
		return report, causeOf(ctx, err)
	}
	report.Point = acked
	if f.app {
		e.appTaken = f.time
		e.history.mark("application-consistent-points-missing", nil)
	}
	if err := e.resent(resend); err != nil {
		return report, err
	}
	report.Transfer = e.now().Sub(begin)
	if state.Head.Sequence > 0 && !state.Head.Time.IsZero() {
		report.RPO = e.now().Sub(state.Head.Time)
	}
	begin = e.now()
	if err := release(); err != nil {
		return report, err
	}
	if !off && d.From != "" {
		if err := hv.DeleteCheckpoint(ctx, e.cfg.VM, d.From); err != nil {
			// The point exists; the next cycle drops the leftover.
			e.log.Warn("older checkpoint is left, the next cycle drops it", "checkpoint", d.From, "error", err)
		}
	}
	report.End = e.now().Sub(begin)
	report.Total = e.now().Sub(report.StartedAt)
	return report, nil
}

// causeOf prefers why the context was cancelled over what that made fail.
func causeOf(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && ctx.Err() != nil {
		return c
	}
	return err
}

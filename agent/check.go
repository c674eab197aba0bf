package agent

import (
	"context"
	"fmt"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
)

const (
	// checkRate bounds what a check in the background reads, in bytes per second.
	checkRate = 32 << 20
	// checkSaveEvery is how often its progress is made durable.
	checkSaveEvery = 10 * time.Second
	// checkFirst is how long after a replica was made over disks of which nothing
	// is known its first check begins.
	checkFirst = time.Hour
	// checkLookEvery is how often is looked whether one is due.
	checkLookEvery = 20 * time.Second
)

// checkRecord is what is kept of a replica's checks, beside it.
type checkRecord struct {
	// Since is when the replica was first looked at.
	Since time.Time              `json:"since"`
	Last  *agentapi.ReplicaCheck `json:"last,omitempty"`
	// Running is how far the one in the background is; nil when none is under way.
	Running   *journal.CheckState `json:"running,omitempty"`
	StartedAt time.Time           `json:"started_at,omitzero"`
}

// checks is what an agent knows of the checks of one replica.
type checks struct {
	mu   sync.Mutex
	of   *journal.Replica // that rec was read from
	rec  checkRecord
	stop context.CancelFunc // of the one under way in the background
	done chan struct{}
}

// load reads the record of a replica, once. The caller holds c.mu.
func (c *checks) load(r *journal.Replica) error {
	if c.of == r {
		return nil
	}
	c.of, c.rec = r, checkRecord{}
	err := r.LoadCheck(&c.rec)
	switch switchback.CodeOf(err) {
	case switchback.CodeNotFound, switchback.CodeCorrupt: // never checked; a check that is forgotten is made again
		c.rec = checkRecord{Since: time.Now()}
		return r.SaveCheck(c.rec)
	}
	return err
}

// change makes a change of the record durable.
func (c *checks) change(r *journal.Replica, f func(*checkRecord)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.load(r); err != nil {
		return err
	}
	f(&c.rec)
	return r.SaveCheck(c.rec)
}

// checkStatus is how the checks stand, and the condition that follows.
func (v *vm) checkStatus(r *journal.Replica, a Assignment) (*agentapi.CheckStatus, []switchback.Condition) {
	v.checks.mu.Lock()
	defer v.checks.mu.Unlock()
	if v.checks.load(r) != nil {
		return nil, nil
	}
	st := &agentapi.CheckStatus{Last: v.checks.rec.Last, Next: v.checks.due(a.Policy, r.Manifest().BaseIsOriginal)}
	if run := v.checks.rec.Running; run != nil && run.TotalBytes > 0 {
		percent := 100 * float64(run.DoneBytes) / float64(run.TotalBytes)
		st.Percent = &percent
	}
	if st.Last == nil || len(st.Last.Damage) == 0 {
		return st, nil
	}
	d := st.Last.Damage[0]
	cause := fmt.Sprintf("%v; it affects %s", d, d.Points())
	if n := len(st.Last.Damage) - 1; n > 0 {
		cause += fmt.Sprintf(", and %d more damages", n)
	}
	if d.Branch != "" {
		return st, []switchback.Condition{{Name: "replica-damaged", Severity: switchback.SeverityCritical, Cause: cause, Since: st.Last.At,
			Remedy: fmt.Sprintf("no point is affected; drop the snapshot: switchback vm snapshot drop %s %s", a.Name, d.Branch)}}
	}
	return st, []switchback.Condition{{Name: "replica-damaged", Severity: switchback.SeverityCritical, Cause: cause, Since: st.Last.At,
		Remedy: fmt.Sprintf("switchback points repair %s: the source sends these ranges again, newer points are whole then, and older ones where it still has the content; choose a point that is not affected until then", a.Name)}}
}

// due is when the next check begins by itself; zero = never. Original disks, of
// which nothing is known at first, are proven soon. The caller holds c.mu.
func (c *checks) due(p switchback.Policy, original bool) time.Time {
	every := p.VerifyInterval()
	switch {
	case every == 0:
		return time.Time{}
	case c.rec.Last != nil:
		return c.rec.Last.At.Add(every)
	case original:
		return c.rec.Since.Add(min(every, checkFirst))
	}
	return c.rec.Since.Add(every)
}

// checkReplicas runs the checks that are due, one at a time, until ctx ends.
func (a *Agent) checkReplicas(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, checkLookEvery) {
		for _, v := range a.all() {
			if ctx.Err() == nil {
				v.checkIfDue(ctx)
			}
		}
	}
}

// checkIfDue goes on with a check, or begins one. A replica that is not open
// has not been taken up yet.
func (v *vm) checkIfDue(ctx context.Context) {
	v.mu.Lock()
	r, as := v.replica, v.a
	v.mu.Unlock()
	if r == nil || as.Role != agentapi.RoleTarget || r.Manifest().Seeding {
		return
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	done := make(chan struct{})
	defer close(done)
	v.checks.mu.Lock()
	err := v.checks.load(r)
	rec := v.checks.rec
	due := v.checks.due(as.Policy, r.Manifest().BaseIsOriginal)
	begin := err == nil && (rec.Running != nil || !due.IsZero() && time.Now().After(due))
	if begin {
		v.checks.stop, v.checks.done = stop, done
	}
	v.checks.mu.Unlock()
	if err != nil {
		v.agent.log.Error("the record of checks cannot be read", "protection", as.Protection, "error", err)
		return
	}
	if !begin {
		return
	}
	defer func() {
		v.checks.mu.Lock()
		v.checks.stop, v.checks.done = nil, nil
		v.checks.mu.Unlock()
	}()
	o := journal.CheckOptions{BytesPerSecond: checkRate}
	if rec.Running != nil {
		o.State = *rec.Running
	} else {
		rec.StartedAt = time.Now()
	}
	var saved time.Time
	o.Progress = func(st journal.CheckState) {
		if v.assignment().Role != agentapi.RoleTarget {
			stop()
			return
		}
		v.checks.mu.Lock()
		if v.checks.of == r {
			v.checks.rec.Running = &st
		}
		v.checks.mu.Unlock()
		if time.Since(saved) > checkSaveEvery {
			saved = time.Now()
			if err := v.checks.change(r, func(x *checkRecord) { x.Running, x.StartedAt = &st, rec.StartedAt }); err != nil {
				v.agent.log.Warn("progress of a check is not saved", "protection", as.Protection, "error", err)
			}
		}
	}
	st, err := r.Check(ctx, o)
	if err != nil {
		if ctx.Err() == nil {
			v.agent.log.Error("check of the replica failed, trying again", "protection", as.Protection, "error", err)
		}
		return
	}
	if err := v.checked(r, rec.StartedAt, 0, st); err != nil {
		v.agent.log.Error("the result of a check is not saved", "protection", as.Protection, "error", err)
	}
}

// checked keeps the result of a check of everything.
func (v *vm) checked(r *journal.Replica, began time.Time, seq switchback.Sequence, st journal.CheckState) error {
	result := checkResult(began, seq, st)
	if seq != 0 {
		return nil
	}
	if len(st.Damage) > 0 {
		v.agent.log.Error("the replica is damaged", "protection", v.assignment().Protection, "damage", st.Damage[0].Error(), "affects", st.Damage[0].Points(), "more", len(st.Damage)-1)
	}
	return v.checks.change(r, func(x *checkRecord) { x.Last, x.Running, x.StartedAt = &result, nil, time.Time{} })
}

func checkResult(began time.Time, seq switchback.Sequence, st journal.CheckState) agentapi.ReplicaCheck {
	now := time.Now()
	return agentapi.ReplicaCheck{At: now, Took: now.Sub(began), Sequence: seq, Points: st.Points, Bytes: st.TotalBytes,
		UnprovenBytes: st.UnprovenBytes, Damage: st.Damage}
}

// stopCheck ends a check in the background; it goes on where it was another time.
func (v *vm) stopCheck() {
	v.checks.mu.Lock()
	stop, done := v.checks.stop, v.checks.done
	v.checks.mu.Unlock()
	if stop != nil {
		stop()
		<-done
	}
}

// checkable refuses to check bases that somebody else writes by now.
func (v *vm) checkable() error {
	as := v.assignment()
	if as.Role == agentapi.RoleTarget || as.Role == agentapi.RoleActive && as.Run != nil && !as.Run.Folded && !as.Run.Viewless {
		return nil
	}
	return switchback.Errorf(switchback.CodeRefused, "%s is being committed: its replica becomes plain disks", as.Name)
}

// checkReplica checks everything, or what a reader of one point reads.
func (a *Agent) checkReplica(ctx context.Context, t *task, v *vm, replica *journal.Replica, _ agentapi.Task, p agentapi.CheckReplicaParams) (any, error) {
	if err := v.checkable(); err != nil {
		return nil, err
	}
	if p.Sequence > 0 {
		if _, err := journal.InspectPoint(replica.Dir(), p.Sequence); switchback.CodeOf(err) == switchback.CodeNotFound {
			return nil, err
		}
	}
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	began := time.Now()
	st, err := replica.Check(ctx, journal.CheckOptions{Point: p.Sequence, BytesPerSecond: p.BytesPerSecond, Progress: func(st journal.CheckState) {
		t.Report("checking", rates(began, st.DoneBytes, st.TotalBytes))
		if err := v.checkable(); err != nil {
			stop(err)
		}
	}})
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return nil, cause
	}
	if err != nil {
		return nil, err
	}
	if err := v.checkable(); err != nil { // what was found may be the commit's doing
		return nil, err
	}
	if err := v.checked(replica, began, p.Sequence, st); err != nil {
		return nil, err
	}
	return checkResult(began, p.Sequence, st), nil
}

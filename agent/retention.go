package agent

import (
	"context"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/retention"
)

// retentionRate is how many bytes a second retention may read and write beside
// replication. A journal that is too large does not wait.
const retentionRate = 100 << 20

// retainLater applies the retention policy in the background, when it asks for
// something and nothing of the kind runs. What is interrupted is planned anew
// after the next point.
func (v *vm) retainLater() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.folded != nil || v.replica == nil || v.a.Role != agentapi.RoleTarget {
		return
	}
	replica, policy := v.replica, v.a.Policy.EffectiveRetention()
	plan := replica.PlanRetention(policy, time.Now())
	v.setRetained(replica, plan.Shortage, nil)
	if len(plan.Steps) == 0 && !v.offloadDue(replica) {
		return
	}
	folded := make(chan struct{})
	ctx, cancel := context.WithCancel(v.agent.tasks.ctx)
	v.folded, v.stopFold = folded, cancel
	go func() {
		defer close(folded)
		defer cancel()
		err := v.retain(ctx, replica, policy, plan)
		var far error
		if err == nil {
			far = v.offload(ctx, replica)
		}
		shortage := replica.PlanRetention(policy, time.Now()).Shortage
		if shortage == nil && plan.Shortage != nil && plan.Shortage.Cut {
			shortage = plan.Shortage // it was made to fit just now
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		v.folded, v.stopFold = nil, nil
		if ctx.Err() != nil {
			err = nil
		}
		if err != nil {
			v.agent.log.Error("retention", "protection", v.a.Protection, "error", err)
		}
		if ctx.Err() != nil {
			far = nil
		}
		v.setOffloaded(far)
		v.setRetained(replica, shortage, err)
	}()
}

// retain carries out what retention plans until nothing is left to do.
func (v *vm) retain(ctx context.Context, replica *journal.Replica, policy switchback.Retention, plan retention.Plan) error {
	for len(plan.Steps) > 0 {
		rate := int64(retentionRate)
		if s := plan.Shortage; s != nil && s.Cut {
			rate = 0
		}
		var err error
		if s := plan.Steps[0]; s.Fold() {
			err = replica.FoldPaced(ctx, s.Into, v.openFoldWriter, rate)
		} else {
			err = replica.Merge(ctx, s.First, s.Into, rate)
		}
		if err != nil {
			return err
		}
		plan = replica.PlanRetention(policy, time.Now())
	}
	return nil
}

// setRetained keeps what is to be reported of retention. The caller holds v.mu.
func (v *vm) setRetained(replica *journal.Replica, shortage *retention.Shortage, failed error) {
	var now []switchback.Condition
	warn := func(name, cause, remedy string) {
		c := switchback.Condition{Name: name, Severity: switchback.SeverityWarning, Cause: cause, Remedy: remedy, Since: time.Now()}
		for _, old := range v.retained {
			if old.Name == name {
				c.Since = old.Since
			}
		}
		now = append(now, c)
	}
	if err := replica.MarksDamage(); err != nil {
		warn("marks-unreadable", err.Error(), "nothing is dropped meanwhile, since a point may be locked; move "+replica.MarksFile()+" away to forget all marks, then restart the agent")
	}
	for _, p := range replica.Pins() {
		if p.Damaged {
			warn("pin-unreadable", fmt.Sprintf("pin %s cannot be read; no point is dropped meanwhile", p.Name), "remove the pin when nothing uses it")
		}
	}
	if failed != nil {
		warn("retention-failing", failed.Error(), "points are kept; see the cause")
	}
	if s := shortage; s != nil {
		warn("history-shorter-than-policy", shortageCause(*s), "raise --journal-max, or ask for less with --retention")
	}
	v.retained = now
}

// shortageCause says in words what a shortage is.
func shortageCause(s retention.Shortage) string {
	size := fmt.Sprintf("the journal holds %d MiB of at most %d MiB", s.Bytes>>20, s.MaxBytes>>20)
	history := fmt.Sprintf("reaches back %s", s.History.Round(time.Second))
	if s.Wanted > 0 {
		history += fmt.Sprintf(" of the %s that the policy asks for", switchback.FormatAge(s.Wanted))
	}
	switch {
	case s.Over:
		return size + "; what is left is locked, pinned or the minimum and is kept; the history " + history
	case s.Cut:
		return size + ": points that the policy keeps are dropped; the history " + history
	}
	return size + " and will soon drop points that the policy keeps; the history " + history
}

// stopFolding ends retention in the background, which goes on where it was
// another time.
func (v *vm) stopFolding() {
	v.mu.Lock()
	stop, folded := v.stopFold, v.folded
	v.mu.Unlock()
	if stop != nil {
		stop()
		<-folded
	}
}

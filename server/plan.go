package server

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/replicator"
)

// assumedRate is the throughput an estimate uses where nothing was measured yet.
const assumedRate = 100 << 20 // bytes per second

// plan says what an operation would do, without doing it. The steps are the
// very ones that would run.
func (s *Server) plan(ctx context.Context, v api.VM, kind recovery.Kind, params any) (*api.Plan, error) {
	raw, err := json.Marshal(params)
	if err != nil {
		return nil, err
	}
	p := v.Protection
	plan := &api.Plan{Kind: string(kind), VM: p.Name}
	for _, d := range s.definitions() {
		if d.Kind != string(kind) {
			continue
		}
		steps, err := d.Steps(raw)
		if err != nil {
			return nil, err
		}
		for _, st := range steps {
			plan.Steps = append(plan.Steps, api.PlanStep{Name: st.Name, Title: st.Title})
		}
	}
	if len(plan.Steps) == 0 {
		return nil, switchback.Errorf(switchback.CodeInvalid, "unknown operation %q", kind)
	}
	var sp switchParams
	if kind == recovery.Failover || kind == recovery.Failback {
		sp = params.(switchParams)
	}
	switch kind {
	case recovery.Protect:
		for _, d := range p.Disks {
			if d.AllocatedBytes > 0 {
				plan.Bytes += d.AllocatedBytes
			} else {
				plan.Bytes += d.SizeBytes
			}
		}
		plan.Basis = "what the disks occupy at the source; holes and zeros are not sent"
		plan.Time = estimate(plan.Bytes)
		plan.Changes = []string{fmt.Sprintf("a replica of %s (%d disks) is made at site %s", p.Name, len(p.Disks), p.Target)}
		plan.Keeps = []string{fmt.Sprintf("the guest goes on running at %s", p.Source)}
	case recovery.Failover, recovery.Failback:
		s.planSwitch(v, sp, plan)
		if err := s.planChoice(ctx, v, sp, plan); err != nil {
			return nil, err
		}
		if sp.FromCommitted {
			if err := s.planReprotect(ctx, v, plan); err != nil {
				return nil, err
			}
		}
	case recovery.Reprotect:
		if err := s.planReprotect(ctx, v, plan); err != nil {
			return nil, err
		}
	case recovery.Commit:
		points, err := s.points(ctx, p)
		if err != nil {
			return nil, err
		}
		kept, dropped := 0, 0
		var fold int64
		for _, pt := range points {
			if p.Switch != nil && pt.Sequence > p.Switch.Point.Sequence {
				dropped++
			} else {
				kept++
				fold += pt.ChangedBytes
			}
		}
		plan.Basis = fmt.Sprintf("nothing crosses the network; at most %d MiB are written locally, and what the guest has written since it started", fold>>20)
		plan.Time = estimate(fold)
		cp := params.(commitParams)
		if cp.Points == "keep" {
			plan.Time = 0
			plan.Changes = []string{fmt.Sprintf("%d later recovery points are dropped", dropped)}
			if err := s.planKeep(ctx, v, plan); err != nil {
				return nil, err
			}
			plan.Keeps = []string{fmt.Sprintf("%d recovery points up to the chosen one, read-only, until the new direction has its own", kept)}
		} else {
			plan.Changes = []string{fmt.Sprintf("the recovery points are deleted: %d up to the chosen one become the disk, %d later ones are dropped", kept, dropped)}
		}
		if p.Target == p.Home {
			plan.Keeps = append(plan.Keeps, fmt.Sprintf("the VM at its home %s stays defined, off and fenced, with its disks", p.Home))
		} else {
			plan.Changes = append(plan.Changes, fmt.Sprintf("the VM is undefined at %s", p.Target))
			plan.Keeps = append(plan.Keeps, fmt.Sprintf("its disks at %s stay as seed of the next reprotect", p.Target))
		}
		planSnapshots(v, cp.Snapshots, plan)
	case recovery.ChangePoint:
		if err := s.planChange(ctx, v, params.(changeParams), plan); err != nil {
			return nil, err
		}
	case recovery.Extend:
		plan.Basis = "nothing is copied"
		if ep := params.(extendParams); ep.Until.IsZero() {
			plan.Changes = []string{"the countdown stops: the switch waits for an operator"}
		} else {
			plan.Changes = []string{fmt.Sprintf("the policy's %s begins at %s", p.Policy.Commit.Action, ep.Until.UTC().Format(time.RFC3339))}
		}
	case recovery.Resolve:
		planResolve(p, params.(resolveParams), plan)
	case recovery.DropKept:
		plan.Basis = "nothing is copied"
		plan.Changes = []string{"the points that the commit has kept are deleted"}
	case recovery.DropSnapshot:
		_, kept, err := snapshotKeeper(v, params.(dropSnapshotParams).Snapshot)
		if err != nil {
			return nil, err
		}
		plan.Basis = "nothing is copied"
		plan.Changes = []string{fmt.Sprintf("snapshot %s is deleted: %d MiB that a run from point %d wrote", kept.Name, kept.SizeBytes>>20, kept.Point)}
	case recovery.Cancel:
		plan.Basis = "nothing is copied"
		plan.Time, plan.Outage = 15*time.Second, 15*time.Second
		plan.Changes = []string{fmt.Sprintf("the guest at %s is turned off: what it wrote since the switch is set aside", p.Source),
			fmt.Sprintf("the guest at %s is started again, replication resumes", p.Target)}
		plan.Keeps = []string{"all recovery points"}
	case recovery.TakePoint, recovery.Edit:
		plan.Basis = "what has changed since the last point"
		if lc := lastCycle(v); lc != nil {
			plan.Bytes, plan.Time = lc.SentBytes, lc.Total
		}
		if tp, ok := params.(agentapi.TakePointParams); ok && tp.ApplicationConsistent {
			plan.Changes = []string{"the guest's file systems are frozen through its agent while the instant is fixed, 10 s at most; refused where the agent does not answer"}
		}
	case recovery.Unprotect:
		plan.Basis = "nothing is copied"
		plan.Time = 5 * time.Second
		plan.Keeps = []string{fmt.Sprintf("the VM at %s, as it is", p.Source)}
		if params.(unprotectParams).RemoveData {
			plan.Changes = []string{fmt.Sprintf("the replica or seed disks at %s are deleted, unless a VM is defined on them", p.Target)}
		} else {
			plan.Keeps = append(plan.Keeps, fmt.Sprintf("the replica or seed disks at %s (add --remove-data to delete them)", p.Target))
		}
	}
	return plan, nil
}

func lastCycle(v api.VM) *replicator.CycleReport {
	if v.AtSource != nil && v.AtSource.Replication != nil {
		if c := v.AtSource.Replication.LastCycle; c != nil && c.Mode == replicator.ModeIncremental {
			return c
		}
	}
	return nil
}

func (s *Server) planSwitch(v api.VM, sp switchParams, plan *api.Plan) {
	p := v.Protection
	from, to := p.Source, p.Target
	plan.Basis = "the size of the last cycle, twice (before and after the shutdown)"
	plan.Outage = 10 * time.Second
	if lc := lastCycle(v); lc != nil {
		plan.Bytes = 2 * lc.SentBytes
		plan.Outage += lc.Total
	}
	plan.Time = plan.Outage + 5*time.Second
	plan.Changes = []string{fmt.Sprintf("the guest is shut down at %s, started at %s, and fenced at %s", from, to, from)}
	plan.Keeps = []string{fmt.Sprintf("the copy at %s and all recovery points, until the switch is committed or cancelled", from)}
}

// planChoice says which point is chosen, what that loses, and what is known against it.
func (s *Server) planChoice(ctx context.Context, v api.VM, sp switchParams, plan *api.Plan) error {
	sp.AcceptLoss = true
	chosen, err := s.checkChoice(ctx, v, sp)
	if err == nil && chosen == nil && !sp.FromCommitted { // latest: the newest so far tells
		newest, nerr := s.choose(ctx, v.Protection, recovery.Choice{}, time.Now())
		if nerr != nil {
			return nerr
		}
		if w := recovery.Warning(newest); w != "" {
			plan.Warnings = append(plan.Warnings, "the newest so far, "+w)
		}
	}
	if err != nil || chosen == nil {
		return err
	}
	plan.Changes = append(plan.Changes, fmt.Sprintf("the guest starts from point %d (%s): everything written later is left behind", chosen.Sequence, chosen.Kind))
	plan.Warnings = append(plan.Warnings, lossText(*chosen))
	if w := recovery.Warning(*chosen); w != "" {
		plan.Warnings = append(plan.Warnings, w)
	}
	return nil
}

// planReprotect asks the other site what it keeps and says what has to travel.
func (s *Server) planReprotect(ctx context.Context, v api.VM, plan *api.Plan) error {
	p := v.Protection
	params, err := s.prepareFromRest(ctx, p)
	if err != nil {
		return err
	}
	params.DryRun = true
	a, err := s.store.Agent(ctx, p.TargetAgent)
	if err != nil {
		return err
	}
	var out agentapi.PrepareReplicaResult
	t := agentapi.Task{Key: fmt.Sprintf("plan/%s/%d", p.ID, time.Now().UnixNano()), Action: agentapi.ActionPrepareReplica, Protection: p.ID, Epoch: p.Epoch}
	if err := s.agentClient(a.ID).Run(ctx, t, params, &out, nil); err != nil {
		return err
	}
	if out.Trusted {
		plan.Basis = "to the original location: only blocks written since the switch, and those of points that were left behind; at most what the disks occupy"
	} else {
		plan.Basis = "to the original location, everything: " + out.Reason
	}
	for _, d := range params.Disks {
		if out.Trusted {
			plan.Bytes += d.AllocatedBytes
		} else {
			plan.Bytes += d.SizeBytes
		}
	}
	plan.Time += estimate(plan.Bytes)
	plan.Changes = append(plan.Changes, fmt.Sprintf("replication runs from %s to %s, over the disks kept there", p.Source, p.Target))
	plan.Keeps = append(plan.Keeps, fmt.Sprintf("the guest goes on running at %s meanwhile", p.Source))
	return nil
}

func (s *Server) planCancelRunning(v api.VM) *api.Plan {
	plan := &api.Plan{Kind: "cancel", VM: v.Name, Basis: "nothing is copied"}
	for i := len(v.Current.Steps) - 1; i >= 0; i-- {
		if st := v.Current.Steps[i]; !st.StartedAt.IsZero() {
			plan.Steps = append(plan.Steps, api.PlanStep{Name: st.Name, Title: "undo: " + st.Title})
		}
	}
	plan.Changes = []string{fmt.Sprintf("operation %s stops and what it did is undone", v.Current.ID)}
	return plan
}

func estimate(bytes int64) time.Duration {
	return (2*time.Second + time.Duration(float64(bytes)/assumedRate*float64(time.Second))).Round(time.Second)
}

package server

import (
	"context"
	"fmt"
	"time"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
)

// planChange says what a change of the point would stop, keep and start.
func (s *Server) planChange(ctx context.Context, v api.VM, params changeParams, plan *api.Plan) error {
	p := v.Protection
	chosen, err := s.changeTarget(ctx, p, params, time.Now())
	if err != nil {
		return err
	}
	plan.Basis = "nothing is copied"
	plan.Outage = 10*time.Second + params.ShutdownDeadline/2
	plan.Time = plan.Outage + 5*time.Second
	to := fmt.Sprintf("point %d (%s, %s)", chosen.Sequence, chosen.Kind, chosen.Time.UTC().Format(time.RFC3339))
	if params.Snapshot != "" {
		to = fmt.Sprintf("snapshot %s, on point %d", params.Snapshot, chosen.Sequence)
	}
	plan.Changes = []string{fmt.Sprintf("the guest at %s is stopped and started from %s", p.Source, to)}
	plan.Keeps = []string{fmt.Sprintf("what it has written since it was started from point %d, as a snapshot to which it can return", p.Switch.Point.Sequence),
		"all recovery points, until the switch is committed or cancelled"}
	if w := recovery.Warning(chosen); w != "" {
		plan.Warnings = append(plan.Warnings, w)
	}
	return nil
}

// planSnapshots says what a commit does to the snapshots that need its points.
func planSnapshots(v api.VM, choice string, plan *api.Plan) {
	list := leaning(v.AtSource)
	if len(list) == 0 {
		return
	}
	var bytes int64
	for _, x := range list {
		bytes += x.WholeBytes
	}
	switch choice {
	case "drop":
		plan.Changes = append(plan.Changes, fmt.Sprintf("%d kept snapshots are dropped", len(list)))
		return
	case "":
		plan.Warnings = append(plan.Warnings, "the commit is refused until you say --snapshots drop or --snapshots keep; this is what keep does")
	}
	plan.Changes = append(plan.Changes, fmt.Sprintf("%d kept snapshots are made self-contained: at most %d MiB are written locally", len(list), bytes>>20))
	plan.Time += estimate(bytes)
}

package server

import (
	"context"
	"log/slog"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
)

// stopDrills makes way for an operation on the VM: a drill never blocks one. What
// cannot be cleared is logged; the agent goes on trying.
func (s *Server) stopDrills(ctx context.Context, r *operation.Run, p switchback.Protection) {
	if id := p.Drill.Operation; id != "" {
		err := s.runner.Cancel(ctx, id)
		if err != nil && switchback.CodeOf(err) != switchback.CodeRefused && switchback.CodeOf(err) != switchback.CodeNotFound {
			r.Log(slog.LevelWarn, "the drill under way cannot be cancelled", "drill", id, "error", err)
		}
		r.Log(slog.LevelInfo, "the drill under way is cleared first", "drill", id)
	} else if !s.keepsDrills(ctx, p) {
		return
	}
	var out agentapi.DrillCleanResult
	if err := s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionDrillClean, agentapi.DrillParams{}, &out); err != nil {
		r.Log(slog.LevelWarn, "drills are not cleared; going on, the agent tries again", "site", p.Target, "error", err)
	} else if len(out.Removed) > 0 {
		r.Log(slog.LevelInfo, "drill cleared", "removed", strings.Join(out.Removed, ", "))
	}
}

// keepsDrills reports whether the target's agent last said that it has drills of
// the VM. One that it has not spoken of is cleared when the VM becomes active there.
func (s *Server) keepsDrills(ctx context.Context, p switchback.Protection) bool {
	a, err := s.store.Agent(ctx, p.TargetAgent)
	if err != nil {
		return false
	}
	if v := s.agentView(a); v.Status != nil {
		for _, st := range v.Status.VMs {
			if st.Protection == p.ID && len(st.Drills) > 0 {
				return true
			}
		}
	}
	return false
}

// cleanDrillSteps clear what ended drills have left.
func (s *Server) cleanDrillSteps() []operation.Step {
	return []operation.Step{{Name: "clean", Title: "clear what drills have left", RetryFor: shortRetry, Do: func(ctx context.Context, r *operation.Run) error {
		p, err := s.of(ctx, r)
		if err != nil {
			return err
		}
		var out agentapi.DrillCleanResult
		if err := s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionDrillClean, agentapi.DrillParams{}, &out); err != nil {
			return err
		}
		return summarise(r, func(sum *api.Summary) { sum.Removed = out.Removed })
	}}}
}

func (s *Server) endCleanDrill(context.Context, *operation.Run, operation.State) error { return nil }

// replicationMeanwhile is what the VM's own replication did since the drill was
// asked for; nil where that cannot be said any more.
func (s *Server) replicationMeanwhile(ctx context.Context, r *operation.Run) *api.DrillReplication {
	p, err := s.of(ctx, r)
	if err != nil || p.Phase != switchback.PhaseProtected {
		return nil // overtaken by a move of the VM
	}
	points, err := s.points(ctx, p)
	if err != nil {
		r.Log(slog.LevelWarn, "the points that came during the drill are not known", "error", err)
		return nil
	}
	m := compareGaps(points, r.Record().CreatedAt)
	return &m
}

// compareGaps sets the time between points since an instant beside what it was
// before, over as many points.
func compareGaps(points []switchback.MarkedPoint, since time.Time) (m api.DrillReplication) {
	first := len(points) // the first after the instant
	for first > 0 && points[first-1].Time.After(since) {
		first--
	}
	m.Points = len(points) - first
	gap := func(i int) time.Duration { return points[i].Time.Sub(points[i-1].Time) }
	for i := max(first, 1); i < len(points); i++ {
		m.LongestGap = max(m.LongestGap, gap(i))
	}
	for i := max(first-m.Points, 1); i < first; i++ {
		m.LongestGapBefore = max(m.LongestGapBefore, gap(i))
	}
	return m
}

package server

import (
	"context"
	"strings"
	"time"

	"github.com/robfig/cron/v3"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

const (
	scheduleEvery = 5 * time.Second
	// drillsAtOnce bounds the drills that the server begins by itself: after a
	// downtime many are due, and their guests would boot all at once.
	drillsAtOnce = 2
)

// scheduleDrills begins drills that are due until ctx ends.
func (s *Server) scheduleDrills(ctx context.Context) {
	ticker := time.NewTicker(scheduleEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if err := s.beginDueDrills(ctx); err != nil && ctx.Err() == nil {
			s.log.Error("scheduled drills", "error", err)
		}
	}
}

func (s *Server) beginDueDrills(ctx context.Context) error {
	list, err := s.store.Protections(ctx)
	if err != nil {
		return err
	}
	running, err := s.store.Operations(ctx, operation.Filter{Kind: string(recovery.TestFailover), Unfinished: true})
	if err != nil {
		return err
	}
	free := drillsAtOnce - len(running)
	for _, p := range list {
		if p.Policy.Drill == nil || p.Phase != switchback.PhaseProtected || p.Drill.Operation != "" {
			continue
		}
		begun, err := s.beginDueDrill(ctx, p, free > 0)
		if err != nil {
			s.log.Warn("a drill that is due cannot begin", "vm", p.Name, "error", err)
		}
		if begun {
			free--
		}
	}
	return nil
}

// beginDueDrill begins what a VM's policy asks for now, if there is room. The
// decision is durable before the drill is: one that cannot begin waits for its
// next time, or tag.
func (s *Server) beginDueDrill(ctx context.Context, p switchback.Protection, room bool) (begun bool, err error) {
	now := time.Now()
	begin, due, err := drillDue(p.Policy.Drill.Schedule, p.Drill.ScheduledAt, now)
	if err != nil {
		return false, err
	}
	params := drillParams{Point: "latest-processed", Cause: "schedule"}
	change := func(axis *switchback.DrillAxis) { axis.ScheduledAt = now }
	if !due && p.Policy.Drill.OnTag != "" && room {
		points, err := s.points(ctx, p)
		if err != nil {
			return false, err
		}
		if seq := taggedForDrill(points, p.Policy.Drill.OnTag, p.Drill.OnTag); seq > 0 {
			due, params.Cause = true, "tag"
			for _, pt := range points {
				if pt.Sequence == seq {
					params.Point = pt.Mark.Tag
				}
			}
			change = func(axis *switchback.DrillAxis) { axis.OnTag = seq }
		}
	}
	if !due && !begin || due && !room {
		return false, nil
	}
	if p, err = s.update(ctx, p.ID, func(p *switchback.Protection) error { change(&p.Drill); return nil }); err != nil || !due {
		return false, err
	}
	v, err := s.view(ctx, p, true)
	if err != nil {
		return false, err
	}
	if a := recovery.Find(v.Allowed, recovery.TestFailover); !a.Allowed {
		return false, switchback.Errorf(switchback.CodeRefused, "%s", a.Reason).WithHint("%s", a.Remedy)
	}
	params.DrillRequest = api.DrillRequest{Network: p.Policy.Drill.Network, NoNetwork: p.Policy.Drill.Network == ""}
	rec, err := s.submitDrill(ctx, "policy", p, string(recovery.TestFailover), params)
	if err == nil {
		s.log.Info("drill begun", "vm", p.Name, "drill", rec.ID, "cause", params.Cause)
	}
	return err == nil, err
}

// drillDue says whether a time of the schedule lies between the last that was
// served and now; however many do, it is one drill. begin: the schedule is new,
// and is to count from now.
func drillDue(schedule string, served, now time.Time) (begin, due bool, err error) {
	if schedule == "" {
		return false, false, nil
	}
	times, err := cron.ParseStandard(schedule)
	if err != nil {
		return false, false, err
	}
	if served.IsZero() {
		return true, false, nil
	}
	next := times.Next(served)
	return false, !next.IsZero() && !next.After(now), nil
}

// taggedForDrill is the newest point after the last drilled one whose tag begins
// with the prefix and that no drill has judged; 0 = none.
func taggedForDrill(points []switchback.MarkedPoint, prefix string, after switchback.Sequence) switchback.Sequence {
	for i := len(points) - 1; i >= 0 && points[i].Sequence > after; i-- {
		if strings.HasPrefix(points[i].Mark.Tag, prefix) && points[i].Mark.Boot == nil {
			return points[i].Sequence
		}
	}
	return 0
}

// countScheduleAnew lets a schedule that is another now count from now.
func countScheduleAnew(p *switchback.Protection, next switchback.Policy) {
	of := func(d *switchback.DrillPolicy) string {
		if d == nil {
			return ""
		}
		return d.Schedule
	}
	if of(p.Policy.Drill) != of(next.Drill) {
		p.Drill.ScheduledAt = time.Time{}
	}
}

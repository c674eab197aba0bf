package server

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
)

// checkPoints refuses what a commit cannot do with the points.
func checkPoints(choice string) error {
	switch choice {
	case "", "delete", "keep":
		return nil
	}
	return switchback.Errorf(switchback.CodeInvalid, "points cannot be %q", choice).WithHint("delete or keep")
}

// locksAllow refuses what would delete a locked point after upTo.
func (s *Server) locksAllow(ctx context.Context, p switchback.Protection, upTo switchback.Sequence) error {
	points, err := s.points(ctx, p)
	if err != nil {
		return err
	}
	for _, x := range points {
		if x.Mark.Locked && x.Sequence > upTo {
			return switchback.Errorf(switchback.CodeRefused, "point %d is locked, and would be deleted", x.Sequence).
				WithHint("switchback points unlock %s %d; a commit with --points keep keeps those up to the chosen one", p.Name, x.Sequence)
		}
	}
	return nil
}

// keepPoints is the part of a commit that keeps the points up to the chosen
// one, where that was asked for.
func (s *Server) keepPoints(ctx context.Context, r *operation.Run, p switchback.Protection) error {
	var params commitParams
	if err := r.Params(&params); err != nil {
		return err
	}
	if params.Points != "keep" {
		return operation.Skip("the points are deleted")
	}
	if err := s.setPhase(ctx, p.ID, switchback.PhaseCommitting); err != nil {
		return err
	}
	var out agentapi.KeepPointsResult
	if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionKeepPoints, agentapi.KeepPointsParams{}, &out); err != nil {
		return err
	}
	r.Log(slog.LevelInfo, "points are kept, read-only", "points", out.Points, "copied_bytes", out.Bytes)
	return r.SetResult(out)
}

// dropKept deletes the points that a commit has kept.
func (s *Server) dropKept(ctx context.Context, r *operation.Run) error {
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	if !p.KeptPoints {
		return operation.Skip("no points were kept")
	}
	if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionDropKept, nil, nil); err != nil {
		return err
	}
	_, err = s.update(ctx, p.ID, func(p *switchback.Protection) error { p.KeptPoints = false; return nil })
	return err
}

func (s *Server) dropKeptSteps() []operation.Step {
	return []operation.Step{{Name: "drop", Title: "delete the points that the commit has kept", RetryFor: shortRetry, Irreversible: true, Do: s.dropKept}}
}

// planKeep says what keeping the points takes.
func (s *Server) planKeep(ctx context.Context, v api.VM, plan *api.Plan) error {
	p := v.Protection
	a, err := s.store.Agent(ctx, p.SourceAgent)
	if err != nil {
		return err
	}
	var out agentapi.KeepPointsResult
	t := agentapi.Task{Key: fmt.Sprintf("plan/%s/%d", p.ID, time.Now().UnixNano()), Action: agentapi.ActionKeepPoints, Protection: p.ID, Epoch: p.Epoch}
	if err := s.agentClient(a.ID).Run(ctx, t, agentapi.KeepPointsParams{DryRun: true}, &out, nil); err != nil {
		return err
	}
	plan.Changes = append(plan.Changes, fmt.Sprintf("the chosen point is copied to be the VM's disks: at most %d MiB are written locally", out.Bytes>>20))
	plan.Time += estimate(out.Bytes)
	return nil
}

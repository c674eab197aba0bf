package server

import (
	"context"
	"encoding/json"
	"log/slog"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
)

// commitSteps end with the phase committed. Step names carry prefix where the
// commit is part of a longer operation.
func (s *Server) commitSteps(prefix string) []operation.Step {
	step := func(name, title string, do func(ctx context.Context, r *operation.Run, p switchback.Protection) error) operation.Step {
		return operation.Step{Name: prefix + name, Title: title, RetryFor: shortRetry, Irreversible: true, Do: func(ctx context.Context, r *operation.Run) error {
			p, err := s.of(ctx, r)
			if err != nil {
				return err
			}
			return do(ctx, r, p)
		}}
	}
	return []operation.Step{
		s.settleSnapshots(prefix),
		step("keep", "keep the points, if asked to", s.keepPoints),
		step("fold", "fix the point: fold it into the base", func(ctx context.Context, r *operation.Run, p switchback.Protection) error {
			if err := s.setPhase(ctx, p.ID, switchback.PhaseCommitting); err != nil {
				return err
			}
			var out agentapi.FoldResult
			if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionFold, nil, &out); err != nil {
				return err
			}
			return r.SetResult(out)
		}),
		step("collapse", "move the VM onto plain local disks", func(ctx context.Context, r *operation.Run, p switchback.Protection) error {
			var out agentapi.CollapseResult
			if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionCollapse, nil, &out); err != nil {
				return err
			}
			r.Log(slog.LevelInfo, "the VM is on plain disks", "copied_bytes", out.CopiedBytes, "live", out.Live)
			return r.SetResult(out)
		}),
		step("settle", "fix definition and delta, remove the journal", func(ctx context.Context, r *operation.Run, p switchback.Protection) error {
			var out agentapi.SettleResult
			if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionSettle, nil, &out); err != nil {
				return err
			}
			return r.SetResult(out)
		}),
		step("retire", "settle the old side", func(ctx context.Context, r *operation.Run, p switchback.Protection) error {
			var out agentapi.RetireResult
			if err := s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionRetire, agentapi.RetireParams{Undefine: p.Target != p.Home}, &out); err != nil {
				return err
			}
			var fold agentapi.FoldResult
			var collapse agentapi.CollapseResult
			if err := r.StepResult(prefix+"fold", &fold); err != nil {
				return err
			}
			if err := r.StepResult(prefix+"collapse", &collapse); err != nil {
				return err
			}
			var settled agentapi.SettleSnapshotsResult
			if err := r.StepResult(prefix+"snapshots", &settled); err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
				return err
			}
			var kept agentapi.KeepPointsResult
			if err := r.StepResult(prefix+"keep", &kept); err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
				return err
			}
			err := summarise(r, func(sum *api.Summary) {
				sum.Commit = &api.Committed{FoldedBytes: fold.Bytes, CopiedBytes: collapse.CopiedBytes, Live: collapse.Live, Seeds: out.Seeds,
					KeptPoints: kept.Points, KeptBytes: kept.Bytes, Snapshots: settled.Kept, SnapshotBytes: settled.Bytes}
			})
			if err != nil {
				return err
			}
			_, err = s.update(ctx, p.ID, func(p *switchback.Protection) error {
				p.Phase, p.Switch, p.KeptPoints = switchback.PhaseCommitted, nil, kept.Points > 0
				if p.Seeds == nil {
					p.Seeds = map[switchback.SiteID][]switchback.Disk{}
				}
				p.Seeds[p.Target] = out.Seeds
				return nil
			})
			return err
		}),
	}
}

// reprotectSteps end with the phase protected in the new direction.
func (s *Server) reprotectSteps(prefix string) []operation.Step {
	return []operation.Step{
		{Name: prefix + "preflight", Title: "check the disks kept at the other site", RetryFor: shortRetry, Do: func(ctx context.Context, r *operation.Run) error {
			p, err := s.of(ctx, r)
			if err != nil {
				return err
			}
			var out agentapi.PrepareReplicaResult
			params, err := s.prepareFromRest(ctx, p)
			if err != nil {
				return err
			}
			params.DryRun = true
			if err := s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionPrepareReplica, params, &out); err != nil {
				return err
			}
			if !out.Trusted {
				r.Log(slog.LevelWarn, "everything has to be sent", "reason", out.Reason)
			}
			return r.SetResult(out)
		}},
		{Name: prefix + "replica", Title: "make the replica over the kept disks", RetryFor: shortRetry, Do: func(ctx context.Context, r *operation.Run) error {
			p, err := s.of(ctx, r)
			if err != nil {
				return err
			}
			params, err := s.prepareFromRest(ctx, p)
			if err != nil {
				return err
			}
			return s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionPrepareReplica, params, nil)
		}},
		{Name: prefix + "replicate", Title: "start replicating the other way", RetryFor: shortRetry,
			Do: func(ctx context.Context, r *operation.Run) error {
				p, err := s.of(ctx, r)
				if err != nil {
					return err
				}
				var prepared agentapi.PrepareReplicaResult
				if err := r.StepResult(prefix+"preflight", &prepared); err != nil {
					return err
				}
				if err := s.setPhase(ctx, p.ID, switchback.PhaseReprotecting); err != nil {
					return err
				}
				return s.startReplication(ctx, r, p, !prepared.Trusted)
			},
			// A cancelled reprotect leaves the VM committed; the target keeps what it has for the next try.
			Undo: func(ctx context.Context, r *operation.Run) error {
				p, err := s.of(ctx, r)
				if err != nil || p.Phase != switchback.PhaseReprotecting {
					return err
				}
				if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionHold, nil, nil); err != nil {
					return err
				}
				return s.setPhase(ctx, p.ID, switchback.PhaseCommitted)
			}},
		{Name: prefix + "verify", Title: "first point in the new direction, verified", RetryFor: longRetry, Cancellable: true, Do: func(ctx context.Context, r *operation.Run) error {
			p, err := s.of(ctx, r)
			if err != nil {
				return err
			}
			var out agentapi.AwaitPointResult
			if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionAwaitPoint, nil, &out); err != nil {
				return err
			}
			if err := s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionVerifyReplica, nil, nil); err != nil {
				return err
			}
			return s.awaitFirstPoint(ctx, r, p)
		}},
		{Name: prefix + "kept", Title: "delete the points that the commit has kept", RetryFor: shortRetry, Irreversible: true, Do: s.dropKept},
	}
}

// prepareFromRest are the parameters of a replica over the disks that the
// target site kept; the checkpoint is the one taken when the VM began to run here.
func (s *Server) prepareFromRest(ctx context.Context, p switchback.Protection) (agentapi.PrepareReplicaParams, error) {
	peer, err := s.peer(ctx, p.SourceAgent)
	if err != nil {
		return agentapi.PrepareReplicaParams{}, err
	}
	var source agentapi.DescribeResult
	if err := s.agentDescribe(ctx, p.SourceAgent, p, &source); err != nil {
		return agentapi.PrepareReplicaParams{}, err
	}
	var disks []switchback.Disk
	for _, d := range source.Domain.Disks {
		if d.Device == "disk" && d.Unsupported == "" {
			disks = append(disks, d.Disk)
		}
	}
	return agentapi.PrepareReplicaParams{VM: p.VM, Name: p.Name, Peer: peer, Disks: disks, FromRest: true,
		Checkpoint: runCheckpoint(p.Epoch), Policy: p.Policy}, nil
}

// failbackSteps is reprotect (where the VM is committed) + a planned failover
// home + optionally commit and reprotect, as one resumable operation.
func (s *Server) failbackSteps(raw json.RawMessage) ([]operation.Step, error) {
	var p switchParams
	if err := json.Unmarshal(raw, &p); err != nil {
		return nil, err
	}
	var steps []operation.Step
	if p.FromCommitted {
		steps = append(steps, s.reprotectSteps("reprotect-")...)
		// The points that were kept are no part of the way home: without them,
		// too, the switch that follows can be undone.
		steps[len(steps)-1].Irreversible = false
	}
	steps = append(steps, s.switchSteps()...)
	if p.AndCommit {
		steps = append(steps, s.commitSteps("commit-")...)
	}
	if p.AndReprotect {
		steps = append(steps, s.reprotectSteps("again-")...)
	}
	return steps, nil
}

package server

import (
	"context"
	"log/slog"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
)

func (s *Server) peer(ctx context.Context, id switchback.AgentID) (agentapi.Peer, error) {
	a, err := s.store.Agent(ctx, id)
	return agentapi.Peer{Agent: a.ID, Site: a.Site, Address: a.Address}, err
}

func (s *Server) protectSteps() []operation.Step {
	return []operation.Step{
		{Name: "preflight", Title: "check the VM and both sites", RetryFor: shortRetry, Do: func(ctx context.Context, r *operation.Run) error {
			p, err := s.of(ctx, r)
			if err != nil {
				return err
			}
			var d agentapi.DescribeResult
			if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionDescribe, agentapi.DescribeParams{VM: p.VM, MustExist: true}, &d); err != nil {
				return err
			}
			return r.SetResult(d.Domain)
		}},
		{Name: "replica", Title: "make the replica at the target", RetryFor: shortRetry,
			Do: func(ctx context.Context, r *operation.Run) error {
				p, err := s.of(ctx, r)
				if err != nil {
					return err
				}
				peer, err := s.peer(ctx, p.SourceAgent)
				if err != nil {
					return err
				}
				var out agentapi.PrepareReplicaResult
				err = s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionPrepareReplica, agentapi.PrepareReplicaParams{
					VM: p.VM, Name: p.Name, Peer: peer, Disks: p.Disks, Policy: p.Policy}, &out)
				if err != nil {
					return err
				}
				return r.SetResult(out)
			},
			Undo: func(ctx context.Context, r *operation.Run) error {
				p, err := s.of(ctx, r)
				if err != nil {
					return err
				}
				return s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionRelease, agentapi.ReleaseParams{RemoveData: true}, nil)
			}},
		s.roomStep(),
		{Name: "replicate", Title: "start replicating", RetryFor: shortRetry,
			Do: func(ctx context.Context, r *operation.Run) error {
				p, err := s.of(ctx, r)
				if err != nil {
					return err
				}
				if err := s.startReplication(ctx, r, p, false); err != nil {
					return err
				}
				return s.setPhase(ctx, p.ID, switchback.PhaseSeeding)
			},
			Undo: func(ctx context.Context, r *operation.Run) error {
				p, err := s.of(ctx, r)
				if err != nil {
					return err
				}
				return s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionRelease, agentapi.ReleaseParams{}, nil)
			}},
		{Name: "seed", Title: "first full copy, until the first recovery point", RetryFor: longRetry, Cancellable: true,
			Do: func(ctx context.Context, r *operation.Run) error {
				p, err := s.of(ctx, r)
				if err != nil {
					return err
				}
				return s.awaitFirstPoint(ctx, r, p)
			}},
	}
}

func (s *Server) startReplication(ctx context.Context, r *operation.Run, p switchback.Protection, sendAll bool) error {
	peer, err := s.peer(ctx, p.TargetAgent)
	if err != nil {
		return err
	}
	return s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionReplicate, agentapi.ReplicateParams{
		VM: p.VM, Name: p.Name, Peer: peer, Policy: p.Policy, SendAll: sendAll}, nil)
}

// awaitFirstPoint ends with the phase protected, once the target holds a point.
func (s *Server) awaitFirstPoint(ctx context.Context, r *operation.Run, p switchback.Protection) error {
	var out agentapi.AwaitPointResult
	if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionAwaitPoint, nil, &out); err != nil {
		return err
	}
	r.Log(slog.LevelInfo, "first point is durable at the target", "sequence", out.Point.Sequence, "mode", out.Report.Mode, "sent_bytes", out.Report.SentBytes)
	err := summarise(r, func(sum *api.Summary) {
		sum.Copy = &api.Copy{Mode: string(out.Report.Mode), Reason: out.Report.Reason, Point: out.Point, BytesSent: out.Report.SentBytes,
			BytesChanged: out.Report.ChangedBytes, Took: out.Report.Total}
	})
	if err != nil {
		return err
	}
	if err := r.SetResult(out); err != nil {
		return err
	}
	_, err = s.update(ctx, p.ID, func(p *switchback.Protection) error {
		p.Phase = switchback.PhaseProtected
		delete(p.Seeds, p.Target)
		return nil
	})
	return err
}

// endProtect forgets a VM whose protection did not come about.
func (s *Server) endProtect(ctx context.Context, r *operation.Run, final operation.State) error {
	rec := r.Record()
	nothingMade := rec.Step("replica").StartedAt.IsZero()
	if final != operation.StateUndone && final != operation.StateCancelled && (final != operation.StateFailed || !nothingMade) {
		return s.end(ctx, r, final)
	}
	for {
		p, err := s.of(ctx, r)
		if err == nil {
			err = s.store.DeleteProtection(ctx, p.ID, p.Version)
		}
		switch switchback.CodeOf(err) {
		case switchback.CodeNotFound:
			return nil
		case switchback.CodeConflict: // the request that began this was just linking it
			if ctx.Err() == nil {
				continue
			}
		}
		return err
	}
}

func (s *Server) takePointSteps() []operation.Step {
	return []operation.Step{{Name: "point", Title: "take a point", RetryFor: shortRetry, Cancellable: true, Do: func(ctx context.Context, r *operation.Run) error {
		p, err := s.of(ctx, r)
		if err != nil {
			return err
		}
		var params agentapi.TakePointParams
		if err := r.Params(&params); err != nil {
			return err
		}
		var out agentapi.PointResult
		if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionTakePoint, params, &out); err != nil {
			return err
		}
		return summarise(r, func(sum *api.Summary) {
			sum.Copy = &api.Copy{Mode: string(out.Report.Mode), Reason: out.Report.Reason, Point: out.Report.Point, BytesSent: out.Report.SentBytes,
				BytesChanged: out.Report.ChangedBytes, Took: out.Report.Total, Frozen: out.Report.Frozen}
		})
	}}}
}

// editParams are the parameters of an edit, pause or resume.
type editParams struct {
	Policy switchback.Policy `json:"policy"`
	Paused bool              `json:"paused"`
	// Networks replace the mapping; nil = it stays.
	Networks map[string]string `json:"networks"`
}

func (s *Server) editSteps() []operation.Step {
	return []operation.Step{{Name: "policy", Title: "apply the policy at both sites", RetryFor: shortRetry, Do: func(ctx context.Context, r *operation.Run) error {
		var e editParams
		if err := r.Params(&e); err != nil {
			return err
		}
		p, err := s.update(ctx, r.Protection(), func(p *switchback.Protection) error {
			countScheduleAnew(p, e.Policy)
			p.Policy, p.Paused = e.Policy, e.Paused
			if e.Networks != nil {
				p.Networks = e.Networks
			}
			return nil
		})
		if err != nil {
			return err
		}
		params := agentapi.SetPolicyParams{Policy: e.Policy, Paused: e.Paused}
		if err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionSetPolicy, params, nil); err != nil {
			return err
		}
		params.Paused = false
		return s.do(ctx, r, p.TargetAgent, p.Epoch, agentapi.ActionSetPolicy, params, nil)
	}}}
}

// unprotectParams are the parameters of unprotect.
type unprotectParams struct {
	RemoveData bool `json:"remove_data"`
}

func (s *Server) unprotectSteps() []operation.Step {
	release := func(name, title string, agent func(switchback.Protection) switchback.AgentID) operation.Step {
		return operation.Step{Name: name, Title: title, RetryFor: shortRetry, Irreversible: true, Do: func(ctx context.Context, r *operation.Run) error {
			var u unprotectParams
			if err := r.Params(&u); err != nil {
				return err
			}
			p, err := s.of(ctx, r)
			if switchback.CodeOf(err) == switchback.CodeNotFound {
				return nil
			}
			if err != nil {
				return err
			}
			s.stopDrills(ctx, r, p)
			var out agentapi.ReleaseResult
			if err := s.do(ctx, r, agent(p), p.Epoch, agentapi.ActionRelease, agentapi.ReleaseParams{RemoveData: u.RemoveData}, &out); err != nil {
				return err
			}
			return r.SetResult(out)
		}}
	}
	return []operation.Step{
		release("source", "stop replicating, remove checkpoints", func(p switchback.Protection) switchback.AgentID { return p.SourceAgent }),
		release("target", "let go of the replica", func(p switchback.Protection) switchback.AgentID { return p.TargetAgent }),
		{Name: "forget", Title: "forget the protection", Irreversible: true, RetryFor: shortRetry, Do: func(ctx context.Context, r *operation.Run) error {
			var sum api.Summary
			for _, step := range []string{"source", "target"} {
				var out agentapi.ReleaseResult
				if err := r.StepResult(step, &out); err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
					return err
				}
				sum.Removed, sum.Left = append(sum.Removed, out.Removed...), append(sum.Left, out.Left...)
			}
			if err := r.SetSummary(sum); err != nil {
				return err
			}
			p, err := s.of(ctx, r)
			if switchback.CodeOf(err) == switchback.CodeNotFound {
				return nil
			}
			if err != nil {
				return err
			}
			return s.store.DeleteProtection(ctx, p.ID, p.Version)
		}},
	}
}

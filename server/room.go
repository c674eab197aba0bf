package server

import (
	"context"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// roomStepName is the step of protect that waits for its turn.
const roomStepName = "room"

// roomStep waits, where an agent bounds how many first copies it makes at the
// same time, until it is this one's turn: first come, first served.
func (s *Server) roomStep() operation.Step {
	return operation.Step{Name: roomStepName, Title: "wait for its turn", RetryFor: longRetry, Cancellable: true, Do: func(ctx context.Context, r *operation.Run) error {
		p, err := s.of(ctx, r)
		if err != nil {
			return err
		}
		limits := map[switchback.AgentID]int{}
		for _, id := range []switchback.AgentID{p.SourceAgent, p.TargetAgent} {
			a, err := s.store.Agent(ctx, id)
			if err != nil {
				return err
			}
			if n := maxCopies(s.agentView(a)); n > 0 {
				limits[id] = n
			}
		}
		if len(limits) == 0 {
			return operation.Skip("the agents bound no first copies")
		}
		ahead, err := s.copiesAhead(ctx, r.ID())
		if err != nil {
			return err
		}
		for id, limit := range limits {
			if n := ahead[id]; n >= limit {
				return switchback.Errorf(switchback.CodeUnavailable, "agent %s makes %d first copies, its limit is %d: this one waits", id, n, limit).
					WithHint("it begins by itself when one of them has ended; the limit is the agent's --max-copies")
			}
		}
		return nil
	}}
}

// copiesAhead counts by agent the first copies under way, and those that have waited longer.
func (s *Server) copiesAhead(ctx context.Context, me switchback.OperationID) (map[switchback.AgentID]int, error) {
	ahead := map[switchback.AgentID]int{}
	filter := operation.Filter{Kind: string(recovery.Protect), Unfinished: true}
	for {
		list, err := s.store.Operations(ctx, filter) // newest first
		if err != nil || len(list) == 0 {
			return ahead, err
		}
		for _, rec := range list {
			filter.Before = rec.ID
			step := rec.Step(roomStepName)
			if rec.ID == me || step == nil {
				continue
			}
			passed := step.State == operation.StepDone || step.State == operation.StepSkipped
			if !passed && rec.ID > me {
				continue
			}
			p, err := s.store.Protection(ctx, rec.Protection)
			if switchback.CodeOf(err) == switchback.CodeNotFound {
				continue
			}
			if err != nil {
				return nil, err
			}
			ahead[p.SourceAgent]++
			ahead[p.TargetAgent]++
		}
	}
}

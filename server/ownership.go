package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// ruling says who is active, by the record; held is the epoch of the agent that
// asks. ok: this server can tell. It cannot where an agent knows of a newer epoch
// than it does, or may: then the agents are the ones to ask.
func (s *Server) ruling(p switchback.Protection, held switchback.Epoch) (r fencing.Ruling, ok bool) {
	if held > p.Epoch {
		s.learning.wanted.Store(true)
		return r, false
	}
	r = fencing.Rule(p)
	return r, r.Epoch != 0 && p.MintAbove <= p.Epoch
}

// answerOwnership says which site is active to an agent that asks. What it does
// not know, or is not of that agent's site, is missing in the answer.
func (s *Server) answerOwnership(r *http.Request) (any, error) {
	id, err := transport.PeerIdentity(r)
	if err != nil {
		return nil, err
	}
	if err := s.knownAgent(r.Context(), id); err != nil {
		return nil, err
	}
	var q agentapi.OwnershipQuestion
	if err := transport.ReadJSON(r, &q); err != nil {
		return nil, err
	}
	answer := agentapi.OwnershipAnswer{Rulings: map[switchback.ProtectionID]fencing.Ruling{}}
	take := func(p switchback.Protection) {
		if site := switchback.SiteID(id.Site); site == p.Source || site == p.Target {
			if r, ok := s.ruling(p, q.Held[p.ID]); ok {
				answer.Rulings[p.ID] = r
			}
		}
	}
	if len(q.Held) > 8 { // one query for many
		list, err := s.store.Protections(r.Context())
		for _, p := range list {
			if _, ok := q.Held[p.ID]; ok {
				take(p)
			}
		}
		return answer, err
	}
	for held := range q.Held {
		p, err := s.store.Protection(r.Context(), held)
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			continue
		}
		if err != nil {
			return nil, err
		}
		take(p)
	}
	return answer, nil
}

// cutOff says on a VM whose site does not answer whether it may run there all the same.
func (s *Server) cutOff(v *api.VM, a store.Agent) {
	if a.ID != v.SourceAgent {
		return
	}
	c := switchback.Condition{Name: "source-may-run", Severity: switchback.SeverityNotice, Since: a.LastSeen,
		Cause:  fmt.Sprintf("site %s does not answer: the VM may run on there until it hears of a newer epoch", v.Source),
		Remedy: "before it is started elsewhere make sure that it is off there; a lease prevents it: vm edit --lease 30s"}
	if lease := v.Policy.Fencing.Lease; lease > 0 {
		c.Cause = fmt.Sprintf("site %s does not answer: the VM there is stopped %v after it was last confirmed", v.Source, lease)
		c.Remedy = fmt.Sprintf("a takeover waits for that by itself, %v in all", fencing.TakeoverWait(v.Policy.Fencing))
	}
	v.Conditions = append(v.Conditions, c)
}

// fenceWait is how long an old side that does not answer is waited for before its
// lease is relied on.
const fenceWait = 15 * time.Second

// fencedByLease lets a switch go on whose old side cannot be told that it is
// fenced, where that needs a lease to run: the new side then waits until it has
// ended. err is what the fence has met.
func (s *Server) fencedByLease(ctx context.Context, r *operation.Run, p switchback.Protection, err error) error {
	if err == nil || !switchback.IsRetryable(err) || p.Policy.Fencing.Lease == 0 || p.Switch.Unproven {
		if p.Switch.Unproven && switchback.IsRetryable(err) {
			return nil
		}
		return err
	}
	rec := r.Record()
	if st := rec.Step("fence"); st == nil || time.Since(st.StartedAt) < fenceWait {
		return err // asked again
	}
	r.Log(slog.LevelWarn, "the old side does not answer: the new side waits for the end of its lease", "site", p.Switch.From,
		"lease", p.Policy.Fencing.Lease, "wait", fencing.TakeoverWait(p.Policy.Fencing), "error", err)
	_, err = s.update(ctx, p.ID, func(x *switchback.Protection) error { x.Switch.Unproven = true; return nil })
	return err
}

// contested returns the sites whose copy of a VM was let start by hand.
func contested(v api.VM) []switchback.SiteID {
	var sites []switchback.SiteID
	if v.AtSource != nil && v.AtSource.Ownership != nil && v.AtSource.Ownership.Override != nil {
		sites = append(sites, v.Source)
	}
	if v.AtTarget != nil && v.AtTarget.Ownership != nil && v.AtTarget.Ownership.Override != nil {
		sites = append(sites, v.Target)
	}
	return sites
}

// resolveParams are the parameters of resolve.
type resolveParams struct {
	Winner switchback.SiteID `json:"winner"`
}

// checkWinner refuses a winner that the record does not make active, or that no
// undo can.
func checkWinner(p switchback.Protection, winner switchback.SiteID) error {
	switch {
	case winner != p.Source && winner != p.Target:
		return switchback.Errorf(switchback.CodeInvalid, "the winner is a site of the VM, not %q", winner).WithHint("--winner %s or %s", p.Source, p.Target)
	case winner == fencing.Rule(p).Site, p.Phase == switchback.PhaseSwitched:
		return nil
	}
	return switchback.Errorf(switchback.CodeRefused, "site %s cannot win: by the record the VM is active at %s, and no switch is there to be undone", winner, fencing.Rule(p).Site).
		WithHint("let %s win, then move the VM", fencing.Rule(p).Site)
}

// resolveSteps end a contest. Where the old side of a switch wins, the switch is undone.
func (s *Server) resolveSteps() []operation.Step {
	return []operation.Step{{Name: "resolve", Title: "the loser off and fenced, the winner confirmed", RetryFor: shortRetry, Irreversible: true, Do: func(ctx context.Context, r *operation.Run) error {
		var params resolveParams
		if err := r.Params(&params); err != nil {
			return err
		}
		p, err := s.of(ctx, r)
		if err != nil {
			return err
		}
		if p.Switch != nil && params.Winner == p.Switch.From {
			return s.undoSwitch(ctx, r)
		}
		loser, winner := p.TargetAgent, p.SourceAgent
		if params.Winner == p.Target {
			loser, winner = winner, loser
		}
		for _, agent := range []switchback.AgentID{loser, winner} {
			if err := s.do(ctx, r, agent, p.Epoch, agentapi.ActionSettleContest, agentapi.SettleContestParams{Winner: params.Winner}, nil); err != nil {
				return err
			}
		}
		return nil
	}}}
}

// endResolve has what the contest had interrupted led on, by what the agents know:
// the operation that had failed before cannot be retried after another one.
func (s *Server) endResolve(ctx context.Context, r *operation.Run, final operation.State) error {
	err := s.end(ctx, r, final)
	if err == nil && final == operation.StateSucceeded {
		s.learning.wanted.Store(true)
	}
	return err
}

// planResolve says what an end of the contest does.
func planResolve(p switchback.Protection, params resolveParams, plan *api.Plan) {
	loser := p.Target
	if params.Winner == p.Target {
		loser = p.Source
	}
	plan.Basis = "nothing is copied"
	plan.Changes = []string{fmt.Sprintf("the copy at %s is turned off and fenced; the copy at %s goes on", loser, params.Winner)}
	plan.Keeps = []string{fmt.Sprintf("what the copy at %s wrote stays on its disks until the next reprotect, which then sends everything", loser)}
}

package server

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/store"
)

// settingRestored stands from a restore until every agent was asked what
// happened since the backup.
const settingRestored = "restored"

// learning is how a server comes to know what its agents know and it does not.
type learning struct {
	mu sync.Mutex // one adoption at a time
	// wanted: an agent knows more of a VM than this server.
	wanted atomic.Bool
}

const learnEvery = 2 * time.Second

// learner is who does what follows from what agents know.
const learner = "learned from the agents"

// learnFromAgents asks the agents of this installation what they hold, after a
// restore from a backup and whenever a report shows that one knows more.
func (s *Server) learnFromAgents(ctx context.Context) {
	wait := time.NewTicker(learnEvery)
	defer wait.Stop()
	for {
		restored, err := s.restored(ctx)
		if err == nil && (restored || s.learning.wanted.Swap(false)) {
			err = s.learn(ctx, restored)
		}
		if err != nil && ctx.Err() == nil {
			s.log.Warn("cannot learn from the agents yet", "error", err)
			s.learning.wanted.Store(true)
		}
		select {
		case <-ctx.Done():
			return
		case <-wait.C:
		}
	}
}

func (s *Server) restored(ctx context.Context) (bool, error) {
	_, err := s.store.Setting(ctx, settingRestored)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return false, nil
	}
	return err == nil, err
}

// askable are the agents that can answer: not those that are revoked, or known by
// name only since they were never adopted.
func (s *Server) askable(ctx context.Context) ([]store.Agent, error) {
	agents, err := s.store.Agents(ctx, "")
	if err != nil {
		return nil, err
	}
	revoked, err := s.revocations(ctx)
	return slices.DeleteFunc(agents, func(a store.Agent) bool {
		return a.JoinedAt.IsZero() || slices.ContainsFunc(revoked, func(r agentapi.Revocation) bool { return r.Agent == a.ID })
	}), err
}

// learn asks all agents once. After a restore it is done when all that can have answered.
func (s *Server) learn(ctx context.Context, restored bool) error {
	s.learning.mu.Lock()
	defer s.learning.mu.Unlock()
	agents, err := s.askable(ctx)
	if err != nil {
		return err
	}
	answers := make([]contact, len(agents))
	var asking sync.WaitGroup
	for i, a := range agents {
		asking.Go(func() { answers[i] = s.askOwn(ctx, a.Address, contact{}) })
	}
	asking.Wait()
	contacts := map[string]contact{}
	all := true
	holds, answered := map[switchback.ProtectionID]bool{}, map[switchback.AgentID]bool{}
	for i, c := range answers {
		contacts[agents[i].Address] = c
		all = all && c.err == nil
		answered[agents[i].ID] = c.err == nil
		for _, vm := range c.holdings.VMs {
			holds[vm.Protection] = true
		}
	}
	revoked, err := s.refuseRevoked(ctx, contacts)
	if err == nil {
		err = s.takeRevocations(ctx, learner, revoked)
	}
	if err != nil {
		return err
	}
	vms, err := s.rebuild(ctx, contacts, restored)
	if err != nil {
		return err
	}
	for i := range vms {
		if vms[i].Outcome == api.VMRefused {
			s.log.Warn("what agents hold of a VM cannot be learned", "vm", vms[i].Name, "protection", vms[i].ID, "error", vms[i].Error)
			continue
		}
		if err := s.take(ctx, learner, &vms[i]); err != nil {
			return err
		}
	}
	if !restored || !all {
		return nil
	}
	if err := s.forgetReleased(ctx, holds, answered); err != nil {
		return err
	}
	s.log.Info("restored from a backup: every agent was asked what happened since", "agents", len(agents))
	return s.store.DeleteSetting(ctx, settingRestored)
}

// forgetReleased drops what was unprotected after the backup: neither of its agents
// has a part in it any more. Of what one could not be asked for nothing is known.
func (s *Server) forgetReleased(ctx context.Context, holds map[switchback.ProtectionID]bool, answered map[switchback.AgentID]bool) error {
	list, err := s.store.Protections(ctx)
	if err != nil {
		return err
	}
	for _, p := range list {
		if holds[p.ID] || p.Phase == switchback.PhaseUnprotected || !answered[p.SourceAgent] || !answered[p.TargetAgent] {
			continue
		}
		s.log.Warn("no agent knows this VM any more: it was unprotected since the backup", "vm", p.Name, "protection", p.ID)
		if err := s.store.DeleteProtection(ctx, p.ID, p.Version); err != nil {
			return err
		}
		if err := s.audit(ctx, audit.Entry{Who: learner, Via: "server", Action: "forget-vm", Object: "vms/" + p.Name, Outcome: audit.Done,
			Detail: fmt.Sprintf("protection %s, %s, epoch %d: no agent has a part in it since the backup", p.ID, p.Phase, p.Epoch)}); err != nil {
			return err
		}
	}
	return nil
}

// markRestored makes a restored installation learn from its agents.
func markRestored(ctx context.Context, st *store.Store, at time.Time) error {
	return st.SetSetting(ctx, settingRestored, at.UTC().Format(time.RFC3339))
}

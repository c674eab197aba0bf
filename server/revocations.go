package server

import (
	"context"
	"encoding/json"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/audit"
)

// Agents keep the revocations of their server. Where that is lost, or has
// forgotten some since it was restored, they are taken over from the agents before
// anything else is.

// heardOf is a revocation and the agent that knows of it; "" = it stands here.
type heardOf struct {
	agentapi.Revocation
	from switchback.AgentID
}

// heard are the revocations that stand here, and those of agents of other
// installations; after a restore also those of the own agents. One of another
// installation does not count for an agent that had left it before.
func (s *Server) heard(ctx context.Context, contacts map[string]contact) (map[switchback.AgentID]heardOf, error) {
	here, err := s.revocations(ctx)
	if err != nil {
		return nil, err
	}
	restored, err := s.restored(ctx)
	if err != nil {
		return nil, err
	}
	all := map[switchback.AgentID]heardOf{}
	for _, r := range here {
		all[r.Agent] = heardOf{Revocation: r}
	}
	for _, c := range contacts {
		if c.err != nil || c.own && !restored {
			continue
		}
		for _, r := range c.holdings.Revoked {
			if was, ok := all[r.Agent]; r.Agent == "" || ok && (was.from == "" || was.from <= c.holdings.Agent.Agent) {
				continue
			}
			if !c.own {
				a, err := s.store.Agent(ctx, r.Agent)
				if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
					return nil, err
				}
				if err == nil && !a.JoinedAt.IsZero() && a.JoinedAt.Before(r.At) {
					continue
				}
				r.Elsewhere = true
			}
			all[r.Agent] = heardOf{r, c.holdings.Agent.Agent}
		}
	}
	return all, nil
}

// refuseRevoked leaves out what revoked agents say, and returns what is heard of revocations.
func (s *Server) refuseRevoked(ctx context.Context, contacts map[string]contact) (map[switchback.AgentID]heardOf, error) {
	all, err := s.heard(ctx, contacts)
	if err != nil {
		return nil, err
	}
	for address, c := range contacts {
		r, ok := all[c.holdings.Agent.Agent]
		if c.err != nil || !ok {
			continue
		}
		by := "here"
		if r.from != "" {
			by = "says agent " + string(r.from)
		}
		c.err = switchback.Errorf(switchback.CodeUnauthorized, "agent %s was revoked at %s by %s, %s", r.Agent, r.At.UTC().Format("2006-01-02 15:04 UTC"), r.By, by).
			WithHint("join it with an empty state directory: that makes a new key")
		contacts[address] = c
	}
	return all, nil
}

// takeRevocations stores what was heard of revocations. It may be repeated.
func (s *Server) takeRevocations(ctx context.Context, who string, all map[switchback.AgentID]heardOf) error {
	for id, r := range all {
		if r.from == "" {
			continue
		}
		text, err := json.Marshal(r.Revocation)
		if err != nil {
			return err
		}
		stands, err := s.store.EnsureSetting(ctx, settingRevoked+string(id), string(text))
		if err != nil {
			return err
		}
		if stands != string(text) {
			continue
		}
		s.log.Warn("revocation learned from an agent", "agent", id, "site", r.Site, "by", r.By, "at", r.At, "from", r.from)
		if err := s.audit(ctx, audit.Entry{Who: who, Via: "server", Action: "learn-revocation", Object: "agents/" + string(id), Outcome: audit.Done,
			Detail: "revoked by " + r.By + ", says agent " + string(r.from)}); err != nil {
			return err
		}
	}
	return s.enforce(ctx)
}

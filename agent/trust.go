package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/transport"
)

// revokedFile keeps the revocations that this agent has heard of, so that they
// hold after a restart, server or no server.
const revokedFile = "revoked.json"

func (a *Agent) loadRevoked() error {
	path := filepath.Join(IdentityDir(a.cfg.StateDir), revokedFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var list []agentapi.Revocation
	if err := json.Unmarshal(b, &list); err != nil {
		return switchback.Errorf(switchback.CodeCorrupt, "%s: %w", path, err).WithHint("remove it: the server tells the agent again")
	}
	a.refuse(list)
	return nil
}

// refuse takes revocations, that are stored, into effect.
func (a *Agent) refuse(list []agentapi.Revocation) {
	a.revoked.Store(&list)
	a.cfg.Credentials.Revoke(revokedIDs(list))
}

// revocations are those that are in effect.
func (a *Agent) revocations() []agentapi.Revocation {
	if list := a.revoked.Load(); list != nil {
		return *list
	}
	return nil
}

func revokedIDs(list []agentapi.Revocation) []switchback.AgentID {
	ids := make([]switchback.AgentID, len(list))
	for i, r := range list {
		ids[i] = r.Agent
	}
	return ids
}

// learnTrust takes over what the server says of authorities and revocations:
// on disk first, then in effect. A server that was restored says nothing of
// revocations until it knows them again. It may be repeated.
func (a *Agent) learnTrust(ctx context.Context, u agentapi.TrustUpdate) error {
	c := a.cfg.Credentials
	if ids := revokedIDs(u.Revoked); u.Revoked != nil && !c.RevokedAre(ids) {
		b, err := json.Marshal(u.Revoked)
		if err != nil {
			return err
		}
		if err := durable.WriteFile(filepath.Join(IdentityDir(a.cfg.StateDir), revokedFile), b, 0o600); err != nil {
			return err
		}
		a.refuse(u.Revoked)
		a.reach.inbound.Judge()
		a.log.Info("revoked agents", "agents", ids)
	}
	if u.CAPEM != "" && !c.Believes([]byte(u.CAPEM)) {
		if err := a.believe([]byte(u.CAPEM)); err != nil {
			return err
		}
	}
	if u.Renew {
		return a.renew(ctx)
	}
	return nil
}

// believe replaces the authorities, on disk and then in effect.
func (a *Agent) believe(caPEM []byte) error {
	a.trust.Lock()
	defer a.trust.Unlock()
	c := a.cfg.Credentials
	n, err := c.WithAuthorities(caPEM)
	if err != nil {
		return err
	}
	if err := transport.SaveCredentials(IdentityDir(a.cfg.StateDir), n); err != nil {
		return err
	}
	killpoint.At("agent", "trust", "authorities", killpoint.AfterEffect)
	if err := c.Replace(n); err != nil {
		return err
	}
	a.reach.inbound.Judge()
	a.log.Info("authorities", "believed", c.Authorities())
	return nil
}

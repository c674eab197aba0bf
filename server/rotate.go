package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/transport"
)

// The rotation of the CA is a sequence of phases (transport.RotationPhase). The
// phase is one value, stored with the keys in one file or one setting, and
// replaced in one write; everything else follows from it and may be repeated:
// each server makes its credentials fit it, agents are told with each answer to a
// report what to believe and when to renew, and the next phase begins when all
// of them have reported that they did.

const (
	trustEvery = time.Second
	// settleShared is how long a phase lasts at least where several servers
	// share the store, so that each has taken it over before the next.
	settleShared = 10 * time.Second
)

// keepTrust keeps certificates, revocations and the CA as they should be, until ctx ends.
func (s *Server) keepTrust(ctx context.Context) {
	failed := false
	for ctx.Err() == nil {
		err := s.trustOnce(ctx)
		if (err != nil) != failed && ctx.Err() == nil {
			if failed = err != nil; failed {
				s.log.Warn("certificates and revocations cannot be kept up to date", "error", err)
			} else {
				s.log.Info("certificates and revocations are up to date again")
			}
		}
		t := time.NewTimer(trustEvery)
		select {
		case <-ctx.Done():
			t.Stop()
		case <-t.C:
		}
	}
}

func (s *Server) trustOnce(ctx context.Context) error {
	if err := s.followCA(ctx); err != nil {
		return err
	}
	if err := s.renewOwn(); err != nil {
		return err
	}
	if err := s.enforce(ctx); err != nil {
		return err
	}
	if s.ca.Rotation().Phase == transport.RotationNone {
		return nil
	}
	st, err := s.caStatus(ctx)
	if err != nil {
		return err
	}
	settle := time.Duration(0)
	if s.store.Shared() {
		settle = settleShared
	}
	if len(st.Waiting()) > 0 || s.store.Now().Sub(st.Rotation.Since) < settle {
		return nil
	}
	return s.advanceCA(ctx, st.Rotation)
}

// followCA takes over what another server on the store has made of the CA.
func (s *Server) followCA(ctx context.Context) error {
	if !s.store.Shared() {
		return nil
	}
	s.rotating.Lock()
	defer s.rotating.Unlock()
	now, err := s.cfg.sharedCA(ctx, s.store)
	if err == nil && (now.Rotation() != s.ca.Rotation() || now.Fingerprint() != s.ca.Fingerprint()) {
		s.ca.Become(now)
	}
	return err
}

// renewOwn makes the server's and the first administrator's certificates fit
// the CA, and renews them well before their end.
func (s *Server) renewOwn() error {
	id := transport.Identity{Installation: s.ca.Installation(), Role: transport.RoleServer, ID: "server"}
	if s.fits(s.creds, serverTTL) {
		return nil
	}
	c, err := s.issueTo(filepath.Join(s.cfg.StateDir, serverDir), id, serverTTL)
	if err != nil {
		return err
	}
	admin := transport.Identity{Installation: s.ca.Installation(), Role: transport.RoleAdmin, ID: "admin"}
	if _, err := s.issueTo(filepath.Join(s.cfg.StateDir, adminDir), admin, adminTTL); err != nil {
		return err
	}
	s.log.Info("certificates of the server renewed", "expires", c.Expires(), "issuer", c.Issuer())
	return s.creds.Replace(c)
}

// fits reports whether credentials can stay: of the CA that signs, believing
// what is to be believed, and not near their end.
func (s *Server) fits(c *transport.Credentials, ttl time.Duration) bool {
	return time.Until(c.Expires()) > ttl/3 && c.Issuer() == s.ca.Fingerprint() && c.Believes(s.ca.BundlePEM())
}

// caStatus says how the CA, and a rotation of it, stands.
func (s *Server) caStatus(ctx context.Context) (api.CAStatus, error) {
	st := api.CAStatus{Installation: s.ca.Installation(), Signing: s.ca.Fingerprint(), Expires: s.ca.Expires(), Rotation: s.ca.Rotation()}
	agents, err := s.store.Agents(ctx, "")
	if err != nil {
		return st, err
	}
	revoked, err := s.revocations(ctx)
	if err != nil {
		return st, err
	}
	for _, a := range agents {
		if slices.ContainsFunc(revoked, func(r agentapi.Revocation) bool { return r.Agent == a.ID }) {
			continue
		}
		var status agentapi.AgentStatus
		if len(a.Status) > 0 {
			if err := json.Unmarshal(a.Status, &status); err != nil {
				return st, switchback.Errorf(switchback.CodeCorrupt, "report of agent %s: %w", a.ID, err)
			}
		}
		x := api.CAAgent{Agent: a.ID, Site: a.Site, LastSeen: a.LastSeen, Issuer: status.Trust.Issuer, Believes: status.Trust.Authorities}
		switch st.Rotation.Phase {
		case transport.RotationIntroducing:
			x.Ready = slices.Contains(x.Believes, st.Rotation.Other)
		case transport.RotationReplacing:
			x.Ready = x.Issuer == st.Signing
		default:
			x.Ready = x.Issuer == st.Signing && slices.Equal(x.Believes, []string{st.Signing})
		}
		st.Agents = append(st.Agents, x)
	}
	return st, nil
}

// advanceCA begins the next phase, unless somebody else has. What it replaced
// is gone then: the write is the one moment of it.
func (s *Server) advanceCA(ctx context.Context, from transport.Rotation) error {
	s.rotating.Lock()
	defer s.rotating.Unlock()
	if s.ca.Rotation() != from {
		return nil
	}
	next, err := s.ca.Next(s.store.Now())
	if err != nil {
		return err
	}
	phase := string(next.Rotation().Phase)
	if phase == "" {
		phase = "done"
	}
	killpoint.At("server", "ca-rotate", phase, killpoint.BeforeEffect)
	if s.store.Shared() {
		was, err := s.store.Setting(ctx, settingCA)
		if err != nil {
			return err
		}
		// What is replaced must be what this was made from.
		if now, err := s.cfg.sharedCA(ctx, s.store); err != nil || now.Rotation() != from {
			return err
		}
		sealed, err := s.cfg.sealCA(ctx, next)
		if err != nil {
			return err
		}
		if err := s.store.SwapSetting(ctx, settingCA, was, sealed); err != nil {
			if switchback.CodeOf(err) == switchback.CodeConflict {
				return nil // another server was first
			}
			return err
		}
	} else if err := transport.SaveCA(filepath.Join(s.cfg.StateDir, caDir), next); err != nil {
		return err
	}
	killpoint.At("server", "ca-rotate", phase, killpoint.AfterEffect)
	s.ca.Become(next)
	s.log.Info("rotation of the CA", "from", from.Phase, "to", next.Rotation().Phase, "signing", next.Fingerprint())
	// The request that began or forced a phase has an entry of its own.
	what := fmt.Sprintf("from phase %q to %q, signing %.16s", from.Phase, next.Rotation().Phase, next.Fingerprint())
	if c := callOf(ctx); c.came != nil {
		c.note(what)
	} else {
		err = s.audit(ctx, audit.Entry{Who: "server", Via: "server", Action: "advance-ca", Object: "ca", Outcome: audit.Done, Detail: what})
	}
	return errors.Join(err, s.renewOwn())
}

// rotateCA begins a rotation, or shows the one under way. With force the phase
// under way ends though agents did not follow: these have to join again.
func (s *Server) rotateCA(r *http.Request) (any, error) {
	var req api.RotateRequest
	if err := transport.ReadJSON(r, &req); err != nil {
		return nil, err
	}
	now := s.ca.Rotation()
	if req.Force && now.Phase == transport.RotationNone {
		return nil, switchback.Errorf(switchback.CodeRefused, "no rotation is under way that could be forced").WithHint("begin one without --force")
	}
	if req.Force || now.Phase == transport.RotationNone {
		if err := s.advanceCA(r.Context(), now); err != nil {
			return nil, err
		}
	}
	return s.caStatus(r.Context())
}

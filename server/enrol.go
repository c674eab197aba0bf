package server

import (
	"context"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

const maxTokenLife = 7 * 24 * time.Hour

func (s *Server) mintToken(ctx context.Context, site switchback.SiteID, validFor time.Duration) (api.Token, error) {
	if validFor <= 0 || validFor > maxTokenLife {
		return api.Token{}, switchback.Errorf(switchback.CodeInvalid, "a token is valid for up to %s, not %s", maxTokenLife, validFor)
	}
	if s.cfg.Unreachable {
		return api.Token{}, switchback.Errorf(switchback.CodeRefused, "agents cannot open connections to this server, so a token would be of no use to them").
			WithHint("on the agent's host: switchback agent request; then here: switchback site admit SITE REQUEST")
	}
	now := s.store.Now()
	t := transport.MintToken(s.cfg.Addresses, s.ca.Fingerprint(), site, now.Add(validFor))
	err := s.store.CreateJoinToken(ctx, store.JoinToken{Hash: transport.HashSecret(t.Secret), Site: site, CreatedAt: now, ExpiresAt: t.ExpiresAt})
	return api.Token{Token: t.String(), Site: site, Expires: t.ExpiresAt}, err
}

// join redeems a token: once, for one agent. The same agent may repeat it.
func (s *Server) join(r *http.Request) (any, error) {
	var req transport.JoinRequest
	if err := transport.ReadJSON(r, &req); err != nil {
		return nil, err
	}
	id, err := transport.AgentIDFor([]byte(req.CSRPEM))
	if err != nil {
		return nil, err
	}
	now := s.store.Now()
	t, err := s.store.RedeemJoinToken(r.Context(), transport.HashSecret(req.Secret), id, now)
	if err != nil {
		return nil, err
	}
	return s.enrol(r.Context(), "join token", store.Agent{ID: id, Site: t.Site, Address: req.Agent.Address, Version: req.Agent.Version}, req.CSRPEM)
}

// enrol makes an agent one of its site's, which is there, and gives it its first
// certificate here for the key that csr is of. via says how it came.
func (s *Server) enrol(ctx context.Context, via string, a store.Agent, csr string) (transport.JoinResponse, error) {
	none := transport.JoinResponse{}
	if err := ownAddress(a.ID, a.Address); err != nil {
		return none, err
	}
	if _, err := s.store.Setting(ctx, settingRevoked+string(a.ID)); switchback.CodeOf(err) != switchback.CodeNotFound {
		if err == nil {
			err = switchback.Errorf(switchback.CodeUnauthorized, "agent %s was revoked", a.ID).WithHint("join with an empty state directory: that makes a new key")
		}
		return none, err
	}
	identity := transport.Identity{Installation: s.ca.Installation(), Role: transport.RoleAgent, Site: a.Site, ID: string(a.ID)}
	resp, serial, expires, err := s.certify([]byte(csr), identity)
	if err != nil {
		return none, err
	}
	a.CertificateSerial, a.CertificateExpires, a.JoinedAt = serial, expires, s.store.Now()
	if err := s.store.SaveAgent(ctx, a); err != nil {
		return none, err
	}
	err = s.audit(ctx, audit.Entry{Who: "agent " + string(a.ID), Via: via, Action: "join", Object: "sites/" + string(a.Site), Outcome: audit.Done, Detail: a.Address})
	if err == nil {
		s.log.Info("agent joined", "agent", a.ID, "site", a.Site, "address", a.Address, "via", via)
	}
	return resp, err
}

func (s *Server) certify(csr []byte, id transport.Identity) (transport.JoinResponse, string, time.Time, error) {
	cert, err := s.ca.Sign(csr, id, agentTTL)
	if err != nil {
		return transport.JoinResponse{}, "", time.Time{}, err
	}
	serial, expires, err := transport.CertificateInfo(cert)
	return transport.JoinResponse{CertificatePEM: string(cert), CAPEM: string(s.ca.BundlePEM()), RecoveryKey: s.recovery}, serial, expires, err
}

// renew gives an agent that is known a new certificate for its identity.
func (s *Server) renew(r *http.Request) (any, error) {
	id, err := transport.PeerIdentity(r)
	if err != nil {
		return nil, err
	}
	var req transport.JoinRequest
	if err := transport.ReadJSON(r, &req); err != nil {
		return nil, err
	}
	if err := s.knownAgent(r.Context(), id); err != nil {
		return nil, err
	}
	a, err := s.store.Agent(r.Context(), switchback.AgentID(id.ID))
	if err != nil {
		return nil, err
	}
	resp, serial, expires, err := s.certify([]byte(req.CSRPEM), id)
	if err != nil {
		return nil, err
	}
	a.CertificateSerial, a.CertificateExpires = serial, expires
	return resp, s.store.SaveAgent(r.Context(), a)
}

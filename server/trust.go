package server

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/transport"
)

// settingRevoked is where revocations stand, one setting for each agent: the
// decision of a person, which no later join or renewal takes back.
const settingRevoked = "revoked/"

// revocations lists all agents that are not believed any more.
func (s *Server) revocations(ctx context.Context) ([]agentapi.Revocation, error) {
	all, err := s.store.SettingsUnder(ctx, settingRevoked)
	if err != nil {
		return nil, err
	}
	list := make([]agentapi.Revocation, 0, len(all))
	for id, text := range all {
		var r agentapi.Revocation
		if err := json.Unmarshal([]byte(text), &r); err != nil || string(r.Agent) != id {
			return nil, switchback.Errorf(switchback.CodeCorrupt, "setting %s%s is no revocation: %q", settingRevoked, id, text)
		}
		list = append(list, r)
	}
	slices.SortFunc(list, func(a, b agentapi.Revocation) int { return strings.Compare(string(a.Agent), string(b.Agent)) })
	return list, nil
}

// forgetRevocations drops those of agents that were removed and have no
// certificate any more that somebody could believe.
func (s *Server) forgetRevocations(ctx context.Context, list []agentapi.Revocation) error {
	for _, r := range list {
		if r.Elsewhere || s.store.Now().Sub(r.At) < agentTTL+time.Hour {
			continue
		}
		_, err := s.store.Agent(ctx, r.Agent)
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			err = s.store.DeleteSetting(ctx, settingRevoked+string(r.Agent))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// enforce takes the revocations of the store into effect in this process.
func (s *Server) enforce(ctx context.Context) error {
	list, err := s.revocations(ctx)
	if err != nil {
		return err
	}
	ids := make([]switchback.AgentID, len(list))
	for i, r := range list {
		ids[i] = r.Agent
	}
	if !s.creds.RevokedAre(ids) {
		s.creds.Revoke(ids)
		s.inbound.Judge()
	}
	return s.forgetRevocations(ctx, list)
}

// routeTrust serves what concerns agents as parties of the installation.
func (s *Server) routeTrust(mux *http.ServeMux, admin func(string, func(*http.Request) (any, error))) {
	mux.Handle("POST "+transport.DialInPath, transport.RequireRole(s.inbound, transport.RoleAgent))
	admin("GET /v1/agents/{agent}", func(r *http.Request) (any, error) { return s.agentDetail(r) })
	admin("POST /v1/agents/{agent}/revoke", func(r *http.Request) (any, error) { return s.revokeAgent(r, false) })
	admin("DELETE /v1/agents/{agent}", func(r *http.Request) (any, error) { return s.revokeAgent(r, true) })
	admin("POST /v1/sites/{site}/admit", s.admitAgent)
	admin("GET /v1/ca", func(r *http.Request) (any, error) { return s.caStatus(r.Context()) })
	admin("POST /v1/ca/rotate", s.rotateCA)
}

// agentDetail is everything that is known of one agent.
func (s *Server) agentDetail(r *http.Request) (any, error) {
	a, err := s.store.Agent(r.Context(), switchback.AgentID(r.PathValue("agent")))
	if err != nil {
		return nil, err
	}
	d := api.AgentDetail{Agent: s.agentView(a), JoinedAt: a.JoinedAt, CertificateSerial: a.CertificateSerial, CertificateExpires: a.CertificateExpires}
	for _, l := range s.inbound.Lines() {
		if strings.HasSuffix(l.Peer, "/"+string(a.ID)) {
			d.Lines = append(d.Lines, l)
		}
	}
	revoked, err := s.revocations(r.Context())
	if err != nil {
		return nil, err
	}
	for _, x := range revoked {
		if x.Agent == a.ID {
			d.Revoked = &x
		}
	}
	d.VMs, err = s.worksFor(r.Context(), a.ID)
	return d, err
}

// worksFor lists the protected VMs that an agent has a part in.
func (s *Server) worksFor(ctx context.Context, id switchback.AgentID) ([]string, error) {
	list, err := s.store.Protections(ctx)
	var names []string
	for _, p := range list {
		if p.SourceAgent == id || p.TargetAgent == id {
			names = append(names, p.Name)
		}
	}
	return names, err
}

// revokeAgent has an agent refused everywhere: here at once, by the other
// agents with their next report. With remove it is forgotten, too, which is
// refused while VMs depend on it. Both may be repeated.
func (s *Server) revokeAgent(r *http.Request, remove bool) (any, error) {
	ctx := r.Context()
	who, err := transport.PeerIdentity(r)
	if err != nil {
		return nil, err
	}
	a, err := s.store.Agent(ctx, switchback.AgentID(r.PathValue("agent")))
	if err != nil {
		return nil, err
	}
	vms, err := s.worksFor(ctx, a.ID)
	if err != nil {
		return nil, err
	}
	if remove && len(vms) > 0 {
		return nil, switchback.Errorf(switchback.CodeConflict, "agent %s works for %s", a.ID, strings.Join(vms, ", ")).
			WithHint("unprotect them first; to shut the agent out all the same: switchback agent revoke %s", a.ID)
	}
	text, err := json.Marshal(agentapi.Revocation{Agent: a.ID, Site: a.Site, At: s.store.Now().UTC(), By: who.ID})
	if err != nil {
		return nil, err
	}
	if _, err := s.store.EnsureSetting(ctx, settingRevoked+string(a.ID), string(text)); err != nil {
		return nil, err
	}
	if err := s.enforce(ctx); err != nil {
		return nil, err
	}
	s.log.Warn("agent revoked", "agent", a.ID, "site", a.Site, "by", who.ID, "removed", remove)
	if remove {
		if err := s.store.DeleteAgent(ctx, a.ID); err != nil {
			return nil, err
		}
	}
	return api.RevokeAnswer{Agent: a.ID, Site: a.Site, Removed: remove, VMs: vms}, nil
}

// trustUpdate is what an agent is told with the answer to its report. Of
// revocations a restored server says nothing until all agents have told it theirs.
func (s *Server) trustUpdate(ctx context.Context, st agentapi.AgentStatus) (u agentapi.TrustUpdate, err error) {
	restored, err := s.restored(ctx)
	if err == nil && !restored {
		u.Revoked, err = s.revocations(ctx)
	}
	if err != nil {
		return u, err
	}
	u.CAPEM = string(s.ca.BundlePEM())
	u.Renew = st.Trust.Issuer != "" && st.Trust.Issuer != s.ca.Fingerprint()
	return u, nil
}

package server

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

func (s *Server) handler() http.Handler { return s.routes() }

// routes are all requests that the server answers. Those of agents have their
// own types and stand in no document; those of people have theirs in the files
// routes_*.go.
func (s *Server) routes() *routes {
	rt := newRoutes(s)
	rt.mux.Handle("POST "+transport.JoinPath, answer(s.join))
	rt.mux.Handle("POST /v1/agents/report", transport.RequireRole(answer(s.takeReport), transport.RoleAgent))
	rt.mux.Handle("POST /v1/agents/ownership", transport.RequireRole(answer(s.answerOwnership), transport.RoleAgent))
	rt.mux.Handle("POST /v1/agents/renew", transport.RequireRole(answer(s.renew), transport.RoleAgent))

	s.routeSites(rt)
	s.routeVMs(rt)
	s.routePoints(rt)
	s.routeOperations(rt)
	s.routeTokens(rt)
	s.routeApprovals(rt)
	s.routeLogin(rt)
	s.routeAudit(rt)
	s.routeDrills(rt)
	s.routeTrust(rt.mux, rt.admin)
	s.routeAdoption(rt.admin)
	s.routeConnectivity(rt.mux, rt.admin)
	s.routeDocument(rt)
	return rt
}

func validSite(id switchback.SiteID) error {
	if id == "" || len(id) > 40 {
		return switchback.Errorf(switchback.CodeInvalid, "a site's name has 1 to 40 characters")
	}
	for _, c := range id {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-') {
			return switchback.Errorf(switchback.CodeInvalid, "site name %q: only letters, digits and dashes", id)
		}
	}
	return nil
}

func (s *Server) listSites(ctx context.Context) ([]api.Site, error) {
	sites, err := s.store.Sites(ctx)
	if err != nil {
		return nil, err
	}
	out := []api.Site{}
	for _, x := range sites {
		v, err := s.siteView(ctx, x.ID)
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

func (s *Server) createSite(ctx context.Context, id switchback.SiteID) (api.Site, error) {
	if err := validSite(id); err != nil {
		return api.Site{}, err
	}
	return api.Site{ID: id, Agents: []api.Agent{}}, s.store.CreateSite(ctx, store.Site{ID: id, Name: string(id), CreatedAt: s.store.Now()})
}

func (s *Server) takeReport(r *http.Request) (any, error) {
	id, err := transport.PeerIdentity(r)
	if err != nil {
		return nil, err
	}
	var st agentapi.AgentStatus
	if err := transport.ReadJSON(r, &st); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(st)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(s.knownAgent(r.Context(), id), ownAddress(switchback.AgentID(id.ID), st.Address)); err != nil {
		return nil, err
	}
	if err := s.store.TouchAgent(r.Context(), switchback.AgentID(id.ID), st.Address, st.Version, s.store.Now(), raw); err != nil {
		return nil, err
	}
	return s.reportAnswer(r.Context(), st)
}

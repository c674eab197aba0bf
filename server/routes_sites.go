package server

import (
	"context"
	"slices"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
)

func (s *Server) routeSites(rt *routes) {
	type SiteIn struct {
		Site switchback.SiteID `path:"site"`
	}
	handle(rt, route{ID: "whoami", Tag: "Access", Pattern: "GET /v1/whoami", Summary: "Who is asking, and what they may", Need: switchback.Viewer},
		func(ctx context.Context, _ *struct{}) (api.Principal, error) { return callOf(ctx).who.Principal, nil })

	handle(rt, route{ID: "list-sites", Tag: "Sites", Pattern: "GET /v1/sites", Summary: "List sites with their agents", Need: switchback.Viewer},
		func(ctx context.Context, in *struct{ Paging }) (page api.Page[api.Site], err error) {
			sites, err := s.listSites(ctx)
			if err != nil {
				return page, err
			}
			scope := callOf(ctx).who.Scope
			sites = slices.DeleteFunc(sites, func(x api.Site) bool { return !scope.HasSite(x.ID) })
			for _, x := range sites {
				if err := s.hideOthers(ctx, scope, x.Agents); err != nil {
					return page, err
				}
			}
			return pageOf(sites, func(x api.Site) string { return string(x.ID) }, in.Paging)
		})
	handle(rt, route{ID: "get-site", Tag: "Sites", Pattern: "GET /v1/sites/{site}", Summary: "One site: its health, its capacity and its VMs", Need: switchback.Viewer},
		func(ctx context.Context, in *SiteIn) (api.SiteDetail, error) {
			scope := callOf(ctx).who.Scope
			if !scope.HasSite(in.Site) {
				return api.SiteDetail{}, switchback.Errorf(switchback.CodeNotFound, "there is no site %q", in.Site).WithHint("'switchback site list' shows them")
			}
			v, err := s.showSite(ctx, in.Site)
			if err != nil || scope.All() {
				return v, err
			}
			mine, err := s.protectionsIn(ctx, scope)
			if err != nil {
				return v, err
			}
			v.VMs = slices.DeleteFunc(v.VMs, func(x api.SiteVM) bool { _, ok := mine[x.ID]; return !ok })
			return v, s.hideOthers(ctx, scope, v.Agents)
		})
	handle(rt, route{ID: "create-site", Tag: "Sites", Pattern: "POST /v1/sites", Summary: "Add a site", Need: switchback.Administrator},
		func(ctx context.Context, in *struct{ Body api.CreateSiteRequest }) (api.Site, error) {
			return s.createSite(ctx, in.Body.ID)
		})
	handle(rt, route{ID: "delete-site", Tag: "Sites", Pattern: "DELETE /v1/sites/{site}", Summary: "Remove a site that has no agent", Need: switchback.Administrator},
		func(ctx context.Context, in *SiteIn) (struct{}, error) {
			return struct{}{}, s.store.DeleteSite(ctx, in.Site)
		})
	handle(rt, route{ID: "create-join-token", Tag: "Sites", Pattern: "POST /v1/sites/{site}/tokens", Summary: "Make a token by which one agent joins the site, once", Need: switchback.Administrator},
		func(ctx context.Context, in *struct {
			SiteIn
			Body api.TokenRequest
		}) (api.Token, error) {
			return s.mintToken(ctx, in.Site, in.Body.ValidFor)
		})
	handle(rt, route{ID: "list-agents", Tag: "Sites", Pattern: "GET /v1/agents", Summary: "List agents", Need: switchback.Viewer},
		func(ctx context.Context, in *struct {
			Paging
			Site switchback.SiteID `query:"site" doc:"only those of a site"`
		}) (page api.Page[api.Agent], err error) {
			agents, err := s.agentViews(ctx, in.Site)
			if err != nil {
				return page, err
			}
			scope := callOf(ctx).who.Scope
			agents = slices.DeleteFunc(agents, func(x api.Agent) bool { return !scope.HasSite(x.Site) })
			if err := s.hideOthers(ctx, scope, agents); err != nil {
				return page, err
			}
			return pageOf(agents, func(x api.Agent) string { return string(x.ID) }, in.Paging)
		})
	handle(rt, route{ID: "list-machines", Tag: "Sites", Pattern: "GET /v1/machines", Summary: "List every VM of the sites, protected or not", Need: switchback.Viewer},
		func(ctx context.Context, in *struct {
			Paging
			Site      switchback.SiteID `query:"site" doc:"only those found at a site"`
			Protected string            `query:"protected" enum:"true,false" doc:"only protected, or only unprotected ones"`
		}) (page api.Page[api.Machine], err error) {
			machines, err := s.machines(ctx, in.Site)
			if err != nil {
				return page, err
			}
			scope := callOf(ctx).who.Scope
			mine, err := s.protectionsIn(ctx, scope)
			if err != nil {
				return page, err
			}
			machines = slices.DeleteFunc(machines, func(x api.Machine) bool {
				if in.Protected != "" && (in.Protected == "true") != (x.Protection != "") {
					return true
				}
				_, seen := mine[x.Protection]
				return !seen && (x.Protection != "" || !scope.HasSite(x.Site))
			})
			return pageOf(machines, func(x api.Machine) string {
				return string(x.Site) + "\n" + x.Domain.Name + "\n" + string(x.Domain.UUID)
			}, in.Paging)
		})
}

// hideOthers takes VMs that are not in scope out of what agents report.
func (s *Server) hideOthers(ctx context.Context, scope switchback.Scope, agents []api.Agent) error {
	if scope.All() {
		return nil
	}
	mine, err := s.protectionsIn(ctx, scope)
	if err != nil {
		return err
	}
	for _, a := range agents {
		if a.Status != nil {
			a.Status.VMs = slices.DeleteFunc(a.Status.VMs, func(v agentapi.VMStatus) bool { _, ok := mine[v.Protection]; return !ok })
		}
	}
	return nil
}

// protectionsIn are the protected VMs of a scope, by ID.
func (s *Server) protectionsIn(ctx context.Context, scope switchback.Scope) (map[switchback.ProtectionID]switchback.Protection, error) {
	list, err := s.store.Protections(ctx)
	if err != nil {
		return nil, err
	}
	in := map[switchback.ProtectionID]switchback.Protection{}
	for _, p := range list {
		if sees(scope, p) {
			in[p.ID] = p
		}
	}
	return in, nil
}

package server

import (
	"context"
	"regexp"
	"slices"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// VMIn names a protected VM.
type VMIn struct {
	VM string `path:"vm" doc:"name, UUID or protection ID"`
}

func (s *Server) routeVMs(rt *routes) {
	handle(rt, route{ID: "list-vms", Tag: "VMs", Pattern: "GET /v1/vms", Summary: "List protected VMs", Need: switchback.Viewer},
		func(ctx context.Context, in *struct {
			Paging
			Site   switchback.SiteID `query:"site" doc:"only those that are active at, or replicate to, a site"`
			Phase  switchback.Phase  `query:"phase" doc:"only those in a phase"`
			Tag    string            `query:"tag" doc:"only those with a tag"`
			Name   string            `query:"name" doc:"only those of that name"`
			Health string            `query:"health" enum:"normal,warning,critical" doc:"only those of that health"`
		}) (page api.Page[api.VM], err error) {
			mine, err := s.protectionsIn(ctx, callOf(ctx).who.Scope)
			if err != nil {
				return page, err
			}
			views := []api.VM{}
			for _, p := range mine {
				if in.Site != "" && p.Source != in.Site && p.Target != in.Site || in.Phase != "" && p.Phase != in.Phase ||
					in.Tag != "" && !slices.Contains(p.Tags, in.Tag) || in.Name != "" && p.Name != in.Name {
					continue
				}
				v := api.VM{Protection: p}
				if in.Health != "" {
					if v, err = s.view(ctx, p, false); err != nil {
						return page, err
					}
					if v.Health != in.Health {
						continue
					}
				}
				views = append(views, v)
			}
			page, err = pageOf(views, func(v api.VM) string { return v.Name + "\n" + string(v.ID) }, in.Paging)
			for i, v := range page.Items {
				if err == nil && in.Health == "" {
					page.Items[i], err = s.view(ctx, v.Protection, false)
				}
			}
			return page, err
		})
	handle(rt, route{ID: "get-vm", Tag: "VMs", Pattern: "GET /v1/vms/{vm}", Summary: "Everything about a protected VM, with what may be done", Need: switchback.Viewer},
		func(ctx context.Context, in *VMIn) (api.VM, error) {
			p, err := s.find(ctx, in.VM)
			if err != nil {
				return api.VM{}, err
			}
			return s.view(ctx, p, true)
		})
	handle(rt, route{ID: "tag-vm", Tag: "VMs", Pattern: "PUT /v1/vms/{vm}/tags", Summary: "Replace the tags of a protected VM", Need: switchback.Administrator},
		func(ctx context.Context, in *struct {
			VMIn
			Body api.Tags
		}) (api.Tags, error) {
			return s.setTags(ctx, in.VM, in.Body.Tags)
		})
	handle(rt, route{ID: "request-operation", Tag: "VMs", Pattern: "POST /v1/vms/{vm}/operations/{kind}", Need: switchback.Operator, Begins: true,
		Summary: "Begin an operation on a VM, or have its plan"},
		func(ctx context.Context, in *struct {
			VMIn
			Kind recovery.Kind `path:"kind" doc:"protect, or one of the VM's allowed_operations"`
			Body api.OperationRequest
		}) (api.OperationAnswer, error) {
			return s.request(ctx, callOf(ctx).who.Name, in.VM, in.Kind, in.Body)
		})
	handle(rt, route{ID: "list-drills", Tag: "VMs", Pattern: "GET /v1/vms/{vm}/drills", Summary: "List the reports of a VM's drills, newest first", Need: switchback.Viewer},
		func(ctx context.Context, in *struct {
			VMIn
			Paging
		}) (page api.Page[api.DrillReport], err error) {
			p, err := s.find(ctx, in.VM)
			if err != nil {
				return page, err
			}
			list, next, err := s.operationPage(ctx, operation.Filter{Protection: p.ID, Kind: string(recovery.TestFailover)}, in.Paging)
			if err != nil {
				return page, err
			}
			page = api.Page[api.DrillReport]{Items: []api.DrillReport{}, Next: next}
			for _, rec := range list {
				report, err := reportOf(rec)
				if err != nil {
					return page, err
				}
				page.Items = append(page.Items, report)
			}
			return page, nil
		})
}

const maxTags = 32

var tagPattern = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

func (s *Server) setTags(ctx context.Context, vm string, tags []string) (api.Tags, error) {
	tags = slices.Compact(slices.Sorted(slices.Values(tags)))
	if len(tags) > maxTags {
		return api.Tags{}, switchback.Errorf(switchback.CodeInvalid, "a VM has at most %d tags", maxTags)
	}
	for _, t := range tags {
		if !tagPattern.MatchString(t) {
			return api.Tags{}, switchback.Errorf(switchback.CodeInvalid, "%q cannot be a tag of a VM", t).WithHint("up to 64 letters, digits, dots, dashes and underscores")
		}
	}
	p, err := s.find(ctx, vm)
	if err != nil {
		return api.Tags{}, err
	}
	p, err = s.update(ctx, p.ID, func(x *switchback.Protection) error { x.Tags = tags; return nil })
	return api.Tags{Tags: p.Tags}, err
}

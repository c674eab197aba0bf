package server

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/export"
	"github.com/switchback-dr/switchback/journal"
)

// PointIn names a recovery point of a VM.
type PointIn struct {
	VMIn
	Point string `path:"point" doc:"number, tag, or a choice such as latest"`
}

// findPoint resolves the names.
func (s *Server) findPoint(ctx context.Context, in PointIn) (switchback.Protection, switchback.MarkedPoint, error) {
	p, err := s.find(ctx, in.VM)
	if err != nil {
		return p, switchback.MarkedPoint{}, err
	}
	points, err := s.points(ctx, p)
	if err != nil {
		return p, switchback.MarkedPoint{}, err
	}
	x, err := pointNamed(points, in.Point)
	return p, x, err
}

// routePoints are the requests about points.
func (s *Server) routePoints(rt *routes) {
	handle(rt, route{ID: "list-points", Tag: "Points", Pattern: "GET /v1/vms/{vm}/points", Summary: "List a VM's recovery points, oldest first", Need: switchback.Viewer},
		func(ctx context.Context, in *struct {
			VMIn
			Paging
			Kind   string `query:"kind" doc:"only those of a consistency, such as application-consistent"`
			Tagged string `query:"tag" doc:"only the one with a tag"`
			Locked bool   `query:"locked" doc:"only locked ones"`
		}) (page api.Page[switchback.MarkedPoint], err error) {
			p, err := s.find(ctx, in.VM)
			if err != nil {
				return page, err
			}
			points, err := s.points(ctx, p)
			if err != nil {
				return page, err
			}
			points = slices.DeleteFunc(points, func(x switchback.MarkedPoint) bool {
				return in.Kind != "" && string(x.Kind) != in.Kind || in.Tagged != "" && x.Mark.Tag != in.Tagged || in.Locked && !x.Mark.Locked
			})
			return pageOf(points, func(x switchback.MarkedPoint) string { return fmt.Sprintf("%020d", x.Sequence) }, in.Paging)
		})
	handle(rt, route{ID: "get-point", Tag: "Points", Pattern: "GET /v1/vms/{vm}/points/{point}", Summary: "Everything of one point", Need: switchback.Viewer},
		func(ctx context.Context, in *PointIn) (journal.PointDetail, error) {
			p, x, err := s.findPoint(ctx, *in)
			if err != nil {
				return journal.PointDetail{}, err
			}
			a, err := s.store.Agent(ctx, s.keeper(p))
			if err != nil {
				return journal.PointDetail{}, err
			}
			return s.agentClient(a.ID).Point(ctx, p.ID, x.Sequence)
		})
	handle(rt, route{ID: "mark-point", Tag: "Points", Pattern: "POST /v1/vms/{vm}/points/{point}/mark", Summary: "Tag, lock or clear a point", Need: switchback.Operator},
		func(ctx context.Context, in *struct {
			PointIn
			Body api.MarkRequest
		}) (none switchback.MarkedPoint, err error) {
			req := in.Body
			if req.Tag != nil {
				if err := switchback.ValidTag(*req.Tag); err != nil {
					return none, err
				}
			}
			p, x, err := s.findPoint(ctx, in.PointIn)
			if err != nil {
				return none, err
			}
			return s.mark(ctx, p, agentapi.MarkParams{Sequence: x.Sequence, Tag: req.Tag, Locked: req.Locked, Dismiss: req.Dismiss})
		})
	handle(rt, route{ID: "rotate-key", Tag: "Points", Pattern: "POST /v1/vms/{vm}/rotate-key", Summary: "Make a new data key for the VM's new points", Need: switchback.Operator},
		func(ctx context.Context, in *VMIn) (out agentapi.RotateKeyResult, err error) {
			p, err := s.find(ctx, in.VM)
			if err != nil {
				return out, err
			}
			err = s.askKeeper(ctx, p, agentapi.ActionRotateKey, nil, &out)
			return out, err
		})

	for _, x := range []struct{ id, rest, kind, summary string }{
		{"verify-replica", "verify", api.PointsVerify, "Read the whole replica and compare checksums"},
		{"repair-replica", "repair", api.PointsRepair, "Have damaged content sent again"},
	} {
		handle(rt, route{ID: x.id, Tag: "Points", Pattern: "POST /v1/vms/{vm}/" + x.rest, Summary: x.summary, Need: switchback.Operator, Begins: true},
			func(ctx context.Context, in *struct {
				VMIn
				Body api.PointsRequest
			}) (none api.OperationAnswer, err error) {
				p, err := s.find(ctx, in.VM)
				if err != nil {
					return none, err
				}
				return s.requestPoints(ctx, callOf(ctx).who.Name, p, x.kind, pointsParams{Protection: p.ID, PointsRequest: in.Body})
			})
	}
	handle(rt, route{ID: "export-snapshot", Tag: "Points", Pattern: "POST /v1/vms/{vm}/export", Summary: "Write a kept snapshot where its keeper can", Need: switchback.Operator, Begins: true},
		func(ctx context.Context, in *struct {
			VMIn
			Body api.PointsRequest
		}) (none api.OperationAnswer, err error) {
			if in.Body.Snapshot == "" {
				return none, switchback.Errorf(switchback.CodeInvalid, "no point and no snapshot is named")
			}
			if err := checkExport(in.Body); err != nil {
				return none, err
			}
			p, err := s.find(ctx, in.VM)
			if err != nil {
				return none, err
			}
			return s.requestPoints(ctx, callOf(ctx).who.Name, p, api.PointsExport, pointsParams{Protection: p.ID, PointsRequest: in.Body})
		})
	for _, x := range []struct{ id, rest, kind, summary string }{
		{"verify-point", "verify", api.PointsVerify, "Read one point and compare checksums"},
		{"delete-point", "delete", "delete-point", "Delete a point"},
		{"export-point", "export", api.PointsExport, "Write a point where its keeper can"},
	} {
		handle(rt, route{ID: x.id, Tag: "Points", Pattern: "POST /v1/vms/{vm}/points/{point}/" + x.rest, Summary: x.summary, Need: switchback.Operator, Begins: true},
			func(ctx context.Context, in *struct {
				PointIn
				Body api.PointsRequest
			}) (none api.OperationAnswer, err error) {
				if in.Body.Snapshot != "" {
					return none, switchback.Errorf(switchback.CodeInvalid, "a snapshot has its own point").WithHint("name a point or a snapshot, not both")
				}
				if x.kind == api.PointsExport {
					if err := checkExport(in.Body); err != nil {
						return none, err
					}
				}
				p, point, err := s.findPoint(ctx, in.PointIn)
				if err != nil {
					return none, err
				}
				return s.requestPoints(ctx, callOf(ctx).who.Name, p, x.kind, pointsParams{Protection: p.ID, Sequence: point.Sequence, PointsRequest: in.Body})
			})
	}
}

func checkExport(req api.PointsRequest) error {
	if _, err := export.ParseFormat(req.Format); err != nil {
		return err
	}
	if !filepath.IsAbs(req.To) {
		return switchback.Errorf(switchback.CodeInvalid, "path %q is not absolute", req.To).WithHint("--to PATH, on the host of the agent that keeps the points")
	}
	return nil
}

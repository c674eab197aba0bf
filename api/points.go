package api

import (
	"context"
	"net/http"
	"net/url"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
)

// MarkRequest changes what is said of a point; nil leaves a part as it is.
type MarkRequest struct {
	// Tag names the point; "" removes its tag.
	Tag    *string `json:"tag,omitempty"`
	Locked *bool   `json:"locked,omitempty"`
	// Dismiss says that the point is not suspicious.
	Dismiss bool `json:"dismiss,omitempty"`
}

// PointsRequest asks for an operation on points. Which fields count depends on it.
type PointsRequest struct {
	// export: "raw", "qcow2" or "dir", to an absolute path on the host of the agent that keeps the points
	Format string `json:"format,omitempty"`
	To     string `json:"to,omitempty"`
	// export, verify: of this snapshot, instead of a point
	Snapshot string `json:"snapshot,omitempty"`
	// verify: bounds the reading; 0 means not
	BytesPerSecond int64 `json:"bytes_per_second,omitempty"`
	// repair: also delete points that cannot be opened any more
	DropUnreadable bool `json:"drop_unreadable,omitempty"`
}

// Operations on points.
const (
	PointsVerify = "verify"
	PointsExport = "export"
	PointsDelete = "delete"
	PointsRepair = "repair"
)

func pointPath(vm, point, rest string) string {
	path := "/v1/vms/" + url.PathEscape(vm)
	if point != "" {
		path += "/points/" + url.PathEscape(point)
	}
	return path + rest
}

// Point returns everything of one point, named by number, tag, "latest" or "oldest".
func (c *Client) Point(ctx context.Context, vm, point string) (journal.PointDetail, error) {
	return call[journal.PointDetail](ctx, c, http.MethodGet, pointPath(vm, point, ""), nil)
}

// MarkPoint changes what is said of a point.
func (c *Client) MarkPoint(ctx context.Context, vm, point string, req MarkRequest) (switchback.MarkedPoint, error) {
	return call[switchback.MarkedPoint](ctx, c, http.MethodPost, pointPath(vm, point, "/mark"), req)
}

// RotateKey makes a new data key for the VM's new points.
func (c *Client) RotateKey(ctx context.Context, vm string) (agentapi.RotateKeyResult, error) {
	return call[agentapi.RotateKeyResult](ctx, c, http.MethodPost, "/v1/vms/"+url.PathEscape(vm)+"/rotate-key", nil)
}

// RequestPoints begins an operation on points; point "" is the whole replica.
func (c *Client) RequestPoints(ctx context.Context, vm, point, kind string, req PointsRequest) (OperationAnswer, error) {
	return begin(ctx, c, pointPath(vm, point, "/"+kind), req)
}

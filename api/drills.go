package api

import (
	"context"
	"net/http"

	switchback "github.com/switchback-dr/switchback"
)

// DrillsRequest asks for drills of several VMs at once, which reach each other on
// the isolated network that they share. Each is an operation of its own, as if it
// had been asked for alone; one operation more begins them, waits for all and
// gathers their reports.
type DrillsRequest struct {
	// VMs by name, UUID or protection ID; one agent must keep the points of all.
	VMs []string `json:"vms"`
	// Point is the choice for each VM, Points for single ones.
	Point  string            `json:"point,omitempty"`
	Points map[string]string `json:"points,omitempty"`
	// Drill is what is asked of each; Keep counts from when the last was checked.
	Drill  *DrillRequest `json:"drill,omitempty"`
	DryRun bool          `json:"dry_run,omitempty"`
}

// DrillSeveral begins drills of several VMs, or says what they would do.
func (c *Client) DrillSeveral(ctx context.Context, req DrillsRequest) (OperationAnswer, error) {
	return begin(ctx, c, "/v1/drills", req)
}

// CleanDrills ends all drills that the operation id has begun: those that are only
// kept as passed, others as cancelled. It does not wait for their end.
func (c *Client) CleanDrills(ctx context.Context, id switchback.OperationID) error {
	_, err := call[struct{}](ctx, c, http.MethodPost, "/v1/drills/"+string(id)+"/clean", struct{}{})
	return err
}

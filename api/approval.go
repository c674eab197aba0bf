package api

import (
	"context"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
)

// ApprovalPolicy says which operations wait for a second person.
type ApprovalPolicy struct {
	// Operations are kinds, such as failover, commit, failback, delete-point.
	Operations []string `json:"operations"`
	// Role is what the second person needs.
	Role switchback.AccessRole `json:"role"`
	// ValidFor is how long an operation waits before it is cancelled.
	ValidFor time.Duration `json:"valid_for"`
}

// ApproveRequest lets an operation go on.
type ApproveRequest struct {
	Note string `json:"note,omitempty" maxLength:"500"`
}

// ApprovalPolicy returns which operations wait for a second person.
func (c *Client) ApprovalPolicy(ctx context.Context) (ApprovalPolicy, error) {
	return call[ApprovalPolicy](ctx, c, http.MethodGet, "/v1/approval-policy", nil)
}

// SetApprovalPolicy chooses which operations wait for a second person.
func (c *Client) SetApprovalPolicy(ctx context.Context, p ApprovalPolicy) (ApprovalPolicy, error) {
	return call[ApprovalPolicy](ctx, c, http.MethodPut, "/v1/approval-policy", p)
}

// ApproveOperation lets an operation go on that another person has asked for.
func (c *Client) ApproveOperation(ctx context.Context, id switchback.OperationID, note string) (operation.Record, error) {
	return call[operation.Record](ctx, c, http.MethodPost, operationPath(id, "/approve"), ApproveRequest{Note: note})
}

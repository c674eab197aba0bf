package agentapi

import (
	"context"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/transport"
)

// ConnectivityRequest asks an agent to measure its legs.
type ConnectivityRequest struct {
	Peers []Peer `json:"peers"`
	// Bytes and Limit bound the data that is sent on each leg.
	Bytes int64         `json:"bytes"`
	Limit time.Duration `json:"limit"`
}

// ConnectivityAnswer is what an agent found.
type ConnectivityAnswer struct {
	// Server is the leg to the server that the agent reports to, at Address.
	Server     LegResult   `json:"server"`
	Peers      []LegResult `json:"peers"` // as asked
	Hypervisor LegResult   `json:"hypervisor"`
	Storage    LegResult   `json:"storage"`
}

// LegResult is how one leg is.
type LegResult struct {
	Address string `json:"address,omitempty"`
	transport.Measurement
	Detail string            `json:"detail,omitempty"`
	Error  *switchback.Error `json:"error,omitempty"`
}

// Connectivity has the agent measure its legs.
func (c *Client) Connectivity(ctx context.Context, req ConnectivityRequest) (ConnectivityAnswer, error) {
	return transport.Call[ConnectivityAnswer](ctx, c.HTTP, http.MethodPost, c.url("/v1/connectivity"), req)
}

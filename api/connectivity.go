package api

import (
	"context"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
)

// ConnectivityRequest asks for a test of every leg that touches the sites; none = all.
type ConnectivityRequest struct {
	Sites []switchback.SiteID `json:"sites,omitempty"`
}

// LegKind says between whom a leg is.
type LegKind string

const (
	LegServerAgent LegKind = "server-agent"
	LegAgentServer LegKind = "agent-server"
	LegAgentAgent  LegKind = "agent-agent"
	LegHypervisor  LegKind = "agent-hypervisor"
	LegStorage     LegKind = "agent-storage"
)

// Leg is one way between two parts of the installation.
type Leg struct {
	Kind LegKind `json:"kind"`
	From string  `json:"from"`
	To   string  `json:"to"`
	// OK is false with Error, which says reason and remedy.
	OK bool `json:"ok"`
	agentapi.LegResult
	// Warnings are what will be trouble.
	Warnings []string `json:"warnings,omitempty"`
}

// Connectivity is the test of all legs.
type Connectivity struct {
	At   time.Time `json:"at"`
	OK   bool      `json:"ok"`
	Legs []Leg     `json:"legs"`
}

// TestConnectivity has every leg of the sites measured.
func (c *Client) TestConnectivity(ctx context.Context, req ConnectivityRequest) (Connectivity, error) {
	return call[Connectivity](ctx, c, http.MethodPost, "/v1/connectivity", req)
}

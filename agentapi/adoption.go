package agentapi

import (
	"context"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
)

// AdoptionPath is where an agent talks to a server of another installation that
// proves that it may adopt the agent.
const AdoptionPath = "/v1/adoption"

// What is asked in an AdoptionRequest.
const (
	AdoptionInspect = "inspect" // what does the agent hold?
	AdoptionEnrol   = "enrol"   // a request for a certificate of the new installation
	AdoptionInstall = "install" // take it: from here on the agent belongs to the new one
)

// AdoptionRequest is the body of POST AdoptionPath.
type AdoptionRequest struct {
	Proof transport.AdoptionProof `json:"proof"`
	Do    string                  `json:"do"`
	// TakeOver: though the agent's own server answers it.
	TakeOver bool `json:"take_over,omitempty"`
	// Joined and Servers, for install, are the new certificate and the addresses of
	// the new servers.
	Joined  *transport.JoinResponse `json:"joined,omitempty"`
	Servers []string                `json:"servers,omitempty"`
}

// Holdings are what an agent holds: all of its VMs, and itself.
type Holdings struct {
	Agent   recovery.Keeper `json:"agent"`
	Version string          `json:"version"`
	// Installation is what the agent belongs to; CertificateExpires when that ends.
	Installation       string    `json:"installation"`
	CertificateExpires time.Time `json:"certificate_expires"`
	// ServerAnswered is when its server last took a report; zero = not since it was started.
	ServerAnswered time.Time          `json:"server_answered,omitzero"`
	Storage        Storage            `json:"storage"`
	VMs            []recovery.Holding `json:"vms"`
	// Revoked are the agents that it does not believe any more.
	Revoked []Revocation `json:"revoked,omitempty"`
	// CSRPEM answers enrol.
	CSRPEM string `json:"csr_pem,omitempty"`
}

// Holdings asks an agent of the own installation what it holds.
func (c *Client) Holdings(ctx context.Context) (Holdings, error) {
	return transport.Call[Holdings](ctx, c.HTTP, http.MethodGet, c.url("/v1/holdings"), nil)
}

// Adoption asks an agent of another installation; HTTP is transport.AdoptionClient.
func (c *Client) Adoption(ctx context.Context, req AdoptionRequest) (Holdings, error) {
	return transport.Call[Holdings](ctx, c.HTTP, http.MethodPost, c.url(AdoptionPath), req)
}

// reportRecords is how many records one answer to a report carries at most.
const reportRecords = 32

// StaleRecords are the VMs whose record is not the one that the server has, as
// far as one answer has room for; versions are the server's.
func StaleRecords(list []VMStatus, versions map[switchback.ProtectionID]int64) (stale []switchback.ProtectionID, ahead bool) {
	for _, st := range list {
		version, known := versions[st.Protection]
		switch {
		case known && st.RecordVersion < version && len(stale) < reportRecords:
			stale = append(stale, st.Protection)
		case known && st.RecordVersion > version:
			ahead = true
		}
	}
	return stale, ahead
}

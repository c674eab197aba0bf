package api

import (
	"context"
	"net/http"
	"net/url"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/transport"
)

// AgentDetail is everything that is known of one agent.
type AgentDetail struct {
	Agent
	JoinedAt time.Time `json:"joined_at"`
	// CertificateSerial and CertificateExpires are of the last one issued to it.
	CertificateSerial  string    `json:"certificate_serial"`
	CertificateExpires time.Time `json:"certificate_expires"`
	// Revoked is set for an agent that is not believed any more.
	Revoked *agentapi.Revocation `json:"revoked,omitempty"`
	// Lines are those that it keeps to the server that answers.
	Lines []transport.LineStatus `json:"lines,omitempty"`
	// VMs are the protected VMs it has a part in.
	VMs []string `json:"vms,omitempty"`
}

// RevokeAnswer says what was revoked. VMs are those that depend on the agent.
type RevokeAnswer struct {
	Agent   switchback.AgentID `json:"agent"`
	Site    switchback.SiteID  `json:"site"`
	Removed bool               `json:"removed"`
	VMs     []string           `json:"vms,omitempty"`
}

// AdmitRequest carries an agent's request to join, as 'agent request' prints it.
type AdmitRequest struct {
	Request string `json:"request"`
}

// AdmitAnswer is what the agent is to be given: 'agent join' takes Answer.
type AdmitAnswer struct {
	Agent  switchback.AgentID `json:"agent"`
	Site   switchback.SiteID  `json:"site"`
	Answer string             `json:"answer"`
}

// CAStatus is how the certificate authority stands. Fingerprints are SHA-256 of certificates.
type CAStatus struct {
	Installation string             `json:"installation"`
	Signing      string             `json:"signing"`
	Expires      time.Time          `json:"expires"`
	Rotation     transport.Rotation `json:"rotation"`
	Agents       []CAAgent          `json:"agents"`
}

// CAAgent is one agent as the rotation sees it.
type CAAgent struct {
	Agent    switchback.AgentID `json:"agent"`
	Site     switchback.SiteID  `json:"site"`
	LastSeen time.Time          `json:"last_seen"`
	// Issuer signed its certificate; Believes are the authorities it believes.
	Issuer   string   `json:"issuer"`
	Believes []string `json:"believes"`
	// Ready: it has done what the phase asks for.
	Ready bool `json:"ready"`
}

// Waiting lists the agents that have not done yet what the phase asks for.
func (s CAStatus) Waiting() []CAAgent {
	var list []CAAgent
	for _, a := range s.Agents {
		if !a.Ready {
			list = append(list, a)
		}
	}
	return list
}

// RotateRequest begins a rotation; with Force it ends the phase under way.
type RotateRequest struct {
	Force bool `json:"force,omitempty"`
}

func agentPath(id switchback.AgentID) string { return "/v1/agents/" + url.PathEscape(string(id)) }

// Agent returns one agent.
func (c *Client) Agent(ctx context.Context, id switchback.AgentID) (AgentDetail, error) {
	return call[AgentDetail](ctx, c, http.MethodGet, agentPath(id), nil)
}

// RevokeAgent has an agent refused everywhere.
func (c *Client) RevokeAgent(ctx context.Context, id switchback.AgentID) (RevokeAnswer, error) {
	return call[RevokeAnswer](ctx, c, http.MethodPost, agentPath(id)+"/revoke", struct{}{})
}

// RemoveAgent revokes an agent that no VM depends on, and forgets it.
func (c *Client) RemoveAgent(ctx context.Context, id switchback.AgentID) (RevokeAnswer, error) {
	return call[RevokeAnswer](ctx, c, http.MethodDelete, agentPath(id), nil)
}

// AdmitAgent lets an agent join that cannot reach the server.
func (c *Client) AdmitAgent(ctx context.Context, site switchback.SiteID, request string) (AdmitAnswer, error) {
	return call[AdmitAnswer](ctx, c, http.MethodPost, "/v1/sites/"+url.PathEscape(string(site))+"/admit", AdmitRequest{Request: request})
}

// CA says how the certificate authority stands.
func (c *Client) CA(ctx context.Context) (CAStatus, error) {
	return call[CAStatus](ctx, c, http.MethodGet, "/v1/ca", nil)
}

// RotateCA begins a rotation of the certificate authority.
func (c *Client) RotateCA(ctx context.Context, req RotateRequest) (CAStatus, error) {
	return call[CAStatus](ctx, c, http.MethodPost, "/v1/ca/rotate", req)
}

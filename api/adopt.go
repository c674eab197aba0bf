package api

import (
	"context"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
)

// AdoptRequest asks the server to adopt what agents hold.
type AdoptRequest struct {
	// Agents are addresses, host:port, of agents of another installation; the
	// agents that these work with are found by themselves. None: what the agents
	// of this installation hold is learned anew.
	Agents []string `json:"agents,omitempty"`
	// Proof is made with the recovery key of that installation.
	Proof *transport.AdoptionProof `json:"proof,omitempty"`
	// DryRun says what would be adopted and changes nothing.
	DryRun bool `json:"dry_run,omitempty"`
	// TakeOver: though their own server still answers the agents.
	TakeOver bool `json:"take_over,omitempty"`
	// JoinSites: their sites may be ones that this installation has already.
	JoinSites bool `json:"join_sites,omitempty"`
}

// Adoption is what was adopted, or would be.
type Adoption struct {
	DryRun bool           `json:"dry_run,omitempty"`
	Agents []AdoptedAgent `json:"agents"`
	VMs    []AdoptedVM    `json:"vms"`
}

// AdoptedAgent is one agent that was asked.
type AdoptedAgent struct {
	recovery.Keeper
	Version            string    `json:"version,omitempty"`
	Installation       string    `json:"installation,omitempty"`
	CertificateExpires time.Time `json:"certificate_expires,omitzero"`
	// Own: it belongs to this installation already.
	Own bool `json:"own,omitempty"`
	// Missing says why it does not answer; what it knows is not known then.
	Missing string `json:"missing,omitempty"`
}

// What became of a VM in an adoption.
const (
	VMAdopted = "adopted" // it was not known here
	VMLearned = "learned" // agents knew more
	VMKnown   = "known"   // nothing to learn
	VMRefused = "refused" // see Error
)

// AdoptedVM is one protected VM.
type AdoptedVM struct {
	ID      switchback.ProtectionID `json:"id"`
	Name    string                  `json:"name"`
	Outcome string                  `json:"outcome"`
	recovery.Adopted
	// Operation was begun to lead on from where the lost server was.
	Operation switchback.OperationID `json:"operation,omitempty"`
	Error     *switchback.Error      `json:"error,omitempty"`
}

// Adopt adopts what agents hold.
func (c *Client) Adopt(ctx context.Context, req AdoptRequest) (Adoption, error) {
	return call[Adoption](ctx, c, http.MethodPost, "/v1/adoptions", req)
}

// CAFingerprint is the SHA-256 of the CA of the client's installation, hexadecimal.
func (c *Client) CAFingerprint() string { return c.ca }

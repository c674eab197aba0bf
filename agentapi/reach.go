package agentapi

import (
	"time"

	"github.com/switchback-dr/switchback/transport"
)

// Reachable says whether others can open connections to an agent.
type Reachable string

const (
	// ReachableYes: they dial its address.
	ReachableYes Reachable = "true"
	// ReachableNo: the agent dials them, and is called over these lines.
	ReachableNo Reachable = "false"
	// ReachableAuto: the agent dials them, too; its address is tried first.
	ReachableAuto Reachable = "auto"
)

// Trust is what an agent shows and believes.
type Trust struct {
	// Serial and Expires are of its certificate, Issuer is the SHA-256 of the
	// authority that signed it.
	Serial  string    `json:"serial"`
	Expires time.Time `json:"expires"`
	Issuer  string    `json:"issuer"`
	// Authorities are the SHA-256 of those it believes.
	Authorities []string `json:"authorities"`
}

// TrustOf describes credentials.
func TrustOf(c *transport.Credentials) Trust {
	return Trust{Serial: c.Serial(), Expires: c.Expires(), Issuer: c.Issuer(), Authorities: c.Authorities()}
}

package agentapi

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Revocation says that an agent is not believed any more, whatever certificate it shows.
type Revocation struct {
	Agent switchback.AgentID `json:"agent"`
	Site  switchback.SiteID  `json:"site"`
	At    time.Time          `json:"at"`
	By    string             `json:"by"`
}

// TrustUpdate is what the server has every agent believe; it comes with each
// answer to a report.
type TrustUpdate struct {
	// Revoked are all agents that are not believed any more.
	Revoked []Revocation `json:"revoked,omitempty"`
	// CAPEM are the certificates of the authorities to believe; "" = as before.
	CAPEM string `json:"ca_pem,omitempty"`
	// Renew asks for a new certificate now: the agent's is of an authority that will be dropped.
	Renew bool `json:"renew,omitempty"`
}

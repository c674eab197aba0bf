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
	// Elsewhere: another installation decided it, before its agents were adopted. It
	// stays for good: who is adopted may show a certificate that has ended.
	Elsewhere bool `json:"elsewhere,omitempty"`
}

// TrustUpdate is what the server has every agent believe; it comes with each
// answer to a report.
type TrustUpdate struct {
	// Revoked are all agents that are not believed any more; nil says nothing: as before.
	Revoked []Revocation `json:"revoked,omitzero"`
	// CAPEM are the certificates of the authorities to believe; "" = as before.
	CAPEM string `json:"ca_pem,omitempty"`
	// Renew asks for a new certificate now: the agent's is of an authority that will be dropped.
	Renew bool `json:"renew,omitempty"`
}

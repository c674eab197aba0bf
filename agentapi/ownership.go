package agentapi

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/fencing"
)

// OwnershipQuestion is what an agent asks the server, and its peers: who is
// active? It asks about VMs that are active at its own site, as far as it knows.
type OwnershipQuestion struct {
	// Held is the epoch that it holds of each.
	Held map[switchback.ProtectionID]switchback.Epoch `json:"held"`
}

// OwnershipAnswer has what is known of these; what is not known is missing.
type OwnershipAnswer struct {
	Rulings map[switchback.ProtectionID]fencing.Ruling `json:"rulings"`
}

// Ownership is how a VM stands with its right to run at an agent's site.
type Ownership struct {
	State fencing.State `json:"state"`
	// Why it may not be started; empty when it may.
	Why string `json:"why,omitempty"`
	// ConfirmedBy is a server, an agent, "command", "policy" or "override".
	ConfirmedBy string `json:"confirmed_by,omitempty"`
	// ConfirmedAt is when that was last heard by this process of the agent.
	ConfirmedAt time.Time `json:"confirmed_at,omitzero"`
	// LeaseSeconds is what is left of the lease, with the policy.
	LeaseSeconds float64 `json:"lease_seconds,omitempty"`
	// Autostart: the agent starts the VM after a boot of the host, once granted.
	Autostart bool `json:"autostart"`
	// Override is set while the VM is contested.
	Override *Override `json:"override,omitempty"`
}

// Override is a start by hand with nobody's confirmation.
type Override struct {
	Reason string           `json:"reason"`
	By     string           `json:"by"`
	At     time.Time        `json:"at"`
	Epoch  switchback.Epoch `json:"epoch"`
}

// ActivateParams go with ActionActivate.
type ActivateParams struct {
	// Unproven: nobody has seen the old side off. With the policy of a lease the
	// start waits until that has ended.
	Unproven bool `json:"unproven,omitempty"`
}

// ActionSettleContest ends a contest: the site that is named wins.
const ActionSettleContest = "settle-contest"

// SettleContestParams name the winner.
type SettleContestParams struct {
	Winner switchback.SiteID `json:"winner"`
}

// LocalStatus is what an agent says on its host: 'switchback agent status'.
type LocalStatus struct {
	Site   switchback.SiteID  `json:"site"`
	Agent  switchback.AgentID `json:"agent"`
	Server string             `json:"server"`
	// ServerError is set while the server does not answer.
	ServerError string          `json:"server_error,omitempty"`
	VMs         []LocalVMStatus `json:"vms"`
}

// LocalVMStatus is a VM of LocalStatus.
type LocalVMStatus struct {
	Name string            `json:"name"`
	VM   switchback.VMUUID `json:"vm"`
	VMStatus
}

// OverrideRequest asks an agent, on its host, to let a VM start.
type OverrideRequest struct {
	// VM is a name, UUID or protection.
	VM     string `json:"vm"`
	Reason string `json:"reason"`
	By     string `json:"by"`
}

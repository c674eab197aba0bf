// Package api is the control plane's HTTP API: requests, answers and the
// client that the command line uses. Paths are under /v1, bodies are JSON,
// errors are application/problem+json with code, detail and hint.
package api

import (
	"encoding/json"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// Site is a site with its agents.
type Site struct {
	ID     switchback.SiteID `json:"id"`
	Agents []Agent           `json:"agents"`
	// Health is "normal", "warning" or "critical", by the gravest condition.
	Health     string                 `json:"health,omitempty"`
	Conditions []switchback.Condition `json:"conditions,omitempty"`
}

// Agent is one agent as the server knows it.
type Agent struct {
	ID       switchback.AgentID    `json:"id"`
	Site     switchback.SiteID     `json:"site"`
	Address  string                `json:"address"`
	Version  string                `json:"version"`
	LastSeen time.Time             `json:"last_seen"`
	Healthy  bool                  `json:"healthy"`
	Reason   string                `json:"reason,omitempty"` // why not healthy
	Status   *agentapi.AgentStatus `json:"status,omitempty"`
}

// CreateSiteRequest names a new site.
type CreateSiteRequest struct {
	ID switchback.SiteID `json:"id"`
}

// Token is a fresh join token; it is shown once.
type Token struct {
	Token   string            `json:"token"`
	Site    switchback.SiteID `json:"site"`
	Expires time.Time         `json:"expires"`
}

// TokenRequest asks for a join token.
type TokenRequest struct {
	ValidFor time.Duration `json:"valid_for"`
}

// Machine is a VM found at a site, protected or not.
type Machine struct {
	Site switchback.SiteID `json:"site"`
	// Agent is the one whose hypervisor has it.
	Agent  switchback.AgentID `json:"agent"`
	Domain hypervisor.Domain  `json:"domain"`
	// Protection is set where the VM is protected; Role is the site's part in it.
	Protection switchback.ProtectionID `json:"protection,omitempty"`
	Role       string                  `json:"role,omitempty"`
}

// VM is a protected VM with everything an operator asks of it.
type VM struct {
	switchback.Protection
	// Health is "normal", "warning" or "critical", by the gravest condition.
	Health     string                 `json:"health"`
	Conditions []switchback.Condition `json:"conditions,omitempty"`
	// AtSource and AtTarget are the agents' reports; nil when there is none.
	AtSource   *agentapi.VMStatus `json:"at_source,omitempty"`
	AtTarget   *agentapi.VMStatus `json:"at_target,omitempty"`
	LastPoint  *switchback.Point  `json:"last_point,omitempty"`
	RPOSeconds float64            `json:"rpo_seconds"` // age of the last point; 0 when there is none
	Allowed    []recovery.Allowed `json:"allowed_operations"`
	// Countdown is set while the commit policy's timer runs.
	Countdown *Countdown `json:"countdown,omitempty"`
	// Current is the operation under way, or the last one when it failed.
	Current *operation.Record `json:"current_operation,omitempty"`
	// CurrentDrill is the drill under way; it is on an axis of its own.
	CurrentDrill *operation.Record `json:"current_drill,omitempty"`
}

// Countdown says what the commit policy will do by itself, and when.
type Countdown struct {
	Action switchback.CommitAction `json:"action"`
	At     time.Time               `json:"at"`
	// Seconds to go; negative when it is due and could not begin.
	Seconds float64 `json:"seconds"`
}

// OperationRequest asks for an operation on a VM. Which fields count depends on the kind.
type OperationRequest struct {
	// DryRun answers with a Plan and does nothing.
	DryRun bool `json:"dry_run,omitempty"`
	// protect
	From     switchback.SiteID  `json:"from,omitempty"`
	To       switchback.SiteID  `json:"to,omitempty"`
	Policy   *switchback.Policy `json:"policy,omitempty"`  // also edit
	Networks map[string]string  `json:"networks,omitzero"` // also edit; nil = they stay
	// failover, failback, change-point: a choice (recovery.ParseChoice), "latest" by default
	Point string `json:"point,omitempty"`
	// AcceptLoss agrees to lose what was written after an older point.
	AcceptLoss bool `json:"accept_loss,omitempty"`
	// ShutdownDeadline is how long the guest may take to power off; ForceOff pulls the plug then.
	ShutdownDeadline time.Duration `json:"shutdown_deadline,omitempty"`
	ForceOff         bool          `json:"force_off,omitempty"`
	// NoProof leaves out comparing both sides after the switch.
	NoProof bool `json:"no_proof,omitempty"`
	// commit: though both sides were found to differ
	AcceptMismatch bool `json:"accept_mismatch,omitempty"`
	// failback: also commit, and also protect again
	AndCommit    bool `json:"and_commit,omitempty"`
	AndReprotect bool `json:"and_reprotect,omitempty"`
	// test-failover, together with Point
	Drill *DrillRequest `json:"drill,omitempty"`
	// take-point: frozen through the guest agent, or refused
	ApplicationConsistent bool `json:"application_consistent,omitempty"`
	// change-point: the kept writes to go on with, instead of a point; drop-snapshot: which
	Snapshot string `json:"snapshot,omitempty"`
	// commit, failback with AndCommit: what becomes of kept snapshots, "drop" or "keep"
	Snapshots string `json:"snapshots,omitempty"`
	// and of the points up to the chosen one: "delete" (default) or "keep"
	Points string `json:"points,omitempty"`
	// extend: by how much, or not at all any more
	ExtendBy time.Duration `json:"extend_by,omitempty"`
	Stop     bool          `json:"stop,omitempty"`
	// resolve: the site whose copy counts
	Winner switchback.SiteID `json:"winner,omitempty"`
	// unprotect
	RemoveData bool `json:"remove_data,omitempty"`
}

// OperationAnswer carries the operation that was begun, or the plan of a dry run.
type OperationAnswer struct {
	Operation *operation.Record `json:"operation,omitempty"`
	Plan      *Plan             `json:"plan,omitempty"`
}

// Plan is what an operation would do.
type Plan struct {
	Kind  string     `json:"kind"`
	VM    string     `json:"vm"`
	Steps []PlanStep `json:"steps"`
	// Bytes is how much would cross the network, as far as can be said; Basis says from what.
	Bytes   int64         `json:"bytes"`
	Basis   string        `json:"basis"`
	Time    time.Duration `json:"time"`
	Outage  time.Duration `json:"outage"`
	Changes []string      `json:"changes"`
	Keeps   []string      `json:"keeps"`
	// Warnings are what to think of before it is done.
	Warnings []string `json:"warnings,omitempty"`
}

// PlanStep is one step of a plan.
type PlanStep struct {
	Name  string            `json:"name"`
	Title string            `json:"title"`
	Site  switchback.SiteID `json:"site,omitempty"`
}

// Raw is a JSON document passed on as it is.
type Raw = json.RawMessage

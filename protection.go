package switchback

import "time"

// Protection is one protected VM as the server knows it: independent axes,
// never folded into one.
type Protection struct {
	ID   ProtectionID `json:"id"`
	VM   VMUUID       `json:"vm_uuid"`
	Name string       `json:"name"`
	// Home is the site the VM belongs to; Source is where it is active (and
	// replicated from, while protected); Target is the other one.
	Home   SiteID `json:"home_site"`
	Source SiteID `json:"source_site"`
	Target SiteID `json:"target_site"`
	// The agents that do the work at either end.
	SourceAgent AgentID `json:"source_agent"`
	TargetAgent AgentID `json:"target_agent"`

	Phase Phase `json:"phase"`
	// Epoch is the newest epoch minted; the active site is Source.
	Epoch Epoch `json:"epoch"`
	// MintAbove is set where an agent may know of epochs that the server does
	// not: the next one is above it.
	MintAbove Epoch  `json:"mint_above,omitempty"`
	Policy    Policy `json:"policy"`
	// Disks as they were at the source when last looked at.
	Disks []Disk `json:"disks"`
	// Networks maps network names at home to names at the other site.
	Networks map[string]string `json:"networks,omitempty"`
	// Tags are words by which VMs are found and roles are limited.
	Tags []string `json:"tags,omitempty"`
	// Paused: replication is held on request.
	Paused bool `json:"paused,omitempty"`
	// Operation is the one that currently works on this VM, if any.
	Operation OperationID `json:"operation,omitempty"`
	// Ended is the one that ended last: it does not become Operation again.
	Ended OperationID `json:"ended,omitempty"`
	// Switch says what a failover in progress or uncommitted rests on.
	Switch *Switch `json:"switch,omitempty"`
	// Drill is an axis of its own.
	Drill DrillAxis `json:"drill,omitzero"`
	// Seeds are disk files that a commit left behind as seed of the next
	// reprotect, by site; removable.
	Seeds map[SiteID][]Disk `json:"seeds,omitempty"`
	// KeptPoints: a commit has kept points at Source, read-only, until the new
	// direction has its own.
	KeptPoints bool `json:"kept_points,omitempty"`
	// CreatedAt is when the VM was first protected.
	CreatedAt time.Time `json:"created_at"`
	// Version is raised by each write; a write with an old one is refused.
	Version int64 `json:"version"`
}

// Switch is what a failover or failback that is not yet committed rests on.
type Switch struct {
	// From and To are the old and the new active site.
	From SiteID `json:"from"`
	To   SiteID `json:"to"`
	// FromAgent and ToAgent do the work there.
	FromAgent AgentID `json:"from_agent"`
	ToAgent   AgentID `json:"to_agent"`
	// Point is the state the VM was started from; Last is the newest one that
	// existed, whose changes since Point are abandoned at commit.
	Point Point `json:"point"`
	Last  Point `json:"last"`
	// Epoch is the new side's; PreviousEpoch the old side's.
	Epoch         Epoch `json:"epoch"`
	PreviousEpoch Epoch `json:"previous_epoch"`
	// UndoEpoch is the old side's new epoch once the switch is being undone; 0 = it is not.
	UndoEpoch Epoch `json:"undo_epoch,omitempty"`
	// Proof compares both sides; nil until that is done.
	Proof *Proof `json:"proof,omitempty"`
	// Unproven: the old side could not be fenced; the new one waited for its lease to end.
	Unproven bool `json:"unproven,omitempty"`
	// WasRunning says that the guest ran when the switch began.
	WasRunning bool      `json:"was_running"`
	StartedAt  time.Time `json:"started_at"`
	// Snapshot names the kept writes that the VM went on with after a change of
	// the point; empty where it runs from Point alone.
	Snapshot string `json:"snapshot,omitempty"`
	// Changing is set while the VM is moved to another point.
	Changing *ChangingPoint `json:"changing,omitempty"`
	// Deadline is when the policy's commit or undo begins by itself; zero: never.
	Deadline time.Time `json:"deadline,omitzero"`
	// Overdue says why that could not begin at the deadline; it is tried on.
	Overdue string `json:"overdue,omitempty"`
}

// ChangingPoint is a change of the point under way: who does it, and where to.
type ChangingPoint struct {
	Operation OperationID `json:"operation"`
	Point     Point       `json:"point"`
	Snapshot  string      `json:"snapshot,omitempty"`
}

// Mint raises the epoch above every one that somebody may know, and returns it.
func (p *Protection) Mint() Epoch {
	p.Epoch = max(p.Epoch, p.MintAbove) + 1
	return p.Epoch
}

// Homeward reports whether the direction of replication is towards home.
func (p Protection) Homeward() bool { return p.Target == p.Home }

// Severity orders conditions.
type Severity string

const (
	// SeverityNotice is something to know; it leaves the VM healthy.
	SeverityNotice   Severity = "notice"
	SeverityWarning  Severity = "warning"
	SeverityCritical Severity = "critical"
)

// Condition is one named thing that is wrong, with cause and remedy.
type Condition struct {
	Name     string    `json:"name"` // e.g. "target-out-of-space"
	Severity Severity  `json:"severity"`
	Cause    string    `json:"cause"`
	Remedy   string    `json:"remedy"`
	Since    time.Time `json:"since"`
}

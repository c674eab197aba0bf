package agentapi

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/replicator"
)

// Actions. The comment names who carries it out.
const (
	ActionDescribe        = "describe"         // any: the VM's domain, definition and disks
	ActionPrepareReplica  = "prepare-replica"  // new target: an empty replica, or one over existing disks
	ActionReplicate       = "replicate"        // source: take points from now on
	ActionAwaitPoint      = "await-point"      // source: until the target holds a point of this epoch
	ActionTakePoint       = "take-point"       // source: one point now
	ActionHold            = "hold"             // source: stop taking points
	ActionFreeze          = "freeze"           // target: keep every point, one is about to be chosen
	ActionShutdown        = "shutdown"         // source: turn the guest off
	ActionFinalPoint      = "final-point"      // source: the point after the shutdown
	ActionFence           = "fence"            // old side: never run again under this epoch
	ActionReinstate       = "reinstate"        // old side: active again under a new epoch (undo)
	ActionActivate        = "activate"         // new side: own the epoch, durably
	ActionStart           = "start"            // new side: run the VM from a view
	ActionCheck           = "check"            // new side: the VM runs
	ActionAbandon         = "abandon"          // new side: stop, keep the writes, keep the replica (undo)
	ActionChangePoint     = "change-point"     // new side: run from another point, or on from a snapshot
	ActionDropSnapshot    = "drop-snapshot"    // any: delete what an abandoned run wrote
	ActionSettleSnapshots = "settle-snapshots" // new side, before a commit: make snapshots self-contained, or drop them
	ActionKeepPoints      = "keep-points"      // new side, instead of fold: points up to the chosen one stay, read-only
	ActionDropKept        = "drop-kept"        // new side: delete those
	ActionFold            = "fold"             // new side: base := chosen point
	ActionCollapse        = "collapse"         // new side: move the VM onto the plain base
	ActionSettle          = "settle"           // new side: definition, delta, journal removed
	ActionRetire          = "retire"           // old side after commit
	ActionVerifyReplica   = "verify-replica"   // target: re-read and re-checksum
	ActionSetPolicy       = "set-policy"       // source and target
	ActionRelease         = "release"          // any: unprotect
)

// DescribeResult answers ActionDescribe.
type DescribeResult struct {
	Domain     hypervisor.Domain `json:"domain"`
	Definition string            `json:"definition"`
	Storage    Storage           `json:"storage"`
	// GuestAgent says that the guest agent answered (only if asked).
	GuestAgent bool `json:"guest_agent"`
}

// DescribeParams name the VM, which may not be protected yet.
type DescribeParams struct {
	VM switchback.VMUUID `json:"vm"`
	// MustExist makes a missing domain an error; otherwise Domain is empty.
	MustExist bool `json:"must_exist"`
	// AskAgent also pings the guest agent of a running VM.
	AskAgent bool `json:"ask_agent"`
}

// PrepareReplicaParams make a replica at its target.
type PrepareReplicaParams struct {
	VM    switchback.VMUUID `json:"vm"`
	Name  string            `json:"name"`
	Peer  Peer              `json:"peer"`
	Disks []switchback.Disk `json:"disks"` // as at the source
	// FromRest builds on the disks that this site has kept from before, so
	// that only what differs has to come; otherwise the replica begins empty.
	FromRest bool `json:"from_rest"`
	// Checkpoint is the source's, whose bitmap records what was written there
	// since the state that the kept disks stand for (with FromRest).
	Checkpoint string            `json:"checkpoint,omitempty"`
	Policy     switchback.Policy `json:"policy"`
	// DryRun only checks and estimates.
	DryRun bool `json:"dry_run"`
}

// PrepareReplicaResult answers ActionPrepareReplica.
type PrepareReplicaResult struct {
	Dir string `json:"dir"`
	// Trusted says that the kept disks are exactly as they were at the last
	// point; otherwise Reason says why everything has to come.
	Trusted   bool   `json:"trusted"`
	Reason    string `json:"reason,omitempty"`
	FreeBytes int64  `json:"free_bytes"`
}

// ReplicateParams make an agent the source.
type ReplicateParams struct {
	VM     switchback.VMUUID `json:"vm"`
	Name   string            `json:"name"`
	Peer   Peer              `json:"peer"`
	Policy switchback.Policy `json:"policy"`
	// SendAll makes the first point carry whole disks: the target's kept disks
	// are not trusted.
	SendAll bool `json:"send_all"`
}

// TakePointParams say what the point is to be.
type TakePointParams struct {
	// ApplicationConsistent refuses where no guest agent answers.
	ApplicationConsistent bool `json:"application_consistent"`
}

// PointResult answers take-point and final-point.
type PointResult struct {
	Report replicator.CycleReport `json:"report"`
}

// AwaitPointResult answers ActionAwaitPoint.
type AwaitPointResult struct {
	Point  switchback.Point       `json:"point"`
	Report replicator.CycleReport `json:"report"`
}

// ShutdownParams turn the guest off.
type ShutdownParams struct {
	Deadline time.Duration `json:"deadline"`
	Force    bool          `json:"force"`
}

// ShutdownResult says when the guest was seen off.
type ShutdownResult struct {
	OffAt      time.Time `json:"off_at"`
	WasRunning bool      `json:"was_running"`
}

// FenceParams forbid the VM to run here.
type FenceParams struct {
	ActiveSite switchback.SiteID `json:"active_site"`
}

// ReinstateParams make the old side active again.
type ReinstateParams struct {
	// Start also starts the guest.
	Start bool `json:"start"`
}

// StartParams run the VM at the new side.
type StartParams struct {
	Sequence   switchback.Sequence `json:"sequence"`
	Definition string              `json:"definition"` // the old side's, inactive
	Networks   map[string]string   `json:"networks,omitempty"`
	Autostart  bool                `json:"autostart"`
}

// StartResult says when the guest was let run.
type StartResult struct {
	RunningAt time.Time `json:"running_at"`
	// Socket serves the view; the disks are its exports.
	Socket string `json:"socket"`
}

// CheckParams say how the VM is checked.
type CheckParams struct {
	// Settle is how long it must stay running.
	Settle time.Duration `json:"settle"`
	// AgentTimeout is how long to wait for the guest agent; 0 = do not ask.
	AgentTimeout time.Duration `json:"agent_timeout"`
}

// CheckResult is what was found.
type CheckResult struct {
	Running bool `json:"running"`
	// GuestAgent is "answered", "silent" or "not asked".
	GuestAgent string `json:"guest_agent"`
}

// FoldResult answers ActionFold.
type FoldResult struct {
	Bytes int64 `json:"bytes"`
}

// CollapseResult answers ActionCollapse.
type CollapseResult struct {
	CopiedBytes int64 `json:"copied_bytes"`
	Live        bool  `json:"live"`
}

// SettleResult answers ActionSettle.
type SettleResult struct {
	Disks []switchback.Disk `json:"disks"`
	// AbandonedBytes is the extent of what points after the chosen one had changed.
	AbandonedBytes int64 `json:"abandoned_bytes"`
}

// RetireParams say what becomes of the old side.
type RetireParams struct {
	// Undefine removes the domain; its disks stay as seed.
	Undefine bool `json:"undefine"`
}

// RetireResult lists what is kept.
type RetireResult struct {
	Seeds []switchback.Disk `json:"seeds"`
}

// ReleaseParams end the protection at an agent.
type ReleaseParams struct {
	// RemoveData deletes the replica or the seed disks here; never the disks
	// of a VM that is defined here.
	RemoveData bool `json:"remove_data"`
}

// ReleaseResult says what was removed and what is left.
type ReleaseResult struct {
	Removed []string `json:"removed,omitempty"`
	Left    []string `json:"left,omitempty"`
}

// VerifyResult answers ActionVerifyReplica.
type VerifyResult struct {
	Bytes  int64    `json:"bytes"`
	Damage []string `json:"damage,omitempty"`
}

// SetPolicyParams change the policy.
type SetPolicyParams struct {
	Policy switchback.Policy `json:"policy"`
	Paused bool              `json:"paused"`
}

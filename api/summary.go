package api

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/export"
	"github.com/switchback-dr/switchback/journal"
)

// Summary is the result of an operation's record: what it measured and what it
// left. An operation that consists of several (failback) has several parts.
type Summary struct {
	Copy   *Copy        `json:"copy,omitempty"`
	Switch *Switched    `json:"switch,omitempty"`
	Commit *Committed   `json:"commit,omitempty"`
	Drill  *DrillReport `json:"drill,omitempty"`
	// Drills are those of several VMs.
	Drills []DrillReport `json:"drills,omitempty"`
	Change *Changed      `json:"change,omitempty"`
	// Proof is of a switch, Check of verify and repair, Export of export.
	Proof *switchback.Proof      `json:"proof,omitempty"`
	Check *agentapi.ReplicaCheck `json:"check,omitempty"`
	// Mend is what a repair has put right in older points, and what not.
	Mend   *journal.MendResult `json:"mend,omitempty"`
	Export *export.Result      `json:"export,omitempty"`
	// Removed and Left are of unprotect.
	Removed []string `json:"removed,omitempty"`
	Left    []string `json:"left,omitempty"`
}

// Copy is how the first point of a direction, or a point taken by hand, was made.
type Copy struct {
	// Mode is "seed", "incremental" or "resync"; Reason says why.
	Mode   string           `json:"mode"`
	Reason string           `json:"reason,omitempty"`
	Point  switchback.Point `json:"point"`
	// BytesSent left the source; BytesChanged differed from what the target held.
	BytesSent    int64         `json:"bytes_sent"`
	BytesChanged int64         `json:"bytes_changed"`
	Took         time.Duration `json:"took"`
	// Frozen is how long the guest's file systems were held for it.
	Frozen time.Duration `json:"frozen,omitempty"`
}

// Switched is what a failover or failback measured.
type Switched struct {
	From switchback.SiteID `json:"from"`
	To   switchback.SiteID `json:"to"`
	// Outage is from the guest seen off to the guest let run.
	Outage    time.Duration `json:"outage"`
	OffAt     time.Time     `json:"off_at"`
	RunningAt time.Time     `json:"running_at"`
	// Point is the state the guest runs from; Last the newest that existed.
	Point switchback.Point `json:"point"`
	Last  switchback.Point `json:"last"`
	// GuestAgent is "answered", "silent" or "not asked".
	GuestAgent string `json:"guest_agent"`
	// Checks of the guest, by the policy.
	Checks []switchback.CheckResult `json:"checks,omitempty"`
	// Of the point after the shutdown.
	BytesSent    int64 `json:"bytes_sent"`
	BytesChanged int64 `json:"bytes_changed"`
}

// Changed is what a change of the point did.
type Changed struct {
	From switchback.Point `json:"from"`
	To   switchback.Point `json:"to"`
	// Snapshot is what the VM goes on with; SetAside what it had written before.
	Snapshot string `json:"snapshot,omitempty"`
	SetAside string `json:"set_aside,omitempty"`
	// Outage is from the guest seen off to the guest let run.
	Outage     time.Duration `json:"outage"`
	GuestAgent string        `json:"guest_agent"`
}

// Committed is what a commit did.
type Committed struct {
	FoldedBytes int64 `json:"folded_bytes"`
	CopiedBytes int64 `json:"copied_bytes"`
	// Live: the guest ran meanwhile.
	Live bool `json:"live"`
	// KeptPoints is how many points were kept, at the price of KeptBytes.
	KeptPoints int   `json:"kept_points,omitempty"`
	KeptBytes  int64 `json:"kept_bytes,omitempty"`
	// Snapshots were made self-contained and occupy SnapshotBytes now.
	Snapshots     []string `json:"snapshots,omitempty"`
	SnapshotBytes int64    `json:"snapshot_bytes,omitempty"`
	// Seeds are disks kept at the old side for the next reprotect.
	Seeds []switchback.Disk `json:"seeds,omitempty"`
}

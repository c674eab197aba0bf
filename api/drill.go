package api

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// DrillRequest is what is asked of a test failover, as part of OperationRequest.
type DrillRequest struct {
	// Networks maps networks of the VM to isolated ones at the target; Network
	// is for all others. With neither, and none in the policy, NoNetwork must be set.
	Networks map[string]string `json:"networks,omitempty"`
	Network  string            `json:"network,omitempty"`
	// NoNetwork leaves the copy's interfaces out.
	NoNetwork bool `json:"no_network,omitempty"`
	// Checks replace those of the policy; nil = the policy's.
	Checks []switchback.GuestCheck `json:"checks,omitempty"`
	// Keep is how long the copy runs on after its checks; 0 = not at all.
	Keep     time.Duration `json:"keep,omitempty"`
	KeepMACs bool          `json:"keep_macs,omitempty"`
}

// DrillReport is what a drill has shown. Times that are zero were not reached.
type DrillReport struct {
	Drill switchback.OperationID `json:"drill"`
	VM    string                 `json:"vm"`
	Site  switchback.SiteID      `json:"site"`
	Point switchback.Point       `json:"point"`
	// Cause is "asked", "schedule" or "tag".
	Cause string `json:"cause"`
	// Group is the operation that began it together with drills of other VMs,
	// which are Together; "" = none.
	Group    switchback.OperationID `json:"group,omitempty"`
	Together []string               `json:"together,omitempty"`
	// Domain is the copy's name; Networks those it was connected to; Notes how
	// it differed from the VM.
	Domain   string   `json:"domain,omitempty"`
	Networks []string `json:"networks,omitempty"`
	Notes    []string `json:"notes,omitempty"`

	RequestedAt time.Time `json:"requested_at"`
	ViewAt      time.Time `json:"view_at,omitzero"`
	GuestUpAt   time.Time `json:"guest_up_at,omitzero"`
	CheckedAt   time.Time `json:"checked_at,omitzero"`
	CleanedAt   time.Time `json:"cleaned_at,omitzero"`

	Checks []switchback.CheckResult `json:"checks,omitempty"`
	// Judged: all checks have ended. Passed: every required one passed.
	Judged bool   `json:"judged"`
	Passed bool   `json:"passed"`
	Error  string `json:"error,omitempty"`
	// Screen describes the picture; NoScreen says why there is none.
	Screen   *DrillScreen `json:"screen,omitempty"`
	NoScreen string       `json:"no_screen,omitempty"`
	// BytesWritten is what the copy's disks occupied beside the point.
	BytesWritten int64 `json:"bytes_written"`
	// Replication is what the VM's own replication did meanwhile.
	Replication *DrillReplication `json:"replication,omitempty"`
	// Removed was cleared, Left was not (yet).
	Removed []string `json:"removed,omitempty"`
	Left    []string `json:"left,omitempty"`
}

// DrillScreen is a stored picture of the copy's screen.
type DrillScreen struct {
	Width  int `json:"width"`
	Height int `json:"height"`
	Bytes  int `json:"bytes"`
}

// DrillReplication shows that a drill did not hold up the VM's replication.
type DrillReplication struct {
	// Points that were taken during the drill, and the longest time from one to
	// the next; and that time over as many points before.
	Points           int           `json:"points"`
	LongestGap       time.Duration `json:"longest_gap"`
	LongestGapBefore time.Duration `json:"longest_gap_before"`
}

// DrillPicture is a PNG.
type DrillPicture struct {
	PNG []byte `json:"png"`
}

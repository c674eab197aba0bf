package agentapi

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// ChangePointParams move an uncommitted VM to another state.
type ChangePointParams struct {
	// Sequence is the point to run from, unless Snapshot names the kept writes
	// to go on with; then their parent point counts.
	Sequence switchback.Sequence `json:"sequence"`
	Snapshot string              `json:"snapshot,omitempty"`
	// ShutdownDeadline is how long the guest may take to power off before the
	// plug is pulled; 0 pulls it at once.
	ShutdownDeadline time.Duration `json:"shutdown_deadline"`
	// DryRun only checks that it could be done.
	DryRun bool `json:"dry_run,omitempty"`
}

// ChangePointResult says what runs now and what was kept.
type ChangePointResult struct {
	OffAt     time.Time           `json:"off_at"`
	RunningAt time.Time           `json:"running_at"`
	Sequence  switchback.Sequence `json:"sequence"`
	// SetAside names the snapshot of what the guest had written; empty if it never ran.
	SetAside string `json:"set_aside,omitempty"`
}

// DropSnapshotParams name a snapshot.
type DropSnapshotParams struct {
	Name string `json:"name"`
}

// DropSnapshotResult answers ActionDropSnapshot.
type DropSnapshotResult struct{}

// SettleSnapshotsParams say what becomes of snapshots whose points go.
type SettleSnapshotsParams struct {
	// Keep makes each self-contained; otherwise all are dropped.
	Keep bool `json:"keep"`
}

// SettleSnapshotsResult says what became of them.
type SettleSnapshotsResult struct {
	Kept    []string `json:"kept,omitempty"`
	Dropped []string `json:"dropped,omitempty"`
	// Bytes is what those that were made self-contained occupy now.
	Bytes int64 `json:"bytes"`
}

// KeepPointsParams keep points at a commit.
type KeepPointsParams struct {
	// DryRun only says what it would take; CodeNoSpace where there is no room.
	DryRun bool `json:"dry_run"`
}

// KeepPointsResult says what it took; of a dry run, what it would at most.
type KeepPointsResult struct {
	Bytes  int64 `json:"bytes"`
	Points int   `json:"points"`
}

package hypervisor

import (
	"context"

	switchback "github.com/switchback-dr/switchback"
)

// FineUnit is the unit in bytes of a FineTracker's records.
const FineUnit = 4 << 10

// FineContext is the meta context under which a FineTracker's export marks
// what was written.
const FineContext = "qemu:dirty-bitmap:switchback-changes"

// FineExport is the name under which the changes of a disk are exported on the
// socket of an open backup job, beside the disk itself.
func FineExport(disk string) string { return "switchback-" + disk }

// FineTracker is implemented by a Hypervisor that can record writes in units of
// FineUnit beside its checkpoints, whose bitmaps are coarser: who reads by such
// a record leaves out what was not written. A record is a help and never needed.
// It lives in the memory of the domain's process and is gone with it; where
// there is none the checkpoint's bitmap says what to read.
type FineTracker interface {
	// TrackWrites begins a record of writes on the disks. Called before a
	// checkpoint is made it knows all that the checkpoint's bitmap knows, and
	// little more. Every other record of ours is dropped, but for the one
	// called keep ("" = none). kept tells for which disks that one has been
	// recording all the time, and what ExportWrites needs to find it. A disk
	// that cannot have a record has none.
	TrackWrites(ctx context.Context, uuid switchback.VMUUID, record, keep string, disks []string) (kept map[string]string, err error)
	// ExportWrites offers on the socket of the open backup job, as FineExport
	// under FineContext, what a record holds up to now. kept is from
	// TrackWrites, all or some of it. The export ends with the job.
	ExportWrites(ctx context.Context, uuid switchback.VMUUID, record string, kept map[string]string) error
	// ForgetWrites drops every record of ours. A domain that is off has none.
	ForgetWrites(ctx context.Context, uuid switchback.VMUUID) error
}

package replicator

import (
	"fmt"
	"strings"

	switchback "github.com/switchback-dr/switchback"
)

// Mode is how a cycle gets the content of the next point.
type Mode string

const (
	// ModeSeed: the first full copy into an empty base, resumable.
	ModeSeed Mode = "seed"
	// ModeIncremental: what the bitmaps say changed since the target's last point.
	ModeIncremental Mode = "incremental"
	// ModeResync: whole disks are read; blocks the index proves equal are not sent.
	ModeResync Mode = "resync"
)

// Facts are what a cycle knows before it acts.
type Facts struct {
	Target TargetState
	// Checkpoints are the domain's, oldest first.
	Checkpoints []string
	// BitmapLost is set when the platform refused the matching checkpoint.
	BitmapLost bool
	// Epoch is the epoch this source holds.
	Epoch switchback.Epoch
}

// Decision is what the next cycle does.
type Decision struct {
	Mode Mode
	// From is the checkpoint that an incremental cycle continues from.
	From string
	// Reason says why, for the log and the point: always set for a resync.
	Reason string
	// Drop lists our checkpoints that are in the way, newest first: left by
	// failed cycles or by another epoch. They go before the cycle begins.
	Drop []string
	// Sequence is the next point's.
	Sequence switchback.Sequence
}

// CheckpointPrefix begins the name of each checkpoint that Switchback makes.
const CheckpointPrefix = "sb-"

// CheckpointName names the checkpoint taken with a point.
func CheckpointName(e switchback.Epoch, s switchback.Sequence) string {
	return fmt.Sprintf("%s%d-%d", CheckpointPrefix, e, s)
}

// Decide chooses the mode from facts alone.
func Decide(f Facts) Decision {
	if !f.Target.Seeded {
		return Decision{Mode: ModeSeed, Reason: "the target has no complete copy yet", Drop: ours(f.Checkpoints, ""), Sequence: 1}
	}
	next := f.Target.Head.Sequence + 1
	match := f.Target.Head.Checkpoint
	switch {
	case f.BitmapLost:
		return Decision{Mode: ModeResync, Sequence: next, Drop: ours(f.Checkpoints, ""),
			Reason: fmt.Sprintf("the bitmap of checkpoint %s is lost (QEMU was killed, or its host crashed)", match)}
	case match == "":
		return Decision{Mode: ModeResync, Sequence: next, Drop: ours(f.Checkpoints, ""),
			Reason: fmt.Sprintf("point %d at the target names no checkpoint", f.Target.Head.Sequence)}
	case !contains(f.Checkpoints, match):
		return Decision{Mode: ModeResync, Sequence: next, Drop: ours(f.Checkpoints, ""),
			Reason: fmt.Sprintf("checkpoint %s of the target's last point %d is not in the domain", match, f.Target.Head.Sequence)}
	}
	return Decision{Mode: ModeIncremental, From: match, Drop: ours(f.Checkpoints, match), Sequence: next}
}

func contains(names []string, name string) bool {
	for _, n := range names {
		if n == name {
			return true
		}
	}
	return false
}

// ours lists our checkpoints except keep, newest first.
func ours(names []string, keep string) []string {
	var out []string
	for i := len(names) - 1; i >= 0; i-- {
		if strings.HasPrefix(names[i], CheckpointPrefix) && names[i] != keep {
			out = append(out, names[i])
		}
	}
	return out
}

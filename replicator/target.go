package replicator

import (
	"context"
	"io"

	switchback "github.com/switchback-dr/switchback"
)

// TargetState is what a target says of a replica; the facts a cycle starts from.
type TargetState struct {
	Epoch switchback.Epoch `json:"epoch"`
	// Seeded is false until the base stands for a complete point.
	Seeded bool `json:"seeded"`
	// Session names the replica's base while it is not seeded: a base made anew has a new one.
	Session string `json:"session"`
	// Head is the newest point, or the state the base stands for where there
	// is no point yet (sequence 0: the original disks of a homeward replica).
	Head switchback.Point `json:"head"`
	// FreeBytes is the room left in the target's storage.
	FreeBytes int64 `json:"free_bytes"`
}

// Target receives what a source sends. Every call carries the epoch and is
// refused with CodeStaleEpoch when the target knows a newer one.
type Target interface {
	State(ctx context.Context) (TargetState, error)
	// SendPoint streams one segment and returns the point once it is durable.
	// Sending the point that already is the head again is no error.
	SendPoint(ctx context.Context, epoch switchback.Epoch, body io.Reader) (switchback.Point, error)
	// SendSeed writes one segment's extents to the base; durable after FlushSeed.
	SendSeed(ctx context.Context, epoch switchback.Epoch, session string, body io.Reader) error
	FlushSeed(ctx context.Context, epoch switchback.Epoch, session string) error
	// FinishSeed makes the base stand for the point, durably.
	FinishSeed(ctx context.Context, epoch switchback.Epoch, session string, p switchback.Point) error
}

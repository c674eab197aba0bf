package switchback

import "time"

// PointKind says how consistent a recovery point is.
type PointKind string

const (
	// CrashConsistent: as if the power had failed at that instant.
	CrashConsistent PointKind = "crash-consistent"
	// ApplicationConsistent: file systems were frozen through the guest agent.
	ApplicationConsistent PointKind = "application-consistent"
	// ShutdownConsistent: taken after a clean shutdown of the guest; nothing can follow it.
	ShutdownConsistent PointKind = "shutdown-consistent"
)

// Point describes one recovery point. It is immutable.
type Point struct {
	Protection ProtectionID `json:"protection"`
	Sequence   Sequence     `json:"sequence"`
	Epoch      Epoch        `json:"epoch"`
	Kind       PointKind    `json:"kind"`
	// Time is the instant of the state at the source's clock.
	Time time.Time `json:"time"`
	// Checkpoint is the hypervisor checkpoint whose bitmap records what is
	// written after this point. The point taken after a shutdown carries its
	// predecessor's, whose bitmap is a superset.
	Checkpoint string `json:"checkpoint"`
	// Digest identifies the segment (BLAKE3-256, hexadecimal).
	Digest string `json:"digest"`
	// Parent is the digest of the point before; empty for the first.
	Parent string `json:"parent,omitempty"`
	// Resync is true when the point was made by comparing or copying whole
	// disks because no trusted bitmap existed; ResyncReason says why.
	Resync       bool   `json:"resync,omitempty"`
	ResyncReason string `json:"resync_reason,omitempty"`
	// ChangedBytes is the number of disk bytes the point changes against the
	// one before; StoredBytes is the size of its segment at the target.
	ChangedBytes int64 `json:"changed_bytes"`
	StoredBytes  int64 `json:"stored_bytes"`
}

package agentapi

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/transport"
)

// Actions on recovery points. The comment names who carries it out.
const (
	ActionRotateKey    = "rotate-key"    // keeper of the replica: a new data key for new points
	ActionMarkPoint    = "mark-point"    // keeper of the replica: tag, lock, dismiss a suspicion
	ActionDeletePoint  = "delete-point"  // target: one point
	ActionCheckReplica = "check-replica" // keeper: read everything, or a point, and compare checksums
	ActionExportPoint  = "export-point"  // keeper: copy a point out
	// Any agent that keeps the snapshot which the parameters name.
	ActionExportSnapshot = "export-snapshot"
	ActionCheckSnapshot  = "check-snapshot"
	ActionFindDamage     = "find-damage" // target: what the source should send again
	ActionResend         = "resend"      // source: ranges that the next point carries in any case
	ActionHashRest       = "hash-rest"   // old side of a switch: hash tree of the disks at rest
	ActionHashPoint      = "hash-point"  // new side: hash tree of a point
)

// MarkParams change the mark of a point; nil leaves a part as it is.
type MarkParams struct {
	Sequence switchback.Sequence `json:"sequence"`
	Tag      *string             `json:"tag,omitempty"`
	Locked   *bool               `json:"locked,omitempty"`
	// Dismiss says that the point is not suspicious.
	Dismiss bool `json:"dismiss,omitempty"`
}

// RotateKeyResult says how many data keys there are; the newest encrypts new points.
type RotateKeyResult struct {
	Keys int `json:"keys"`
}

// DeletePointParams name a point.
type DeletePointParams struct {
	Sequence switchback.Sequence `json:"sequence"`
}

// CheckReplicaParams say what is read.
type CheckReplicaParams struct {
	// Sequence is one point; 0 means everything.
	Sequence switchback.Sequence `json:"sequence,omitempty"`
	// Snapshot is checked instead, by ActionCheckSnapshot.
	Snapshot string `json:"snapshot,omitempty"`
	// BytesPerSecond bounds the reading; 0 means not.
	BytesPerSecond int64 `json:"bytes_per_second,omitempty"`
}

// ReplicaCheck is what reading a replica and comparing it with its checksums has found.
type ReplicaCheck struct {
	At   time.Time     `json:"at"` // its end
	Took time.Duration `json:"took"`
	// Sequence is the point that was checked; 0 means everything.
	Sequence switchback.Sequence `json:"sequence,omitempty"`
	Points   int                 `json:"points"`
	Bytes    int64               `json:"bytes"`
	// UnprovenBytes of the bases could be read, but there was nothing to compare
	// them with. What they hold is recorded: the next check proves it unchanged.
	UnprovenBytes int64            `json:"unproven_bytes"`
	Damage        []journal.Damage `json:"damage,omitempty"`
}

// CheckStatus is how the checks of a replica stand.
type CheckStatus struct {
	Last *ReplicaCheck `json:"last,omitempty"`
	// Percent of the one under way in the background; nil when none is.
	Percent *float64 `json:"percent,omitempty"`
	// Next is when the next one begins by itself; zero = never.
	Next time.Time `json:"next,omitzero"`
}

// ExportParams copy a point out, to a path on the agent's host; or Snapshot, by
// ActionExportSnapshot.
type ExportParams struct {
	Sequence   switchback.Sequence `json:"sequence"`
	Snapshot   string              `json:"snapshot,omitempty"`
	Format     string              `json:"format"` // raw, qcow2 or dir
	To         string              `json:"to"`
	Definition string              `json:"definition,omitempty"`
}

// FindDamageParams say what may be given up to mend a replica.
type FindDamageParams struct {
	// DropUnreadable deletes points that cannot be opened any more.
	DropUnreadable bool `json:"drop_unreadable,omitempty"`
}

// FindDamageResult is what the newest point cannot read, and was done at once.
type FindDamageResult struct {
	// Ranges, by disk, have to be sent again.
	Ranges map[string]extent.Set `json:"ranges,omitempty"`
	// Damage is all that was found in segments and bases.
	Damage []journal.Damage `json:"damage,omitempty"`
	// Restored and Dropped say what was mended here.
	Restored []string `json:"restored,omitempty"`
	Dropped  []string `json:"dropped,omitempty"`
	// Hopeless is what cannot be mended this way.
	Hopeless []string `json:"hopeless,omitempty"`
}

// ActionMend is carried out by the target: what is damaged is put back from the
// newest point, where that has the very content. It answers with a
// journal.MendResult.
const ActionMend = "mend"

// MendParams name the damage.
type MendParams struct {
	Damage []journal.Damage `json:"damage"`
}

// ResendParams are ranges, by disk.
type ResendParams struct {
	Ranges map[string]extent.Set `json:"ranges"`
}

// HashParams name what is hashed.
type HashParams struct {
	// Sequence of the point (ActionHashPoint).
	Sequence switchback.Sequence `json:"sequence,omitempty"`
	// Leaves asks for the leaves, too.
	Leaves bool `json:"leaves,omitempty"`
}

// DiskHash is the hash tree of a disk: SHA-256 leaves of LeafBytes each, that of
// zeros being all zero, and a root: SHA-256 of the size (8 bytes, little-endian)
// and the leaves.
type DiskHash struct {
	Name      string `json:"name"`
	SizeBytes int64  `json:"size_bytes"`
	Root      string `json:"root"`
	// Leaves, hexadecimal; "" stands for zeros. Only where asked for.
	Leaves []string `json:"leaves,omitempty"`
}

// LeafBytes is what one leaf of a hash tree covers.
const LeafBytes = 4 << 20

// HashResult answers the hashing actions.
type HashResult struct {
	Disks     []DiskHash    `json:"disks"`
	ReadBytes int64         `json:"read_bytes"`
	Took      time.Duration `json:"took"`
}

// Point returns everything of one point of the replica that the agent keeps.
func (c *Client) Point(ctx context.Context, id switchback.ProtectionID, seq switchback.Sequence) (journal.PointDetail, error) {
	return transport.Call[journal.PointDetail](ctx, c.HTTP, http.MethodGet,
		c.url("/v1/points/"+url.PathEscape(string(id))+"/"+strconv.FormatUint(uint64(seq), 10)), nil)
}

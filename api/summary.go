package api

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Summary is what an operation's record keeps of what it measured: the result of
// its record. Fields that the kind does not have are zero.
type Summary struct {
	// Outage is from the guest seen off to the guest let run again.
	Outage       time.Duration     `json:"outage,omitempty"`
	Point        *switchback.Point `json:"point,omitempty"`
	BytesSent    int64             `json:"bytes_sent,omitempty"`
	BytesChanged int64             `json:"bytes_changed,omitempty"`
	CopiedBytes  int64             `json:"copied_bytes,omitempty"`
	FoldedBytes  int64             `json:"folded_bytes,omitempty"`
	// Mode and Reason say how the copy was made, as in a cycle's report.
	Mode       string            `json:"mode,omitempty"`
	Reason     string            `json:"reason,omitempty"`
	GuestAgent string            `json:"guest_agent,omitempty"`
	Removed    []string          `json:"removed,omitempty"`
	Left       []string          `json:"left,omitempty"`
	Seeds      []switchback.Disk `json:"seeds,omitempty"`
}

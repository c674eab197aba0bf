package switchback

import (
	"time"

	"github.com/switchback-dr/switchback/extent"
)

// Proof is what hashing both sides of a cut-over has shown: the disks that the
// old side left, and the last point as a VM at the new side reads it.
type Proof struct {
	At time.Time `json:"at"`
	// Point is the last one: what the old side's disks must be.
	Point Sequence `json:"point"`
	Equal bool     `json:"equal"`
	// Missing says why no proof could be made; Equal then says nothing.
	Missing string      `json:"missing,omitempty"`
	Disks   []ProofDisk `json:"disks,omitempty"`
	// ReadBytes is what both sides read.
	ReadBytes int64         `json:"read_bytes,omitempty"`
	Took      time.Duration `json:"took,omitempty"`
}

// ProofDisk has the roots of the hash trees of one disk at both sides; see
// agentapi.DiskHash for how they are made.
type ProofDisk struct {
	Name      string `json:"name"`
	SizeBytes int64  `json:"size_bytes"`
	Old       string `json:"old"`
	New       string `json:"new"`
	// Differs are the ranges that are not the same.
	Differs extent.Set `json:"differs,omitzero"`
}

// Mismatch says which disks and ranges differ; "" = none do.
func (p *Proof) Mismatch() string {
	if p == nil || p.Equal || p.Missing != "" {
		return ""
	}
	text := ""
	for _, d := range p.Disks {
		if d.Old == d.New {
			continue
		}
		if text != "" {
			text += "; "
		}
		text += "disk " + d.Name
		for i, r := range d.Differs.Ranges() {
			if i == 4 {
				text += " and more"
				break
			}
			text += " " + r.String()
		}
	}
	return text
}

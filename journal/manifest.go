package journal

import (
	"path/filepath"
	"slices"

	"github.com/switchback-dr/switchback"
)

// ReplicaDisk is one disk of a replica and the file that is its base.
type ReplicaDisk struct {
	Name string `json:"name"`
	// SizeBytes is the disk's size at the base point. The file may be larger
	// or, until a fold, smaller.
	SizeBytes int64 `json:"size_bytes"`
	// BasePath is the base image, absolute.
	BasePath string `json:"base_path"`
	// BaseFormat is "qcow2" (also when empty) or "raw". It is never guessed.
	BaseFormat string `json:"base_format,omitempty"`
	// Absent: the VM has no such disk at the base point; what the file holds
	// means nothing until a fold has filled it.
	Absent bool `json:"absent,omitempty"`
}

// Spec is what a replica is created from.
type Spec struct {
	Protection switchback.ProtectionID `json:"protection"`
	VM         switchback.VMUUID       `json:"vm_uuid"`
	Name       string                  `json:"name"`
	Epoch      switchback.Epoch        `json:"epoch"`
	Disks      []ReplicaDisk           `json:"disks"`
	// BaseIsOriginal: the bases are the VM's own disks at their original paths
	// (a homeward replica). They are complete, need no seeding, stand for
	// sequence 0, and nothing writes to them before the first fold.
	BaseIsOriginal bool `json:"base_is_original,omitempty"`
}

// Manifest is the durable state of a replica besides its segments and pins.
type Manifest struct {
	Spec
	// Base is the point that the bases stand for. Its Sequence is 0 for
	// original disks and while seeding.
	Base switchback.Point `json:"base"`
	// Seeding: the bases are being filled and no point exists yet.
	Seeding bool `json:"seeding,omitempty"`
	// Folding is not 0 from before the first write of a fold up to that
	// sequence until the bases stand for it: older points are gone.
	Folding switchback.Sequence `json:"folding,omitempty"`
	// FoldedBranch names the branch whose content the bases have taken in, from
	// before the first write: only that branch can be read, and no point.
	FoldedBranch string `json:"folded_branch,omitempty"`
	// Detached: there are no bases and no points, only branches that are whole.
	Detached bool `json:"detached,omitempty"`
	// Dropping is set while segments after that sequence are being deleted.
	Dropping *switchback.Sequence `json:"dropping,omitempty"`
	// RetentionFrozen: PlanRetention folds nothing. Set while a failover is uncommitted.
	RetentionFrozen bool `json:"retention_frozen,omitempty"`
}

// noPoints says why the replica has no point any more; nil if it may have some.
func (m *Manifest) noPoints() error {
	switch {
	case m.Detached:
		return switchback.Errorf(switchback.CodeNotFound, "there is no replica of %s here, only what a run wrote", m.Protection).WithHint("name the snapshot: --snapshot")
	case m.FoldedBranch != "":
		return switchback.Errorf(switchback.CodeNotFound, "replica %s has no points any more: its bases have taken in snapshot %s", m.Protection, m.FoldedBranch)
	}
	return nil
}

func (m Manifest) clone() Manifest {
	m.Disks = slices.Clone(m.Disks)
	return m
}

// disk returns the disk called name, or nil.
func (m *Manifest) disk(name string) *ReplicaDisk {
	for i := range m.Disks {
		if m.Disks[i].Name == name {
			return &m.Disks[i]
		}
	}
	return nil
}

// geometry returns the VM's disks at the base point.
func (m *Manifest) geometry() []DiskGeometry {
	var out []DiskGeometry
	for _, d := range m.Disks {
		if !d.Absent {
			out = append(out, DiskGeometry{d.Name, d.SizeBytes})
		}
	}
	return out
}

// oldest returns the sequence of the oldest state that can be read.
func (m *Manifest) oldest() switchback.Sequence { return max(m.Base.Sequence, m.Folding) }

func (d ReplicaDisk) validate() error {
	if err := (Header{Seed: true, Disks: []DiskGeometry{{d.Name, d.SizeBytes}}}).Validate(); err != nil {
		return err
	}
	if !filepath.IsAbs(d.BasePath) {
		return switchback.Errorf(switchback.CodeInvalid, "base of disk %s: path %q is not absolute", d.Name, d.BasePath)
	}
	switch d.BaseFormat {
	case "", "qcow2", "raw":
		return nil
	}
	return switchback.Errorf(switchback.CodeInvalid, "base of disk %s: unknown format %q", d.Name, d.BaseFormat)
}

func (s Spec) validate() error {
	if s.Protection == "" || s.Epoch == 0 || len(s.Disks) == 0 || len(s.Disks) > maxDisks {
		return switchback.Errorf(switchback.CodeInvalid, "a replica needs a protection, an epoch and disks")
	}
	names, paths := map[string]bool{}, map[string]bool{}
	for _, d := range s.Disks {
		if err := d.validate(); err != nil {
			return err
		}
		if names[d.Name] || paths[filepath.Clean(d.BasePath)] {
			return switchback.Errorf(switchback.CodeInvalid, "disk %s: name or base path is used twice", d.Name)
		}
		names[d.Name], paths[filepath.Clean(d.BasePath)] = true, true
	}
	return nil
}

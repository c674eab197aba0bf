package journal

import (
	"context"
	"slices"

	"github.com/switchback-dr/switchback"
)

// mayFoldBranch refuses what would take the parent of a branch away from
// somebody else. The caller holds r.mu.
func (r *Replica) mayFoldBranch(name string, holders []string) (BranchInfo, error) {
	b, ok := r.branches[name]
	switch {
	case !ok:
		return b, branchMissing(r.dir, name)
	case b.Damaged:
		return b, Damage{Branch: name, File: b.File, Reason: "it cannot be opened"}.corrupt()
	case r.manifest.FoldedBranch != "" && r.manifest.FoldedBranch != name:
		return b, r.manifest.noPoints()
	}
	for _, p := range r.sortedPins() {
		if p.Name != b.Pin && !slices.Contains(holders, p.Name) {
			return b, pinned(p, "folding snapshot %s", name)
		}
	}
	for _, other := range r.branches {
		if other.Name != name {
			return b, switchback.Errorf(switchback.CodeRefused, "folding snapshot %s: snapshot %s needs its points", name, other.Name).WithHint("drop it, or make it self-contained")
		}
	}
	return b, nil
}

// CheckFoldBranch reports what would refuse FoldBranch: pins other than the
// branch's and those named by holders, and other branches.
func (r *Replica) CheckFoldBranch(name string, holders ...string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err := r.mayFoldBranch(name, holders)
	return err
}

// FoldBranch writes the content of a branch to the bases, which must stand for
// its parent point. From the first write on only that branch can be read, and
// that it can, from what it was, and not changed by a crash: FoldBranch is
// repeated until it succeeds. There is no way back.
func (r *Replica) FoldBranch(ctx context.Context, name string, open OpenBaseFunc, holders ...string) error {
	r.maintenance.Lock()
	defer r.maintenance.Unlock()
	r.mu.Lock()
	b, err := r.mayFoldBranch(name, holders)
	m := r.manifest.clone()
	r.mu.Unlock()
	if err != nil {
		return err
	}
	if b.Whole || m.Folding != 0 || m.Base.Sequence != b.Point {
		return switchback.Errorf(switchback.CodeRefused, "the bases do not stand for point %d, which snapshot %s follows", b.Point, name).WithHint("fold up to that point first")
	}
	_, segments, err := openBranchChain(r.dir, name)
	if err != nil {
		return fault(err, "fold snapshot %s", name)
	}
	defer func() {
		for _, s := range segments {
			s.close()
		}
	}()
	cache := newFrameCache(foldCache)
	var disks []*overlay
	for _, g := range b.Disks {
		if m.disk(g.Name) == nil {
			return switchback.Errorf(switchback.CodeRefused, "disk %s has no base image", g.Name).WithHint("create one and name it with SetDisk")
		}
		o := newOverlay(g.Name, g.SizeBytes, segments, true)
		if err := o.verify(ctx); err != nil {
			return err
		}
		disks = append(disks, o)
	}
	r.mu.Lock()
	if r.manifest.FoldedBranch == name {
		err = r.settle()
	} else {
		err = r.update(func(m *Manifest) { m.FoldedBranch = name })
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	for i, o := range disks {
		if err := foldDisk(ctx, b.Disks[i], o, cache, r.summedBases(open)); err != nil {
			return err
		}
	}
	return nil
}

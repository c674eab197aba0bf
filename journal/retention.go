package journal

import "github.com/switchback-dr/switchback"

// FoldTarget says up to which sequence to fold so that the newest keep points
// stay, given all points, oldest first. It never passes a pin. ok is false when there is
// nothing to fold.
func FoldTarget(points []switchback.Point, pins []Pin, keep int) (upTo switchback.Sequence, ok bool) {
	keep = max(keep, 1)
	if len(points) <= keep {
		return 0, false
	}
	upTo = points[len(points)-keep].Sequence
	for _, p := range pins {
		if p.Damaged {
			return 0, false
		}
		upTo = min(upTo, p.Sequence)
	}
	return upTo, upTo > points[0].Sequence
}

// PlanRetention is FoldTarget for this replica. While retention is frozen there
// is nothing to fold, except to complete a fold that was interrupted.
func (r *Replica) PlanRetention(keep int) (upTo switchback.Sequence, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.manifest.RetentionFrozen {
		upTo, ok = FoldTarget(r.points(), r.sortedPins(), keep)
	}
	if f := r.manifest.Folding; f > 0 && (!ok || upTo < f) {
		return f, true
	}
	return upTo, ok
}

package journal

import (
	"time"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/retention"
)

// PlanRetention plans by policy what is to be folded and merged now. A fold that
// was interrupted comes first, and is all while retention is frozen. While a pin
// or the marks cannot be read nothing is dropped.
func (r *Replica) PlanRetention(policy switchback.Retention, now time.Time) retention.Plan {
	r.mu.Lock()
	defer r.mu.Unlock()
	var plan retention.Plan
	readable := r.marksDamage == nil
	pinned := map[switchback.Sequence]bool{}
	for _, p := range r.pins {
		readable = readable && !p.Damaged
		pinned[p.Sequence] = true
	}
	if readable && !r.manifest.Seeding {
		var points []retention.Point
		for _, p := range r.points() {
			x := retention.Point{MarkedPoint: switchback.MarkedPoint{Point: p, Mark: r.marks[p.Sequence]}, Pinned: pinned[p.Sequence]}
			if p.Sequence != r.manifest.Base.Sequence {
				x.Bytes = p.StoredBytes
			}
			points = append(points, x)
		}
		plan = retention.Make(policy, points, now)
	}
	if r.manifest.RetentionFrozen || !readable {
		plan.Steps = nil
	}
	if f := r.manifest.Folding; f > 0 && (len(plan.Steps) == 0 || !plan.Steps[0].Fold() || plan.Steps[0].Into < f) {
		plan.Steps = append([]retention.Step{{Into: f}}, plan.Steps...)
	}
	return plan
}

// JournalBytes is the size of all segments of the points.
func (r *Replica) JournalBytes() (n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.segments {
		n += s.point.StoredBytes
	}
	return n
}

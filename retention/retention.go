// Package retention decides which recovery points of a replica are dropped, and
// how: the oldest by folding them into the base, those in the middle by merging
// them into the next newer one that stays.
//
// # What stays
//
// Always, whatever the policy and the size of the journal:
//
//   - the newest point, and the newest MinPoints;
//   - locked points and points with a pin.
//
// By policy, until the journal is too large:
//
//   - what a tier keeps: of each of its intervals the newest point, until it is
//     older than the tier's age. A tier lets go of whole intervals of the next
//     coarser one at a time, so that their points are merged in one pass; it
//     thus keeps points up to one such interval longer than its age.
//   - the newest Newest points;
//   - tagged points; application-consistent ones (also those after a shutdown)
//     for AppConsistentFor; the newest that a drill has booted, and the newest
//     that is not suspicious.
//
// # What goes first
//
// When the journal is larger than MaxBytes, points that the policy keeps go until
// it is not, in this order, the oldest of each sort first:
//
//  1. points that only a tier or Newest keeps;
//  2. application-consistent points, and the newest booted or unsuspicious one;
//  3. tagged points.
//
// # Time
//
// The order of points is that of their sequences, never of their times, and the
// clocks of two sites take part. A point counts as no younger than one after it, and ages
// are against the time of the newest point or now, whichever is earlier. A clock
// that jumps can thus make points stay longer, but only when both jump is
// anything dropped early; and nothing ages while no points come.
package retention

import (
	"slices"
	"time"

	"github.com/switchback-dr/switchback"
)

// Point is a recovery point as retention looks at it.
type Point struct {
	switchback.MarkedPoint
	// Bytes is the length of its segment; 0 for the point that the base stands for.
	Bytes int64
	// Pinned: something uses it.
	Pinned bool
}

// Step is one thing to do to the journal: a fold, where First is 0, or a merge.
type Step struct {
	// First is the oldest of the points that are merged away.
	First switchback.Sequence
	// Into is the point that takes them in: by a fold it becomes what the base stands for.
	Into switchback.Sequence
}

// Fold reports whether the step folds.
func (s Step) Fold() bool { return s.First == 0 }

// Shortage says that the size of the journal makes the history shorter than the
// policy asks, or soon will.
type Shortage struct {
	// Cut: points that the policy keeps have to go now.
	Cut bool
	// Over: the journal stays larger than MaxBytes, since what is left must not go.
	Over bool
	// Bytes is the size of the journal, MaxBytes its bound.
	Bytes, MaxBytes int64
	// History is how far the points reach back, Wanted how far the tiers do.
	History, Wanted time.Duration
}

// Plan is what is to be done. Sizes after a merge are not known before, so that
// it is made anew after each step.
type Plan struct {
	Steps []Step
	// Shortage is nil while the history is, and by its size will be, as the policy asks.
	Shortage *Shortage
}

const (
	// soon is the part of MaxBytes from which on a history that is still growing is
	// reported, and close that from which on any is. In percent.
	soon  = 80
	close = 95
)

// class is why a point stays, by how late it goes.
type class int

const (
	unwanted class = iota
	tiered
	special
	tagged
	untouchable
)

// Make plans for points, oldest first, all that can be read.
func Make(policy switchback.Retention, points []Point, now time.Time) Plan {
	if len(points) == 0 {
		return Plan{}
	}
	times := effective(points)
	reference := times[len(times)-1]
	if now.Before(reference) {
		reference = now
	}
	classes := classify(policy, points, times, reference)
	p := Plan{}
	size := total(points)
	if limit := policy.MaxBytes; limit > 0 {
		s := &Shortage{Bytes: size, MaxBytes: limit, History: reference.Sub(times[0]), Wanted: policy.History()}
		wanted := remaining(points, classes)
		s.Cut = wanted > limit
		for wanted > limit && giveUp(classes) {
			wanted = remaining(points, classes)
		}
		s.Over = wanted > limit
		growing := policy.Newest > len(points) || s.History < s.Wanted
		if s.Cut || size*100 > limit*close || growing && size*100 > limit*soon {
			p.Shortage = s
		}
	}
	p.Steps = steps(points, classes)
	return p
}

// effective returns the times of the points, none later than that of the next.
func effective(points []Point) []time.Time {
	out := make([]time.Time, len(points))
	for i, p := range slices.Backward(points) {
		out[i] = p.Time
		if i+1 < len(out) && out[i+1].Before(out[i]) {
			out[i] = out[i+1]
		}
	}
	return out
}

func classify(policy switchback.Retention, points []Point, times []time.Time, reference time.Time) []class {
	classes := make([]class, len(points))
	n := len(points)
	booted, clean := false, false
	for i, p := range slices.Backward(points) {
		age := reference.Sub(times[i])
		newer := n - 1 - i // how many points are
		isClean := p.Mark.Suspicious == ""
		isBooted := p.Mark.Boot != nil && p.Mark.Boot.Passed
		switch {
		case newer < max(1, policy.MinPoints), p.Mark.Locked, p.Pinned:
			classes[i] = untouchable
		case p.Mark.Tag != "" && (policy.TaggedFor == 0 || age < policy.TaggedFor):
			classes[i] = tagged
		case isBooted && !booted, isClean && !clean,
			(p.Kind == switchback.ApplicationConsistent || p.Kind == switchback.ShutdownConsistent) && age < policy.AppConsistentFor:
			classes[i] = special
		case newer < policy.Newest, inTiers(policy.Tiers, times, i, reference):
			classes[i] = tiered
		}
		booted, clean = booted || isBooted, clean || isClean
	}
	return classes
}

// inTiers reports whether a tier keeps point i.
func inTiers(tiers []switchback.RetentionTier, times []time.Time, i int, reference time.Time) bool {
	for k, t := range tiers {
		// The interval after whose end the tier counts the point's age.
		whole := t.Every
		if k+1 < len(tiers) {
			whole = tiers[k+1].Every
		}
		if reference.Sub(end(times[i], whole)) >= t.For {
			continue
		}
		if t.Every == 0 || i+1 == len(times) || !times[i].Truncate(t.Every).Equal(times[i+1].Truncate(t.Every)) {
			return true
		}
	}
	return false
}

// end is the end of the interval that t lies in; with no interval it is t.
func end(t time.Time, every time.Duration) time.Time {
	if every == 0 {
		return t
	}
	return t.Truncate(every).Add(every)
}

// giveUp drops the next point that the policy would keep; false if there is none.
func giveUp(classes []class) bool {
	for c := tiered; c < untouchable; c++ {
		if i := slices.Index(classes, c); i >= 0 {
			classes[i] = unwanted
			return true
		}
	}
	return false
}

func total(points []Point) (n int64) {
	for _, p := range points {
		n += p.Bytes
	}
	return n
}

// remaining is the size of the journal once the unwanted points are gone, as far
// as it can be known: segments that are merged may share nothing, but are taken
// for sharing all, since too much must not be dropped.
func remaining(points []Point, classes []class) (n int64) {
	first := slices.IndexFunc(classes, func(c class) bool { return c != unwanted })
	for i, p := range points {
		if classes[i] != unwanted && (i != first || i == 0) {
			n += p.Bytes
		}
	}
	return n
}

func steps(points []Point, classes []class) (out []Step) {
	from := -1 // where the run of unwanted points began
	for i, c := range classes {
		switch {
		case c == unwanted && from < 0:
			from = i
		case c != unwanted && from == 0:
			out = append(out, Step{Into: points[i].Sequence})
			from = -1
		case c != unwanted && from > 0:
			out = append(out, Step{First: points[from].Sequence, Into: points[i].Sequence})
			from = -1
		}
	}
	return out
}

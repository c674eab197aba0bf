package retention

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/switchback-dr/switchback"
)

var noon = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)

// at makes points at these ages before noon, numbered from 1, of 10 bytes each but the first.
func at(ages ...time.Duration) []Point {
	var out []Point
	for i, age := range ages {
		p := Point{Bytes: 10}
		p.Sequence, p.Time, p.Kind = switchback.Sequence(i+1), noon.Add(-age), switchback.CrashConsistent
		out = append(out, p)
	}
	out[0].Bytes = 0
	return out
}

const (
	m = time.Minute
	h = time.Hour
	d = 24 * time.Hour
)

func TestMake(t *testing.T) {
	tiers := func(s string) switchback.Retention {
		list, err := switchback.ParseTiers(s)
		if err != nil {
			t.Fatal(err)
		}
		return switchback.Retention{Tiers: list}
	}
	with := func(p switchback.Retention, change func(*switchback.Retention)) switchback.Retention {
		change(&p)
		return p
	}
	mark := func(points []Point, i int, change func(*Point)) []Point {
		change(&points[i])
		return points
	}
	newest := func(n int) switchback.Retention { return switchback.Retention{Newest: n} }
	for name, c := range map[string]struct {
		policy switchback.Retention
		points []Point
		now    time.Duration // after noon
		want   []Step
	}{
		"none":   {policy: newest(2)},
		"few":    {policy: newest(3), points: at(3*m, 2*m, m)},
		"newest": {policy: newest(2), points: at(5*m, 4*m, 3*m, 2*m, m), want: []Step{{0, 4}}},
		"pinned in the middle": {policy: newest(2), points: mark(at(5*m, 4*m, 3*m, 2*m, m), 1, func(p *Point) { p.Pinned = true }),
			want: []Step{{0, 2}, {3, 4}}},
		"locked oldest": {policy: newest(2), points: mark(at(6*m, 5*m, 4*m, 3*m, 2*m, m), 0, func(p *Point) { p.Mark.Locked = true }),
			want: []Step{{2, 5}}},
		"one interval, nearest the next": {policy: tiers("all:30m,10m:2h"), points: at(59*m, 55*m, 52*m, 49*m, 41*m, 5*m, 1*m),
			want: []Step{{0, 3}, {4, 5}}},
		"an interval is let go as a whole": {policy: tiers("all:30m,10m:2h"), points: at(39*m, 32*m, 31*m, 5*m)},
		"older than all tiers":             {policy: tiers("all:30m,10m:2h"), points: at(5*h, 4*h, 3*h, 20*m, m), want: []Step{{0, 4}}},
		"a minimum":                        {policy: with(tiers("all:30m"), func(p *switchback.Retention) { p.MinPoints = 3 }), points: at(5*h, 4*h, 3*h, m), want: []Step{{0, 2}}},
		"never the newest":                 {policy: tiers("all:30m"), points: at(9 * h)},
		"application-consistent": {policy: with(tiers("all:30m"), func(p *switchback.Retention) { p.AppConsistentFor = 6 * h }),
			points: mark(mark(at(7*h, 5*h, 4*h, m), 1, func(p *Point) { p.Kind = switchback.ApplicationConsistent }), 0, func(p *Point) { p.Kind = switchback.ApplicationConsistent }),
			want:   []Step{{0, 2}, {3, 4}}},
		"tagged until untagged": {policy: tiers("all:30m"), points: mark(at(90*d, 5*h, m), 0, func(p *Point) { p.Mark.Tag = "x" }), want: []Step{{2, 3}}},
		"tagged too long ago": {policy: with(tiers("all:30m"), func(p *switchback.Retention) { p.TaggedFor = 30 * d }),
			points: mark(at(90*d, 5*h, m), 0, func(p *Point) { p.Mark.Tag = "x" }), want: []Step{{0, 3}}},
		"the newest booted": {policy: tiers("all:30m"), want: []Step{{0, 2}, {3, 4}},
			points: mark(mark(at(9*h, 5*h, 4*h, m), 1, func(p *Point) { p.Mark.Boot = &switchback.BootProof{Passed: true} }), 0, func(p *Point) { p.Mark.Boot = &switchback.BootProof{Passed: true} })},
		"the newest clean": {policy: tiers("all:30m"), want: []Step{{0, 2}, {3, 4}},
			points: mark(mark(at(9*h, 5*h, 4*h, m), 2, func(p *Point) { p.Mark.Suspicious = "x" }), 3, func(p *Point) { p.Mark.Suspicious = "x" })},
		"now is years ahead":                      {policy: tiers("all:30m"), points: at(20*m, 10*m, m), now: 99999 * h},
		"now is years behind":                     {policy: tiers("all:30m"), points: at(9*h, 10*m, m), now: -99999 * h},
		"the source's clock jumped back":          {policy: tiers("all:30m"), points: at(-300*h, -299*h, 2*m, m)},
		"the source's clock was ahead for a time": {policy: tiers("all:30m"), points: at(9*m, -299*h, 2*m, m)},
		"too large: the oldest of the tiers": {policy: with(tiers("all:2h"), func(p *switchback.Retention) { p.MaxBytes = 25 }),
			points: at(5*m, 4*m, 3*m, 2*m, m), want: []Step{{0, 3}}},
		"too large: tagged last": {policy: with(tiers("all:2h"), func(p *switchback.Retention) { p.MaxBytes = 25 }),
			points: mark(at(5*m, 4*m, 3*m, 2*m, m), 1, func(p *Point) { p.Mark.Tag = "x" }), want: []Step{{0, 2}, {3, 4}}},
		"too large, but all that is left must stay": {policy: with(tiers("all:2h"), func(p *switchback.Retention) { p.MaxBytes, p.MinPoints = 5, 3 }),
			points: at(5*m, 4*m, 3*m, 2*m, m), want: []Step{{0, 3}}},
	} {
		got := Make(c.policy, c.points, noon.Add(c.now))
		if diff := cmp.Diff(c.want, got.Steps); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestShortage(t *testing.T) {
	list, _ := switchback.ParseTiers("all:1h")
	for name, c := range map[string]struct {
		max                 int64
		history             time.Duration
		shortage, cut, over bool
	}{
		"no bound":                     {max: 0, history: 10 * m},
		"far":                          {max: 1000, history: 10 * m},
		"80 percent, still growing":    {max: 120, history: 10 * m, shortage: true},
		"80 percent, history complete": {max: 120, history: 2 * h},
		"95 percent":                   {max: 103, history: 2 * h, shortage: true},
		"cut":                          {max: 60, history: 10 * m, shortage: true, cut: true},
	} {
		ages := []time.Duration{c.history}
		for i := range 10 {
			ages = append(ages, time.Duration(10-i)*30*time.Second)
		}
		points := at(ages...)
		points[0].Pinned = true
		got := Make(switchback.Retention{Tiers: list, MaxBytes: c.max}, points, noon).Shortage
		if (got != nil) != c.shortage || got != nil && (got.Cut != c.cut || got.Over != c.over) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestProperties: whatever the points and the policy, what must stay does, steps
// are possible one after the other, and a plan that was carried out leaves none.
func TestProperties(t *testing.T) {
	for seed := range uint64(3000) {
		rng := rand.New(rand.NewPCG(seed, 1))
		policy := switchback.Retention{MinPoints: rng.IntN(5), Newest: rng.IntN(8), AppConsistentFor: time.Duration(rng.IntN(48)) * h}
		if rng.IntN(3) > 0 {
			policy.Tiers = switchback.DefaultTiers()[:1+rng.IntN(4)]
		}
		if rng.IntN(2) == 0 {
			policy.MaxBytes = int64(1 + rng.IntN(500))
		}
		var points []Point
		now := noon
		for i := range 1 + rng.IntN(60) {
			p := Point{Bytes: int64(rng.IntN(30)), Pinned: rng.IntN(12) == 0}
			p.Sequence = switchback.Sequence(2*i + 1 + rng.IntN(2))
			now = now.Add(time.Duration(rng.ExpFloat64() * float64(20*m)))
			if rng.IntN(25) == 0 {
				now = now.Add(time.Duration(rng.IntN(200)-100) * h)
			}
			p.Time = now
			p.Mark.Locked = rng.IntN(12) == 0
			if rng.IntN(12) == 0 {
				p.Mark.Tag = fmt.Sprint("t", i)
			}
			points = append(points, p)
		}
		now = now.Add(time.Duration(rng.IntN(100)-50) * h)
		points[0].Bytes = 0
		newest := points[len(points)-1].Sequence
		var must []switchback.Sequence
		for i, p := range points {
			if p.Mark.Locked || p.Pinned || len(points)-i <= policy.MinPoints {
				must = append(must, p.Sequence)
			}
		}
		for range 3 + len(points) { // merges that save little need another round
			plan := Make(policy, points, now)
			if len(plan.Steps) == 0 {
				break
			}
			for _, s := range plan.Steps {
				points = carryOut(t, points, s)
			}
		}
		if plan := Make(policy, points, now); len(plan.Steps) > 0 {
			t.Fatalf("seed %d: no end: %v", seed, plan.Steps)
		}
		if points[len(points)-1].Sequence != newest {
			t.Fatalf("seed %d: the newest point was dropped", seed)
		}
		for _, seq := range must {
			if !slices.ContainsFunc(points, func(p Point) bool { return p.Sequence == seq }) {
				t.Fatalf("seed %d: point %d was dropped", seed, seq)
			}
		}
	}
}

// carryOut does what the journal does; a merge saves nothing here.
func carryOut(t *testing.T, points []Point, s Step) []Point {
	t.Helper()
	find := func(seq switchback.Sequence) int {
		i := slices.IndexFunc(points, func(p Point) bool { return p.Sequence == seq })
		if i < 0 {
			t.Fatalf("step %+v speaks of a point there is not", s)
		}
		return i
	}
	into := find(s.Into)
	if s.Fold() {
		points = slices.Clone(points[into:])
		points[0].Bytes = 0
		return points
	}
	first := find(s.First)
	if first == 0 || first >= into {
		t.Fatalf("step %+v", s)
	}
	for _, p := range points[first:into] {
		points[into].Bytes += p.Bytes
	}
	return slices.Delete(points, first, into)
}

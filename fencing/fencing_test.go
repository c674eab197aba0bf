package fencing

import (
	"flag"
	"fmt"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

var (
	simSeeds   = flag.Int("simulate.seeds", 300, "how many seeds TestSimulation runs")
	simSeed    = flag.Uint64("simulate.seed", 0, "the first seed; 0 = another one each time")
	simStory   = flag.Bool("simulate.story", false, "tell what happened also where nothing was violated")
	simMutants = flag.Int("simulate.mutant-seeds", 1500, "how many seeds TestSimulationFindsBugs has to find each bug")
)

// TestSimulation runs seeds and fails where one violates what the package promises.
func TestSimulation(t *testing.T) {
	first := *simSeed
	if first == 0 {
		first = uint64(time.Now().UnixNano())
	}
	t.Logf("-simulate.seed=%d", first)
	violations, starts, points, moves := 0, 0, 0, 0
	for i := range *simSeeds {
		seed := first + uint64(i)
		bad, w := simulate(seed, product())
		starts, points, moves = starts+w.starts, points+w.points, moves+w.moves
		if *simStory && len(bad) == 0 {
			t.Logf("seed %d:\n%s", seed, w.story())
		}
		if len(bad) > 0 {
			if violations++; violations <= 3 {
				t.Errorf("-simulate.seeds=1 -simulate.seed=%d: %s\n%s", seed, bad[0], w.story())
			}
		}
	}
	t.Logf("%d starts, %d points, %d operations", starts, points, moves)
	fmt.Printf("%d seeds, %d violations\n", *simSeeds, violations)
	if violations > 0 {
		t.Errorf("%d violations", violations)
	}
	if starts <= *simSeeds || points == 0 || moves < *simSeeds/2 {
		t.Error("too little has happened to say anything")
	}
}

// mutants are bugs that TestSimulation must be able to see.
var mutants = []struct {
	name  string
	plant func(*rules)
}{
	{"grants survive a reboot", func(r *rules) { r.keepRun = true }},
	{"the epoch of commands is not compared", func(r *rules) {
		r.admit = func(Standing, switchback.Epoch) error { return nil }
	}},
	{"the epoch of points is not compared", func(r *rules) {
		r.acceptsPoint = func(s Standing, _ switchback.Epoch) error { return s.AcceptsPoint(s.Newest()) }
	}},
	{"a contested source sends points", func(r *rules) {
		r.sendsPoints = func(s Standing) bool { s.Contested = false; return s.SendsPoints() }
	}},
	{"the epoch of a grant is not compared", func(r *rules) {
		r.decide = func(s Standing, m Moment) Decision {
			if m.Grant.Epoch != 0 {
				m.Grant.Epoch = s.Epoch
			}
			return Decide(s, m)
		}
	}},
	{"an old answer confirms", func(r *rules) {
		r.hear = func(s Standing, x Ruling) (Standing, Hearing) {
			if s.Role.Owns() && x.Site == s.Site {
				s.Heard = Ruling{}
				return s, HeardConfirmed
			}
			return s.Hear(x)
		}
	}},
	{"an answer of a newer epoch elsewhere is ignored", func(r *rules) {
		r.hear = func(s Standing, x Ruling) (Standing, Hearing) {
			if s.Role.Owns() && x.Site != s.Site {
				return s, HeardNothing
			}
			return s.Hear(x)
		}
	}},
	{"a superseded VM is not stopped", func(r *rules) {
		r.decide = func(s Standing, m Moment) Decision { s.Heard = Ruling{}; return Decide(s, m) }
	}},
	{"a fenced VM whose stop has failed is left running", func(r *rules) {
		r.decide = func(s Standing, m Moment) Decision {
			d := Decide(s, m)
			if d.State == StateElsewhere {
				d.Act = ActNone
			}
			return d
		}
	}},
	{"an active peer confirms the other side", func(r *rules) {
		r.answer = func(_ Standing, asker switchback.SiteID, e switchback.Epoch) Ruling { return Ruling{e, asker} }
	}},
	{"the server confirms the old side during a switch", func(r *rules) {
		r.rule = func(p switchback.Protection) Ruling { return Ruling{p.Epoch, p.Source} }
	}},
	{"a takeover waits for the lease alone", takeover(func(t Takeover, _ Moment) Takeover {
		t.Wait = t.Wait*Drift/(Drift+2) - StopWithin - time.Second
		return t
	})},
	{"a takeover does not wait", takeover(func(t Takeover, _ Moment) Takeover { t.Wait = 0; return t })},
	{"a takeover takes the clock of the boot before for its own", takeover(func(t Takeover, m Moment) Takeover {
		if t.Boot != m.Boot {
			t.Boot, t.Since = m.Boot, t.Since-Instant(t.Wait)
		}
		return t
	})},
	{"a VM that was shut down to be moved may be started", func(r *rules) {
		r.decide = func(s Standing, m Moment) Decision { s.Leaving = false; return Decide(s, m) }
	}},
	{"a lease runs from the answer", func(r *rules) {
		r.confirm = func(s Standing, boot string, _, now Instant, by string) Grant { return Confirm(s, boot, now, by) }
	}},
	{"a lease has no end", func(r *rules) {
		r.confirm = func(s Standing, boot string, _, now Instant, by string) Grant {
			return Confirm(s, boot, now.Add(time.Hour), by)
		}
	}},
	{"after a reboot nobody is believed", func(r *rules) {
		r.hear = func(s Standing, x Ruling) (Standing, Hearing) {
			next, h := s.Hear(x)
			if h == HeardConfirmed {
				h = HeardNothing
			}
			return next, h
		}
	}},
}

// takeover plants a bug in what a new side waits for.
func takeover(bug func(Takeover, Moment) Takeover) func(*rules) {
	return func(r *rules) {
		r.decide = func(s Standing, m Moment) Decision {
			if s.Takeover != nil {
				t := bug(*s.Takeover, m)
				s.Takeover = &t
			}
			return Decide(s, m)
		}
	}
}

// TestSimulationFindsBugs plants each mutant and fails where no seed shows it.
func TestSimulationFindsBugs(t *testing.T) {
	caught := 0
	for _, m := range mutants {
		t.Run(m.name, func(t *testing.T) {
			r := product()
			m.plant(&r)
			for seed := range uint64(*simMutants) {
				if bad, _ := simulate(seed+1, r); len(bad) > 0 {
					caught++
					t.Logf("seed %d: %s", seed+1, bad[0])
					return
				}
			}
			t.Errorf("not caught in %d seeds", *simMutants)
		})
	}
	t.Logf("%d mutants, %d caught", len(mutants), caught)
}

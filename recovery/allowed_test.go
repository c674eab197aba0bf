package recovery

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
)

var phases = []switchback.Phase{
	switchback.PhaseUnprotected, switchback.PhaseSeeding, switchback.PhaseProtected, switchback.PhaseSwitching,
	switchback.PhaseSwitched, switchback.PhaseUndoing, switchback.PhaseCommitting, switchback.PhaseCommitted, switchback.PhaseReprotecting,
}

// up are facts under which nothing but the phase stands in the way.
func up() Facts { return Facts{SourceUp: true, TargetUp: true, Points: 3, KeptDisks: true} }

// away is a VM that is active away from home, so that its target is home.
func away(phase switchback.Phase) switchback.Protection {
	return switchback.Protection{Phase: phase, Home: "berlin", Source: "riga", Target: "berlin"}
}

func home(phase switchback.Phase) switchback.Protection {
	return switchback.Protection{Phase: phase, Home: "berlin", Source: "berlin", Target: "riga"}
}

// TestPhases: which operations a phase allows when nothing else is in the way.
func TestPhases(t *testing.T) {
	for _, c := range []struct {
		phase      switchback.Phase
		home, away string // in the order of Kinds
	}{
		{switchback.PhaseUnprotected, "unprotect", "unprotect"},
		{switchback.PhaseSeeding, "pause unprotect", "pause unprotect"},
		{switchback.PhaseProtected, "take-point test-failover failover pause edit unprotect", "take-point test-failover failover failback pause edit unprotect"},
		{switchback.PhaseSwitching, "", ""},
		{switchback.PhaseSwitched, "change-point commit cancel", "change-point commit cancel"},
		{switchback.PhaseUndoing, "", ""},
		{switchback.PhaseCommitting, "", ""},
		{switchback.PhaseCommitted, "reprotect unprotect", "failback reprotect unprotect"},
		{switchback.PhaseReprotecting, "unprotect", "unprotect"},
	} {
		for where, p := range map[string]switchback.Protection{c.home: home(c.phase), c.away: away(c.phase)} {
			var got []string
			for _, a := range AllowedOperations(p, up()) {
				if a.Allowed {
					got = append(got, string(a.Kind))
				}
			}
			if d := cmp.Diff(where, strings.Join(got, " ")); d != "" {
				t.Errorf("%s at %s: %s", c.phase, p.Source, d)
			}
		}
	}
}

// TestEveryRefusalHasAReason, and a remedy where there is one; an allowed
// operation has neither.
func TestEveryRefusalHasAReason(t *testing.T) {
	// Where nothing has to be done, or the phase passes by itself.
	noRemedy := func(k Kind, a Allowed) bool {
		return k == Retry || k == Resume || k == Pause
	}
	facts := map[string]func(*Facts){
		"nothing":     func(*Facts) {},
		"source down": func(f *Facts) { f.SourceUp = false },
		"target down": func(f *Facts) { f.TargetUp = false },
		"no point":    func(f *Facts) { f.Points = 0 },
		"no disks":    func(f *Facts) { f.KeptDisks = false },
		"failed":      func(f *Facts) { f.Failed = true },
		"running":     func(f *Facts) { f.Running, f.RunningID, f.Cancellable = "failover", "op-1", true },
		"running for good": func(f *Facts) {
			f.Running, f.RunningID, f.NotCancellable = "commit", "op-1", "it has begun what cannot be undone"
		},
		"all sites down":    func(f *Facts) { f.SourceUp, f.TargetUp = false, false },
		"seeding half way":  func(f *Facts) { f.SeedPercent = 62.4; f.Points = 0 },
		"target and points": func(f *Facts) { f.TargetUp = false; f.Points = 0 },
	}
	refused := 0
	for name, change := range facts {
		for _, phase := range phases {
			for _, paused := range []bool{false, true} {
				for _, p := range []switchback.Protection{home(phase), away(phase)} {
					p.Paused = paused
					f := up()
					change(&f)
					for i, a := range AllowedOperations(p, f) {
						switch {
						case a.Kind != Kinds[i]:
							t.Fatalf("operation %d is %s, want %s", i, a.Kind, Kinds[i])
						case a.Allowed && (a.Reason != "" || a.Remedy != ""):
							t.Errorf("%s, %s: %s is allowed, but: %s (%s)", phase, name, a.Kind, a.Reason, a.Remedy)
						case !a.Allowed && (a.Reason == "" || a.Remedy == "" && !noRemedy(a.Kind, a)):
							t.Errorf("%s, %s: %s is refused with reason %q, remedy %q", phase, name, a.Kind, a.Reason, a.Remedy)
						}
						if !a.Allowed {
							refused++
						}
					}
				}
			}
		}
	}
	if refused < 1000 {
		t.Errorf("only %d refusals were seen", refused)
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name           string
		p              switchback.Protection
		change         func(*Facts)
		kind           Kind
		reason, remedy string // parts; no reason = allowed
	}{
		{"source down", home(switchback.PhaseProtected), func(f *Facts) { f.SourceUp = false }, Failover, "site berlin does not answer", "start the agent"},
		{"target down", home(switchback.PhaseProtected), func(f *Facts) { f.TargetUp = false }, Failover, "site riga does not answer", "start the agent"},
		{"target down and so no points known", home(switchback.PhaseProtected), func(f *Facts) { f.TargetUp, f.Points = false, 0 }, Failover, "site riga does not answer", "start the agent"},
		{"take a point without the target", home(switchback.PhaseProtected), func(f *Facts) { f.TargetUp = false }, TakePoint, "riga", "mend the network"},
		{"no point", home(switchback.PhaseProtected), func(f *Facts) { f.Points = 0 }, Failover, "no recovery point yet", "wait"},
		{"first copy", home(switchback.PhaseSeeding), func(f *Facts) { f.SeedPercent = 62.4 }, Failover, "the VM is seeding", "62 %"},
		{"failback at home", home(switchback.PhaseProtected), nil, Failback, "at its home berlin already", "use failover"},
		{"failback from a committed VM", away(switchback.PhaseCommitted), nil, Failback, "", ""},
		{"failback from a committed VM, home down", away(switchback.PhaseCommitted), func(f *Facts) { f.TargetUp = false }, Failback, "site berlin does not answer", ""},
		{"failback at home and committed there", home(switchback.PhaseCommitted), nil, Failback, "the VM is committed", "reprotect it first"},
		{"commit while the old side is down", away(switchback.PhaseSwitched), func(f *Facts) { f.TargetUp = false }, Commit, "", ""},
		{"commit while the new side is down", away(switchback.PhaseSwitched), func(f *Facts) { f.SourceUp = false }, Commit, "site riga, where the VM runs", "start the agent"},
		{"commit without a switch", home(switchback.PhaseProtected), nil, Commit, "the VM is protected", "fail over first"},
		{"cancel needs both", away(switchback.PhaseSwitched), func(f *Facts) { f.TargetUp = false }, Cancel, "site berlin does not answer", ""},
		{"cancel of nothing", home(switchback.PhaseProtected), nil, Cancel, "the VM is protected", "nothing to cancel"},
		{"reprotect without kept disks", away(switchback.PhaseCommitted), func(f *Facts) { f.KeptDisks = false }, Reprotect, "site berlin keeps no disks", "protect it anew"},
		{"reprotect before commit", away(switchback.PhaseSwitched), nil, Reprotect, "the VM is switched", "commit the switch or cancel it"},
		{"after an operation that failed half way", home(switchback.PhaseSwitching), func(f *Facts) { f.Failed = true }, Failover, "the VM is switching", "retry it"},
		{"retry it", home(switchback.PhaseSwitching), func(f *Facts) { f.Failed = true }, Retry, "", ""},
		{"nothing to retry", home(switchback.PhaseProtected), nil, Retry, "no operation of this VM has failed", ""},
		{"pause", home(switchback.PhaseProtected), nil, Pause, "", ""},
		{"resume what runs", home(switchback.PhaseProtected), nil, Resume, "not paused", ""},
		{"unprotect while switched", away(switchback.PhaseSwitched), nil, Unprotect, "the VM is switched", "commit the switch or cancel it"},
		{"unprotect with both sites down", home(switchback.PhaseProtected), func(f *Facts) { f.SourceUp, f.TargetUp = false, false }, Unprotect, "", ""},
		{"during another", home(switchback.PhaseProtected), func(f *Facts) { f.Running, f.RunningID = "take-point", "op-7" }, Failover, "operation op-7 (take-point) is under way", "operation watch op-7"},
		{"retry during another", home(switchback.PhaseProtected), func(f *Facts) { f.Running, f.RunningID, f.Failed = "commit", "op-7", true }, Retry, "op-7", "operation watch op-7"},
		{"cancel the one under way", home(switchback.PhaseSwitching), func(f *Facts) { f.Running, f.RunningID, f.Cancellable = "failover", "op-7", true }, Cancel, "", ""},
		{"cancel what cannot be", home(switchback.PhaseCommitting), func(f *Facts) { f.Running, f.NotCancellable = "commit", "too late" }, Cancel, "too late", "let it finish"},
		{"an operation there is not", home(switchback.PhaseProtected), nil, "explode", "unknown operation", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := up()
			if c.change != nil {
				c.change(&f)
			}
			got := Check(c.p, f, c.kind)
			if got.Kind != c.kind || got.Allowed != (c.reason == "") {
				t.Fatalf("got %+v", got)
			}
			if !strings.Contains(got.Reason, c.reason) || !strings.Contains(got.Remedy, c.remedy) {
				t.Errorf("got reason %q, remedy %q; want %q, %q", got.Reason, got.Remedy, c.reason, c.remedy)
			}
		})
	}
	paused := home(switchback.PhaseProtected)
	paused.Paused = true
	if a := Check(paused, up(), Pause); a.Allowed || a.Remedy != "resume it" {
		t.Errorf("pausing twice: %+v", a)
	}
	if a := Check(paused, up(), Resume); !a.Allowed {
		t.Errorf("resuming: %+v", a)
	}
}

// TestRetryWhileContested: only what ends the contest goes on.
func TestRetryWhileContested(t *testing.T) {
	for kind, want := range map[Kind]bool{Failover: false, Commit: false, Resolve: true} {
		f := up()
		f.Failed, f.FailedKind, f.Contested = true, string(kind), []switchback.SiteID{"riga"}
		if a := Check(home(switchback.PhaseSwitched), f, Retry); a.Allowed != want {
			t.Errorf("%s: %+v", kind, a)
		}
		if a := Check(home(switchback.PhaseSwitched), f, Resolve); !a.Allowed {
			t.Errorf("%s: %+v", kind, a)
		}
	}
}

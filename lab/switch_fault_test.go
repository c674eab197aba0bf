package lab

import (
	"flag"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"

	switchback "github.com/switchback-dr/switchback"
)

// strike kills a process while a step of an operation runs, and starts it again.
type strike struct {
	step   string
	victim string
	// within of the step's beginning, at random.
	within time.Duration
}

// leg is one operation of the loop with what strikes it.
type leg struct {
	kind    recovery.Kind
	strikes []strike
}

// TestSwitchesUnderKills runs the loop twice while server and agents are killed
// in its steps. Each operation must end by itself; one that was undone must have
// left the guest running at its old side, and is asked for again.
func TestSwitchesUnderKills(t *testing.T) {
	const away, home = Recovery, Primary
	f := addGuest(t, Guest{Name: "sw", Disks: []int64{4 << 30, 4 << 30}})
	f.protect()
	legs := []leg{
		{recovery.Failover, []strike{{"shutdown", home, time.Second}, {"final-point", theServer, 0}, {"start", away, 200 * time.Millisecond}}},
		{recovery.Commit, []strike{{"fold", away, 0}, {"collapse", away, 300 * time.Millisecond}, {"retire", home, 0}}},
		{recovery.Reprotect, []strike{{"replica", home, 0}, {"verify", away, 200 * time.Millisecond}, {"verify", home, 200 * time.Millisecond}}},
		{recovery.Failback, []strike{{"sync", away, 200 * time.Millisecond}, {"fence", away, 0}, {"activate", home, 0}, {"check", theServer, time.Second}}},
		{recovery.Commit, []strike{{"collapse", theServer, 200 * time.Millisecond}, {"settle", home, 0}}},
		{recovery.Reprotect, []strike{{"replicate", home, 0}, {"verify", theServer, 100 * time.Millisecond}}},
		{recovery.Failover, []strike{{"hold", theServer, 0}, {"final-point", away, 100 * time.Millisecond}, {"start", theServer, 100 * time.Millisecond}, {"check", away, time.Second}}},
		{recovery.Commit, []strike{{"collapse", away, time.Second}, {"settle", theServer, 0}}},
	}
	for range *soak {
		for _, kind := range []recovery.Kind{recovery.Reprotect, recovery.Failback, recovery.Commit, recovery.Reprotect, recovery.Failover, recovery.Commit} {
			legs = append(legs, leg{kind, anyStrikes(kind)})
		}
	}
	for _, l := range legs {
		if !t.Run(fmt.Sprintf("%sFrom%s", l.kind, f.vm().Source), func(t *testing.T) {
			g := *f
			g.t = t
			g.run(l)
		}) {
			return
		}
	}
}

var soak = flag.Int("fault.soak", 0, "how many more times TestSwitchesUnderKills goes round, struck at random")

// anyStrikes draws two strikes in order.
func anyStrikes(kind recovery.Kind) []strike {
	steps := map[recovery.Kind][]string{
		recovery.Failover:  {"preflight", "sync", "hold", "shutdown", "final-point", "fence", "activate", "start", "check"},
		recovery.Commit:    {"fold", "collapse", "settle", "retire"},
		recovery.Reprotect: {"preflight", "replica", "replicate", "verify"},
	}
	steps[recovery.Failback] = steps[recovery.Failover]
	of := steps[kind]
	first := randomUpTo(int64(len(of)))
	second := first + randomUpTo(int64(len(of))-first)
	var strikes []strike
	for _, i := range []int64{first, second} {
		victim := []string{theServer, Primary, Recovery}[randomUpTo(3)]
		strikes = append(strikes, strike{of[i], victim, []time.Duration{0, 50 * time.Millisecond, 500 * time.Millisecond}[randomUpTo(3)]})
	}
	return strikes
}

// run runs a leg and judges what it left.
func (f *fixture) run(l leg) {
	f.t.Helper()
	before := f.vm()
	id := f.begin(l.kind, api.OperationRequest{})
	for _, s := range l.strikes {
		f.strike(id, s)
	}
	rec := f.end(id)
	f.t.Logf("%s is %s: %v", rec.Title, rec.State, rec.Error)
	switch rec.State {
	case operation.StateSucceeded:
	case operation.StateUndone:
		f.running(string(before.Source))
		f.eventually(10*time.Second, "it is as before", func() (bool, string) {
			v := f.vm()
			return v.Phase == before.Phase && v.Source == before.Source, string(v.Phase)
		})
		f.operate(l.kind, api.OperationRequest{})
	default:
		f.t.Fatalf("%s is %s: %v", rec.Title, rec.State, rec.Error)
	}
	v := f.vm()
	f.running(string(v.Source))
	switch l.kind {
	case recovery.Failover, recovery.Failback:
		if v.Source != before.Target || v.Phase != switchback.PhaseSwitched {
			f.t.Errorf("it is %s at %s", v.Phase, v.Source)
		}
		f.cutOver(string(before.Source), string(before.Target))
		if _, err := f.Virsh(f.t.Context(), string(before.Source), "start", f.Name); err == nil {
			f.t.Errorf("the old side starts")
		}
	case recovery.Commit:
		f.plain(string(v.Source))
		f.noViews(string(v.Source))
		for _, pattern := range []string{"journal-*", "overlay-*"} {
			storage := f.Site(string(v.Source)).HostPath("/var/lib/switchback/storage")
			if left, _ := filepath.Glob(filepath.Join(storage, f.Name+"-*", pattern)); len(left) > 0 {
				f.t.Errorf("the commit left %v", left)
			}
		}
	case recovery.Reprotect:
		f.incremental(f.morePoints(2))
		if _, err := f.Virsh(f.t.Context(), string(v.Target), "start", f.Name); err == nil {
			f.t.Errorf("the target's copy starts")
		}
	}
}

// running fails the test unless the guest runs at a site, and there only.
func (f *fixture) running(site string) {
	f.t.Helper()
	if s := f.virsh(site, "domstate", f.Name); s != "running" {
		f.t.Errorf("%s is %s at %s", f.Name, s, site)
	}
	f.writes(site)
	n := 0
	for _, l := range f.watch.Lifetimes(f.UUID()) {
		if l.End.IsZero() {
			n++
		}
	}
	if n != 1 {
		f.t.Errorf("%d QEMUs run %s", n, f.Name)
	}
}

// strike waits for the step and kills the victim. A step that was too quick is
// struck late; which counts as well.
func (f *fixture) strike(id switchback.OperationID, s strike) {
	f.t.Helper()
	var state operation.StepState
	f.poll(5*time.Millisecond, 120*time.Second, "step "+s.step, func() (bool, string) {
		rec, err := f.client.Operation(f.t.Context(), id)
		if err != nil {
			return false, err.Error()
		}
		for _, st := range rec.Steps {
			if st.Name == s.step {
				state = st.State
			}
		}
		return rec.State.Finished() || (state != "" && state != operation.StepPending), fmt.Sprintf("%s: %+v", rec.State, rec.Steps)
	})
	delay := time.Duration(0)
	if s.within > 0 {
		delay = time.Duration(randomUpTo(int64(s.within)))
	}
	time.Sleep(delay)
	f.t.Logf("kill -9 %s %v after step %s was seen %s", s.victim, delay.Round(time.Millisecond), s.step, state)
	f.crash(f.t, s.victim)
}

// noViews fails the test if a process still serves a view of the VM's points.
func (f *fixture) noViews(site string) {
	f.t.Helper()
	for _, cmdline := range f.commands(site) {
		if args := cmdline; len(args) > 1 && args[1] == "export" && strings.Contains(strings.Join(args, " "), "/"+f.Name+"-p-") {
			f.t.Errorf("a view is still served: %v", args)
		}
	}
}

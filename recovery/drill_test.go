package recovery

import (
	"strings"
	"testing"

	switchback "github.com/switchback-dr/switchback"
)

func TestDrills(t *testing.T) {
	p := home(switchback.PhaseProtected)
	p.Name = "app"
	drilling := up()
	drilling.Drill.Running = "op-1"
	for _, c := range []struct {
		name  string
		p     switchback.Protection
		facts func(*Facts)
		kind  Kind
		want  string // of the reason; "" = allowed
	}{
		{"a drill", p, func(*Facts) {}, TestFailover, ""},
		{"two drills", p, func(f *Facts) { f.Drill.Running = "op-1" }, TestFailover, "drill op-1 is under way"},
		{"while the VM moves", p, func(f *Facts) { f.Running, f.RunningID = "failover", "op-2" }, TestFailover, "operation op-2"},
		{"before the first point", p, func(f *Facts) { f.Points = 0 }, TestFailover, "no recovery point"},
		{"source away, described at the target", p, func(f *Facts) { f.SourceUp, f.Drill.Described = false, true }, TestFailover, ""},
		{"source away", p, func(f *Facts) { f.SourceUp = false }, TestFailover, "site berlin"},
		{"target away", p, func(f *Facts) { f.TargetUp = false }, TestFailover, "site riga"},
		{"switched", home(switchback.PhaseSwitched), func(*Facts) {}, TestFailover, "switched"},
		{"nothing to clean", p, func(*Facts) {}, CleanDrill, "no drill"},
		{"clean a running one", p, func(f *Facts) { f.Drill.Running = "op-1" }, CleanDrill, ""},
		{"clean while another operation runs", p, func(f *Facts) { f.Drill.Left, f.Running = 1, "edit" }, CleanDrill, ""},
		{"clean with the agent away", p, func(f *Facts) { f.Drill.Left, f.TargetUp = 1, false }, CleanDrill, "site riga"},
		{"failover during a drill", p, func(f *Facts) { f.Drill.Running = "op-1" }, Failover, ""},
		{"unprotect during a drill", p, func(f *Facts) { f.Drill.Running = "op-1" }, Unprotect, ""},
	} {
		f := up()
		c.facts(&f)
		got := Check(c.p, f, c.kind)
		if got.Allowed != (c.want == "") || !strings.Contains(got.Reason, c.want) {
			t.Errorf("%s: %+v", c.name, got)
		}
	}
}

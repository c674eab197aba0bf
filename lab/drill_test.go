package lab

import (
	"bytes"
	"context"
	"image/png"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/check"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/witness"
)

// network makes a libvirt network at a site, gone after the test.
func (f *fixture) network(site, name, bridge, forward string, start bool) {
	f.t.Helper()
	file := filepath.Join(f.t.TempDir(), name+".xml")
	f.must(os.WriteFile(file, []byte("<network><name>"+name+"</name>"+forward+"<bridge name='"+bridge+"'/></network>"), 0o644))
	f.virsh(site, "net-define", file)
	f.t.Cleanup(func() {
		if start {
			f.Virsh(context.Background(), site, "net-destroy", name)
		}
		f.Virsh(context.Background(), site, "net-undefine", name)
	})
	if start {
		f.virsh(site, "net-start", name)
	}
}

func parseChecks(t *testing.T, texts ...string) []switchback.GuestCheck {
	t.Helper()
	var list []switchback.GuestCheck
	for _, text := range texts {
		c, err := check.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, c)
	}
	return list
}

// drills are what the VM's drills have left at the recovery site: domains,
// processes, files, pins.
func (f *fixture) drillRemains() []string {
	f.t.Helper()
	var left []string
	for line := range strings.Lines(f.virsh(Recovery, "list", "--all", "--name")) {
		if strings.HasPrefix(line, f.Name+"-drill-") {
			left = append(left, "domain "+strings.TrimSpace(line))
		}
	}
	for _, args := range f.commands(Recovery) {
		if line := strings.Join(args, " "); strings.Contains(line, string(f.vm().ID)+".") && strings.Contains(line, ".drill") || strings.Contains(line, f.Name+"-drill-") {
			left = append(left, "process "+line)
		}
	}
	for _, pattern := range []string{"/var/lib/switchback/storage/" + f.Name + "-p-*/drill-*", "/var/lib/switchback/storage/" + f.Name + "-p-*/journal-*/pins/drill-*", "/run/switchback/" + string(f.vm().ID) + ".*.drill*"} {
		files, err := filepath.Glob(f.Site(Recovery).HostPath(pattern))
		f.must(err)
		left = append(left, files...)
	}
	return left
}

func (f *fixture) report() api.DrillReport {
	f.t.Helper()
	list, err := f.client.Drills(f.t.Context(), f.Name, 1)
	f.must(err)
	if len(list) != 1 {
		f.t.Fatal("no drill is reported")
	}
	return list[0]
}

// guestNetwork brings up the copy's interface, which lab guests leave alone, and
// a service behind it.
const guestNetwork = "b=/bin/busybox; $b ip addr add 10.99.0.5/24 dev eth0; $b ip link set eth0 up; " +
	"($b nc -l -p 5432 </dev/null >/dev/null 2>&1 &); $b ip addr show eth0 | $b grep -q 10.99.0.5"

// TestDrill: a copy of a point boots on an isolated network while the VM and its
// replication go on; failing checks fail it; agent and server may die in it; a
// failover sweeps it away. It leaves its report and nothing else.
func TestDrill(t *testing.T) {
	wires := &fixture{bed: &shared, t: t}
	wires.network(Primary, "lan", "sblan0", "", true)
	wires.network(Recovery, "lan-away", "sblan0", "", true)
	f := addGuest(t, Guest{Name: "drill", Wire: "lan", Screen: true})
	policy := testPolicy()
	policy.Checks = parseChecks(t, "power", "console:^SB ACK")
	f.operate(recovery.Protect, api.OperationRequest{To: Recovery, Policy: policy, Networks: map[string]string{"lan": "lan-away"}})
	f.network(Recovery, "quiet", "sbquiet0", "", true)
	f.network(Recovery, "uplink", "sbuplink0", "<forward mode='bridge'/>", false)
	f.network(Recovery, "asleep", "sbasleep0", "", false)
	// The isolated network ends at the agent's host, from where it is checked.
	if out, err := f.Site(Recovery).Command(t.Context(), "ip", "addr", "add", "10.99.0.1/24", "dev", "sbquiet0").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, c := range []struct {
		name    string
		drill   api.DrillRequest
		code    switchback.Code
		because string
	}{
		{"no network named", api.DrillRequest{}, switchback.CodeInvalid, "no network for the drill"},
		{"unknown", api.DrillRequest{Network: "nowhere"}, switchback.CodeRefused, "no libvirt network of that name"},
		{"bridged", api.DrillRequest{Network: "uplink"}, switchback.CodeRefused, `forward mode is "bridge"`},
		{"where the VM would be after a failover", api.DrillRequest{Network: "lan-away"}, switchback.CodeRefused, "a protected VM uses it"},
		{"inactive", api.DrillRequest{Network: "asleep"}, switchback.CodeRefused, "net-start asleep"},
	} {
		f.refused(recovery.TestFailover, api.OperationRequest{DryRun: true, Drill: &c.drill}, c.code, c.because)
	}
	refused := f.end(f.begin(recovery.TestFailover, api.OperationRequest{Drill: &api.DrillRequest{Network: "uplink"}}))
	if refused.State == operation.StateSucceeded || refused.Error == nil || !strings.Contains(refused.Error.Error(), "can reach production") {
		t.Errorf("a drill on a bridged network is %s: %v", refused.State, refused.Error)
	}

	t.Run("Passes", func(t *testing.T) {
		g := *f
		g.t = t
		qemu, before := g.qemu(), g.newest()
		sum := g.operate(recovery.TestFailover, api.OperationRequest{Drill: &api.DrillRequest{Network: "quiet",
			Checks: parseChecks(t, "power", "agent", "console:^SB ACK", "exec:"+guestNetwork, "icmp:10.99.0.5", "tcp:10.99.0.5:5432",
				"tcp:192.0.2.1:9;timeout=1s:optional")}})
		d := *sum.Drill
		t.Logf("guest up after %v, checked after %v; %+v", d.GuestUpAt.Sub(d.RequestedAt), d.CheckedAt.Sub(d.RequestedAt), d.Checks)
		if live := d.Networks; !slices.Equal(live, []string{"quiet"}) {
			t.Errorf("it was on %v", live)
		}
		if !d.Passed || !d.Judged || d.Domain == "" || len(d.Left) > 0 || d.BytesWritten == 0 || len(d.Checks) != 7 || d.Checks[6].Passed {
			t.Errorf("report %+v", d)
		}
		picture, err := g.client.DrillPicture(t.Context(), d.Drill)
		g.must(err)
		img, err := png.Decode(bytes.NewReader(picture))
		g.must(err)
		colours := map[[3]uint32]bool{}
		for y := range img.Bounds().Dy() {
			for x := range img.Bounds().Dx() {
				r, gr, b, _ := img.At(x, y).RGBA()
				colours[[3]uint32{r, gr, b}] = true
			}
		}
		if len(colours) < 2 {
			t.Errorf("the picture, %v, shows nothing", img.Bounds())
		}
		if d.Replication == nil || d.Replication.Points < 3 {
			t.Errorf("replication meanwhile: %+v", d.Replication)
		}
		if g.qemu() != qemu {
			t.Error("the VM itself was touched")
		}
		g.incremental(g.pointsAfter(before, 3))
		if now := g.points(); len(now) > 0 {
			proved := slices.ContainsFunc(now, func(p switchback.MarkedPoint) bool {
				return p.Sequence == d.Point.Sequence && p.Mark.Boot != nil && p.Mark.Boot.Passed && p.Mark.Boot.Report == string(d.Drill)
			})
			if !proved && now[0].Sequence <= d.Point.Sequence {
				t.Errorf("point %d is not marked as proven", d.Point.Sequence)
			}
		}
		if v := g.vm(); v.Protection.Drill.Passed == nil || v.Protection.Drill.Passed.Sequence != d.Point.Sequence || v.Protection.Drill.Operation != "" || v.Current != nil && v.Current.Kind == "test-failover" {
			t.Errorf("the drill axis is %+v", v.Protection.Drill)
		}
		if left := g.drillRemains(); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})

	t.Run("FailsItsChecks", func(t *testing.T) {
		g := *f
		g.t = t
		rec := g.end(g.begin(recovery.TestFailover, api.OperationRequest{Drill: &api.DrillRequest{NoNetwork: true,
			Checks: parseChecks(t, "console:NEVER SAID;timeout=2s", "agent;timeout=1s:optional")}}))
		if rec.State != operation.StateFailed || !strings.Contains(rec.Error.Error(), "console:NEVER SAID;timeout=2s") {
			t.Errorf("it is %s: %v", rec.State, rec.Error)
		}
		d := g.report()
		if d.Passed || !d.Judged {
			t.Errorf("report %+v", d)
		}
		if left := g.drillRemains(); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		v := g.vm()
		if !slices.ContainsFunc(v.Conditions, func(c switchback.Condition) bool { return c.Name == "drill-failed" }) {
			t.Errorf("conditions %+v", v.Conditions)
		}
	})

	t.Run("KillsAndFailover", func(t *testing.T) {
		g := *f
		g.t = t
		before := g.newest()
		id := g.begin(recovery.TestFailover, api.OperationRequest{Drill: &api.DrillRequest{Network: "quiet", Keep: 10 * time.Minute}})
		g.strike(id, strike{"start", Recovery, 100 * time.Millisecond})
		g.strike(id, strike{"checks", theServer, time.Second})
		g.strike(id, strike{"checks", Recovery, 2 * time.Second})
		g.poll(200*time.Millisecond, 3*time.Minute, "the drill is kept", func() (bool, string) {
			rec, err := g.client.Operation(t.Context(), id)
			if err != nil {
				return false, err.Error()
			}
			if rec.State.Finished() {
				t.Fatalf("the drill is %s: %v", rec.State, rec.Error)
			}
			return rec.Step("hold").State == operation.StepRunning, rec.Step("checks").Title
		})
		if d := g.report(); !d.Passed {
			t.Errorf("report %+v", d)
		}
		if v := g.vm(); v.CurrentDrill == nil || v.CurrentDrill.ID != id {
			t.Errorf("the drill is not shown: %+v", v.CurrentDrill)
		}
		g.incremental(g.pointsAfter(before, 2))
		g.refused(recovery.TestFailover, api.OperationRequest{Drill: &api.DrillRequest{NoNetwork: true}}, switchback.CodeRefused, "drill clean")

		from := witness.ConsoleSize(g.Console(Recovery, g.Name))
		if ifs := g.virsh(Recovery, "domiflist", g.report().Domain); !strings.Contains(ifs, "quiet") || strings.Contains(ifs, "lan") {
			t.Errorf("the copy is connected to %s", ifs)
		}
		sum := g.operate(recovery.Failover, api.OperationRequest{})
		if c := sum.Switch.Checks; len(c) != 2 || !c[0].Passed || !c[1].Passed {
			t.Errorf("checks of the failover: %+v", c)
		}
		g.awaitLine(Recovery, from, "SB ACK")
		if rec := g.end(id); rec.State != operation.StateCancelled {
			t.Errorf("the drill is %s: %v", rec.State, rec.Error)
		}
		if left := g.drillRemains(); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		g.running(Recovery)
		g.refused(recovery.TestFailover, api.OperationRequest{Drill: &api.DrillRequest{NoNetwork: true}}, switchback.CodeRefused, "switched")
	})
}

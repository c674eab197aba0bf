package lab

import (
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// TestDrillsOfSeveral: copies of two VMs start on one isolated network and reach
// each other, also while the agent of their source is away and when the server
// dies. One that must make way for a failover takes nothing from the other, and
// one request clears what is kept.
func TestDrillsOfSeveral(t *testing.T) {
	wires := &fixture{bed: &shared, t: t}
	wires.network(Primary, "lan", "sblan0", "", true)
	wires.network(Recovery, "lan-away", "sblan0", "", true)
	wires.network(Recovery, "quiet", "sbquiet0", "", true)
	// Each guest gives itself an address and asks the other for an answer.
	reach := func(own, other string) string {
		return "exec:b=/bin/busybox; $b ip addr add " + own + "/24 dev eth0; $b ip link set eth0 up; $b ping -c 1 -W 1 " + other + ";timeout=60s"
	}
	one, two := bootGuest(t, Guest{Name: "drill-one", Wire: "lan"}), bootGuest(t, Guest{Name: "drill-two", Wire: "lan"})
	addresses := map[*fixture][]string{one: {"10.98.0.5", "10.98.0.6"}, two: {"10.98.0.6", "10.98.0.5"}}
	begun := map[*fixture]switchback.OperationID{}
	for _, f := range []*fixture{one, two} {
		f.awaitLine(Primary, 0, "SB ACK")
		policy := testPolicy()
		policy.Checks = parseChecks(t, "power", reach(addresses[f][0], addresses[f][1]))
		begun[f] = f.begin(recovery.Protect, api.OperationRequest{To: Recovery, Policy: policy, Networks: map[string]string{"lan": "lan-away"}})
	}
	for f, id := range begun {
		f.succeeded(f.end(id))
		f.eventually(30*time.Second, "the target keeps the definition", func() (bool, string) {
			st := f.vm().AtTarget
			return st != nil && st.Replica != nil && st.Replica.Described, "it does not"
		})
	}
	both := api.DrillsRequest{VMs: []string{one.Name, two.Name}, Drill: &api.DrillRequest{Network: "quiet"}}
	begin := func(req api.DrillsRequest) (id switchback.OperationID) {
		t.Helper()
		one.eventually(60*time.Second, "the drills are accepted", func() (bool, string) {
			a, err := one.client.DrillSeveral(t.Context(), req)
			if err != nil {
				return false, err.Error()
			}
			id = a.Operation.ID
			return true, ""
		})
		return id
	}
	clean := func() {
		t.Helper()
		for _, f := range []*fixture{one, two} {
			if left := f.drillRemains(); len(left) > 0 {
				t.Errorf("left of %s: %v", f.Name, left)
			}
		}
	}
	_, err := one.client.DrillSeveral(t.Context(), api.DrillsRequest{VMs: []string{one.Name, one.Name}, Drill: both.Drill})
	checkRefusal(t, err, switchback.CodeInvalid, "named twice")
	_, err = one.client.DrillSeveral(t.Context(), api.DrillsRequest{VMs: both.VMs, Drill: &api.DrillRequest{Network: "lan-away"}, DryRun: true})
	checkRefusal(t, err, switchback.CodeRefused, "a protected VM uses it")

	// The source's agent is away; the server dies in the middle.
	one.kill(t, Primary)
	id := begin(both)
	one.strike(id, strike{"wait", theServer, 3 * time.Second})
	sum := one.succeeded(one.end(id))
	one.start(t, Primary)
	if len(sum.Drills) != 2 {
		t.Fatalf("reports %+v", sum.Drills)
	}
	for _, d := range sum.Drills {
		t.Logf("%s: up after %v, checked after %v, cleared after %v, %v", d.VM, d.GuestUpAt.Sub(d.RequestedAt), d.CheckedAt.Sub(d.RequestedAt), d.CleanedAt.Sub(d.RequestedAt), d.Notes)
		if !d.Passed || len(d.Checks) != 2 || d.Group != id || len(d.Together) != 1 || len(d.Left) > 0 {
			t.Errorf("report %+v", d)
		}
		if !strings.Contains(strings.Join(d.Notes, "\n"), "kept at site recovery") {
			t.Errorf("notes %v", d.Notes)
		}
		for _, other := range sum.Drills {
			if d.CleanedAt.Before(other.CheckedAt) {
				t.Errorf("%s was cleared before %s was checked", d.VM, other.VM)
			}
		}
	}
	clean()

	// One VM moves for real while both are kept.
	both.Drill.Keep = 10 * time.Minute
	id = begin(both)
	kept := func(f *fixture) (bool, string) {
		cur := f.vm().CurrentDrill
		if cur == nil {
			return false, "no drill"
		}
		if cur.State.Finished() {
			t.Fatalf("the drill of %s is %s: %v", f.Name, cur.State, cur.Error)
		}
		return cur.Step("hold").State == operation.StepRunning, string(cur.State)
	}
	one.eventually(2*time.Minute, "both are kept", func() (bool, string) {
		for _, f := range []*fixture{one, two} {
			if ok, why := kept(f); !ok {
				return false, f.Name + ": " + why
			}
		}
		return true, ""
	})
	policy := testPolicy() // in a failover nobody answers at the other's address
	two.operate(recovery.Edit, api.OperationRequest{Policy: policy})
	two.operate(recovery.Failover, api.OperationRequest{})
	two.running(Recovery)
	if ok, why := kept(one); !ok {
		t.Errorf("the other drill has gone, too: %s", why)
	}
	one.must(one.client.CleanDrills(t.Context(), id))
	rec := one.end(id)
	if rec.State != operation.StateFailed || !strings.Contains(rec.Error.Error(), "1 of 2 drills did not pass: "+two.Name) {
		t.Errorf("it is %s: %v", rec.State, rec.Error)
	}
	if d := one.report(); !d.Passed || d.CleanedAt.IsZero() {
		t.Errorf("report %+v", d)
	}
	clean()
}

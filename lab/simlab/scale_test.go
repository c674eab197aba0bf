package simlab_test

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor/simulated"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

var scaleVMs = flag.Int("scale.vms", 8, "how many VMs TestScale fails over at once")

// TestScale fails many VMs over at once. It asserts that all of them are right
// in the end, and tells how long it took and what the server needed.
func TestScale(t *testing.T) {
	b := newBed(t)
	var machines []simlab.Machine
	for i := range *scaleVMs {
		m := simlab.Machine{Name: fmt.Sprintf("vm%d", i), Disks: []int64{4 << 20}, Program: simulated.Program{Reacts: true, Rate: 2, Seed: uint64(i)}}
		b.must(b.Add(t.Context(), simlab.Primary, m))
		machines = append(machines, m)
	}
	all := func(kind recovery.Kind, req api.OperationRequest) time.Duration {
		began := time.Now()
		var wg sync.WaitGroup
		for _, m := range machines {
			wg.Go(func() {
				a, err := b.client.Request(t.Context(), m.Name, kind, req)
				if err != nil {
					t.Errorf("%s: %v", m.Name, err)
					return
				}
				for {
					rec, err := b.client.Operation(t.Context(), a.Operation.ID)
					if err == nil && rec.State.Finished() {
						if rec.State != operation.StateSucceeded {
							t.Errorf("%s is %s: %v", rec.Title, rec.State, rec.Error)
						}
						return
					}
					time.Sleep(200 * time.Millisecond)
				}
			})
		}
		wg.Wait()
		return time.Since(began)
	}
	req := fast()
	req.Policy.Interval = 10 * time.Second
	t.Logf("%d VMs protected after %v", len(machines), all(recovery.Protect, req).Round(time.Millisecond))
	if t.Failed() {
		return
	}
	t.Logf("failed over after %v; server %s", all(recovery.Failover, api.OperationRequest{}).Round(time.Millisecond), peak(b.Process(simlab.Server).PID))
	for _, m := range machines {
		v, err := b.client.VM(t.Context(), m.Name)
		b.must(err)
		if v.Phase != switchback.PhaseSwitched || string(v.Source) != simlab.Recovery {
			t.Errorf("%s is %s at %s", m.Name, v.Phase, v.Source)
		}
	}
	events, err := simulated.ReadPowerLog(b.PowerLog())
	b.must(err)
	for _, o := range simulated.Overlaps(events) {
		t.Errorf("two copies ran at once: %+v", o)
	}
}

// peak is the most memory that a process has had.
func peak(pid int) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)) // gone: nothing to tell
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

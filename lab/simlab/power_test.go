package simlab_test

import (
	"testing"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/recovery"
)

// TestPowerCut takes the power from the site of a protected VM. It boots with
// its host, its bitmaps are lost, and replication goes on by a resync.
func TestPowerCut(t *testing.T) {
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	b.runsAt(simlab.Primary)
	b.must(b.Driver(simlab.Primary).SetAutostart(t.Context(), b.machine.UUID(), true))
	before := b.facts()
	b.must(b.PowerCut(t.Context(), simlab.Primary))
	b.must(b.Start(t.Context(), simlab.Primary+"-hypervisor"))
	b.must(b.Start(t.Context(), simlab.Primary))
	b.runsAt(simlab.Primary)
	boots := b.console(simlab.Primary).Boots
	if is := boots[len(boots)-1]; len(boots) != before.boots[simlab.Primary]+1 || is.Found.Damaged > 0 || is.Found.Highest < before.acked[simlab.Primary] {
		t.Errorf("it booted %d times and found %+v, record %d was acknowledged", len(boots), is.Found, before.acked[simlab.Primary])
	}
	b.replicates()
	b.operate(recovery.Failover, api.OperationRequest{})
	b.cutOver(simlab.Primary, simlab.Recovery)
	b.runsAt(simlab.Recovery)
}

// TestHypervisorRestart restarts the daemons of both hosts: machines go on.
func TestHypervisorRestart(t *testing.T) {
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	for _, site := range simlab.Sites {
		b.must(b.RestartHypervisor(t.Context(), site))
	}
	b.runsAt(simlab.Primary)
	b.replicates()
	if boots := b.console(simlab.Primary).Boots; len(boots) != 1 {
		t.Errorf("it booted %d times", len(boots))
	}
}

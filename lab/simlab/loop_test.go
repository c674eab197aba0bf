package simlab_test

import (
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/recovery"
)

// TestLoop is the whole loop: away, home, and protected again.
func TestLoop(t *testing.T) {
	began := time.Now()
	b := newBed(t)
	t.Logf("up in %v", time.Since(began))
	b.operate(recovery.Protect, fast())
	from, to := simlab.Primary, simlab.Recovery
	for _, kind := range []recovery.Kind{recovery.Failover, recovery.Failback} {
		b.runsAt(from)
		b.operate(kind, api.OperationRequest{})
		b.cutOver(from, to)
		b.runsAt(to)
		if err := b.Driver(from).Start(t.Context(), b.machine.UUID(), false); switchback.CodeOf(err) != switchback.CodeRefused {
			t.Errorf("a start of the fenced copy at %s: %v", from, err)
		}
		b.operate(recovery.Commit, api.OperationRequest{})
		b.runsAt(to)
		b.plain(to)
		b.operate(recovery.Reprotect, api.OperationRequest{})
		if v := b.vm(); v.Phase != switchback.PhaseProtected || string(v.Source) != to || string(v.Target) != from {
			t.Errorf("it is %s at %s with target %s", v.Phase, v.Source, v.Target)
		}
		b.runsAt(to)
		from, to = to, from
	}
	t.Logf("done after %v", time.Since(began))
}

// plain fails the test unless the machine is on images that stand alone.
func (b *bed) plain(site string) {
	b.t.Helper()
	d, err := b.domain(site)
	b.must(err)
	for _, disk := range d.Disks {
		if len(disk.Backing) > 0 {
			b.t.Errorf("disk %s is on %s over %v", disk.Name, disk.Path, disk.Backing)
		}
	}
}

package replicator

import (
	"context"
	"math/rand/v2"
	"os"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// TestResend: ranges that the target lost are carried by the next point though
// they have not changed, also across failures and a restart, and just once.
func TestResend(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 3))
	p := newPair(t, cycleDisks(), nil)
	p.scribble(rng)
	p.cycle(ModeSeed)
	p.scribble(rng)
	p.cycle(ModeIncremental)
	if r := p.cycle(ModeIncremental); r.ChangedBytes != 0 {
		t.Fatalf("nothing has changed, %d bytes were sent", r.ChangedBytes)
	}
	lost := map[string]extent.Set{"vda": extent.NewSet(extent.Range{Offset: 5000, Length: 10000}), "vdb": extent.NewSet(extent.Range{Offset: 640 << 10, Length: 512})}
	if err := p.e.Resend(lost); err != nil {
		t.Fatal(err)
	}
	p.restart()
	p.target.fail = func(call string) when {
		if call == "point" {
			return before
		}
		return never
	}
	if _, err := p.e.Cycle(context.Background(), CycleOptions{}); err == nil {
		t.Fatal("the target did not fail")
	}
	p.target.fail = func(string) when { return never }
	// Whole blocks: [4096, 16384) of vda, the short last one of vdb.
	if r := p.cycle(ModeIncremental); r.ChangedBytes != 12288+512 {
		t.Errorf("%d bytes were sent again", r.ChangedBytes)
	}
	changed, err := p.target.replica.ChangedAfter(p.target.replica.Head().Sequence - 1)
	if err != nil {
		t.Fatal(err)
	}
	for name, set := range lost {
		if !set.Subtract(changed[name]).IsEmpty() {
			t.Errorf("%s: %v was sent, of %v", name, changed[name].Ranges(), set.Ranges())
		}
	}
	if _, err := os.Stat(p.e.resendPath()); !os.IsNotExist(err) {
		t.Errorf("what has to be sent again is still noted: %v", err)
	}
	if r := p.cycle(ModeIncremental); r.ChangedBytes != 0 {
		t.Errorf("%d bytes were sent a third time", r.ChangedBytes)
	}
	if err := p.e.Resend(map[string]extent.Set{"vdz": {}}); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("no such disk: %v", err)
	}
}

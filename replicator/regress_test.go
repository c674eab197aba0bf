package replicator

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// Once a defect (seed-tail): the entries of the last piece of a first copy are forgotten
// when the piece fills a batch, and then stand for zeros.
func TestOnceSeedTail(t *testing.T) {
	p := newPair(t, []switchback.Disk{{Name: "vda", SizeBytes: seedBatch}}, nil)
	p.vm.write("vda", 0, bytes.Repeat([]byte{1}, seedBatch))
	p.cycle(ModeSeed)
	p.vm.write("vda", seedBatch-BlockSize, make([]byte, BlockSize)) // the guest discards the last block
	p.cycle(ModeIncremental)
}

// Once a defect (seed-overwrite): a block that an interrupted copy has sent again is
// still known by its old content; when the guest returns to that, it is not sent.
func TestOnceSeedOverwrite(t *testing.T) {
	p := newPair(t, []switchback.Disk{{Name: "vda", SizeBytes: 12 << 20}}, nil)
	clock := time.Unix(0, 0)
	p.cfg.Now = func() time.Time { clock = clock.Add(seedFlushEvery); return clock }
	p.restart()
	p.vm.write("vda", 0, bytes.Repeat([]byte{1}, 12<<20))
	failAt := func(call string, n int) func(string) when {
		return func(c string) when {
			if c == call {
				if n--; n == 0 {
					return before
				}
			}
			return never
		}
	}
	attempt := func(fail func(string) when) {
		p.target.fail = fail
		if _, err := p.e.Cycle(context.Background(), CycleOptions{}); !errors.Is(err, errLost) {
			t.Fatalf("error %v", err)
		}
	}
	attempt(failAt("seed", 2)) // the first batch is flushed and known
	p.vm.write("vda", 0, bytes.Repeat([]byte{2}, BlockSize))
	attempt(failAt("flush", 1)) // the block's new content has arrived, and is not acknowledged
	p.vm.write("vda", 0, bytes.Repeat([]byte{1}, BlockSize))
	p.target.fail = func(string) when { return never }
	p.cycle(ModeSeed)
}

// Once a defect (lost-answer): the target has the point, its answer is lost, and the source
// deletes the very checkpoint that continues from it: whole disks are read again.
func TestOnceLostAnswer(t *testing.T) {
	p := newPair(t, cycleDisks(), nil)
	p.cycle(ModeSeed)
	p.vm.write("vda", 0, []byte{1})
	p.target.fail = func(call string) when {
		if call == "point" {
			return after
		}
		return never
	}
	if _, err := p.e.Cycle(context.Background(), CycleOptions{}); !errors.Is(err, errLost) {
		t.Fatal(err)
	}
	p.target.fail = func(string) when { return never }
	p.cycle(ModeIncremental)
}

// Once a defect (offline-must-send): an offline point over kept disks leaves out MustSend.
func TestOnceOfflineMustSend(t *testing.T) {
	kept := map[string][]byte{"vda": make([]byte, 1<<20)}
	p := newPair(t, []switchback.Disk{{Name: "vda", SizeBytes: 1 << 20}}, kept)
	p.target.checkpoint = "sb-2-0"
	copy(p.vm.disks["vda"], bytes.Repeat([]byte{1}, 4096))
	p.vm.checkpoints = []fakeCheckpoint{{"sb-2-0", map[string]extent.Set{}}}
	p.cfg.Epoch, p.cfg.MustSend = 2, map[string]extent.Set{"vda": extent.NewSet(extent.Range{Length: 4096})}
	p.restart()
	p.vm.state = "off"
	if _, err := p.e.Cycle(context.Background(), CycleOptions{Offline: true}); err != nil {
		t.Fatal(err)
	}
	p.equal()
}

// Once a defect (stale-io-error): an I/O error that came between two cycles fails the next one.
func TestOnceStaleIOError(t *testing.T) {
	p := newPair(t, cycleDisks(), nil)
	p.cycle(ModeSeed)
	p.e.IOError("vda enospc")
	p.target.fail = func(call string) when {
		if call == "point" {
			time.Sleep(50 * time.Millisecond)
		}
		return never
	}
	p.cycle(ModeIncremental)
}

// Once a defect (hypervisor-away): a libvirtd that does not answer is named "target-unreachable".
func TestOnceHypervisorAway(t *testing.T) {
	p := newPair(t, cycleDisks(), nil)
	p.cycle(ModeSeed)
	p.vm.kill()
	if _, err := p.e.Cycle(context.Background(), CycleOptions{}); err == nil {
		t.Fatal("no error")
	}
	if d := cmp.Diff("target-unreachable", p.e.Status().Conditions[0].Name); d == "" {
		t.Error("the hypervisor is away and the target is blamed")
	}
}

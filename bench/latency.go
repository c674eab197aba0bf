package main

import (
	"context"
	"fmt"
	"time"

	"github.com/switchback-dr/switchback/lab/guest"
)

// measureGuest compares what our guest sees under cycles each second with what
// it sees when it is not protected at all.
func measureGuest(ctx context.Context, b *bed) ([]entry, error) {
	if err := b.ensureUnprotected(ctx); err != nil {
		return nil, err
	}
	var p50, p99 samples
	var counts []float64
	latency := func(ctx context.Context) (guest.Latency, error) {
		if err := b.settle(); err != nil {
			return guest.Latency{}, err
		}
		return b.ours.control.Latency(ctx, diskName, b.sizes.latencyWrites, guest.DirtyOffset, 64<<20)
	}
	without := func(ctx context.Context) error {
		l, err := latency(ctx)
		if err != nil {
			return err
		}
		b.say("not protected: p50 %v, p90 %v, p99 %v, max %v", l.P50, l.P90, l.P99, l.Max)
		p50.Peer, p99.Peer = append(p50.Peer, micro(l.P50)), append(p99.Peer, micro(l.P99))
		return nil
	}
	with := func(ctx context.Context) error {
		if _, err := b.protect(ctx, time.Second); err != nil {
			return err
		}
		first, err := b.cycleCount(ctx)
		if err != nil {
			return err
		}
		begin := time.Now()
		l, err := latency(ctx)
		if err != nil {
			return err
		}
		took := time.Since(begin)
		last, err := b.cycleCount(ctx)
		if err != nil {
			return err
		}
		if last == first {
			return fmt.Errorf("no cycle ran while the guest wrote for %v", took)
		}
		counts = append(counts, float64(last-first)/took.Seconds())
		b.say("1 s cycles (%d in %.1f s): p50 %v, p90 %v, p99 %v, max %v", last-first, took.Seconds(), l.P50, l.P90, l.P99, l.Max)
		p50.Ours, p99.Ours = append(p50.Ours, micro(l.P50)), append(p99.Ours, micro(l.P99))
		return b.unprotect(ctx)
	}
	// The first writes after a start are not like the others.
	if _, err := latency(ctx); err != nil {
		return nil, err
	}
	if err := alternate(ctx, b.cfg.runs, nil, with, without); err != nil {
		return nil, err
	}
	detail := fmt.Sprintf("%d writes a sample, %.1f cycles a second meanwhile", b.sizes.latencyWrites, median(counts))
	const peer = "the same guest without protection"
	return []entry{newEntry("guest_p99", "µs", peer, oursByPeer, p99, detail), newEntry("guest_p50", "µs", peer, oursByPeer, p50, "")}, nil
}

func micro(d time.Duration) float64 { return float64(d.Microseconds()) }

// cycleCount is how many cycles our agent has finished.
func (b *bed) cycleCount(ctx context.Context) (int64, error) {
	vm, err := b.api.VM(ctx, b.ours.name)
	if err != nil {
		return 0, err
	}
	if vm.AtSource == nil || vm.AtSource.Replication == nil {
		return 0, fmt.Errorf("the source agent does not report")
	}
	return vm.AtSource.Replication.Cycles, nil
}

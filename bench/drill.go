package main

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/check"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/recovery"
)

// The bound of a drill: so much, and so often a plain boot.
const (
	drillSeconds = 2.0
	drillBoots   = 1.15
)

// drill runs a drill of the newest point and returns how long it took from the
// request until the copy was seen to have mounted its file system and checked its
// files. Not in it: what comes after, the picture and the clean-up.
func (b *bed) drill(ctx context.Context) (up time.Duration, err error) {
	checked, err := check.Parse("console: CHECKED ;timeout=2m")
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	rec, err := b.operate(ctx, recovery.TestFailover, api.OperationRequest{Point: "latest-processed",
		Drill: &api.DrillRequest{NoNetwork: true, Checks: []switchback.GuestCheck{checked}}})
	if err != nil {
		return 0, err
	}
	var sum api.Summary
	if err := json.Unmarshal(rec.Result, &sum); err != nil {
		return 0, err
	}
	d := sum.Drill
	if d == nil || !d.Passed || len(d.Checks) != 1 || len(d.Left) > 0 {
		return 0, fmt.Errorf("the drill has left no report of a pass: %+v", d)
	}
	up = d.Checks[0].EndedAt.Sub(begin)
	b.say("drill %.2f s: view after %.2f, started after %.2f, cleared after %.2f", up.Seconds(), d.ViewAt.Sub(begin).Seconds(),
		d.GuestUpAt.Sub(begin).Seconds(), d.CleanedAt.Sub(begin).Seconds())
	return up, nil
}

// measureDrill times drills, by the server and both agents, beside starts of a
// guest with the same work on a plain qcow2 with the same content. Nothing is in
// the machine's cache before.
func measureDrill(ctx context.Context, b *bed) ([]entry, error) {
	v, err := b.makeView(ctx, b.sizes.viewPoints, b.sizes.viewPointChange)
	defer b.dropView(v)
	if err != nil {
		return nil, err
	}
	plain, _, err := b.bootXML()
	if err != nil {
		return nil, err
	}
	var s samples
	ours := func(ctx context.Context) error {
		if err := b.settle(); err != nil {
			return err
		}
		if err := b.forgetReplica(v); err != nil {
			return err
		}
		d, err := b.drill(ctx)
		s.Ours = append(s.Ours, d.Seconds())
		return err
	}
	peer := func(ctx context.Context) error {
		d, err := b.bootPlain(ctx, v, plain)
		s.Peer = append(s.Peer, d.Seconds())
		return err
	}
	// Kernel and initrd come into the cache here.
	if err := alternate(ctx, 1, nil, peer, ours); err != nil {
		return nil, err
	}
	s = samples{}
	if err := alternate(ctx, b.cfg.runs, nil, ours, peer); err != nil {
		return nil, err
	}
	os.Remove(b.recoveryPath(bootLocal))
	detail := fmt.Sprintf("%d MiB checked cold, %d segments over the base; the drill's own check looks every half second", b.sizes.check>>20, v.segments)
	return []entry{newEntry("drill_seconds_over_boot", "s", "boot of a plain local qcow2 with the same content", oursByBootBound, s, detail)}, nil
}

// measureRPO compares the RPO of our guest, which writes all the time, during
// drills in a row with what it is in as long a time without.
func measureRPO(ctx context.Context, b *bed) (_ []entry, err error) {
	if err := b.ensureUnprotected(ctx); err != nil {
		return nil, err
	}
	if _, err := b.protect(ctx, time.Second); err != nil {
		return nil, err
	}
	r, err := b.replica(ctx)
	if err != nil {
		return nil, err
	}
	writing, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- b.keepWriting(writing) }()
	defer func() {
		stop()
		if werr := <-ended; err == nil {
			err = werr
		}
		if err == nil {
			err = b.unprotect(ctx)
		}
	}()

	var s samples
	var cycles []float64
	span := func(into *[]float64, what string, work func() error) error {
		if err := b.settle(); err != nil {
			return err
		}
		begin := time.Now()
		if err := work(); err != nil {
			return err
		}
		rpo, err := b.rpoSince(ctx, r.Dir, begin)
		if err != nil {
			return err
		}
		p99 := percentile(rpo, 0.99)
		b.say("%s: %d points in %.1f s, RPO p50 %.2f s, p99 %.2f s", what, len(rpo), time.Since(begin).Seconds(), percentile(rpo, 0.5), p99)
		*into, cycles = append(*into, p99), append(cycles, float64(len(rpo)))
		return nil
	}
	var took time.Duration // of the newest span with drills
	with := func(ctx context.Context) error {
		return span(&s.Ours, fmt.Sprintf("%d drills", b.sizes.drills), func() error {
			begin := time.Now()
			defer func() { took = time.Since(begin) }()
			for range b.sizes.drills {
				if _, err := b.drill(ctx); err != nil {
					return err
				}
			}
			return nil
		})
	}
	without := func(ctx context.Context) error {
		return span(&s.Peer, "no drill", func() error {
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(took):
				return nil
			}
		})
	}
	if err := alternate(ctx, b.cfg.runs, nil, with, without); err != nil {
		return nil, err
	}
	detail := fmt.Sprintf("%d drills in a row, 1 s interval, %.0f points a span; the age of the point before when one became durable", b.sizes.drills, median(cycles))
	return []entry{newEntry("rpo_during_drills", "s", "p99 in as long a time without drills", oursByPeer, s, detail)}, nil
}

// keepWriting has our guest write some hundred KiB each second until ctx ends.
func (b *bed) keepWriting(ctx context.Context) error {
	for seed := uint64(1 << 32); ctx.Err() == nil; seed++ {
		if _, err := b.ours.control.Dirty(context.WithoutCancel(ctx), guest.Changes{Disk: diskName, Bytes: 128 << 10, Span: b.sizes.span, Seed: seed}); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
		case <-time.After(200 * time.Millisecond):
		}
	}
	return nil
}

// rpoSince returns for each point that became durable after begin how old the
// point before it was at that moment, as agents report it. A point is durable
// when its segment has its name.
func (b *bed) rpoSince(ctx context.Context, dir string, begin time.Time) ([]float64, error) {
	points, err := b.api.Points(ctx, b.ours.name)
	if err != nil {
		return nil, err
	}
	var rpo []float64
	for i := 1; i < len(points); i++ {
		if points[i].Time.Before(begin) {
			continue
		}
		path := b.recoveryPath(filepath.Join(dir, "segments", fmt.Sprintf("%016d.seg", points[i].Sequence)))
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return nil, fmt.Errorf("segment of point %d: %w", points[i].Sequence, err)
		}
		rpo = append(rpo, time.Unix(st.Ctim.Unix()).Sub(points[i-1].Time).Seconds())
	}
	if len(rpo) == 0 {
		return nil, fmt.Errorf("no point came in %v", time.Since(begin))
	}
	return rpo, nil
}

// percentile of at least one value: the smallest that so large a part does not exceed.
func percentile(v []float64, part float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[max(0, int(math.Ceil(part*float64(len(s))))-1)]
}

// bootPlain starts the guest cold on a plain copy of the view's content.
func (b *bed) bootPlain(ctx context.Context, v *view, definition string) (time.Duration, error) {
	os.Remove(b.recoveryPath(bootLocal))
	if err := command(b.lab.Site(lab.Recovery).Command(ctx, "cp", "--sparse=always", v.qcow2, bootLocal)); err != nil {
		return 0, err
	}
	for _, path := range []string{bootLocal, v.qcow2} {
		if err := forget(b.recoveryPath(path)); err != nil {
			return 0, err
		}
	}
	d, err := b.boot(ctx, bootName, definition)
	b.say("from a plain qcow2 %.2f s", d.Seconds())
	return d, err
}

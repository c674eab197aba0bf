package main

import (
	"context"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/replicator"
)

// cycles are the reports of our cycles, with what crossed the WAN meanwhile and,
// if asked for, what really had changed.
type cycles struct {
	reports       []replicator.CycleReport
	wire, changed []int64
	last          blocks // state of our disk after the last cycle; nil = not wanted
}

// core is a cycle without begin and delete: the job's end is in it.
func core(r replicator.CycleReport) time.Duration { return r.Total - r.Begin - r.End }

func (c *cycles) detail() string {
	var begin, core_, end, read, changed []float64
	for _, r := range c.reports {
		begin, core_, end = append(begin, r.Begin.Seconds()*1000), append(core_, core(r).Seconds()*1000), append(end, r.End.Seconds()*1000)
		read, changed = append(read, float64(r.ReadBytes)/1e6), append(changed, float64(r.ChangedBytes)/1e6)
	}
	return fmt.Sprintf("medians: begin %.1f ms, map and transfer %.1f ms, end %.1f ms; %.1f MB read, %.1f MB changed, codec %s",
		median(begin), median(core_), median(end), median(read), median(changed), c.reports[len(c.reports)-1].Codec)
}

// take is one sample of ours.
func (b *bed) take(ctx context.Context, c *cycles) error {
	before, err := b.wanBytes()
	if err != nil {
		return err
	}
	r, err := b.takePoint(ctx)
	if err != nil {
		return err
	}
	after, err := b.wanBytes()
	if err != nil {
		return err
	}
	c.reports, c.wire = append(c.reports, r), append(c.wire, after-before)
	note := ""
	if c.last != nil {
		now, err := b.scan(ctx)
		if err != nil {
			return err
		}
		c.changed = append(c.changed, c.last.differing(now))
		c.last = now
		note = fmt.Sprintf(", %.2f MB on the wire for %.2f MB changed", float64(after-before)/1e6, float64(c.changed[len(c.changed)-1])/1e6)
	}
	b.say("ours %v: begin %v, transfer %v, end %v, %d KiB read, %d KiB changed, %s%s", ms(r.Total), ms(r.Begin), ms(r.Transfer), ms(r.End), r.ReadBytes>>10, r.ChangedBytes>>10, r.Codec, note)
	return nil
}

// against takes our cycles and the push-mode backups of the same changes.
func (b *bed) against(ctx context.Context, bytes int64, mix guest.Mix, truth bool) (c cycles, p []pushed, err error) {
	if err := b.ensureProtected(ctx); err != nil {
		return c, p, err
	}
	if err := b.ensurePush(ctx); err != nil {
		return c, p, err
	}
	before := func(ctx context.Context) error { return b.change(ctx, bytes, mix) }
	ours := func(ctx context.Context) error { return b.take(ctx, &c) }
	peer := func(ctx context.Context) error {
		one, err := b.push(ctx)
		if err == nil {
			b.say("push %v: begin %v, job %v, end %v, %d KiB", ms(one.total), ms(one.begin), ms(one.core()), ms(one.end), one.bytes>>10)
			p = append(p, one)
		}
		return err
	}
	// The first of each is not like the others: what the guest did before is in it.
	if err := alternate(ctx, 1, before, ours, peer); err != nil {
		return c, p, err
	}
	c, p = cycles{}, nil
	if truth {
		if c.last, err = b.scan(ctx); err != nil {
			return c, p, err
		}
	}
	return c, p, alternate(ctx, b.cfg.runs, before, ours, peer)
}

func seconds[T any](list []T, of func(T) time.Duration) (out []float64) {
	for _, x := range list {
		out = append(out, of(x).Seconds())
	}
	return out
}

func total(r replicator.CycleReport) time.Duration { return r.Total }

func measureCycle1MB(ctx context.Context, b *bed) ([]entry, error) {
	c, p, err := b.against(ctx, b.sizes.small, guest.Random4K, false)
	if err != nil {
		return nil, err
	}
	whole := samples{seconds(c.reports, total), seconds(p, func(p pushed) time.Duration { return p.total })}
	inner := samples{seconds(c.reports, core), seconds(p, pushed.core)}
	return []entry{
		newEntry("cycle_1mb", "s", pushName, oursByPeer, whole, c.detail()),
		newEntry("cycle_1mb_core", "s", pushName+", without begin and delete", oursByPeer, inner, ""),
	}, nil
}

func measureCycleMixed(ctx context.Context, b *bed) ([]entry, error) {
	c, p, err := b.against(ctx, b.sizes.mixed, guest.Mixed, true)
	if err != nil {
		return nil, err
	}
	whole := samples{seconds(c.reports, total), seconds(p, func(p pushed) time.Duration { return p.total })}
	wire, err := perChanged(c, p)
	if err != nil {
		return nil, err
	}
	return []entry{
		newEntry("cycle_64mb_mixed", "s", pushName, oursByPeer, whole, c.detail()),
		newEntry("wire_per_changed", "bytes per changed byte", pushName+": its target's allocated bytes, for information", oursAlone, wire, c.detail()),
	}, nil
}

func measureWireRandom(ctx context.Context, b *bed) ([]entry, error) {
	c, p, err := b.against(ctx, b.sizes.mixed, guest.Random4K, true)
	if err != nil {
		return nil, err
	}
	wire, err := perChanged(c, p)
	if err != nil {
		return nil, err
	}
	return []entry{newEntry("wire_rand4k", "bytes per changed byte", pushName+": its target's allocated bytes, for information", oursAlone, wire, c.detail())}, nil
}

// perChanged divides by what really changed, which is the same on both disks.
func perChanged(c cycles, p []pushed) (s samples, err error) {
	for i, n := range c.changed {
		if n == 0 {
			return s, fmt.Errorf("nothing has changed before cycle %d", i)
		}
		if got := c.reports[i].ChangedBytes; got < n {
			return s, fmt.Errorf("cycle %d sent %d bytes, but %d have changed", i, got, n)
		}
		s.Ours = append(s.Ours, float64(c.wire[i])/float64(n))
		s.Peer = append(s.Peer, float64(p[i].bytes)/float64(n))
	}
	return s, nil
}

const toolName = "virtnbdbackup -l inc (Debian 1.9.15), whole run"

// measureCycleTool gives the peer to virtnbdbackup.
func measureCycleTool(ctx context.Context, b *bed) ([]entry, error) {
	if err := b.ensureProtected(ctx); err != nil {
		return nil, err
	}
	if err := b.dropCheckpoints(ctx); err != nil {
		return nil, err
	}
	dir := b.cfg.dir + "/virtnbdbackup"
	tool := func(ctx context.Context, level string) (time.Duration, error) {
		begin := time.Now()
		cmd := b.lab.Site(lab.Primary).Command(ctx, "virtnbdbackup", "-d", b.peer.name, "-l", level, "-o", dir)
		out, err := cmd.CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("virtnbdbackup -l %s: %w: %s", level, err, tail(string(out), 6))
		}
		return time.Since(begin), nil
	}
	if d, err := tool(ctx, "full"); err != nil {
		return nil, err
	} else {
		b.say("virtnbdbackup -l full %.2f s (not a sample)", d.Seconds())
	}
	var c cycles
	var peers []float64
	before := func(ctx context.Context) error { return b.change(ctx, b.sizes.small, guest.Random4K) }
	ours := func(ctx context.Context) error { return b.take(ctx, &c) }
	peer := func(ctx context.Context) error {
		d, err := tool(ctx, "inc")
		b.say("virtnbdbackup -l inc %.2f s", d.Seconds())
		peers = append(peers, d.Seconds())
		return err
	}
	if err := alternate(ctx, 1, before, ours, peer); err != nil {
		return nil, err
	}
	c, peers = cycles{}, nil
	if err := alternate(ctx, b.cfg.runs, before, ours, peer); err != nil {
		return nil, err
	}
	if err := b.dropCheckpoints(ctx); err != nil {
		return nil, err
	}
	if err := exec.CommandContext(ctx, "rm", "-rf", dir).Run(); err != nil {
		return nil, err
	}
	return []entry{newEntry("cycle_1mb_vs_tool", "s", toolName, oursByPeer, samples{seconds(c.reports, total), peers}, c.detail())}, nil
}

func tail(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

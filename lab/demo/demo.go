// Package demo runs the product's main job end to end on real guests: two VMs
// are protected, handed to the other site, committed, reprotected, brought home,
// committed and protected again, while a separate witness looks on.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/witness"

	switchback "github.com/switchback-dr/switchback"
)

// Config says where the demo runs.
type Config struct {
	Dir        string
	Executable string
	// JSON is the path of the report.
	JSON string
	Out  io.Writer
	// Keep leaves the lab up.
	Keep bool
}

const (
	interval   = 2 * time.Second
	keepPoints = 12
	minRecords = 1100
	// dirtyBytes per VM at the recovery site, in blocks of 64 KiB and more:
	// between 64 MB and 5 % of a 4 GiB disk.
	dirtyBytes = 88 << 20
)

// demo is one run.
type demo struct {
	cfg    Config
	begin  time.Time
	lab    *lab.Lab
	client *api.Client
	guests []lab.Guest
	watch  *witness.Watch
	report Report
	mu     sync.Mutex
}

// Run runs the demo and writes the report. Its error says what did not hold.
func Run(ctx context.Context, cfg Config) error {
	d := &demo{cfg: cfg, begin: time.Now(), guests: lab.DefaultGuests(), watch: &witness.Watch{}}
	watchCtx, stopWatch := context.WithCancel(ctx)
	watched := make(chan error, 1)
	go func() { watched <- d.watch.Run(watchCtx) }()
	err := d.run(ctx)
	for _, g := range d.guests {
		d.report.DoubleActiveSeconds = max(d.report.DoubleActiveSeconds, d.watch.DoubleActive(g.UUID()).Seconds())
	}
	stopWatch()
	if werr := <-watched; werr != nil && !errors.Is(werr, context.Canceled) {
		err = errors.Join(err, werr)
	}
	if d.lab != nil && !cfg.Keep {
		err = errors.Join(err, d.lab.Down(context.WithoutCancel(ctx)))
	}
	if err != nil {
		d.report.Failures = append(d.report.Failures, err.Error())
	} else {
		d.report.Failures = append(d.report.Failures, d.judge()...)
	}
	d.report.Seconds = time.Since(d.begin).Seconds()
	d.report.Result = "ok"
	if len(d.report.Failures) > 0 {
		d.report.Result = "failed"
	}
	b, merr := json.MarshalIndent(d.report, "", "  ")
	if merr == nil {
		merr = os.WriteFile(cfg.JSON, append(b, '\n'), 0o644)
	}
	if merr != nil {
		return errors.Join(err, merr)
	}
	d.say("%s; the figures are in %s", d.report.Result, cfg.JSON)
	if len(d.report.Failures) > 0 {
		for _, f := range d.report.Failures {
			d.say("FAILED: %s", f)
		}
		return switchback.Errorf(switchback.CodeInternal, "the demo failed: %d things did not hold", len(d.report.Failures))
	}
	return nil
}

func (d *demo) say(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fmt.Fprintf(d.cfg.Out, "%6.1f s  %s\n", time.Since(d.begin).Seconds(), fmt.Sprintf(format, args...))
}

// each does something for all guests at once.
func (d *demo) each(f func(g lab.Guest) error) error {
	errs := make([]error, len(d.guests))
	var wg sync.WaitGroup
	for i, g := range d.guests {
		wg.Go(func() { errs[i] = f(g) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// operate runs one operation to its end and notes its steps.
func (d *demo) operate(ctx context.Context, vm string, kind recovery.Kind, req api.OperationRequest) (api.Summary, error) {
	var sum api.Summary
	a, err := d.client.Request(ctx, vm, kind, req)
	if err != nil {
		return sum, fmt.Errorf("%s %s: %w", kind, vm, err)
	}
	var rec operation.Record
	if err := d.client.Watch(ctx, a.Operation.ID, func(r operation.Record) { rec = r }); err != nil {
		return sum, err
	}
	d.mu.Lock()
	for _, s := range rec.Steps {
		d.report.Steps = append(d.report.Steps, Step{Operation: rec.Title, Step: s.Name, Seconds: s.EndedAt.Sub(s.StartedAt).Seconds()})
	}
	d.mu.Unlock()
	if rec.State != operation.StateSucceeded {
		return sum, fmt.Errorf("%s %s is %s: %w", kind, vm, rec.State, rec.Error)
	}
	if len(rec.Result) > 0 {
		err = json.Unmarshal(rec.Result, &sum)
	}
	return sum, err
}

func (d *demo) run(ctx context.Context) error {
	var err error
	d.say("two sites on this machine: %s and %s", lab.Primary, lab.Recovery)
	d.lab, err = lab.Up(ctx, lab.Config{Dir: d.cfg.Dir, Executable: d.cfg.Executable, Guests: d.guests, Log: d.say})
	if err != nil {
		return err
	}
	if d.client, err = d.lab.Client(); err != nil {
		return err
	}
	for _, g := range d.guests {
		var n int64
		for _, b := range g.Disks {
			n += b
		}
		d.report.VMs = append(d.report.VMs, VM{Name: g.Name, DiskBytes: n})
		d.report.Failback.DiskBytes += n
	}
	if err := d.each(func(g lab.Guest) error { _, err := d.awaitLine(ctx, lab.Primary, g.Name, 0, "SB CHECKED"); return err }); err != nil {
		return err
	}
	d.say("both guests have booted and write")

	for _, act := range []func(context.Context) error{d.protect, d.cycles, d.drill, d.failover, d.bootRatio, d.killAgent, d.changePoint, d.commit, d.reprotect, d.failback, d.protectAgain} {
		if err := act(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) wan(site string) (witness.Traffic, error) {
	return witness.InterfaceCounters(d.lab.Site(site).NamespacePID(), "wan")
}

func (d *demo) protect(ctx context.Context) error {
	policy := switchback.DefaultPolicy()
	policy.Interval, policy.KeepPoints = interval, keepPoints
	before, err := d.wan(lab.Primary)
	if err != nil {
		return err
	}
	start := time.Now()
	err = d.each(func(g lab.Guest) error {
		sum, err := d.operate(ctx, g.Name, recovery.Protect, api.OperationRequest{To: lab.Recovery, Policy: &policy})
		if err == nil {
			d.say("%s is protected: first copy in %.1f s", g.Name, sum.Copy.Took.Seconds())
		}
		return err
	})
	if err != nil {
		return err
	}
	after, err := d.wan(lab.Primary)
	if err != nil {
		return err
	}
	d.report.Seed.Seconds = time.Since(start).Seconds()
	d.report.Seed.BytesSent = int64(after.Sub(before).TxBytes)
	for _, g := range d.guests {
		for i := range g.Disks {
			var st syscall.Stat_t
			if err := syscall.Stat(d.lab.Site(lab.Primary).HostPath(g.DiskPath(i)), &st); err != nil {
				return err
			}
			d.report.Seed.BytesAllocated += st.Blocks * 512
		}
	}
	d.say("seeded: %d MiB allocated, %d MiB sent", d.report.Seed.BytesAllocated>>20, d.report.Seed.BytesSent>>20)
	return nil
}

func (d *demo) cycles(ctx context.Context) error {
	before, err := d.wan(lab.Primary)
	if err != nil {
		return err
	}
	changed := map[string]int64{}
	for _, g := range d.guests {
		v, err := d.client.VM(ctx, g.Name)
		if err != nil {
			return err
		}
		changed[g.Name] = v.AtSource.Replication.ChangedBytes
	}
	for {
		enough := true
		d.report.Cycles = Cycles{IntervalSeconds: interval.Seconds()}
		for _, g := range d.guests {
			v, err := d.client.VM(ctx, g.Name)
			if err != nil {
				return err
			}
			c, err := witness.ParseConsole(d.lab.Console(lab.Primary, g.Name))
			if err != nil {
				return err
			}
			r := v.AtSource.Replication
			enough = enough && r.Cycles > 8 && c.Last() != nil && c.Last().Acknowledged() >= minRecords
			d.report.Cycles.Count += r.Cycles - 1 // without the seed
			d.report.Cycles.RPO.P50 = max(d.report.Cycles.RPO.P50, r.RPOP50Seconds)
			d.report.Cycles.RPO.P99 = max(d.report.Cycles.RPO.P99, r.RPOP99Seconds)
			d.report.Cycles.BytesChanged += r.ChangedBytes - changed[g.Name]
		}
		if enough {
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
	after, err := d.wan(lab.Primary)
	if err != nil {
		return err
	}
	d.report.Cycles.BytesSent = int64(after.Sub(before).TxBytes)
	d.say("%d cycles: RPO p50 %.1f s, p99 %.1f s; %d KiB changed, %d KiB sent", d.report.Cycles.Count, d.report.Cycles.RPO.P50, d.report.Cycles.RPO.P99,
		d.report.Cycles.BytesChanged>>10, d.report.Cycles.BytesSent>>10)
	return nil
}

// awaitLine waits for a line on a guest's console after an offset.
func (d *demo) awaitLine(ctx context.Context, site, vm string, from int64, prefix string) (time.Time, error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	_, seen, err := witness.AwaitLine(ctx, d.lab.Console(site, vm), from, prefix)
	if err != nil {
		return seen, fmt.Errorf("no line %q on the console of %s at %s: %w", prefix, vm, site, err)
	}
	return seen, nil
}

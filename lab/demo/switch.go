package demo

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/witness"
)

var ring = witness.Ring{Offset: guest.RecordOffset, Slots: guest.Slots}

// diskPaths lists a VM's disk images at a site, as its definition names them.
func (d *demo) diskPaths(ctx context.Context, site, vm string) ([]string, error) {
	out, err := d.lab.Virsh(ctx, site, "domblklist", "--inactive", vm)
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, line := range strings.Split(out, "\n") {
		if f := strings.Fields(line); len(f) == 2 && strings.HasPrefix(f[1], "/") {
			paths = append(paths, d.lab.Site(site).HostPath(f[1]))
		}
	}
	return paths, nil
}

// view lists the NBD exports of a VM's view at a site.
func (d *demo) view(site string, v api.VM, g lab.Guest) []string {
	socket := d.lab.Site(site).HostPath("/run/switchback/" + string(v.ID) + ".view")
	var uris []string
	for i := range g.Disks {
		uris = append(uris, fmt.Sprintf("nbd+unix:///vd%c?socket=%s", 'a'+i, socket))
	}
	return uris
}

// switchAll moves all VMs and lets the witness judge the cut-over.
func (d *demo) switchAll(ctx context.Context, from, to string, kind recovery.Kind, s *Switch) error {
	offsets := map[string]int64{}
	for _, g := range d.guests {
		offsets[g.Name] = witness.ConsoleSize(d.lab.Console(to, g.Name))
	}
	s.DisksIdentical = true
	return d.each(func(g lab.Guest) error {
		if _, err := d.operate(ctx, g.Name, kind, api.OperationRequest{}); err != nil {
			return err
		}
		booted, err := d.awaitLine(ctx, to, g.Name, offsets[g.Name], "SB BOOT")
		if err != nil {
			return err
		}
		if _, err := d.awaitLine(ctx, to, g.Name, offsets[g.Name], "SB CHECKED"); err != nil {
			return err
		}
		outage := booted.Sub(d.lastEnd(g, booted))
		v, err := d.client.VM(ctx, g.Name)
		if err != nil {
			return err
		}
		source, err := d.diskPaths(ctx, from, g.Name)
		if err != nil {
			return err
		}
		return d.judgeSwitch(ctx, g, from, to, source, d.view(to, v, g), outage, s)
	})
}

// lastEnd is when the VM's QEMU at the old side ended.
func (d *demo) lastEnd(g lab.Guest, before time.Time) time.Time {
	var end time.Time
	for _, l := range d.watch.Lifetimes(g.UUID()) {
		if !l.End.IsZero() && l.End.Before(before) && l.End.After(end) {
			end = l.End
		}
	}
	return end
}

func (d *demo) judgeSwitch(ctx context.Context, g lab.Guest, from, to string, source, target []string, outage time.Duration, s *Switch) error {
	console, err := witness.ParseConsole(d.lab.Console(from, g.Name))
	if err != nil {
		return err
	}
	boot := console.Last()
	if boot == nil {
		return fmt.Errorf("the console of %s at %s shows no boot", g.Name, from)
	}
	age, ok := boot.AckAge()
	if !ok {
		return fmt.Errorf("the console of %s at %s shows no power-off", g.Name, from)
	}
	records, err := witness.VerifyRecords(ctx, ring, target...)
	if err != nil {
		return err
	}
	loss := witness.AcknowledgedLost(boot, records)
	var disks []Disk
	identical := true
	for i := range source {
		a, err := witness.SHA256OfDisk(ctx, source[i], witness.SkipHoles)
		if err != nil {
			return err
		}
		b, err := witness.SHA256OfDisk(ctx, target[i], witness.SkipHoles)
		if err != nil {
			return err
		}
		identical = identical && a.SHA256 == b.SHA256 && a.SizeBytes == b.SizeBytes
		disks = append(disks, Disk{VM: g.Name, Disk: fmt.Sprintf("vd%c", 'a'+i), SourceSHA256: a.SHA256, TargetSHA256: b.SHA256})
	}
	d.say("%s runs at %s: %.1f s from power-off to its first line; %d of %d acknowledged writes lost, disks identical: %v",
		g.Name, to, outage.Seconds(), loss.Lost, loss.Acknowledged, identical)
	d.mu.Lock()
	defer d.mu.Unlock()
	s.OutageSeconds = max(s.OutageSeconds, outage.Seconds())
	s.AcknowledgedWritesLost += int64(loss.Lost)
	if s.AcknowledgedWrites == 0 || int64(loss.Acknowledged) < s.AcknowledgedWrites {
		s.AcknowledgedWrites = int64(loss.Acknowledged)
	}
	s.LastAckSeconds = max(s.LastAckSeconds, age.Seconds())
	s.OrderViolations += records.OrderViolations + records.Missing + records.Bad
	s.DisksIdentical = s.DisksIdentical && identical
	s.Disks = append(s.Disks, disks...)
	return nil
}

func (d *demo) failover(ctx context.Context) error {
	d.say("planned failover of both VMs to %s", lab.Recovery)
	return d.switchAll(ctx, lab.Primary, lab.Recovery, recovery.Failover, &d.report.Failover.Switch)
}

// killAgent kills the recovery agent under a guest that reads cold blocks.
func (d *demo) killAgent(ctx context.Context) error {
	g := d.guests[0]
	console := d.lab.Console(lab.Recovery, g.Name)
	c, err := d.lab.Control(ctx, lab.Recovery, g.Name)
	if err != nil {
		return err
	}
	defer c.Close()
	read := make(chan error, 1)
	go func() { read <- c.Check(ctx, g.CheckBytes) }()
	if err := d.lab.KillAgent(lab.Recovery, syscall.SIGKILL); err != nil {
		return err
	}
	time.Sleep(300 * time.Millisecond)
	if err := d.lab.StartAgent(ctx, lab.Recovery); err != nil {
		return err
	}
	if err := <-read; err != nil {
		return fmt.Errorf("the guest's cold read while the agent was killed: %w", err)
	}
	parsed, err := witness.ParseConsole(console)
	if err != nil {
		return err
	}
	d.report.Failover.AgentKilledIOErrors = int64(len(parsed.Last().EIO))
	d.say("the recovery agent was killed (-9) and started again under the cold reads of %s: %d I/O errors", g.Name, d.report.Failover.AgentKilledIOErrors)
	return d.awaitAgent(ctx, lab.Recovery)
}

// awaitAgent waits until the server sees a site's agent as healthy and fresh.
func (d *demo) awaitAgent(ctx context.Context, site string) error {
	since := time.Now()
	for time.Since(since) < 30*time.Second && ctx.Err() == nil {
		agents, err := d.client.Agents(ctx)
		if err != nil {
			return err
		}
		for _, a := range agents {
			if string(a.Site) == site && a.Healthy && a.LastSeen.After(since) {
				return nil
			}
		}
		time.Sleep(100 * time.Millisecond)
	}
	return fmt.Errorf("the agent of %s does not come back", site)
}

func (d *demo) commit(ctx context.Context) error {
	start := time.Now()
	err := d.commitAll(ctx, lab.Recovery, &d.report.Commit)
	d.report.Commit.Seconds = time.Since(start).Seconds()
	if err != nil {
		return err
	}
	d.say("committed at %s in %.1f s while both guests wrote: %d KiB moved; plain disks: %v", lab.Recovery, d.report.Commit.Seconds, d.report.Commit.BytesCopied>>10, d.report.Commit.PlainDisks)
	// The guest must not notice that its agent is gone.
	if err := d.lab.KillAgent(lab.Recovery, syscall.SIGTERM); err != nil {
		return err
	}
	d.report.Commit.RunsWithoutAgent = true
	for _, g := range d.guests {
		c, err := d.lab.Control(ctx, lab.Recovery, g.Name)
		if err != nil {
			return err
		}
		before, err := c.State(ctx)
		if err == nil {
			err = c.Check(ctx, g.CheckBytes)
		}
		after, err2 := c.State(ctx)
		c.Close()
		if err != nil || err2 != nil {
			return fmt.Errorf("%s without its agent: %w", g.Name, firstOf(err, err2))
		}
		if after.Seq <= before.Seq || after.Errors != before.Errors {
			d.report.Commit.RunsWithoutAgent = false
		}
	}
	d.say("the agent of %s was stopped: both guests read and write on: %v", lab.Recovery, d.report.Commit.RunsWithoutAgent)
	if err := d.lab.StartAgent(ctx, lab.Recovery); err != nil {
		return err
	}
	return d.awaitAgent(ctx, lab.Recovery)
}

func firstOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// commitAll commits all VMs, which keep writing, and looks at their definitions.
func (d *demo) commitAll(ctx context.Context, site string, c *Commit) error {
	c.PlainDisks = true
	return d.each(func(g lab.Guest) error {
		sum, err := d.operate(ctx, g.Name, recovery.Commit, api.OperationRequest{Snapshots: "drop"})
		if err != nil {
			return err
		}
		plain := true
		for _, flag := range []string{"", "--inactive"} {
			args := []string{"dumpxml", g.Name}
			if flag != "" {
				args = append(args, flag)
			}
			xml, err := d.lab.Virsh(ctx, site, args...)
			if err != nil {
				return err
			}
			// A plain disk has a source and at most an empty backingStore.
			if strings.Contains(xml, "<backingStore type") || strings.Contains(xml, "overlay") || strings.Contains(xml, "nbd") ||
				strings.Count(xml, "<source file='/") < len(g.Disks) {
				plain = false
			}
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		c.PlainDisks = c.PlainDisks && plain
		c.BytesCopied += sum.Commit.CopiedBytes
		return nil
	})
}

package demo

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/witness"
)

// reprotect changes the VMs' disks and replicates them home by delta, one after
// the other so that the WAN's counter is of one VM.
func (d *demo) reprotect(ctx context.Context) error {
	err := d.each(func(g lab.Guest) error {
		c, err := d.lab.Control(ctx, lab.Recovery, g.Name)
		if err != nil {
			return err
		}
		defer c.Close()
		disk := fmt.Sprintf("vd%c", 'a'+len(g.Disks)-1)
		for _, mix := range []guest.Mix{guest.Random64K, guest.Sequential1M} {
			if _, err := c.Dirty(ctx, guest.Changes{Disk: disk, Bytes: dirtyBytes / 2, Seed: 7, Mix: mix}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	d.say("each guest has written %d MiB at %s", dirtyBytes>>20, lab.Recovery)
	for _, g := range d.guests {
		f, err := d.reprotectOne(ctx, g)
		if err != nil {
			return err
		}
		d.say("%s is protected homewards by delta: %.1f MiB differ, %.1f MiB sent", g.Name, float64(f.BytesChanged)/(1<<20), float64(f.BytesSent)/(1<<20))
		d.report.Failback.VMs = append(d.report.Failback.VMs, f)
		d.report.Failback.BytesSent += f.BytesSent
		d.report.Failback.BytesChanged += f.BytesChanged
	}
	for _, g := range d.guests {
		if _, err := d.operate(ctx, g.Name, recovery.Resume, api.OperationRequest{}); err != nil {
			return err
		}
	}
	return nil
}

func (d *demo) reprotectOne(ctx context.Context, g lab.Guest) (FailbackVM, error) {
	f := FailbackVM{Name: g.Name}
	before, err := d.wan(lab.Recovery)
	if err != nil {
		return f, err
	}
	start := time.Now()
	if _, err := d.operate(ctx, g.Name, recovery.Reprotect, api.OperationRequest{}); err != nil {
		return f, err
	}
	after, err := d.wan(lab.Recovery)
	if err != nil {
		return f, err
	}
	f.Seconds = time.Since(start).Seconds()
	f.BytesSent = int64(after.Sub(before).TxBytes)
	// Held, so that the first point stays what it is while it is looked at.
	if _, err := d.operate(ctx, g.Name, recovery.Pause, api.OperationRequest{}); err != nil {
		return f, err
	}
	points, err := d.client.Points(ctx, g.Name)
	if err != nil {
		return f, err
	}
	if len(points) == 0 || points[0].Sequence != 1 {
		return f, fmt.Errorf("the first homeward point of %s is not there: %v", g.Name, points)
	}
	v, err := d.client.VM(ctx, g.Name)
	if err != nil {
		return f, err
	}
	// The home disks are as they were left: nothing was folded into them yet.
	home, err := d.diskPaths(ctx, lab.Primary, g.Name)
	if err != nil {
		return f, err
	}
	uris, stop, err := d.export(ctx, lab.Primary, v, 1, g)
	if err != nil {
		return f, err
	}
	defer stop()
	for i := range home {
		changes, err := witness.ChangedBlocks(ctx, home[i], uris[i], 64<<10)
		if err != nil {
			return f, err
		}
		f.BytesChanged += changes.Bytes
	}
	return f, nil
}

// export serves a point of a replica at a site, as anybody could.
func (d *demo) export(ctx context.Context, site string, v api.VM, point int, g lab.Guest) ([]string, func(), error) {
	socket := "/run/switchback/look." + string(v.ID)
	cmd := d.lab.Site(site).Command(ctx, d.cfg.Executable, "export", "--replica", v.AtTarget.Replica.Dir, "--point", fmt.Sprint(point), "--socket", socket)
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		os.Remove(d.lab.Site(site).HostPath(socket))
	}
	host := d.lab.Site(site).HostPath(socket)
	for range 500 {
		if _, err := os.Stat(host); err == nil {
			var uris []string
			for i := range g.Disks {
				uris = append(uris, fmt.Sprintf("nbd+unix:///vd%c?socket=%s", 'a'+i, host))
			}
			return uris, stop, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	return nil, nil, fmt.Errorf("the export of point %d does not come up: %s", point, said.String())
}

func (d *demo) failback(ctx context.Context) error {
	// Let the writers of this boot acknowledge enough to be judged by.
	for _, g := range d.guests {
		for {
			c, err := witness.ParseConsole(d.lab.Console(lab.Recovery, g.Name))
			if err != nil {
				return err
			}
			if c.Last() != nil && c.Last().Acknowledged() >= minRecords {
				break
			}
			time.Sleep(200 * time.Millisecond)
		}
	}
	d.say("failback of both VMs to %s", lab.Primary)
	return d.switchAll(ctx, lab.Recovery, lab.Primary, recovery.Failback, &d.report.Failback.Switch)
}

func (d *demo) protectAgain(ctx context.Context) error {
	var c Commit
	if err := d.commitAll(ctx, lab.Primary, &c); err != nil {
		return err
	}
	if !c.PlainDisks {
		return fmt.Errorf("after the commit at %s the disks are not plain", lab.Primary)
	}
	d.say("committed at home")
	err := d.each(func(g lab.Guest) error {
		_, err := d.operate(ctx, g.Name, recovery.Reprotect, api.OperationRequest{})
		return err
	})
	if err != nil {
		return err
	}
	for _, g := range d.guests {
		v, err := d.client.VM(ctx, g.Name)
		if err != nil {
			return err
		}
		if v.Phase != "protected" || string(v.Source) != lab.Primary {
			return fmt.Errorf("%s is %s, active at %s", g.Name, v.Phase, v.Source)
		}
	}
	d.say("protected again towards %s: the loop is closed", lab.Recovery)
	return nil
}

// bootRatio boots a copy of the last VM from the view and from a plain image of
// the same content, in turns, while the other guests hold their writers.
func (d *demo) bootRatio(ctx context.Context) error {
	g := d.guests[len(d.guests)-1]
	for _, x := range d.guests {
		c, err := d.lab.Control(ctx, lab.Recovery, x.Name)
		if err != nil {
			return err
		}
		if _, err := c.Hold(ctx); err != nil {
			return err
		}
		defer c.Close()
		defer c.Go(context.WithoutCancel(ctx))
	}
	v, err := d.client.VM(ctx, g.Name)
	if err != nil {
		return err
	}
	s := d.lab.Site(lab.Recovery)
	uri := d.view(lab.Recovery, v, g)[0]
	dir := "/var/lib/libvirt/images"
	plain := filepath.Join(dir, "probe-plain.qcow2")
	if out, err := s.Command(ctx, "qemu-img", "convert", "-O", "qcow2", inside(uri, v), plain).CombinedOutput(); err != nil {
		return fmt.Errorf("copy of the view: %w: %s", err, out)
	}
	image, err := lab.Image(ctx)
	if err != nil {
		return err
	}
	overlay := func(name, backing, format string) (string, error) {
		path := filepath.Join(dir, name)
		out, err := s.Command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", format, "-b", backing, path).CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("overlay: %w: %s", err, out)
		}
		return path, nil
	}
	boot := func(disk string) (float64, error) {
		w := guest.Workload{MountDisk: "vda", CheckBytes: g.CheckBytes}
		xml, err := guest.DomainXML(guest.Spec{Name: "probe", UUID: "0b7f3ad2-6c11-4b3f-9d55-2f7e1f6f0b01", Type: s.DomainType(), Image: image,
			Disks: []guest.SpecDisk{{Path: disk, Target: "vda"}}, Cmdline: w.Cmdline()})
		if err != nil {
			return 0, err
		}
		file := filepath.Join(d.lab.Dir(), "probe.xml")
		if err := os.WriteFile(file, []byte(xml), 0o644); err != nil {
			return 0, err
		}
		from := witness.ConsoleSize(d.lab.Console(lab.Recovery, "probe"))
		start := time.Now()
		if _, err := d.lab.Virsh(ctx, lab.Recovery, "create", file); err != nil {
			return 0, err
		}
		seen, err := d.awaitLine(ctx, lab.Recovery, "probe", from, "SB CHECKED")
		if err != nil {
			return 0, err
		}
		_, err = d.lab.Virsh(ctx, lab.Recovery, "destroy", "probe")
		return seen.Sub(start).Seconds(), err
	}
	r := &d.report.Failover
	for i := range 3 {
		fromView, err := overlay(fmt.Sprintf("probe-view-%d.qcow2", i), inside(uri, v), "raw")
		if err != nil {
			return err
		}
		fromPlain, err := overlay(fmt.Sprintf("probe-over-%d.qcow2", i), plain, "qcow2")
		if err != nil {
			return err
		}
		a, err := boot(fromView)
		if err != nil {
			return err
		}
		b, err := boot(fromPlain)
		if err != nil {
			return err
		}
		r.BootViewSeconds, r.BootPlainSeconds = append(r.BootViewSeconds, a), append(r.BootPlainSeconds, b)
	}
	r.BootRatio = median(r.BootViewSeconds) / median(r.BootPlainSeconds)
	d.say("boot to a checked disk: %.1f s from the view, %.1f s from a plain image: ratio %.2f", median(r.BootViewSeconds), median(r.BootPlainSeconds), r.BootRatio)
	return nil
}

// inside turns the URI of a view as seen from the machine into the site's own.
func inside(uri string, v api.VM) string {
	export, _, _ := strings.Cut(uri, "?")
	return export + "?socket=/run/switchback/" + string(v.ID) + ".view"
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/replicator"
)

// measureSeed times first full copies of our guest, which is idle. Both sides
// read a pull-mode backup of the running guest, so the frozen disk is the same and
// served by the same QEMU. The peer's time is nbdcopy's alone.
func measureSeed(ctx context.Context, b *bed) ([]entry, error) {
	if err := b.ensureUnprotected(ctx); err != nil {
		return nil, err
	}
	var s samples
	var last replicator.CycleReport
	protected := false
	ours := func(ctx context.Context) error {
		if err := b.settle(); err != nil {
			return err
		}
		r, err := b.protect(ctx, onRequest)
		if err != nil {
			return err
		}
		if r.Mode != replicator.ModeSeed {
			return fmt.Errorf("the first copy was a %s", r.Mode)
		}
		b.say("ours %.2f s: begin %v, transfer %v, %d MiB sent, %s", r.Total.Seconds(), ms(r.Begin), ms(r.Transfer), r.SentBytes>>20, r.Codec)
		s.Ours, last, protected = append(s.Ours, r.Total.Seconds()), r, true
		if len(s.Ours) < b.cfg.runs {
			protected = false
			return b.unprotect(ctx)
		}
		return nil
	}
	peer := func(ctx context.Context) error {
		if protected {
			// Its turn is last in an even number of rounds: the checkpoint must not be in the way.
			if err := b.unprotect(ctx); err != nil {
				return err
			}
			protected = false
		}
		if err := b.settle(); err != nil {
			return err
		}
		d, err := b.nbdcopy(ctx)
		if err != nil {
			return err
		}
		b.say("nbdcopy %.2f s", d.Seconds())
		s.Peer = append(s.Peer, d.Seconds())
		return nil
	}
	if err := alternate(ctx, b.cfg.runs, nil, ours, peer); err != nil {
		return nil, err
	}
	detail := fmt.Sprintf("last: %d MiB read, %d MiB sent, codec %s, begin %v, transfer %v; TLS, checksums, durable", last.ReadBytes>>20, last.SentBytes>>20, last.Codec, ms(last.Begin), ms(last.Transfer))
	return []entry{newEntry("seed_vs_nbdcopy", "s", "nbdcopy --flush --connections=4 from the guest's pull-mode backup to qemu-nbd (fresh qcow2), plain TCP", peerByOurs, s, detail)}, nil
}

func ms(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }

// ensureUnprotected ends the protection of our guest if there is one.
func (b *bed) ensureUnprotected(ctx context.Context) error {
	list, err := b.api.VMs(ctx)
	if err != nil || len(list) == 0 {
		return err
	}
	return b.unprotect(ctx)
}

// nbdcopy copies our guest's frozen disk over the WAN and returns how long the
// copying took.
func (b *bed) nbdcopy(ctx context.Context) (took time.Duration, err error) {
	const port = "10809"
	source, target := b.lab.Site(lab.Primary), b.lab.Site(lab.Recovery)
	socket := "/run/switchback/bench-pull"
	scratch := guest.ImageDir + "/pull-scratch.qcow2"
	backup, err := b.writeXML("pull-backup", fmt.Sprintf(`<domainbackup mode='pull'><server transport='unix' socket='%s'/><disks>`+
		`<disk name='%s' backup='yes' type='file' exportname='%[2]s'><scratch file='%[3]s'/></disk></disks></domainbackup>`, socket, diskName, scratch))
	if err != nil {
		return 0, err
	}
	v := b.virsh[lab.Primary]
	if _, err := v.do(ctx, "backup-begin "+b.ours.name+" "+backup); err != nil {
		return 0, err
	}
	defer func() {
		_, e := v.do(context.WithoutCancel(ctx), "domjobabort "+b.ours.name)
		err = errors.Join(err, e)
	}()
	image := guest.ImageDir + "/nbdcopy.qcow2"
	if out, err := target.Command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", image, fmt.Sprint(b.sizes.disk)).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("qemu-img create: %w: %s", err, out)
	}
	defer os.Remove(target.HostPath(image))
	// The options of our own writer of bases, qemu.StartNBD.
	address := b.lab.Network().B.WANAddr.String()
	server := target.Command(context.WithoutCancel(ctx), "qemu-nbd", "-f", "qcow2", "--cache=writeback", "--discard=unmap", "-t", "-e", "16", "-b", address, "-p", port, image)
	var said strings.Builder
	server.Stderr = &said
	if err := server.Start(); err != nil {
		return 0, err
	}
	defer func() {
		server.Process.Signal(os.Interrupt)
		server.Wait()
	}()
	from, to := fmt.Sprintf("nbd+unix:///%s?socket=%s", diskName, socket), fmt.Sprintf("nbd://%s:%s", address, port)
	for attempt := 0; ; attempt++ {
		out, err := source.Command(ctx, "nbdinfo", "--size", to).CombinedOutput()
		if err == nil {
			break
		}
		if attempt == 100 {
			return 0, fmt.Errorf("qemu-nbd does not answer: %w: %s %s", err, out, said.String())
		}
		time.Sleep(20 * time.Millisecond)
	}
	begin := time.Now()
	if out, err := source.Command(ctx, "nbdcopy", "--flush", "--connections=4", from, to).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("nbdcopy: %w: %s", err, out)
	}
	return time.Since(begin), nil
}

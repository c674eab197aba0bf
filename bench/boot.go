package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
)

// measureBoot starts a guest at the recovery site from a view, as a failover does,
// and from a plain qcow2 with the same content, and waits until it has mounted its
// file system and checked its files. Nothing is in the machine's cache before.
func measureBoot(ctx context.Context, b *bed) ([]entry, error) {
	v, err := b.makeView(ctx)
	defer b.dropView(v)
	if err != nil {
		return nil, err
	}
	const (
		name    = "boot"
		overlay = guest.ImageDir + "/boot-overlay.qcow2"
		local   = guest.ImageDir + "/boot-local.qcow2"
	)
	site := b.lab.Site(lab.Recovery)
	m := newMachine(name)
	plain, err := guest.DomainXML(guest.Spec{Name: name, UUID: m.uuid, Type: site.DomainType(), Image: b.image,
		Disks: []guest.SpecDisk{{Path: local, Target: diskName}}, Cmdline: guest.Workload{MountDisk: diskName, CheckBytes: b.sizes.check}.Cmdline()})
	if err != nil {
		return nil, err
	}
	// The document that a failover makes.
	hv, err := libvirt.New(libvirt.Config{Socket: site.LibvirtSocket()})
	if err != nil {
		return nil, err
	}
	defer hv.Close()
	overView, err := hv.Translate(plain, hypervisor.Translation{Disks: map[string]hypervisor.DiskSource{
		diskName: {Path: overlay, Format: "qcow2", BackingSocket: exportSocket, BackingExport: diskName}}})
	if err != nil {
		return nil, err
	}
	var s samples
	ours := func(ctx context.Context) error {
		if err := b.forgetReplica(v); err != nil {
			return err
		}
		stop, err := b.export(ctx, v)
		if err != nil {
			return err
		}
		defer stop()
		os.Remove(b.recoveryPath(overlay))
		uri := fmt.Sprintf("nbd+unix:///%s?socket=%s", diskName, exportSocket)
		if err := command(site.Command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, overlay)); err != nil {
			return err
		}
		d, err := b.boot(ctx, name, overView)
		b.say("from the view %.2f s", d.Seconds())
		s.Ours = append(s.Ours, d.Seconds())
		return err
	}
	peer := func(ctx context.Context) error {
		os.Remove(b.recoveryPath(local))
		if err := command(site.Command(ctx, "cp", "--sparse=always", v.qcow2, local)); err != nil {
			return err
		}
		for _, path := range []string{local, v.qcow2} {
			if err := forget(b.recoveryPath(path)); err != nil {
				return err
			}
		}
		d, err := b.boot(ctx, name, plain)
		b.say("from a plain qcow2 %.2f s", d.Seconds())
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
	os.Remove(b.recoveryPath(local))
	os.Remove(b.recoveryPath(overlay))
	detail := fmt.Sprintf("%d MiB checked cold, %d segments over the base", b.sizes.check>>20, v.segments)
	return []entry{newEntry("boot_ratio", "s", "plain local qcow2 with the same content", oursByPeer, s, detail)}, nil
}

// boot defines the domain, times it from its start to its CHECKED line and pulls the plug.
func (b *bed) boot(ctx context.Context, name, definition string) (took time.Duration, err error) {
	if err := b.settle(); err != nil {
		return 0, err
	}
	file, err := b.writeXML(name, definition)
	if err != nil {
		return 0, err
	}
	v := b.virsh[lab.Recovery]
	if _, err := v.do(ctx, "define "+file); err != nil {
		return 0, err
	}
	var said int64
	if st, err := os.Stat(b.lab.Console(lab.Recovery, name)); err == nil {
		said = st.Size()
	}
	bounded, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	begin := time.Now()
	if _, err := v.do(ctx, "start "+name); err != nil {
		return 0, err
	}
	err = b.waitConsole(bounded, lab.Recovery, name, said, " CHECKED ")
	took = time.Since(begin)
	if _, derr := v.do(ctx, "destroy "+name); err == nil {
		err = derr
	}
	return took, err
}

// forgetReplica drops all files of the replica from the machine's cache.
func (b *bed) forgetReplica(v *view) error {
	// The bases lie beside the journal.
	return filepath.WalkDir(filepath.Dir(b.recoveryPath(v.dir)), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		return forget(path)
	})
}

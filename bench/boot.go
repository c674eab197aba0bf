package main

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
)

const (
	bootName    = "boot"
	bootOverlay = guest.ImageDir + "/boot-overlay.qcow2"
	bootLocal   = guest.ImageDir + "/boot-local.qcow2"
)

// bootXML is the guest on a plain qcow2, and on an overlay over a view, as a
// failover defines it.
func (b *bed) bootXML() (plain, overView string, err error) {
	site := b.lab.Site(lab.Recovery)
	plain, err = guest.DomainXML(guest.Spec{Name: bootName, UUID: newMachine(bootName).uuid, Type: site.DomainType(), Image: b.image,
		Disks: []guest.SpecDisk{{Path: bootLocal, Target: diskName}}, Cmdline: guest.Workload{MountDisk: diskName, CheckBytes: b.sizes.check}.Cmdline()})
	if err != nil {
		return "", "", err
	}
	hv, err := libvirt.New(libvirt.Config{Socket: site.LibvirtSocket()})
	if err != nil {
		return "", "", err
	}
	defer hv.Close()
	overView, err = hv.Translate(plain, hypervisor.Translation{Disks: map[string]hypervisor.DiskSource{
		diskName: {Path: bootOverlay, Format: "qcow2", BackingSocket: exportSocket, BackingExport: diskName}}})
	return plain, overView, err
}

// bootView opens a view cold and starts the guest over it, as a failover does.
func (b *bed) bootView(ctx context.Context, v *view, overView string) (opened, booted time.Duration, err error) {
	if err := b.forgetReplica(v); err != nil {
		return 0, 0, err
	}
	begin := time.Now()
	stop, err := b.export(ctx, v)
	if err != nil {
		return 0, 0, err
	}
	defer stop()
	opened = time.Since(begin)
	os.Remove(b.recoveryPath(bootOverlay))
	defer os.Remove(b.recoveryPath(bootOverlay))
	uri := fmt.Sprintf("nbd+unix:///%s?socket=%s", diskName, exportSocket)
	if err := command(b.lab.Site(lab.Recovery).Command(ctx, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", uri, bootOverlay)); err != nil {
		return 0, 0, err
	}
	booted, err = b.boot(ctx, bootName, overView)
	b.say("from the view %.2f s, opened in %.2f s", booted.Seconds(), opened.Seconds())
	return opened, booted, err
}

// measureBoot starts a guest at the recovery site from a view, as a failover does,
// and from a plain qcow2 with the same content, and waits until it has mounted its
// file system and checked its files. Nothing is in the machine's cache before.
func measureBoot(ctx context.Context, b *bed) ([]entry, error) {
	v, err := b.makeView(ctx, b.sizes.viewPoints, b.sizes.viewPointChange)
	defer b.dropView(v)
	if err != nil {
		return nil, err
	}
	plain, overView, err := b.bootXML()
	if err != nil {
		return nil, err
	}
	var s samples
	ours := func(ctx context.Context) error {
		_, d, err := b.bootView(ctx, v, overView)
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
	detail := fmt.Sprintf("%d MiB checked cold, %d segments over the base", b.sizes.check>>20, v.segments)
	return []entry{newEntry("boot_ratio", "s", "plain local qcow2 with the same content", oursByPeer, s, detail)}, nil
}

// measureBootPoints starts the guest from the newest of 1,000 points, and from
// the same content with one point over the same base.
func measureBootPoints(ctx context.Context, b *bed) ([]entry, error) {
	const change = 64 << 10
	many, err := b.makeView(ctx, b.sizes.manyPoints, change)
	defer b.dropView(many)
	if err != nil {
		return nil, err
	}
	one := *many
	one.dir, one.segments = many.dir+"-one", 1
	if err := command(b.lab.Site(lab.Recovery).Command(ctx, "cp", "-a", many.dir, one.dir)); err != nil {
		return nil, err
	}
	defer os.RemoveAll(b.recoveryPath(one.dir))
	r, err := journal.Open(b.recoveryPath(one.dir))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var first switchback.Sequence
	for _, p := range r.Points() {
		if first == 0 && p.Sequence > r.Manifest().Base.Sequence {
			first = p.Sequence
		}
	}
	if err := r.Merge(ctx, first, one.point, 0); err != nil {
		return nil, err
	}
	_, overView, err := b.bootXML()
	if err != nil {
		return nil, err
	}
	var s samples
	from := func(v *view, into *[]float64) func(context.Context) error {
		return func(ctx context.Context) error {
			opened, booted, err := b.bootView(ctx, v, overView)
			*into = append(*into, (opened + booted).Seconds())
			return err
		}
	}
	if err := alternate(ctx, 1, nil, from(many, &s.Ours), from(&one, &s.Peer)); err != nil {
		return nil, err
	}
	s = samples{}
	if err := alternate(ctx, b.cfg.runs, nil, from(many, &s.Ours), from(&one, &s.Peer)); err != nil {
		return nil, err
	}
	detail := fmt.Sprintf("%d segments over the base; opening the view is in the figure", many.segments)
	return []entry{newEntry("boot_1000_points", "s", "the view of the same content with one point", oursByPeer, s, detail)}, nil
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

package libvirt

import (
	"context"

	"github.com/beevik/etree"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// BlockCopy starts copying a disk to an image that exists already, and
// follows its writes. The job ends with the domain's process.
func (d *Driver) BlockCopy(ctx context.Context, id switchback.VMUUID, disk string, to hypervisor.CopyTarget) error {
	const op = "libvirt.BlockCopy"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	if to.Path == "" || to.Format == "" || (to.Backing == "") != (to.BackingFormat == "") {
		return wrap(op, switchback.Errorf(switchback.CodeInvalid, "a copy's target and its backing need both path and format"))
	}
	live, err := d.liveDisk(ctx, r, disk)
	if err != nil {
		return wrap(op, err)
	}
	text, err := copyXML(to, live.SelectElement("driver"))
	if err != nil {
		return wrap(op, err)
	}
	flags := uint32(blockCopyReuseExt | blockCopyTransientJob)
	if to.Shallow {
		flags |= blockCopyShallow
	}
	// No typed parameters: bandwidth, granularity and buffer are left to QEMU.
	a := newArgs().domain(r).str(disk).str(text).u32(0).u32(flags)
	err = d.do(ctx, r, procDomainBlockCopy, a, nil)
	return wrap(op, d.stateConflict(ctx, r, "", err))
}

// copyXML describes the target. The cache and discard modes of the disk's
// present driver are kept, for the target becomes the disk.
func copyXML(to hypervisor.CopyTarget, driver *etree.Element) (string, error) {
	doc := etree.NewDocument()
	root := doc.CreateElement("disk")
	root.CreateAttr("type", "file")
	dr := root.CreateElement("driver")
	dr.CreateAttr("type", to.Format)
	if driver != nil {
		for _, name := range []string{"cache", "discard", "detect_zeroes", "io"} {
			if a := driver.SelectAttr(name); a != nil {
				dr.CreateAttr(name, a.Value)
			}
		}
	}
	root.CreateElement("source").CreateAttr("file", to.Path)
	backing := root.CreateElement("backingStore")
	if to.Backing != "" {
		backing.CreateAttr("type", "file")
		backing.CreateElement("format").CreateAttr("type", to.BackingFormat)
		backing.CreateElement("source").CreateAttr("file", to.Backing)
		backing.CreateElement("backingStore")
	}
	return doc.WriteToString()
}

// BlockCommit starts merging a disk's active layer into the image below it.
func (d *Driver) BlockCommit(ctx context.Context, id switchback.VMUUID, disk string) error {
	const op = "libvirt.BlockCommit"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	live, err := d.liveDisk(ctx, r, disk)
	if err != nil {
		return wrap(op, err)
	}
	backing := live.SelectElement("backingStore")
	if backing == nil || backing.SelectElement("source") == nil {
		return wrap(op, conflict("disk %s has no backing image to commit into", disk))
	}
	// Without a base libvirt would merge down to the end of the chain.
	base := sourcePath(backing)
	if index := backing.SelectAttrValue("index", ""); index != "" {
		base = disk + "[" + index + "]"
	}
	a := newArgs().domain(r).str(disk).optional(base).optional("").u64(0).u32(blockCommitActive)
	err = d.do(ctx, r, procDomainBlockCommit, a, nil)
	return wrap(op, d.stateConflict(ctx, r, "", err))
}

// BlockJob returns the progress of a disk's block job.
func (d *Driver) BlockJob(ctx context.Context, id switchback.VMUUID, disk string) (hypervisor.JobProgress, error) {
	const op = "libvirt.BlockJob"
	r, err := ref(id)
	if err != nil {
		return hypervisor.JobProgress{}, wrap(op, err)
	}
	p, found, err := d.blockJob(ctx, r, disk)
	if err == nil && !found {
		err = switchback.Errorf(switchback.CodeNotFound, "disk %s has no block job", disk)
	}
	return p, wrap(op, err)
}

func (d *Driver) blockJob(ctx context.Context, r domainRef, disk string) (p hypervisor.JobProgress, found bool, err error) {
	if off, err := d.isOff(ctx, r); err != nil || off {
		return p, false, err
	}
	err = d.do(ctx, r, procDomainGetBlockJobInfo, newArgs().domain(r).str(disk).u32(0), func(r *result) {
		found = r.i32() != 0
		r.i32() // type
		r.u64() // bandwidth
		p.Current, p.Total = int64(r.u64()), int64(r.u64())
	})
	if err != nil || !found || p.Current < p.Total {
		return p, found, err
	}
	// libvirt pivots only once it has handled QEMU's event, which it shows here.
	live, err := d.liveDisk(ctx, r, disk)
	if err != nil {
		return p, found, err
	}
	mirror := live.SelectElement("mirror")
	p.Ready = mirror != nil && mirror.SelectAttrValue("ready", "") == "yes"
	return p, true, nil
}

// BlockPivot ends a ready job by switching the domain to its target, and
// waits until the job is gone and the domain runs on the target.
func (d *Driver) BlockPivot(ctx context.Context, id switchback.VMUUID, disk string) error {
	const op = "libvirt.BlockPivot"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	p, found, err := d.blockJob(ctx, r, disk)
	switch {
	case err != nil:
		return wrap(op, err)
	case !found:
		return wrap(op, switchback.Errorf(switchback.CodeNotFound, "disk %s has no block job", disk))
	case !p.Ready:
		return wrap(op, conflict("the block job of disk %s is not ready", disk).WithHint("wait until it has caught up"))
	}
	live, err := d.liveDisk(ctx, r, disk)
	if err != nil {
		return wrap(op, err)
	}
	mirror := live.SelectElement("mirror")
	if mirror == nil {
		return wrap(op, conflict("the block job of disk %s ended by itself", disk))
	}
	target := sourcePath(mirror)
	if err := d.do(ctx, r, procDomainBlockJobAbort, newArgs().domain(r).str(disk).u32(blockJobAbortPivot), nil); err != nil {
		return wrap(op, err)
	}
	return wrap(op, await(ctx, func() (bool, error) {
		live, err := d.liveDisk(ctx, r, disk)
		if err != nil || live.SelectElement("mirror") != nil {
			return false, err
		}
		if now := sourcePath(live); now != target {
			return false, conflict("disk %s is on %s after the pivot, not on %s", disk, now, target)
		}
		return true, nil
	}))
}

// BlockAbort ends a disk's block job; the domain stays on its present image.
func (d *Driver) BlockAbort(ctx context.Context, id switchback.VMUUID, disk string) error {
	const op = "libvirt.BlockAbort"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	_, found, err := d.blockJob(ctx, r, disk)
	if err != nil || !found {
		return wrap(op, err)
	}
	err = d.do(ctx, r, procDomainBlockJobAbort, newArgs().domain(r).str(disk).u32(0), nil)
	if err != nil {
		if _, still, e := d.blockJob(ctx, r, disk); e == nil && !still {
			err = nil // it ended by itself
		}
		return wrap(op, err)
	}
	return wrap(op, await(ctx, func() (bool, error) {
		live, err := d.liveDisk(ctx, r, disk)
		return err == nil && live.SelectElement("mirror") == nil, err
	}))
}

// liveDisk returns a disk's element of the live definition. CodeConflict: the
// domain is off; CodeNotFound: it has no such disk.
func (d *Driver) liveDisk(ctx context.Context, r domainRef, disk string) (*etree.Element, error) {
	text, err := d.xml(ctx, r, 0)
	if err != nil {
		return nil, err
	}
	_, root, err := readDocument(text)
	if err != nil {
		return nil, err
	}
	if root.SelectAttr("id") == nil {
		return nil, conflict("the domain is off")
	}
	if e := findDisk(root, disk); e != nil {
		return e, nil
	}
	return nil, switchback.Errorf(switchback.CodeNotFound, "the domain has no disk %s", disk)
}

// findDisk returns the disk with that target device, nil when there is none.
func findDisk(root *etree.Element, name string) *etree.Element {
	for _, e := range root.FindElements("devices/disk") {
		if t := e.SelectElement("target"); t != nil && t.SelectAttrValue("dev", "") == name {
			return e
		}
	}
	return nil
}

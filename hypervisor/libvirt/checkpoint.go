package libvirt

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/beevik/etree"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// CreateCheckpoint starts recording on the named disks. A domain that was
// started paused will do.
func (d *Driver) CreateCheckpoint(ctx context.Context, id switchback.VMUUID, name string, disks []string) error {
	const op = "libvirt.CreateCheckpoint"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	if name == "" || len(disks) == 0 {
		return wrap(op, switchback.Errorf(switchback.CodeInvalid, "a checkpoint needs a name and at least one disk"))
	}
	text, err := checkpointXML(name, disks)
	if err != nil {
		return wrap(op, err)
	}
	err = d.do(ctx, r, procCheckpointCreateXML, newArgs().domain(r).str(text).u32(0), nil)
	return wrap(op, d.stateConflict(ctx, r, name, err))
}

// checkpointXML writes a checkpoint's description
// (https://libvirt.org/formatcheckpoint.html). Disks not listed are left out.
func checkpointXML(name string, disks []string) (string, error) {
	doc := etree.NewDocument()
	root := doc.CreateElement("domaincheckpoint")
	root.CreateElement("name").SetText(name)
	list := root.CreateElement("disks")
	for _, disk := range disks {
		e := list.CreateElement("disk")
		e.CreateAttr("name", disk)
		e.CreateAttr("checkpoint", "bitmap")
	}
	return doc.WriteToString()
}

// Checkpoints lists the domain's checkpoints, parents before children. That
// one is listed does not prove that its bitmap still exists.
func (d *Driver) Checkpoints(ctx context.Context, id switchback.VMUUID) ([]hypervisor.Checkpoint, error) {
	const op = "libvirt.Checkpoints"
	r, err := ref(id)
	if err != nil {
		return nil, wrap(op, err)
	}
	var names []string
	err = d.query(ctx, procListAllCheckpoints, newArgs().domain(r).i32(1).u32(checkpointListTopological), func(r *result) {
		for range r.count(maxCheckpoints, 28) {
			names = append(names, r.str())
			r.domain()
		}
	})
	if err != nil {
		return nil, wrap(op, err)
	}
	out := make([]hypervisor.Checkpoint, 0, len(names))
	for _, name := range names {
		text, err := d.checkpointXML(ctx, r, name, checkpointXMLNoDomain)
		if isNumber(err, errNoCheckpoint) {
			continue
		}
		if err != nil {
			return nil, wrap(op, err)
		}
		c, err := parseCheckpoint(text)
		if err != nil {
			return nil, wrap(op, err)
		}
		out = append(out, c)
	}
	return out, nil
}

func (d *Driver) checkpointXML(ctx context.Context, r domainRef, name string, flags uint32) (text string, err error) {
	err = d.query(ctx, procCheckpointGetXMLDesc, newArgs().checkpoint(r, name).u32(flags), func(r *result) { text = r.str() })
	return text, err
}

func parseCheckpoint(text string) (hypervisor.Checkpoint, error) {
	doc := etree.NewDocument()
	if err := doc.ReadFromString(text); err != nil {
		return hypervisor.Checkpoint{}, fmt.Errorf("parse a checkpoint: %w", err)
	}
	root := doc.Root()
	if root == nil || root.Tag != "domaincheckpoint" {
		return hypervisor.Checkpoint{}, fmt.Errorf("parse a checkpoint: it is none")
	}
	c := hypervisor.Checkpoint{Name: childText(root, "name"), Disks: []string{}}
	if p := root.SelectElement("parent"); p != nil {
		c.Parent = childText(p, "name")
	}
	if seconds, err := strconv.ParseInt(childText(root, "creationTime"), 10, 64); err == nil {
		c.Time = time.Unix(seconds, 0).UTC()
	}
	for _, e := range root.FindElements("disks/disk") {
		if e.SelectAttrValue("checkpoint", "") == "bitmap" {
			c.Disks = append(c.Disks, e.SelectAttrValue("name", ""))
		}
	}
	return c, nil
}

// DeleteCheckpoint drops a checkpoint; libvirt merges what it recorded into
// its parent. Where libvirt can no longer do that, because the domain is off
// or the bitmap is missing from an image, only libvirt's metadata is dropped;
// bitmaps that are left on other disks are then the caller's to remove.
func (d *Driver) DeleteCheckpoint(ctx context.Context, id switchback.VMUUID, name string) error {
	const op = "libvirt.DeleteCheckpoint"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	err = d.deleteCheckpoint(ctx, r, name, 0)
	if err != nil && d.isBitmapGone(ctx, r, name, err) {
		d.log.Debug("dropping a checkpoint whose bitmap is out of reach", "vm", id, "checkpoint", name, "cause", err)
		err = d.deleteCheckpoint(ctx, r, name, checkpointDeleteMetadataOnly)
	}
	return wrap(op, err)
}

func (d *Driver) deleteCheckpoint(ctx context.Context, r domainRef, name string, flags uint32) error {
	err := d.do(ctx, r, procCheckpointDelete, newArgs().checkpoint(r, name).u32(flags), nil)
	if isNumber(err, errNoCheckpoint) {
		return nil
	}
	return err
}

// isBitmapGone reports whether a delete failed because there is no bitmap to
// delete. libvirt says so only in words, so the bitmap is looked at: defining
// the checkpoint again as it is, with validation, fails with a number of its
// own when a bitmap is missing or broken, and else changes nothing.
func (d *Driver) isBitmapGone(ctx context.Context, r domainRef, name string, cause error) bool {
	if numberOf(cause) == 0 || isNumber(cause, errNoDomain, errOperationTimeout) {
		return false
	}
	if off, err := d.isOff(ctx, r); err != nil || off {
		return off
	}
	text, err := d.checkpointXML(ctx, r, name, xmlSecure)
	if err != nil {
		return false
	}
	err = d.do(ctx, r, procCheckpointCreateXML, newArgs().domain(r).str(text).u32(checkpointRedefine|checkpointRedefineValidate), nil)
	return isNumber(err, errCheckpointInconsistent)
}

package simulated

import (
	"context"
	"errors"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// granularity of dirty bitmaps, in bytes.
const granularity = 64 << 10

// checkpoint returns the index of a checkpoint, -1 where there is none.
func (d *domain) checkpoint(name string) int {
	return slices.IndexFunc(d.s.Checkpoints, func(c hypervisor.Checkpoint) bool { return c.Name == name })
}

// since names the bitmaps that together hold what has changed on a disk since
// a checkpoint: its own and those of all later ones, each of which recorded
// until the next was made.
func (d *domain) since(n node, disk, checkpoint string) ([]string, error) {
	at := d.checkpoint(checkpoint)
	if at < 0 {
		return nil, switchback.Errorf(switchback.CodeNotFound, "no checkpoint %s", checkpoint)
	}
	var names []string
	for _, c := range d.s.Checkpoints[at:] {
		if !slices.Contains(c.Disks, disk) {
			continue
		}
		b, ok := n.bitmap(c.Name)
		if !ok || b.Inconsistent {
			return nil, switchback.Errorf(switchback.CodeBitmapLost, "bitmap %s of disk %s is missing or inconsistent", c.Name, disk)
		}
		names = append(names, c.Name)
	}
	if len(names) == 0 {
		return nil, switchback.Errorf(switchback.CodeBitmapLost, "checkpoint %s does not cover disk %s", checkpoint, disk)
	}
	return names, nil
}

// newBitmaps makes a bitmap on each disk and stops the one that recorded.
func (d *domain) newBitmaps(nodes map[string]node, name string, disks []string) []action {
	var actions []action
	for _, disk := range disks {
		n := nodes[d.s.Live.Nodes[disk]]
		for _, b := range n.Bitmaps {
			if b.Recording && b.Persistent && !b.Inconsistent && d.checkpoint(b.Name) >= 0 {
				actions = append(actions, action{"block-dirty-bitmap-disable", args{"node": n.Name, "name": b.Name}})
			}
		}
		actions = append(actions, action{"block-dirty-bitmap-add", args{"node": n.Name, "name": name, "granularity": granularity, "persistent": true}})
	}
	return actions
}

func (d *domain) addCheckpoint(name string, disks []string) error {
	c := hypervisor.Checkpoint{Name: name, Time: time.Now().UTC(), Disks: disks}
	if n := len(d.s.Checkpoints); n > 0 {
		c.Parent = d.s.Checkpoints[n-1].Name
	}
	d.s.Checkpoints = append(d.s.Checkpoints, c)
	d.s.Live.Making = nil
	return d.save()
}

// finishMaking notes a checkpoint whose bitmaps were made when the daemon died,
// or the job failed: a transaction makes all of them or none.
func (d *domain) finishMaking() error {
	c := d.s.Live.Making
	if c == nil {
		return nil
	}
	nodes, err := d.nodes()
	if err != nil {
		return err
	}
	if b, made := nodes[d.s.Live.Nodes[c.Disks[0]]].bitmap(c.Name); made && b.Recording {
		return d.addCheckpoint(c.Name, c.Disks)
	}
	d.s.Live.Making = nil
	return d.save()
}

// CreateCheckpoint starts recording.
func (h *Host) CreateCheckpoint(ctx context.Context, id switchback.VMUUID, name string, disks []string) error {
	d, err := h.running(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	if d.checkpoint(name) >= 0 {
		return switchback.Errorf(switchback.CodeConflict, "checkpoint %s exists", name)
	}
	nodes, err := d.nodes()
	if err != nil {
		return err
	}
	for _, disk := range disks {
		if d.s.Live.Nodes[disk] == "" {
			return switchback.Errorf(switchback.CodeInvalid, "domain %s has no disk %s", id, disk)
		}
	}
	if len(disks) == 0 {
		return switchback.Errorf(switchback.CodeInvalid, "a checkpoint needs disks")
	}
	d.s.Live.Making = &hypervisor.Checkpoint{Name: name, Disks: disks}
	if err := d.save(); err != nil {
		return err
	}
	if err := d.mon.transaction(d.newBitmaps(nodes, name, disks)); err != nil {
		return errors.Join(err, d.finishMaking())
	}
	return d.addCheckpoint(name, disks)
}

// Checkpoints lists them, parents first.
func (h *Host) Checkpoints(ctx context.Context, id switchback.VMUUID) ([]hypervisor.Checkpoint, error) {
	d, err := h.domain(ctx, id)
	if err != nil {
		return nil, err
	}
	defer d.mu.Unlock()
	return append([]hypervisor.Checkpoint{}, d.s.Checkpoints...), nil
}

// DeleteCheckpoint merges a checkpoint's bitmaps into its parent's. Of a domain
// that is off only the metadata goes.
func (h *Host) DeleteCheckpoint(ctx context.Context, id switchback.VMUUID, name string) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	at := d.checkpoint(name)
	if at < 0 {
		return nil
	}
	if d.mon != nil {
		if err := d.dropBitmaps(at); err != nil {
			return err
		}
	}
	c := d.s.Checkpoints[at]
	d.s.Checkpoints = slices.Delete(slices.Clone(d.s.Checkpoints), at, at+1)
	if at < len(d.s.Checkpoints) {
		d.s.Checkpoints[at].Parent = c.Parent
	}
	return d.save()
}

func (d *domain) dropBitmaps(at int) error {
	nodes, err := d.nodes()
	if err != nil {
		return err
	}
	c := d.s.Checkpoints[at]
	var actions []action
	for _, disk := range c.Disks {
		n := nodes[d.s.Live.Nodes[disk]]
		b, ok := n.bitmap(c.Name)
		if !ok {
			continue
		}
		if parent, ok := d.parentBitmap(n, disk, at); ok && !b.Inconsistent {
			if b.Recording {
				actions = append(actions, action{"block-dirty-bitmap-enable", args{"node": n.Name, "name": parent}})
			}
			actions = append(actions, action{"block-dirty-bitmap-merge", args{"node": n.Name, "target": parent, "bitmaps": []string{c.Name}}})
		}
		actions = append(actions, action{"block-dirty-bitmap-remove", args{"node": n.Name, "name": c.Name}})
	}
	return d.mon.transaction(actions)
}

// parentBitmap is the nearest older bitmap of a disk that can be merged into.
func (d *domain) parentBitmap(n node, disk string, at int) (string, bool) {
	for _, c := range slices.Backward(d.s.Checkpoints[:at]) {
		if !slices.Contains(c.Disks, disk) {
			continue
		}
		b, ok := n.bitmap(c.Name)
		return c.Name, ok && !b.Inconsistent
	}
	return "", false
}

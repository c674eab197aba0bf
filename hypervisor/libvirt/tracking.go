package libvirt

import (
	"context"
	"slices"
	"strings"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// libvirt gives the bitmaps of its checkpoints the granularity of the image's
// clusters, 64 KiB as a rule, and has no setting for it. So records of writes
// are bitmaps of our own beside them. They are not persistent: libvirt looks at
// its own bitmaps by name, and at persistent ones where it merges chains.
const (
	recordPrefix = "switchback-writes-"
	// exported is a copy of a record as of its export: a bitmap that goes on
	// recording cannot be exported beside the disk that is written to.
	exported = "switchback-changes"
)

// node is what of an image's node in QEMU is needed here.
type node struct {
	Name    string `json:"node-name"`
	File    string `json:"file"`
	Bitmaps []struct {
		Name        string `json:"name"`
		Granularity int64  `json:"granularity"`
		Recording   bool   `json:"recording"`
	} `json:"dirty-bitmaps"`
}

// records reports whether the node has a bitmap with the record that misses nothing.
func (n node) records(record string) bool {
	for _, m := range n.Bitmaps {
		if m.Name == recordPrefix+record && m.Granularity == hypervisor.FineUnit && m.Recording {
			return true
		}
	}
	return false
}

// ours lists the node's bitmaps that belong to us, but for one.
func (n node) ours(but string) []string {
	var out []string
	for _, m := range n.Bitmaps {
		if m.Name == exported || strings.HasPrefix(m.Name, recordPrefix) && m.Name != recordPrefix+but {
			out = append(out, m.Name)
		}
	}
	return out
}

// nodes returns the node that each disk's device writes to, by target name. A
// disk whose node cannot be told from its path is left out. While a backup job
// is open its filters stand in their place.
func (d *Driver) nodes(ctx context.Context, r domainRef) (map[string]node, error) {
	text, err := d.xml(ctx, r, 0)
	if err != nil {
		return nil, err
	}
	dom, err := parseDomain(text)
	if err != nil {
		return nil, err
	}
	var devices []struct {
		Inserted *node `json:"inserted"`
	}
	if err := d.monitor(ctx, r, "query-block", nil, &devices); err != nil {
		return nil, err
	}
	out := map[string]node{}
	for _, disk := range dom.Disks {
		for _, b := range devices {
			if b.Inserted != nil && b.Inserted.Name != "" && disk.Path != "" && b.Inserted.File == disk.Path {
				out[disk.Name] = *b.Inserted
			}
		}
	}
	return out, nil
}

func addBitmap(node, name string, disabled bool) action {
	return action{"block-dirty-bitmap-add", map[string]any{"node": node, "name": name, "granularity": hypervisor.FineUnit, "persistent": false, "disabled": disabled}}
}

func removeBitmap(node, name string) action {
	return action{"block-dirty-bitmap-remove", map[string]any{"node": node, "name": name}}
}

// TrackWrites implements hypervisor.FineTracker.
func (d *Driver) TrackWrites(ctx context.Context, id switchback.VMUUID, record, keep string, disks []string) (kept map[string]string, err error) {
	const op = "libvirt.TrackWrites"
	r, err := ref(id)
	if err != nil {
		return nil, wrap(op, err)
	}
	nodes, err := d.nodes(ctx, r)
	if err != nil {
		return nil, wrap(op, err)
	}
	kept = map[string]string{}
	var actions []action
	for disk, n := range nodes {
		for _, name := range n.ours(keep) {
			actions = append(actions, removeBitmap(n.Name, name))
		}
		if !slices.Contains(disks, disk) {
			continue
		}
		actions = append(actions, addBitmap(n.Name, recordPrefix+record, false))
		if keep != "" && n.records(keep) {
			kept[disk] = n.Name
		}
	}
	return kept, wrap(op, d.transaction(ctx, r, actions))
}

// ExportWrites implements hypervisor.FineTracker.
func (d *Driver) ExportWrites(ctx context.Context, id switchback.VMUUID, record string, kept map[string]string) error {
	const op = "libvirt.ExportWrites"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	var actions []action
	for _, n := range kept {
		actions = append(actions, addBitmap(n, exported, true),
			action{"block-dirty-bitmap-merge", map[string]any{"node": n, "target": exported, "bitmaps": []string{recordPrefix + record}}})
	}
	if err := d.transaction(ctx, r, actions); err != nil {
		return wrap(op, err)
	}
	for disk, n := range kept {
		name := hypervisor.FineExport(disk)
		export := map[string]any{"type": "nbd", "id": name, "node-name": n, "name": name, "bitmaps": []string{exported}}
		if err := d.monitor(ctx, r, "block-export-add", export, nil); err != nil {
			return wrap(op, err)
		}
	}
	return nil
}

// ForgetWrites implements hypervisor.FineTracker.
func (d *Driver) ForgetWrites(ctx context.Context, id switchback.VMUUID) error {
	const op = "libvirt.ForgetWrites"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	if off, err := d.isOff(ctx, r); err != nil || off || d.cfg.NoMonitor {
		return wrap(op, err)
	}
	nodes, err := d.nodes(ctx, r)
	if err != nil {
		return wrap(op, err)
	}
	var actions []action
	for _, n := range nodes {
		for _, name := range n.ours("") {
			actions = append(actions, removeBitmap(n.Name, name))
		}
	}
	return wrap(op, d.transaction(ctx, r, actions))
}

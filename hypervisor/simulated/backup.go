package simulated

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// openBackup is a backup job. It is saved before its parts are made.
type openBackup struct {
	Socket string   `json:"socket"`
	Disks  []string `json:"disks"`
}

func backupBitmap(disk string) string { return "backup-" + disk }
func backupJob(disk string) string    { return "backup-" + disk }
func scratchNode(disk string) string  { return "scratch-" + disk }

// BeginBackup opens a pull-mode job as libvirt does: scratch images over the
// disks, a copy-before-write job for each, and NBD exports with the union of
// the bitmaps since the checkpoint. The socket is a link to the machine's own.
func (h *Host) BeginBackup(ctx context.Context, id switchback.VMUUID, spec hypervisor.BackupSpec) error {
	d, err := h.running(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	if len(spec.Disks) == 0 {
		return switchback.Errorf(switchback.CodeInvalid, "a backup needs disks")
	}
	if d.s.Live.Backup != nil || len(d.s.Live.Jobs) > 0 {
		return switchback.Errorf(switchback.CodeConflict, "domain %s has a job already", id)
	}
	if spec.Checkpoint != "" && d.checkpoint(spec.Checkpoint) >= 0 {
		return switchback.Errorf(switchback.CodeConflict, "checkpoint %s exists", spec.Checkpoint)
	}
	nodes, err := d.nodes()
	if err != nil {
		return err
	}
	var actions []action
	var disks []string
	for _, disk := range spec.Disks {
		name := d.s.Live.Nodes[disk.Name]
		if name == "" {
			return switchback.Errorf(switchback.CodeInvalid, "domain %s has no disk %s", id, disk.Name)
		}
		disks = append(disks, disk.Name)
		if disk.Incremental == "" {
			continue
		}
		merged, err := d.since(nodes[name], disk.Name, disk.Incremental)
		if err != nil {
			return err
		}
		actions = append(actions,
			action{"block-dirty-bitmap-add", args{"node": name, "name": backupBitmap(disk.Name), "granularity": granularity, "disabled": true}},
			action{"block-dirty-bitmap-merge", args{"node": name, "target": backupBitmap(disk.Name), "bitmaps": merged}})
	}
	if spec.Checkpoint != "" {
		actions = append(actions, d.newBitmaps(nodes, spec.Checkpoint, disks)...)
		d.s.Live.Making = &hypervisor.Checkpoint{Name: spec.Checkpoint, Disks: disks}
	}
	d.s.Live.Backup = &openBackup{Socket: spec.Socket, Disks: disks}
	if err := d.save(); err != nil {
		return err
	}
	err = d.openBackup(spec, actions)
	if err != nil {
		return errors.Join(err, d.finishMaking(), d.endBackup())
	}
	if spec.Checkpoint != "" {
		return d.addCheckpoint(spec.Checkpoint, disks)
	}
	return nil
}

func (d *domain) openBackup(spec hypervisor.BackupSpec, actions []action) error {
	for _, disk := range spec.Disks {
		scratch := imageNode(scratchNode(disk.Name), disk.Scratch, "qcow2")
		scratch["backing"] = d.s.Live.Nodes[disk.Name]
		if err := d.mon.do("blockdev-add", scratch, nil); err != nil {
			return err
		}
		actions = append(actions, action{"blockdev-backup", args{"job-id": backupJob(disk.Name), "device": d.s.Live.Nodes[disk.Name],
			"target": scratchNode(disk.Name), "sync": "none", "auto-dismiss": true}})
	}
	if err := d.mon.transaction(actions); err != nil {
		return err
	}
	for _, disk := range spec.Disks {
		export := args{"type": "nbd", "id": backupJob(disk.Name), "name": disk.Name, "node-name": scratchNode(disk.Name)}
		if disk.Incremental != "" {
			export["bitmaps"] = []string{backupBitmap(disk.Name)}
		}
		if err := d.mon.do("block-export-add", export, nil); err != nil {
			return err
		}
	}
	if err := os.Remove(spec.Socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.Symlink(d.nbdSocket(), spec.Socket)
}

// endBackup takes away whatever parts there are.
func (d *domain) endBackup() error {
	b := d.s.Live.Backup
	if b == nil {
		return nil
	}
	if target, err := os.Readlink(b.Socket); err == nil && target == d.nbdSocket() {
		if err := os.Remove(b.Socket); err != nil {
			return err
		}
	}
	var exports []struct {
		ID string `json:"id"`
	}
	if err := d.mon.do("query-block-exports", nil, &exports); err != nil {
		return err
	}
	for _, e := range exports {
		if slices.ContainsFunc(b.Disks, func(disk string) bool { return e.ID == backupJob(disk) }) {
			if err := d.mon.do("block-export-del", args{"id": e.ID, "mode": "hard"}, nil); err != nil {
				return err
			}
		}
	}
	for _, disk := range b.Disks {
		if err := d.cancelJob(backupJob(disk)); err != nil {
			return err
		}
	}
	nodes, err := d.nodes()
	if err != nil {
		return err
	}
	for _, disk := range b.Disks {
		if _, ok := nodes[scratchNode(disk)]; ok {
			if err := d.deleteNode(scratchNode(disk)); err != nil {
				return err
			}
		}
		name := d.s.Live.Nodes[disk]
		if _, ok := nodes[name].bitmap(backupBitmap(disk)); ok {
			if err := d.mon.do("block-dirty-bitmap-remove", args{"node": name, "name": backupBitmap(disk)}, nil); err != nil {
				return err
			}
		}
	}
	d.s.Live.Backup = nil
	return d.save()
}

// deleteNode closes a node, whose last user may be about to let go of it.
func (d *domain) deleteNode(name string) error {
	var err error
	for range 1000 {
		if err = d.mon.do("blockdev-del", args{"node-name": name}, nil); err == nil || errors.Is(err, errGone) {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return err
}

// EndBackup ends the job. It may have died with its machine.
func (h *Host) EndBackup(ctx context.Context, id switchback.VMUUID) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	if d.mon == nil {
		return nil
	}
	return d.endBackup()
}

// HasBackup reports whether a job is open.
func (h *Host) HasBackup(ctx context.Context, id switchback.VMUUID) (bool, error) {
	d, err := h.domain(ctx, id)
	if err != nil {
		return false, err
	}
	defer d.mu.Unlock()
	return d.mon != nil && d.s.Live.Backup != nil, nil
}

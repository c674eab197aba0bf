package libvirt

import (
	"context"
	"time"

	"github.com/beevik/etree"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// bitmapPrefix precedes a disk's name in the name of its exported bitmap.
const bitmapPrefix = "backup-"

// BeginBackup opens a pull-mode backup job. It refuses at once with
// CodeConflict when any job is under way, because libvirt itself would wait
// 30 s before it says so. When ctx ends early the job may still come to be:
// the caller then ends it with EndBackup.
func (d *Driver) BeginBackup(ctx context.Context, id switchback.VMUUID, spec hypervisor.BackupSpec) error {
	const op = "libvirt.BeginBackup"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	if err := checkBackup(spec); err != nil {
		return wrap(op, err)
	}
	busy, err := d.job(ctx, r)
	if err != nil {
		return wrap(op, err)
	}
	if busy {
		return wrap(op, conflict("another job is under way on the domain").WithHint("if it is a backup left by a dead agent, end it"))
	}
	var checkpoint string
	if spec.Checkpoint != "" {
		var disks []string
		for _, disk := range spec.Disks {
			disks = append(disks, disk.Name)
		}
		if checkpoint, err = checkpointXML(spec.Checkpoint, disks); err != nil {
			return wrap(op, err)
		}
	}
	backup, err := backupXML(spec)
	if err != nil {
		return wrap(op, err)
	}
	begin := newArgs().domain(r).str(backup).optional(checkpoint).u32(backupReuseExternal)
	err = d.do(ctx, r, procBackupBegin, begin, nil)
	return wrap(op, d.stateConflict(ctx, r, spec.Checkpoint, err))
}

// backupReuseExternal is VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL: the scratch
// images exist. Without it libvirt has QEMU make them by a blockdev-create job,
// and while that job runs a query of the block nodes (which virDomainGetBlockInfo
// is, from whatever program) meets a half-open node: QEMU 7.2 then dies of an
// assertion in qcow2_get_specific_info, and the production guest with it (seen).
const backupReuseExternal = 1

func checkBackup(spec hypervisor.BackupSpec) error {
	switch {
	case spec.Socket == "" || len(spec.Socket) > maxSocketPath:
		return switchback.Errorf(switchback.CodeInvalid, "the backup's socket path has %d bytes, 1 to %d are possible", len(spec.Socket), maxSocketPath)
	case len(spec.Disks) == 0:
		return switchback.Errorf(switchback.CodeInvalid, "a backup needs at least one disk")
	}
	for _, disk := range spec.Disks {
		if disk.Name == "" || disk.Scratch == "" {
			return switchback.Errorf(switchback.CodeInvalid, "disk %q of the backup lacks a name or a scratch file", disk.Name)
		}
	}
	return nil
}

// backupXML writes the job's description
// (https://libvirt.org/formatbackup.html). Disks not listed take no part.
func backupXML(spec hypervisor.BackupSpec) (string, error) {
	doc := etree.NewDocument()
	root := doc.CreateElement("domainbackup")
	root.CreateAttr("mode", "pull")
	server := root.CreateElement("server")
	server.CreateAttr("transport", "unix")
	server.CreateAttr("socket", spec.Socket)
	disks := root.CreateElement("disks")
	for _, disk := range spec.Disks {
		e := disks.CreateElement("disk")
		e.CreateAttr("name", disk.Name)
		e.CreateAttr("backup", "yes")
		e.CreateAttr("type", "file")
		e.CreateAttr("exportname", disk.Name)
		if disk.Incremental == "" {
			e.CreateAttr("backupmode", "full")
		} else {
			e.CreateAttr("backupmode", "incremental")
			e.CreateAttr("incremental", disk.Incremental)
			e.CreateAttr("exportbitmap", bitmapPrefix+disk.Name)
		}
		e.CreateElement("driver").CreateAttr("type", "qcow2")
		e.CreateElement("scratch").CreateAttr("file", disk.Scratch)
	}
	return doc.WriteToString()
}

// job reports whether libvirt has an asynchronous job on the domain.
func (d *Driver) job(ctx context.Context, r domainRef) (busy bool, err error) {
	err = d.query(ctx, procDomainGetJobInfo, newArgs().domain(r), func(r *result) { busy = r.i32() != 0 })
	if isNumber(err, errOperationInvalid) { // the domain is off
		return false, nil
	}
	return busy, err
}

// EndBackup ends the domain's backup job and waits until it is gone.
func (d *Driver) EndBackup(ctx context.Context, id switchback.VMUUID) error {
	const op = "libvirt.EndBackup"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	open, err := d.backup(ctx, r)
	if err != nil || !open {
		return wrap(op, err)
	}
	err = d.do(ctx, r, procDomainAbortJob, newArgs().domain(r), nil)
	if err != nil && !isNumber(err, errOperationInvalid) { // it ended by itself
		return wrap(op, err)
	}
	return wrap(op, await(ctx, func() (bool, error) {
		busy, err := d.job(ctx, r)
		return !busy, err
	}))
}

// HasBackup reports whether a backup job is open.
func (d *Driver) HasBackup(ctx context.Context, id switchback.VMUUID) (bool, error) {
	const op = "libvirt.HasBackup"
	r, err := ref(id)
	if err != nil {
		return false, wrap(op, err)
	}
	open, err := d.backup(ctx, r)
	return open, wrap(op, err)
}

// backup reports whether the domain's job is a backup. That there is a job is
// asked first, because libvirtd logs an error for the other question when
// there is none, and it would be asked in every cycle of every domain.
func (d *Driver) backup(ctx context.Context, r domainRef) (bool, error) {
	busy, err := d.job(ctx, r)
	if err != nil || !busy {
		return false, err
	}
	err = d.query(ctx, procBackupGetXMLDesc, newArgs().domain(r).u32(0), func(r *result) { r.str() })
	if isNumber(err, errNoBackup) {
		return false, nil
	}
	return err == nil, err
}

// stateConflict finds out whether a call failed because of the state the domain
// is in: that it is off, or that it has the checkpoint ("" = none was to be
// made) already. libvirt uses general numbers for both.
func (d *Driver) stateConflict(ctx context.Context, r domainRef, checkpoint string, err error) error {
	switch {
	case isNumber(err, errOperationUnsupported, errOperationInvalid):
		if off, e := d.isOff(ctx, r); e == nil && off {
			return &switchback.Error{Code: switchback.CodeConflict, Message: "the domain is off", Err: err}
		}
	case isNumber(err, errOperationFailed) && checkpoint != "":
		if _, e := d.checkpointXML(ctx, r, checkpoint, checkpointXMLNoDomain); e == nil {
			return &switchback.Error{Code: switchback.CodeConflict, Message: "the domain has checkpoint " + checkpoint + " already", Err: err}
		}
	}
	return err
}

// await asks done, ever less often, until it says yes or ctx ends.
func await(ctx context.Context, done func() (bool, error)) error {
	for pause := time.Millisecond; ; pause = min(2*pause, 100*time.Millisecond) {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

package libvirt

import (
	"context"
	"sync"

	"golang.org/x/sync/errgroup"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// Domains lists every domain, defined or only running, in libvirt's order. A
// domain that vanishes while the list is made is left out.
func (d *Driver) Domains(ctx context.Context) ([]hypervisor.Domain, error) {
	const op = "libvirt.Domains"
	var refs []domainRef
	err := d.query(ctx, procConnectListAllDomains, newArgs().i32(1).u32(0), func(r *result) {
		for range r.count(maxDomains, 24) {
			refs = append(refs, r.domain())
		}
	})
	if err != nil {
		return nil, wrap(op, err)
	}
	var (
		mu    sync.Mutex
		found = make(map[domainRef]hypervisor.Domain, len(refs))
		group errgroup.Group
	)
	group.SetLimit(callsPerConn)
	for _, r := range refs {
		group.Go(func() error {
			dom, err := d.describe(ctx, r)
			if isNumber(err, errNoDomain) {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			found[r] = dom
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, wrap(op, err)
	}
	out := make([]hypervisor.Domain, 0, len(refs))
	for _, r := range refs {
		if dom, ok := found[r]; ok {
			out = append(out, dom)
		}
	}
	return out, nil
}

// Domain describes one domain.
func (d *Driver) Domain(ctx context.Context, id switchback.VMUUID) (hypervisor.Domain, error) {
	const op = "libvirt.Domain"
	r, err := ref(id)
	if err != nil {
		return hypervisor.Domain{}, wrap(op, err)
	}
	dom, err := d.describe(ctx, r)
	return dom, wrap(op, err)
}

func (d *Driver) describe(ctx context.Context, r domainRef) (hypervisor.Domain, error) {
	state, reason, err := d.state(ctx, r)
	if err != nil {
		return hypervisor.Domain{}, err
	}
	text, err := d.xml(ctx, r, 0)
	if err != nil {
		return hypervisor.Domain{}, err
	}
	dom, err := parseDomain(text)
	if err != nil {
		return hypervisor.Domain{}, err
	}
	dom.State, dom.PauseReason = stateOf(state, reason)
	if err := d.query(ctx, procDomainIsPersistent, newArgs().domain(r), func(r *result) { dom.Persistent = r.i32() == 1 }); err != nil {
		return hypervisor.Domain{}, err
	}
	if dom.Persistent {
		if err := d.query(ctx, procDomainGetAutostart, newArgs().domain(r), func(r *result) { dom.Autostart = r.i32() == 1 }); err != nil {
			return hypervisor.Domain{}, err
		}
	}
	for i := range dom.Disks {
		if err := d.measure(ctx, r, &dom.Disks[i]); err != nil {
			return hypervisor.Domain{}, err
		}
	}
	return dom, nil
}

// measure fills in a disk's sizes. A disk whose size libvirt cannot tell is
// shown with size 0 and marked, so that one missing file, or one long job,
// does not hide the domain or even all of them.
func (d *Driver) measure(ctx context.Context, r domainRef, disk *hypervisor.Disk) error {
	if disk.Device == "cdrom" || disk.Device == "floppy" {
		return nil
	}
	err := d.do(ctx, r, procDomainGetBlockInfo, newArgs().domain(r).str(disk.Name).u32(0), func(r *result) {
		disk.AllocatedBytes = int64(r.u64())
		disk.SizeBytes = int64(r.u64())
		if physical := int64(r.u64()); disk.AllocatedBytes == 0 {
			disk.AllocatedBytes = physical
		}
	})
	switch {
	case numberOf(err) == 0 || isNumber(err, errNoDomain):
		return err
	case disk.Unsupported == "":
		disk.Unsupported = "its size cannot be read: " + err.Error()
	}
	return nil
}

func (d *Driver) state(ctx context.Context, r domainRef) (state, reason int32, err error) {
	err = d.query(ctx, procDomainGetState, newArgs().domain(r).u32(0), func(r *result) { state, reason = r.i32(), r.i32() })
	return state, reason, err
}

func stateOf(state, reason int32) (hypervisor.State, hypervisor.PauseReason) {
	switch state {
	case domainRunning, domainBlocked:
		return hypervisor.StateRunning, ""
	case domainShutOff:
		return hypervisor.StateOff, ""
	case domainCrashed:
		return hypervisor.StateOther, ""
	case domainPaused:
		switch reason {
		case pausedUser, pausedStartingUp:
			return hypervisor.StatePaused, hypervisor.PauseUser
		case pausedIOError:
			return hypervisor.StatePaused, hypervisor.PauseIOError
		}
		return hypervisor.StatePaused, hypervisor.PauseOther
	}
	return hypervisor.StateOther, ""
}

// isOff reports whether the domain has no process.
func (d *Driver) isOff(ctx context.Context, r domainRef) (bool, error) {
	state, _, err := d.state(ctx, r)
	return state == domainShutOff || state == domainCrashed, err
}

func (d *Driver) xml(ctx context.Context, r domainRef, flags uint32) (text string, err error) {
	err = d.query(ctx, procDomainGetXMLDesc, newArgs().domain(r).u32(flags), func(r *result) { text = r.str() })
	return text, err
}

// Definition returns the domain's XML with its secrets. For a domain that is
// off, live makes no difference.
func (d *Driver) Definition(ctx context.Context, id switchback.VMUUID, live bool) (string, error) {
	const op = "libvirt.Definition"
	r, err := ref(id)
	if err != nil {
		return "", wrap(op, err)
	}
	flags := uint32(xmlSecure | xmlInactive)
	if live {
		flags = xmlSecure
	}
	text, err := d.xml(ctx, r, flags)
	return text, wrap(op, err)
}

// Define makes or replaces a persistent domain. A running domain keeps its
// live configuration until it is off. CodeConflict: the name belongs to
// another UUID or the UUID to another name.
func (d *Driver) Define(ctx context.Context, definition string) (hypervisor.Domain, error) {
	const op = "libvirt.Define"
	parsed, err := parseDomain(definition)
	if err != nil {
		return hypervisor.Domain{}, wrap(op, err)
	}
	var lane domainRef
	if parsed.UUID != "" {
		if lane, err = ref(parsed.UUID); err != nil {
			return hypervisor.Domain{}, wrap(op, err)
		}
	}
	var made domainRef
	err = d.do(ctx, lane, procDomainDefineXMLFlags, newArgs().str(definition).u32(0), func(r *result) { made = r.domain() })
	if err != nil {
		// libvirt reports a clash of name and UUID as "operation failed".
		if isNumber(err, errOperationFailed) {
			err = &switchback.Error{Code: switchback.CodeConflict, Message: "the name or UUID is taken, or the host cannot take it", Err: err}
		}
		return hypervisor.Domain{}, wrap(op, err)
	}
	dom, err := d.describe(ctx, made)
	return dom, wrap(op, err)
}

// Undefine removes the persistent definition and what belongs to it. A domain
// that runs goes on as a transient one.
func (d *Driver) Undefine(ctx context.Context, id switchback.VMUUID) error {
	const op = "libvirt.Undefine"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	const flags = undefineManagedSave | undefineSnapshotsMetadata | undefineNVRAM | undefineCheckpointsMetadata
	err = d.do(ctx, r, procDomainUndefineFlags, newArgs().domain(r).u32(flags), nil)
	if isNumber(err, errNoDomain) {
		return nil
	}
	return wrap(op, err)
}

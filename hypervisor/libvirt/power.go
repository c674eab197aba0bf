package libvirt

import (
	"context"
	"errors"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// Start starts a defined domain. A managed save image is restored, as with
// any other start.
func (d *Driver) Start(ctx context.Context, id switchback.VMUUID, paused bool) error {
	const op = "libvirt.Start"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	var flags uint32
	if paused {
		flags = startPaused
	}
	return wrap(op, d.do(ctx, r, procDomainCreateWithFlags, newArgs().domain(r).u32(flags), nil))
}

// Resume lets a paused domain run on. One that runs already is no error.
func (d *Driver) Resume(ctx context.Context, id switchback.VMUUID) error {
	const op = "libvirt.Resume"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	err = d.do(ctx, r, procDomainResume, newArgs().domain(r), nil)
	if isNumber(err, errOperationInvalid) {
		if state, _, e := d.state(ctx, r); e == nil && state == domainRunning {
			return nil
		}
	}
	return wrap(op, err)
}

// Suspend stops a domain's virtual CPUs. One that is paused already is no error.
func (d *Driver) Suspend(ctx context.Context, id switchback.VMUUID) error {
	const op = "libvirt.Suspend"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	return wrap(op, d.do(ctx, r, procDomainSuspend, newArgs().domain(r), nil))
}

const (
	// shutdownPoll is how often the state is looked at beside the events.
	shutdownPoll = time.Second
	// shutdownRepeat is when the guest is asked again: one that is still
	// booting does not see the first request.
	shutdownRepeat = 10 * time.Second
)

// Shutdown asks the guest to power off, through its agent where it has one and
// else by ACPI, and waits until the domain is off.
func (d *Driver) Shutdown(ctx context.Context, id switchback.VMUUID, o hypervisor.ShutdownOptions) error {
	const op = "libvirt.Shutdown"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	if o.Deadline <= 0 {
		return wrap(op, switchback.Errorf(switchback.CodeInvalid, "a shutdown needs a deadline"))
	}
	state, _, err := d.state(ctx, r)
	switch {
	case err != nil:
		return wrap(op, err)
	case state == domainShutOff || state == domainCrashed:
		return nil
	case state == domainPaused && !o.Force:
		return wrap(op, conflict("the domain is paused, so its guest cannot shut down").WithHint("resume it, or force it off"))
	case state == domainPaused:
		return d.Destroy(ctx, id)
	}
	limited, cancel := context.WithTimeoutCause(ctx, o.Deadline, errDeadline)
	defer cancel()
	err = d.shutdown(limited, id, r)
	if err == nil || ctx.Err() != nil || !errors.Is(context.Cause(limited), errDeadline) {
		return wrap(op, err)
	}
	if o.Force {
		d.log.Warn("guest did not shut down in time, pulling the plug", "vm", id, "deadline", o.Deadline)
		return d.Destroy(ctx, id)
	}
	return wrap(op, switchback.Errorf(switchback.CodeTimeout, "the guest did not shut down within %s", o.Deadline).
		WithHint("shut it down from inside, or force it off"))
}

var errDeadline = errors.New("the guest's deadline has passed")

func (d *Driver) shutdown(ctx context.Context, id switchback.VMUUID, r domainRef) error {
	// Subscribed before the guest is asked, so that its end cannot be missed.
	sub, stop := context.WithCancel(ctx)
	defer stop()
	events, err := d.Events(sub)
	if err != nil {
		return err
	}
	// A guest that powers off must not be started again by on_poweroff=restart.
	err = d.do(ctx, r, procSetLifecycleAction, newArgs().domain(r).u32(lifecyclePowerOff).u32(lifecycleActionDestroy).u32(affectLive), nil)
	if err != nil && !isNumber(err, errOperationInvalid, errNoDomain) {
		return fmt.Errorf("override on_poweroff: %w", err)
	}
	poll := time.NewTicker(shutdownPoll)
	defer poll.Stop()
	var asked time.Time
	for {
		if time.Since(asked) >= shutdownRepeat {
			asked = time.Now()
			err := d.do(ctx, r, procDomainShutdownFlags, newArgs().domain(r).u32(0), nil)
			if err != nil && !isNumber(err, errOperationInvalid, errNoDomain, errAgentUnresponsive) {
				return err
			}
		}
		off, err := d.isOff(ctx, r)
		if off || isNumber(err, errNoDomain) { // a transient domain is gone with its process
			return nil
		}
		if err != nil && switchback.CodeOf(err) != switchback.CodeUnavailable {
			return err
		}
		for looked := false; !looked; {
			select {
			case e, open := <-events:
				if !open {
					events = nil
				}
				looked = e.UUID == id && e.Kind == hypervisor.EventStopped
			case <-poll.C:
				looked = true
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
}

// Destroy ends the domain's process: first with SIGTERM, upon which QEMU
// stores its bitmaps, then with SIGKILL.
func (d *Driver) Destroy(ctx context.Context, id switchback.VMUUID) error {
	const op = "libvirt.Destroy"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	err = d.do(ctx, r, procDomainDestroyFlags, newArgs().domain(r).u32(0), nil)
	if isNumber(err, errOperationInvalid) {
		if off, e := d.isOff(ctx, r); e == nil && off {
			return nil
		}
	}
	return wrap(op, err)
}

// SetAutostart says whether the domain starts with the host.
func (d *Driver) SetAutostart(ctx context.Context, id switchback.VMUUID, on bool) error {
	const op = "libvirt.SetAutostart"
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	return wrap(op, d.do(ctx, r, procDomainSetAutostart, newArgs().domain(r).flag(on), nil))
}

// AgentPing asks the guest agent for a sign of life. CodeUnsupported: the
// domain has no agent channel; CodeUnavailable: nobody answers.
func (d *Driver) AgentPing(ctx context.Context, id switchback.VMUUID, timeout time.Duration) error {
	const op = "libvirt.AgentPing"
	_, err := d.agent(ctx, id, `{"execute":"guest-ping"}`, timeout)
	return wrap(op, err)
}

// Freeze implements hypervisor.Freezer through the guest agent, all file
// systems at once.
func (d *Driver) Freeze(ctx context.Context, id switchback.VMUUID) error {
	return d.fileSystems(ctx, "libvirt.Freeze", id, procDomainFSFreeze)
}

// Thaw implements hypervisor.Freezer.
func (d *Driver) Thaw(ctx context.Context, id switchback.VMUUID) error {
	return d.fileSystems(ctx, "libvirt.Thaw", id, procDomainFSThaw)
}

func (d *Driver) fileSystems(ctx context.Context, op string, id switchback.VMUUID, p procedure) error {
	r, err := ref(id)
	if err != nil {
		return wrap(op, err)
	}
	// No mount points named: all of them.
	return wrap(op, d.do(ctx, r, p, newArgs().domain(r).u32(0).u32(0), nil))
}

// agent sends one command to the guest agent and returns its JSON answer.
func (d *Driver) agent(ctx context.Context, id switchback.VMUUID, command string, timeout time.Duration) (answer string, err error) {
	r, err := ref(id)
	if err != nil {
		return "", err
	}
	seconds := max(1, int32((timeout+time.Second-1)/time.Second))
	err = d.do(ctx, r, procAgentCommand, newArgs().domain(r).str(command).i32(seconds).u32(0), func(r *result) { answer = r.optional() })
	return answer, err
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/hypervisor"
)

// Leases end for all VMs at once where a site is cut off, and each VM must be off
// or paused within fencing.StopWithin. So all are paused first, side by side, and
// then turned off; one that hangs holds up no other for longer than these bounds.
const (
	pauseWithin = 2 * time.Second
	offWithin   = 4 * time.Second
)

// leaseFacts are what is decided from, read together and anew; on is whether the domain is.
type leaseFacts func(v *vm, on bool) (fencing.Standing, fencing.Moment, error)

// watchLeases ends leases until ctx ends, whatever else looks after a VM.
func (a *Agent) watchLeases(ctx context.Context) {
	for ; ctx.Err() == nil; sleep(ctx, lookEvery) {
		if err := a.endLeases(ctx, a.withoutLease(), (*vm).facts); err != nil && ctx.Err() == nil {
			a.log.Warn("a VM without lease is not stopped, trying again", "error", err)
		}
	}
}

// withoutLease lists the VMs that may not run on for want of a lease.
func (a *Agent) withoutLease() (list []*vm) {
	for _, v := range a.all() {
		as := v.assignment()
		if as.VM == "" || as.Role == "" {
			continue
		}
		s, m, _ := v.facts(false) // of memory: never fails
		if d := fencing.Decide(s, m); s.Policy.Lease > 0 && !d.MayStart && d.State != fencing.StateElsewhere {
			list = append(list, v)
		}
	}
	return list
}

// facts are the agent's own.
func (v *vm) facts(on bool) (fencing.Standing, fencing.Moment, error) {
	v.granting.Lock()
	defer v.granting.Unlock()
	return v.standing(), v.moment(on), nil
}

// endLeases turns VMs off, or pauses them, whose lease has ended.
func (a *Agent) endLeases(ctx context.Context, list []*vm, facts leaseFacts) error {
	var mu sync.Mutex
	var errs []error
	each := func(list []*vm, within time.Duration, do func(context.Context, *vm) error) {
		var wg sync.WaitGroup
		for _, v := range list {
			wg.Go(func() {
				c, cancel := context.WithTimeout(ctx, within)
				defer cancel()
				if err := do(c, v); err != nil {
					mu.Lock()
					defer mu.Unlock()
					errs = append(errs, fmt.Errorf("VM %s: %w", v.assignment().Name, err))
				}
			})
		}
		wg.Wait()
	}
	var off []*vm
	each(list, pauseWithin, func(ctx context.Context, v *vm) error {
		d, err := v.pauseWithoutLease(ctx, facts)
		if d.Act == fencing.ActStop {
			mu.Lock()
			defer mu.Unlock()
			off = append(off, v)
		}
		return err
	})
	each(off, offWithin, func(ctx context.Context, v *vm) error {
		if err := v.lockBegin(ctx); err != nil {
			return err
		}
		defer v.beginning.Unlock()
		s, m, err := facts(v, true)
		if err != nil || fencing.Decide(s, m).Act != fencing.ActStop { // renewed meanwhile: it goes on as one that was paused
			return err
		}
		return ignoreMissing(a.hv.Destroy(ctx, v.assignment().VM))
	})
	return errors.Join(errs...)
}

// lockBegin waits for a start that is at work, as long as ctx lasts.
func (v *vm) lockBegin(ctx context.Context) error {
	for !v.beginning.TryLock() {
		if sleep(ctx, 20*time.Millisecond); ctx.Err() != nil {
			return fmt.Errorf("it is being started: %w", ctx.Err())
		}
	}
	return nil
}

// pauseWithoutLease pauses a VM whose lease has ended, and says what is to become
// of it. That is noted before, so that it comes back with the lease.
func (v *vm) pauseWithoutLease(ctx context.Context, facts leaseFacts) (none fencing.Decision, err error) {
	a, as := v.agent, v.assignment()
	if err := v.lockBegin(ctx); err != nil {
		return none, err
	}
	defer v.beginning.Unlock()
	dom, err := a.hv.Domain(ctx, as.VM)
	if err != nil {
		return none, ignoreMissing(err)
	}
	s, m, err := facts(v, dom.State != hypervisor.StateOff)
	if err != nil {
		return none, err
	}
	d := fencing.Decide(s, m)
	if d.Act != fencing.ActStop && d.Act != fencing.ActSuspend || d.Act == fencing.ActSuspend && dom.State == hypervisor.StatePaused {
		return none, nil
	}
	a.log.Warn("the VM may not run on without a lease", "vm", as.Name, "state", d.State, "why", d.Why, "act", d.Act)
	if !s.Leaving && !s.Superseded() {
		if err := a.markRun("ended", as.VM); err != nil {
			return d, err
		}
	}
	if dom.State == hypervisor.StateRunning {
		if err := a.hv.Suspend(ctx, as.VM); err != nil {
			return d, fmt.Errorf("pause it: %w", err)
		}
	}
	return d, nil
}

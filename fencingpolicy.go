package switchback

import "time"

// LeaseEnd is what becomes of a VM whose lease has ended.
type LeaseEnd string

const (
	LeaseEndStop    LeaseEnd = "stop"    // turned off; the default
	LeaseEndSuspend LeaseEnd = "suspend" // paused, and resumed once the lease is renewed
)

// minLease leaves time for some renewals that are lost.
const minLease = 10 * time.Second

// FencingPolicy says how a site behaves that hears from nobody. The zero value
// is the default: a VM that runs goes on, one that would start after a reboot of
// its host is held.
type FencingPolicy struct {
	// Lease, where it is not 0, is how long the VM may run without its site having
	// been confirmed as the active one. A takeover without proof that the old side
	// is off waits until it has ended.
	Lease time.Duration `json:"lease,omitempty"`
	// OnLeaseEnd is what happens then; empty is stop.
	OnLeaseEnd LeaseEnd `json:"on_lease_end,omitempty"`
	// StartUnconfirmedAfter is how long a site that boots and hears from nobody
	// holds the VM before it is let start all the same; 0 = for ever.
	StartUnconfirmedAfter time.Duration `json:"start_unconfirmed_after,omitempty"`
}

// Validate reports the first setting that cannot work.
func (p FencingPolicy) Validate() error {
	switch {
	case p.Lease != 0 && p.Lease < minLease:
		return Errorf(CodeInvalid, "a lease of %v leaves no time to renew it", p.Lease).WithHint("choose %v or more, or 0 for none", minLease)
	case p.StartUnconfirmedAfter < 0:
		return Errorf(CodeInvalid, "a VM cannot be held for %v", p.StartUnconfirmedAfter).WithHint("0 = until it is confirmed")
	case p.Lease != 0 && p.StartUnconfirmedAfter != 0:
		return Errorf(CodeInvalid, "a VM that runs only under a lease cannot start unconfirmed").WithHint("choose the lease or the start after a time")
	}
	switch p.OnLeaseEnd {
	case "", LeaseEndStop, LeaseEndSuspend:
		return nil
	}
	return Errorf(CodeInvalid, "unknown end of a lease %q", p.OnLeaseEnd).WithHint("stop or suspend")
}

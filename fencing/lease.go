package fencing

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
)

const (
	// Drift bounds by how much the clock of one host may be faster than another's: one part in Drift.
	Drift = 100
	// StopWithin bounds how long it takes from the end of a lease until the VM is off or paused.
	StopWithin = 10 * time.Second
)

// TakeoverWait is how long a new side waits that cannot prove that the old one
// is off, counted by its own clock from when it stopped renewing the old side's
// lease, and the server had minted the new epoch: then every lease has ended, by
// the slowest clock, and every VM under it is off. 0: the policy has no lease,
// and no wait would help.
func TakeoverWait(p switchback.FencingPolicy) time.Duration {
	if p.Lease == 0 {
		return 0
	}
	all := p.Lease + StopWithin
	return all + all/Drift*2 + time.Second
}

// Takeover is what a new side notes when it becomes active without proof that
// the old one is off.
type Takeover struct {
	Epoch switchback.Epoch `json:"epoch"`
	Boot  string           `json:"boot"`
	// Since is when this side became active, and so stopped renewing.
	Since Instant `json:"since"`
	// Wait is TakeoverWait of the policy then.
	Wait time.Duration `json:"wait"`
}

// Remaining is how long to wait until the VM may be started. After a reboot, whose
// clock says nothing of the one before, it is counted anew: up is when the agent
// first looked after the VM in this boot.
func (t Takeover) Remaining(boot string, up, now Instant) time.Duration {
	since := t.Since
	if t.Boot != boot {
		since = up
	}
	return max(0, since.Add(t.Wait).Sub(now))
}

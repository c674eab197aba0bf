package fencing

import (
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Instant is a time by a host's own clock, counted from its boot.
type Instant time.Duration

// Add is the instant so much later.
func (i Instant) Add(d time.Duration) Instant { return i + Instant(d) }

// Sub is the time from j to i.
func (i Instant) Sub(j Instant) time.Duration { return time.Duration(i - j) }

// Grant lets a VM be started. It stands under /run: none survives a reboot, and
// the boot's name in it sees to that where /run is not what it should be.
type Grant struct {
	Epoch switchback.Epoch `json:"epoch"`
	Boot  string           `json:"boot"`
	// Until is the end of the lease; 0 = without end.
	Until Instant `json:"until"`
	// By says who confirmed: a server or agent, a command, the policy or an override.
	By string `json:"by"`
}

// Moment is what is so at an agent's host at the moment of a decision.
type Moment struct {
	Now  Instant
	Boot string
	// Up is when the agent first looked after the VM in this boot.
	Up Instant
	// Grant is the one that stands; zero = none.
	Grant Grant
	// Running: it is on, be it paused, since no start is needed to let that one run.
	Running bool
}

// Grantors that are no agent or server.
const (
	ByCommand  = "command"
	ByPolicy   = "policy"
	ByOverride = "override"
)

// State is how a VM stands with its grant.
type State string

const (
	// StateGranted: it may be started, and run.
	StateGranted State = "granted"
	// StateHeld: it waits for somebody to confirm that it is active here.
	StateHeld State = "held"
	// StateLeaving: it is being moved away, and not started any more.
	StateLeaving State = "leaving"
	// StateTakingOver: it is active here, and waits for the old side's lease to end.
	StateTakingOver State = "taking-over"
	// StateLeaseEnded: nobody renewed its lease; it does not run until somebody does.
	StateLeaseEnded State = "lease-ended"
	// StateSuperseded: it is active elsewhere under a newer epoch.
	StateSuperseded State = "superseded"
	// StateElsewhere: by its role it does not run here.
	StateElsewhere State = "elsewhere"
	// StateContested: it was started by hand with nobody's confirmation.
	StateContested State = "contested"
)

// Act is what is to be done about a VM that runs, or does not.
type Act string

const (
	ActNone    Act = ""
	ActStop    Act = "stop"
	ActSuspend Act = "suspend"
	// ActGrant: write the decision's grant.
	ActGrant Act = "grant"
)

// Decision is what Decide says.
type Decision struct {
	State State
	// MayStart: a start is not refused. A grant that stands and may not be used is withdrawn.
	MayStart bool
	Act      Act
	// Grant is the one to write (ActGrant).
	Grant Grant
	// Why says what is missing, in words for an operator; empty when it may start.
	Why string
}

// valid: the grant is of this boot and epoch, and its lease has not ended.
func (g Grant) valid(s Standing, m Moment) bool {
	if g.Boot != m.Boot || g.Epoch != s.Epoch || g.Epoch == 0 {
		return false
	}
	if g.Until == 0 {
		return s.Policy.Lease == 0
	}
	return m.Now < g.Until
}

// lasts: it is a lease of this boot that has not ended. Of whichever epoch it is,
// nobody else has started the VM before its end: one that runs where the epoch
// is being changed goes on, while it takes a grant of the new epoch to start it.
func (g Grant) lasts(m Moment) bool { return g.Boot == m.Boot && m.Now < g.Until }

// Decide says what holds for a VM now. It is asked again and again, and after
// each change of what it is given.
func Decide(s Standing, m Moment) Decision {
	stop := func(d Decision) Decision {
		if m.Running {
			d.Act = ActStop
		}
		return d
	}
	switch {
	case s.Contested:
		d := Decision{State: StateContested, MayStart: true}
		if m.Grant.Boot != m.Boot || m.Grant.Epoch != s.Epoch || m.Grant.By != ByOverride {
			d.Act, d.Grant = ActGrant, Grant{Epoch: s.Epoch, Boot: m.Boot, By: ByOverride}
		}
		return d
	case !s.Role.Owns():
		return stop(Decision{State: StateElsewhere, Why: fmt.Sprintf("its role here is %s", s.Role)})
	case s.Superseded():
		return stop(Decision{State: StateSuperseded, Why: fmt.Sprintf("it is active at site %s (epoch %d, this site holds %d)", s.Heard.Site, s.Heard.Epoch, s.Epoch)})
	case s.Takeover != nil && s.Takeover.Remaining(m.Boot, m.Up, m.Now) > 0:
		return stop(Decision{State: StateTakingOver, Why: fmt.Sprintf("the lease of the other side may still have %v", s.Takeover.Remaining(m.Boot, m.Up, m.Now).Round(time.Second))})
	case m.Grant.valid(s, m):
		if s.Leaving {
			return Decision{State: StateLeaving, Why: "it is being shut down, or was, to be moved to the other site"}
		}
		return Decision{State: StateGranted, MayStart: true}
	case s.Policy.Lease > 0:
		d := Decision{State: StateHeld, Why: "it needs a lease, which neither the server nor the peer has given since this host booted"}
		lasts := m.Grant.lasts(m)
		if m.Grant.Until != 0 && !lasts {
			d.State, d.Why = StateLeaseEnded, "neither the server nor the peer has renewed its lease"
		}
		if m.Running && !lasts {
			d.Act = ActStop
			if s.Policy.OnLeaseEnd == switchback.LeaseEndSuspend {
				d.Act = ActSuspend
			}
		}
		return d
	}
	if s.Leaving {
		return Decision{State: StateLeaving, Why: "it is being shut down, or was, to be moved to the other site"}
	}
	d := Decision{State: StateHeld, Why: "neither the server nor the peer has confirmed since this host booted that it is active here"}
	// A newer epoch for this very site is under way with a command.
	if after := s.Policy.StartUnconfirmedAfter; after > 0 && s.Heard.Epoch <= s.Epoch && m.Now.Sub(m.Up) >= after {
		d.Act, d.Grant = ActGrant, Grant{Epoch: s.Epoch, Boot: m.Boot, By: ByPolicy}
	}
	return d
}

// Confirm is the grant after an answer that confirmed. asked is when the question
// left: the lease runs from there, since the answer may have been long on its way.
func Confirm(s Standing, boot string, asked Instant, by string) Grant {
	g := Grant{Epoch: s.Epoch, Boot: boot, By: by}
	if s.Policy.Lease > 0 {
		g.Until = asked.Add(s.Policy.Lease)
	}
	return g
}

// Renews reports whether the new grant is to stand in the old one's place. An
// answer that was overtaken by a later one shortens no lease.
func (g Grant) Renews(old Grant) bool {
	switch {
	case g.Boot != old.Boot || g.Epoch != old.Epoch, old.By == ByPolicy || old.By == ByOverride:
		return true
	case (g.Until == 0) != (old.Until == 0): // the policy has changed
		return true
	}
	return g.Until > old.Until
}

package agent

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/fencing"
)

// Override is a start by hand with nobody's confirmation.
type Override struct {
	Reason string           `json:"reason"`
	At     time.Time        `json:"at"`
	Epoch  switchback.Epoch `json:"epoch"`
	// By is the user at the agent's host.
	By string `json:"by"`
}

// site is the agent's own.
func (a *Agent) site() switchback.SiteID { return a.own }

// standing is what package fencing decides from.
func (x *Assignment) standing(site switchback.SiteID) fencing.Standing {
	return fencing.Standing{Site: site, Role: x.Role, Epoch: x.Epoch, Heard: x.Heard, Contested: x.Override != nil, Leaving: x.Leaving,
		Takeover: x.Takeover, Policy: x.Policy.Fencing}
}

// take puts back what a decision has changed.
func (x *Assignment) take(s fencing.Standing) {
	x.Role, x.Epoch, x.Heard, x.Leaving, x.Takeover = s.Role, s.Epoch, s.Heard, s.Leaving, s.Takeover
	if !s.Contested {
		x.Override = nil
	}
}

// become gives the assignment a role under an epoch, by a command that was admitted.
func (x *Assignment) become(r agentapi.Role, e switchback.Epoch) {
	x.take(x.standing("").Become(r, e))
}

func (v *vm) standing() fencing.Standing {
	a := v.assignment()
	return a.standing(v.agent.site())
}

// moment is what is so now; running, which matters for what is to be done only, is
// what the caller has seen of the domain.
func (v *vm) moment(running bool) fencing.Moment {
	v.mu.Lock()
	defer v.mu.Unlock()
	return fencing.Moment{Now: hostClock(), Boot: v.agent.boot.name, Up: v.agent.boot.up, Grant: v.grant, Running: running}
}

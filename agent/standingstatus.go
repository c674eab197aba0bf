package agent

import (
	"fmt"
	"maps"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/fencing"
)

// ownership is how the VM stands with its right to run, and what is wrong with it.
func (v *vm) ownership() (*agentapi.Ownership, []switchback.Condition) {
	as, s := v.assignment(), v.standing()
	if as.VM == "" || !s.Role.Owns() && !s.Contested {
		return nil, nil
	}
	m := v.moment(false)
	d := fencing.Decide(s, m)
	v.mu.Lock()
	powered := v.powered
	o := &agentapi.Ownership{State: d.State, Why: d.Why, ConfirmedBy: m.Grant.By, ConfirmedAt: v.confirmed, Autostart: as.Autostart}
	v.mu.Unlock()
	if m.Grant.Until != 0 {
		o.LeaseSeconds = max(0, m.Grant.Until.Sub(m.Now).Seconds())
	}
	since := as.heldSince(m)
	var list []switchback.Condition
	add := func(name string, severity switchback.Severity, cause, remedy string, at time.Time) {
		list = append(list, switchback.Condition{Name: name, Severity: severity, Cause: cause, Remedy: remedy, Since: at})
	}
	switch d.State {
	case fencing.StateHeld:
		if powered {
			add("running-unconfirmed", switchback.SeverityWarning, "the VM runs, though "+d.Why, "mend the way of this agent to the server or to its peer", since)
			break
		}
		remedy := v.remedy(as, d)
		if after := s.Policy.StartUnconfirmedAfter; after > 0 {
			remedy += fmt.Sprintf("; by its policy it may start unconfirmed %v after the boot", after)
		}
		add("start-held", switchback.SeverityWarning, "the VM is held: "+d.Why, remedy, since)
	case fencing.StateLeaseEnded:
		add("lease-ended", switchback.SeverityCritical, "the VM does not run: "+d.Why, v.remedy(as, d), since)
	case fencing.StateSuperseded:
		add("superseded", switchback.SeverityCritical, d.Why, "it is fenced here; nothing is to be done", since)
	case fencing.StateContested:
		o.Override = &agentapi.Override{Reason: as.Override.Reason, By: as.Override.By, At: as.Override.At, Epoch: as.Override.Epoch}
		add("contested", switchback.SeverityCritical, fmt.Sprintf("the VM was let start at site %s by hand, by %s, with nobody's confirmation: %s", v.agent.site(), as.Override.By, as.Override.Reason),
			fmt.Sprintf("look at both copies and name the winner: switchback vm resolve %s --winner SITE", as.Name), as.Override.At)
	case fencing.StateGranted:
		if m.Grant.By == fencing.ByPolicy {
			add("running-unconfirmed", switchback.SeverityWarning, "nobody has confirmed that the VM is active here; its policy lets it start all the same",
				"mend the way of this agent to the server or to its peer", since)
		}
	}
	return o, list
}

// heldSince is when this boot began, as a time of day.
func (x *Assignment) heldSince(m fencing.Moment) time.Time {
	return time.Now().Add(-m.Now.Sub(m.Up)).Truncate(time.Second)
}

// serverError is why the server does not say who is active; nil when it does.
func (a *Agent) serverError() error {
	a.asks.mu.Lock()
	defer a.asks.mu.Unlock()
	return a.asks.err
}

// named finds a VM by name, UUID or protection.
func (a *Agent) named(name string) (*vm, error) {
	var found []*vm
	for _, v := range a.all() {
		if as := v.assignment(); as.Name == name || string(as.VM) == name || string(as.Protection) == name {
			found = append(found, v)
		}
	}
	if len(found) != 1 {
		known := map[string]bool{}
		for _, v := range a.all() {
			known[v.assignment().Name] = true
		}
		return nil, switchback.Errorf(switchback.CodeNotFound, "%d VMs of this agent are called %q", len(found), name).
			WithHint("it looks after %v", slices.Sorted(maps.Keys(known)))
	}
	return found[0], nil
}

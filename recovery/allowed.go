// Package recovery decides what may happen to a protected VM: which operations
// its phase allows, and why not. It is pure: no I/O, no clock.
//
//	unprotected → seeding → protected → switching → switched → committing → committed → reprotecting → protected …
//	                                        ↘ undoing ↙ (cancel, or a failed planned switch) → protected
package recovery

import (
	"fmt"

	switchback "github.com/switchback-dr/switchback"
)

// Kind names an operation on a protected VM.
type Kind string

const (
	Protect   Kind = "protect"
	Unprotect Kind = "unprotect"
	TakePoint Kind = "take-point"
	Failover  Kind = "failover"
	Commit    Kind = "commit"
	// Cancel undoes an uncommitted switch, or stops the operation under way.
	Cancel    Kind = "cancel"
	Reprotect Kind = "reprotect"
	Failback  Kind = "failback"
	Pause     Kind = "pause"
	Resume    Kind = "resume"
	Edit      Kind = "edit"
	Retry     Kind = "retry"
	// ChangePoint moves a switched VM to another point, or back to kept writes.
	ChangePoint Kind = "change-point"
	// Extend moves or stops the countdown of the commit policy.
	Extend Kind = "extend"
	// DropSnapshot deletes what an abandoned run wrote.
	DropSnapshot Kind = "drop-snapshot"
	// DropKept deletes the points that a commit has kept.
	DropKept Kind = "drop-kept"
)

// Kinds in the order they are shown.
var Kinds = []Kind{TakePoint, TestFailover, CleanDrill, Failover, Failback, ChangePoint, Commit, Cancel, Extend, Reprotect, Pause, Resume, Edit, Retry, DropSnapshot, DropKept, Resolve, Unprotect}

// Allowed says whether an operation may be asked for now; Reason and Remedy why not.
type Allowed struct {
	Kind    Kind   `json:"kind"`
	Allowed bool   `json:"allowed"`
	Reason  string `json:"reason,omitempty"`
	Remedy  string `json:"remedy,omitempty"`
}

// Facts are what the decision needs beside the protection itself.
type Facts struct {
	// Running names the kind of the operation under way; "" = none.
	Running string
	// RunningID is its ID. Cancellable says whether it can be cancelled, and
	// if not NotCancellable why.
	RunningID      switchback.OperationID
	Cancellable    bool
	NotCancellable string
	// Failed is set when the last operation failed and can be retried.
	Failed bool
	// FailedKind names it.
	FailedKind string
	// SourceUp and TargetUp: the agents answer.
	SourceUp, TargetUp bool
	// Points is how many points the target holds.
	Points int
	// SeedPercent of the first full copy.
	SeedPercent float64
	// KeptDisks: the other site keeps the VM's disks from before.
	KeptDisks bool
	// Drill is of an axis of its own.
	Drill DrillFacts
	// Contested are the sites where a copy was let start by hand.
	Contested []switchback.SiteID
	// Snapshots is how many are kept at both sites.
	Snapshots int
}

// AllowedOperations lists every operation with its verdict.
func AllowedOperations(p switchback.Protection, f Facts) []Allowed {
	list := make([]Allowed, len(Kinds))
	for i, k := range Kinds {
		list[i] = Check(p, f, k)
	}
	return list
}

// Find returns the verdict on one operation from a list of them.
func Find(list []Allowed, k Kind) Allowed {
	for _, a := range list {
		if a.Kind == k {
			return a
		}
	}
	return Allowed{Kind: k, Reason: "unknown operation"}
}

// Check decides one operation.
func Check(p switchback.Protection, f Facts, k Kind) Allowed {
	no := func(reason, remedy string) Allowed { return Allowed{Kind: k, Reason: reason, Remedy: remedy} }
	yes := Allowed{Kind: k, Allowed: true}

	if k == TestFailover || k == CleanDrill {
		return checkDrill(p, f, k)
	}
	if f.Running != "" {
		if k == Cancel {
			if !f.Cancellable {
				return no(f.NotCancellable, "let it finish")
			}
			return yes
		}
		return no(fmt.Sprintf("operation %s (%s) is under way", f.RunningID, f.Running), "wait for it: switchback operation watch "+string(f.RunningID))
	}
	if k == Retry && f.Failed {
		if a, decided := CheckRetry(f); decided {
			return a
		}
	} else if a, decided := checkContest(f, k); decided {
		return a
	}
	if k == Retry {
		if !f.Failed {
			return no("no operation of this VM has failed", "")
		}
		return yes
	}
	phase := func(reason, remedy string, phases ...switchback.Phase) (Allowed, bool) {
		for _, ph := range phases {
			if p.Phase == ph {
				return yes, true
			}
		}
		return no(reason, remedy), false
	}
	in := fmt.Sprintf("the VM is %s", p.Phase)
	up := func(a Allowed) Allowed {
		if !f.SourceUp {
			return no(fmt.Sprintf("the agent of site %s does not answer", p.Source), "start the agent, or mend the network to it")
		}
		if !f.TargetUp {
			return no(fmt.Sprintf("the agent of site %s does not answer", p.Target), "start the agent, or mend the network to it")
		}
		return a
	}

	switch k {
	case TakePoint:
		if a, ok := phase(in, remedyFor(p, f, "points are taken while it is protected"), switchback.PhaseProtected); !ok {
			return a
		}
		return up(yes)
	case Failover, Failback:
		if k == Failback && p.Phase == switchback.PhaseCommitted && p.Source != p.Home {
			return up(yes)
		}
		if a, ok := phase(in, remedyFor(p, f, "only a protected VM can be moved"), switchback.PhaseProtected); !ok {
			return a
		}
		if k == Failback && !p.Homeward() {
			return no(fmt.Sprintf("the VM is at its home %s already", p.Home), "to move it away, use failover")
		}
		if f.Points == 0 && f.TargetUp {
			return no("no recovery point yet", "wait for the first one")
		}
		return up(yes)
	case Commit:
		if a, ok := phase(in, "only a switched VM can be committed: fail over first", switchback.PhaseSwitched); !ok {
			return a
		}
		if !f.SourceUp {
			return no(fmt.Sprintf("the agent of site %s, where the VM runs, does not answer", p.Source), "start the agent")
		}
		return yes
	case Cancel:
		if a, ok := phase(in, "there is nothing to cancel", switchback.PhaseSwitched); !ok && !changeFailed(p, f) {
			return a
		}
		return up(yes)
	case ChangePoint:
		switch p.Phase {
		case switchback.PhaseCommitting:
			return no("the switch is being committed: its points are going", "let the commit end; a new failover has new points")
		case switchback.PhaseCommitted:
			if p.KeptPoints {
				return no("the switch is committed: the points that it has kept are only to be read", "'switchback replica export' reads them; a new failover has new points")
			}
			return no("the switch is committed: the points are gone", "reprotect it; a new failover has new points")
		}
		if a, ok := phase(in, "only a VM that is switched and not committed changes its point: fail over first", switchback.PhaseSwitched); !ok && !changeFailed(p, f) {
			return a
		}
		if !f.SourceUp {
			return no(fmt.Sprintf("the agent of site %s, where the VM runs, does not answer", p.Source), "start the agent")
		}
		return yes
	case Extend:
		if a, ok := phase(in, "only a switched VM has a countdown", switchback.PhaseSwitched); !ok {
			return a
		}
		if p.Switch == nil || p.Switch.Deadline.IsZero() {
			return no("no countdown runs", "commit or cancel when you are ready")
		}
		return yes
	case DropKept:
		if !p.KeptPoints {
			return no("no commit has kept points", "there is nothing to drop")
		}
		a, _ := phase(in, "wait until it is protected or committed", switchback.PhaseCommitted, switchback.PhaseProtected)
		return a
	case DropSnapshot:
		if f.Snapshots == 0 {
			return no("no snapshot is kept", "there is nothing to drop")
		}
		a, _ := phase(in, "wait until it is protected, switched or committed", switchback.PhaseProtected, switchback.PhaseSwitched, switchback.PhaseCommitted)
		return a
	case Reprotect:
		if a, ok := phase(in, remedyFor(p, f, "only a committed VM is reprotected"), switchback.PhaseCommitted); !ok {
			return a
		}
		if !f.KeptDisks && f.TargetUp {
			return no(fmt.Sprintf("site %s keeps no disks of this VM", p.Target), "unprotect the VM and protect it anew: that copies everything")
		}
		return up(yes)
	case Pause:
		if p.Paused {
			return no("replication is paused already", "resume it")
		}
		a, _ := phase(in, "", switchback.PhaseProtected, switchback.PhaseSeeding)
		return a
	case Resume:
		if !p.Paused {
			return no("replication is not paused", "")
		}
		a, _ := phase(in, "", switchback.PhaseProtected, switchback.PhaseSeeding)
		return a
	case Edit:
		a, _ := phase(in, "the policy can be changed while it is protected", switchback.PhaseProtected)
		return a
	case Unprotect:
		a, _ := phase(in, remedyFor(p, f, "commit or cancel first"), switchback.PhaseProtected, switchback.PhaseSeeding, switchback.PhaseCommitted, switchback.PhaseUnprotected, switchback.PhaseReprotecting)
		return a
	}
	return no("unknown operation", "")
}

// changeFailed: a change of the point did not come about. The VM is then at the
// new side, perhaps off, and can be moved to yet another point, or taken back.
func changeFailed(p switchback.Protection, f Facts) bool {
	return p.Phase == switchback.PhaseSwitching && f.Failed && f.FailedKind == string(ChangePoint)
}

// remedyFor says how to get from the present phase to what most operations need.
func remedyFor(p switchback.Protection, f Facts, fallback string) string {
	switch p.Phase {
	case switchback.PhaseSeeding:
		return fmt.Sprintf("no recovery point yet: wait for the first full copy, %.0f %%", f.SeedPercent)
	case switchback.PhaseSwitched:
		return "commit the switch or cancel it"
	case switchback.PhaseCommitted:
		return "reprotect it first"
	case switchback.PhaseSwitching, switchback.PhaseUndoing, switchback.PhaseCommitting, switchback.PhaseReprotecting:
		return "the last operation did not end well: retry it"
	}
	return fallback
}

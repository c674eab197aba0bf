package recovery

import (
	"fmt"

	switchback "github.com/switchback-dr/switchback"
)

const (
	// TestFailover runs a copy of a recovery point on an isolated network: a drill.
	TestFailover Kind = "test-failover"
	// CleanDrill ends a drill that is kept, or clears what one has left.
	CleanDrill Kind = "clean-drill"
)

// DrillFacts are what decides about drills.
type DrillFacts struct {
	// Running is the drill under way; "" = none.
	Running switchback.OperationID
	// Left counts drills of which something is left at the target with no
	// operation at work on it.
	Left int
	// Described: the target keeps the VM's definition, so that the source need
	// not be asked.
	Described bool
}

// checkDrill decides the operations of the drill axis. They and all others go
// past each other: nothing but a move of the VM keeps a drill from beginning,
// and a drill keeps nothing from beginning.
func checkDrill(p switchback.Protection, f Facts, k Kind) Allowed {
	no := func(reason, remedy string) Allowed { return Allowed{Kind: k, Reason: reason, Remedy: remedy} }
	yes := Allowed{Kind: k, Allowed: true}
	if k == CleanDrill {
		switch {
		case f.Drill.Running == "" && f.Drill.Left == 0:
			return no("no drill of this VM is under way, and none has left anything", "to begin one, use test-failover")
		case !f.TargetUp && f.Drill.Running == "":
			return no(fmt.Sprintf("the agent of site %s does not answer", p.Target), "start the agent, or mend the network to it")
		}
		return yes
	}
	switch {
	case p.Phase != switchback.PhaseProtected:
		return no(fmt.Sprintf("the VM is %s", p.Phase), remedyFor(p, f, "drills are made from recovery points: protect it"))
	case f.Running != "":
		return no(fmt.Sprintf("operation %s (%s) is under way", f.RunningID, f.Running), "wait for it: switchback operation watch "+string(f.RunningID))
	case f.Drill.Running != "":
		return no(fmt.Sprintf("drill %s is under way", f.Drill.Running), fmt.Sprintf("wait for it, or end it: switchback vm drill clean %s", p.Name))
	case !f.SourceUp && !f.Drill.Described:
		return no(fmt.Sprintf("the agent of site %s, which knows the VM's definition, does not answer, and site %s keeps none", p.Source, p.Target), "start the agent, or mend the network to it")
	case !f.TargetUp:
		return no(fmt.Sprintf("the agent of site %s does not answer", p.Target), "start the agent, or mend the network to it")
	case f.Points == 0:
		return no("no recovery point yet", "wait for the first one")
	}
	return yes
}

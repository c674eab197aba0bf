package switchback

// Phase is where a protected VM stands in its life. A phase is entered only
// when what it says has been verified; failure is not a phase.
type Phase string

const (
	// PhaseUnprotected: not replicated. Left by protect, to seeding.
	PhaseUnprotected Phase = "unprotected"
	// PhaseSeeding: the first full copy runs. Left by the first recovery point, to protected.
	PhaseSeeding Phase = "seeding"
	// PhaseProtected: points are taken. Left by failover (to switching) or unprotect.
	PhaseProtected Phase = "protected"
	// PhaseSwitching: a failover or failback is moving the VM. Left to
	// switched when it runs and is checked at the target, or to undoing.
	PhaseSwitching Phase = "switching"
	// PhaseSwitched: active at the target, uncommitted; the old copy and all
	// points are intact. Left by commit (to committing) or cancel (to undoing).
	PhaseSwitched Phase = "switched"
	// PhaseUndoing: the new side is being turned off and the old side on again. Left to protected.
	PhaseUndoing Phase = "undoing"
	// PhaseCommitting: the replica is collapsing into plain local disks. Left to committed.
	PhaseCommitting Phase = "committing"
	// PhaseCommitted: active on plain local disks, not protected. Left by
	// reprotect (to reprotecting) or finalize (to unprotected).
	PhaseCommitted Phase = "committed"
	// PhaseReprotecting: the other site is being brought up to date. Left by
	// the first point in the new direction, to protected.
	PhaseReprotecting Phase = "reprotecting"
)

// Package operation makes runs durable: protect, failover, commit and the rest
// are operations, each a list of steps, that go on or undo themselves whatever
// process dies at whatever line.
//
// # The rule
//
// A step's intention is persisted, its effect is done, its outcome is
// persisted. A process that dies in between leaves a step in state running, of
// which nobody knows whether the effect took place; whoever takes the operation
// over runs the step again. Therefore
//
//   - Do and Undo must be idempotent. Run.Key names the effect, and a result
//     that Run.SetResult has returned from is durable and found again by
//     Run.StepResult, also by the same step when it is repeated;
//   - Undo is called for every step that has begun, also for one that failed or
//     whose outcome is unknown, in reverse order. It must do nothing where there
//     is nothing to undo;
//   - Do and Undo must return soon after their context is done, and must have
//     no effect after they returned.
//
// # Who runs it
//
// A lease in the store (owner, epoch, until) names the one Runner that works on
// an operation. Taking the lease raises its epoch; every write names owner and
// epoch and is refused when they are not the newest, and a Runner that cannot
// renew in time cancels the steps' contexts before the lease ends. A lease may
// be taken when it has expired, or at once by a Runner with the same owner
// name: that is a restarted process. Two living processes must not share an
// owner name. Run.Fence is the number to hand to whoever must refuse commands of
// a former owner.
//
// At most one unfinished operation exists per protection; the store refuses a
// second one.
//
// # States
//
//	awaiting-approval (where a second person has to agree: Approve)
//	  │
//	  ▼
//	queued ──▶ running ──▶ succeeded
//	  │          │  ▲
//	  │          │  └── Retry ──┐
//	  │          ├───────────▶ failed     (nothing to undo, or past the irreversible step)
//	  │          ▼               ▲  │
//	  │        undoing ──────────┘  │     (an Undo failed; Retry resumes undoing)
//	  │          │  ▲──── Cancel ───┘
//	  │          ├──▶ undone              (a step failed)
//	  └──────────┴──▶ cancelled           (Cancel was called)
//
// Machine.Next decides, without I/O; Runner does.
package operation

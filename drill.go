package switchback

import "time"

// DrillPolicy says how a VM is drilled without being asked.
type DrillPolicy struct {
	// Schedule is a cron expression of five fields, or @daily and the like, in
	// the server's time zone; "" = none.
	Schedule string `json:"schedule,omitempty"`
	// Interval is within what time a drill has to have passed; past it the VM
	// shows "drill-due". 0 = no demand.
	Interval time.Duration `json:"interval,omitempty"`
	// OnTag drills each point when it gets a tag that begins so; "" = none.
	OnTag string `json:"on_tag,omitempty"`
	// Network is the isolated network that drills use at the target; "" = the
	// copy has no network.
	Network string `json:"network,omitempty"`
}

// DrillAxis is where a VM stands with its drills: an axis of its own, since a
// drill touches neither the VM nor its replication.
type DrillAxis struct {
	// Operation is the drill under way; "" = none.
	Operation OperationID `json:"operation,omitempty"`
	// Last is the newest drill that ended, Passed the newest that passed.
	Last   *DrillProof `json:"last,omitempty"`
	Passed *DrillProof `json:"passed,omitempty"`
	// ScheduledAt is when the schedule was last served (or began).
	ScheduledAt time.Time `json:"scheduled_at,omitzero"`
	// OnTag is the newest point that was drilled because of its tag.
	OnTag Sequence `json:"on_tag,omitempty"`
	// Release is the drill that is to end now instead of being kept.
	Release OperationID `json:"release,omitempty"`
}

// DrillProof says what a drill has shown.
type DrillProof struct {
	At       time.Time   `json:"at"`
	Sequence Sequence    `json:"sequence"`
	Time     time.Time   `json:"point_time"` // of the point
	Passed   bool        `json:"passed"`
	Report   OperationID `json:"report"`
}

// DueAt is when the next drill must have passed; zero = there is no demand.
func (d DrillPolicy) DueAt(axis DrillAxis, since time.Time) time.Time {
	if d.Interval <= 0 {
		return time.Time{}
	}
	if axis.Passed != nil {
		since = axis.Passed.At
	}
	return since.Add(d.Interval)
}

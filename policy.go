package switchback

import "time"

// Policy is what an operator asks of the replication of one VM.
type Policy struct {
	// Interval is the time between the starts of two cycles; from 1 s. It is the RPO target.
	Interval time.Duration `json:"interval"`
	// KeepPoints, where it is not 0, replaces the tiers of Retention: that many of
	// the newest points are kept.
	KeepPoints int `json:"keep_points"`
	// Retention says which points are kept.
	Retention Retention `json:"retention,omitzero"`
	// Compression is "auto" (by link and processor speed), "none", "s2" or "zstd".
	Compression string `json:"compression"`
	// Encrypt: points are encrypted where they are kept, with keys of the target's agent.
	Encrypt bool `json:"encrypt,omitempty"`
	// OffloadAfter, where it is not 0, is the age at which the data of points is
	// moved to the object store of the target's agent.
	OffloadAfter time.Duration `json:"offload_after,omitempty"`
	// Checks judge the guest after each start: failover, failback, drill.
	Checks []GuestCheck `json:"checks,omitempty"`
	// Drill says how the VM is drilled without being asked; nil = not at all.
	Drill *DrillPolicy `json:"drill,omitempty"`
	// AppConsistentEvery is how often a point is application-consistent: the
	// guest's file systems are frozen through its agent at its instant. 0 = never.
	AppConsistentEvery time.Duration `json:"app_consistent_every,omitempty"`
	// Commit says what becomes of a switch that nobody commits or cancels.
	Commit CommitPolicy `json:"commit,omitzero"`
	// Fencing says how a site behaves that hears from nobody.
	Fencing FencingPolicy `json:"fencing,omitzero"`
	// VerifyEvery is how often all of the replica is read in the background and
	// compared with its checksums; 0 is the default, a week, and negative never.
	VerifyEvery time.Duration `json:"verify_every,omitempty"`
}

// VerifyInterval is VerifyEvery with its default; 0 means never.
func (p Policy) VerifyInterval() time.Duration {
	if p.VerifyEvery == 0 {
		return 7 * 24 * time.Hour
	}
	return max(0, p.VerifyEvery)
}

// CommitAction is what a commit policy does when its time has passed.
type CommitAction string

const (
	// CommitNone: a switch waits for an operator, for ever.
	CommitNone CommitAction = "none"
	// CommitCommit makes the switch final.
	CommitCommit CommitAction = "commit"
	// CommitUndo takes the switch back: the old side runs again.
	CommitUndo CommitAction = "undo"
)

// CommitPolicy is a timer on a switch. It starts when the VM is switched, and anew
// when its point was changed; operators may extend or stop it.
type CommitPolicy struct {
	Action CommitAction  `json:"action,omitempty"` // empty is none
	After  time.Duration `json:"after,omitempty"`
	// KeepPoints: the commit keeps the points up to the chosen one.
	KeepPoints bool `json:"keep_points,omitempty"`
}

// Deadline is when the action is due for a VM that is switched at now; zero for none.
func (c CommitPolicy) Deadline(now time.Time) time.Time {
	if c.Action == "" || c.Action == CommitNone {
		return time.Time{}
	}
	return now.Add(c.After)
}

// Validate reports the first setting that cannot work.
func (c CommitPolicy) Validate() error {
	switch c.Action {
	case "", CommitNone:
		return nil
	case CommitCommit, CommitUndo:
	default:
		return Errorf(CodeInvalid, "unknown commit action %q", c.Action).WithHint("none, commit or undo")
	}
	if c.After <= 0 {
		return Errorf(CodeInvalid, "a commit policy needs a time after which to %s", c.Action).WithHint("for example 30m")
	}
	return nil
}

// DefaultPolicy is used where the operator names none. It asks for no
// application-consistent points: they hold a guest's writes for a moment and need
// an agent in it, which is for its owner to decide.
func DefaultPolicy() Policy {
	return Policy{Interval: 5 * time.Second, Compression: "auto",
		Retention: Retention{Tiers: DefaultTiers(), AppConsistentFor: 7 * day, MinPoints: 10}}
}

// EffectiveRetention is Retention with KeepPoints in its place.
func (p Policy) EffectiveRetention() Retention {
	r := p.Retention
	if p.KeepPoints != 0 {
		r.Tiers, r.Newest, r.AppConsistentFor = nil, p.KeepPoints, 0
		r.MinPoints = min(r.MinPoints, p.KeepPoints)
	}
	return r
}

// Validate reports the first setting that cannot work.
func (p Policy) Validate() error {
	switch {
	case p.Interval < time.Second:
		return Errorf(CodeInvalid, "interval %v is shorter than 1 s", p.Interval).WithHint("choose 1s or more")
	case p.VerifyEvery > 0 && p.VerifyEvery < time.Minute:
		return Errorf(CodeInvalid, "cannot verify every %v", p.VerifyEvery).WithHint("choose 1m or more; negative means never")
	}
	if p.OffloadAfter < 0 {
		return Errorf(CodeInvalid, "points cannot be moved to the object store at the age of %v", p.OffloadAfter)
	}
	if err := p.EffectiveRetention().Validate(); err != nil {
		return err
	}
	if p.AppConsistentEvery != 0 && p.AppConsistentEvery < p.Interval {
		return Errorf(CodeInvalid, "application-consistent points every %v, but points every %v", p.AppConsistentEvery, p.Interval).WithHint("choose the interval or more, or 0 for never")
	}
	if err := p.Commit.Validate(); err != nil {
		return err
	}
	if err := p.Fencing.Validate(); err != nil {
		return err
	}
	switch p.Compression {
	case "auto", "none", "s2", "zstd":
		return nil
	}
	return Errorf(CodeInvalid, "unknown compression %q", p.Compression).WithHint("auto, none, s2 or zstd")
}

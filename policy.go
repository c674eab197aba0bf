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
}

// DefaultPolicy is used where the operator names none.
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
	}
	if p.OffloadAfter < 0 {
		return Errorf(CodeInvalid, "points cannot be moved to the object store at the age of %v", p.OffloadAfter)
	}
	if err := p.EffectiveRetention().Validate(); err != nil {
		return err
	}
	switch p.Compression {
	case "auto", "none", "s2", "zstd":
		return nil
	}
	return Errorf(CodeInvalid, "unknown compression %q", p.Compression).WithHint("auto, none, s2 or zstd")
}

package switchback

import "time"

// Policy is what an operator asks of the replication of one VM.
type Policy struct {
	// Interval is the time between the starts of two cycles; from 1 s. It is the RPO target.
	Interval time.Duration `json:"interval"`
	// KeepPoints is how many of the newest points are kept; older ones are folded into the base.
	KeepPoints int `json:"keep_points"`
	// Compression is "auto" (by link and processor speed), "none", "s2" or "zstd".
	Compression string `json:"compression"`
	// Checks judge the guest after each start: failover, failback, drill.
	Checks []GuestCheck `json:"checks,omitempty"`
	// Drill says how the VM is drilled without being asked; nil = not at all.
	Drill *DrillPolicy `json:"drill,omitempty"`
}

// DefaultPolicy is used where the operator names none.
func DefaultPolicy() Policy {
	return Policy{Interval: 5 * time.Second, KeepPoints: 120, Compression: "auto"}
}

// Validate reports the first setting that cannot work.
func (p Policy) Validate() error {
	switch {
	case p.Interval < time.Second:
		return Errorf(CodeInvalid, "interval %v is shorter than 1 s", p.Interval).WithHint("choose 1s or more")
	case p.KeepPoints < 2:
		return Errorf(CodeInvalid, "cannot keep fewer than 2 points, got %d", p.KeepPoints)
	}
	switch p.Compression {
	case "auto", "none", "s2", "zstd":
		return nil
	}
	return Errorf(CodeInvalid, "unknown compression %q", p.Compression).WithHint("auto, none, s2 or zstd")
}

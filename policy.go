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
	case p.VerifyEvery > 0 && p.VerifyEvery < time.Minute:
		return Errorf(CodeInvalid, "cannot verify every %v", p.VerifyEvery).WithHint("choose 1m or more; negative means never")
	}
	switch p.Compression {
	case "auto", "none", "s2", "zstd":
		return nil
	}
	return Errorf(CodeInvalid, "unknown compression %q", p.Compression).WithHint("auto, none, s2 or zstd")
}

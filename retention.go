package switchback

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// RetentionTier keeps the newest point of each Every (0: every point) until it
// is older than For.
type RetentionTier struct {
	Every time.Duration `json:"every"`
	For   time.Duration `json:"for"`
}

// Retention says which recovery points of a VM are kept. Package retention
// applies it.
type Retention struct {
	// Tiers, the finest first. Intervals are aligned to UTC.
	Tiers []RetentionTier `json:"tiers,omitempty"`
	// Newest is how many of the newest points are kept whatever their age, as
	// far as MaxBytes allows.
	Newest int `json:"newest,omitempty"`
	// AppConsistentFor keeps application- and shutdown-consistent points at
	// least this long; 0 is no longer than others.
	AppConsistentFor time.Duration `json:"app_consistent_for,omitempty"`
	// TaggedFor keeps tagged points this long; 0 is until the tag is removed.
	TaggedFor time.Duration `json:"tagged_for,omitempty"`
	// MinPoints is how many of the newest points are never dropped.
	MinPoints int `json:"min_points,omitempty"`
	// MaxBytes bounds the journal; 0 is no bound. Newer changes win: the history
	// gets shorter, never the newest MinPoints.
	MaxBytes int64 `json:"max_bytes,omitempty"`
}

const (
	day            = 24 * time.Hour
	minRetained    = 2
	maxTierHistory = 100 * 365 * day
)

// DefaultTiers: every point for an hour, one for each 5 minutes of a day, hourly
// for a week, daily for 30 days.
func DefaultTiers() []RetentionTier {
	return []RetentionTier{{0, time.Hour}, {5 * time.Minute, day}, {time.Hour, 7 * day}, {day, 30 * day}}
}

// History is how far back the tiers reach.
func (r Retention) History() time.Duration {
	var longest time.Duration
	for _, t := range r.Tiers {
		longest = max(longest, t.For)
	}
	return longest
}

// Validate reports the first setting that cannot work.
func (r Retention) Validate() error {
	for i, t := range r.Tiers {
		switch {
		case t.Every < 0 || t.For <= 0 || t.For > maxTierHistory || t.Every > t.For:
			return Errorf(CodeInvalid, "retention tier %s is not possible", t).WithHint("write INTERVAL:AGE, the interval shorter than the age, as in 5m:24h")
		case i > 0 && (t.Every <= r.Tiers[i-1].Every || t.For <= r.Tiers[i-1].For):
			return Errorf(CodeInvalid, "retention tier %s does not reach further with longer intervals than %s", t, r.Tiers[i-1]).
				WithHint("name the tiers from the finest to the coarsest")
		}
	}
	switch {
	case len(r.Tiers) == 0 && r.Newest < minRetained:
		return Errorf(CodeInvalid, "cannot keep fewer than %d points, got %d", minRetained, r.Newest)
	case r.Newest < 0 || r.MinPoints < 0 || r.AppConsistentFor < 0 || r.TaggedFor < 0:
		return Errorf(CodeInvalid, "a retention setting is negative")
	case r.MaxBytes < 0 || r.MaxBytes > 0 && r.MaxBytes < 16<<20:
		return Errorf(CodeInvalid, "a journal of at most %d bytes is too small", r.MaxBytes).WithHint("allow 16 MiB or more, or 0 for no limit")
	}
	return nil
}

func (t RetentionTier) String() string {
	every := "all"
	if t.Every > 0 {
		every = FormatAge(t.Every)
	}
	return every + ":" + FormatAge(t.For)
}

// FormatTiers is the inverse of ParseTiers.
func FormatTiers(tiers []RetentionTier) string {
	parts := make([]string, len(tiers))
	for i, t := range tiers {
		parts[i] = t.String()
	}
	return strings.Join(parts, ",")
}

// ParseTiers reads tiers in the form all:1h,5m:24h,1h:7d,1d:30d.
func ParseTiers(s string) ([]RetentionTier, error) {
	var out []RetentionTier
	for _, part := range strings.Split(s, ",") {
		every, age, ok := strings.Cut(strings.TrimSpace(part), ":")
		var t RetentionTier
		var err error
		if every != "all" {
			t.Every, err = ParseAge(every)
			ok = ok && t.Every > 0
		}
		if err == nil {
			t.For, err = ParseAge(age)
		}
		if err != nil || !ok {
			return nil, Errorf(CodeInvalid, "retention tier %q is not of the form INTERVAL:AGE", part).WithHint("for example all:1h,5m:24h,1h:7d,1d:30d")
		}
		out = append(out, t)
	}
	return out, nil
}

// ParseAge reads a duration that may also be in days (30d).
func ParseAge(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 15)
		if err != nil {
			return 0, Errorf(CodeInvalid, "%q is no number of days", s)
		}
		return time.Duration(n) * day, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return 0, Errorf(CodeInvalid, "%q is no duration: %w", s, err).WithHint("for example 90s, 5m, 24h or 30d")
	}
	return d, nil
}

// FormatAge is the inverse of ParseAge, in one unit where possible.
func FormatAge(d time.Duration) string {
	if d == 0 {
		return "0s"
	}
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{day, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if d > u.unit && d%u.unit == 0 || d == u.unit {
			if u.unit == day && d == day {
				return "1d"
			}
			return fmt.Sprintf("%d%s", d/u.unit, u.name)
		}
	}
	return d.String()
}

package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	switchback "github.com/switchback-dr/switchback"
)

// retentionFlags are the flags of a policy that say which points are kept.
func retentionFlags(cmd *cobra.Command, policy *switchback.Policy) {
	r, f := &policy.Retention, cmd.Flags()
	f.IntVar(&policy.KeepPoints, "keep", policy.KeepPoints, "keep this many of the newest points, instead of --retention")
	f.Var(&textFlag{"tiers", func() string { return switchback.FormatTiers(r.Tiers) }, func(s string) (err error) {
		r.Tiers, err = switchback.ParseTiers(s)
		return err
	}}, "retention", "which points are kept: INTERVAL:AGE, from the finest to the coarsest")
	f.Var(&textFlag{"age", func() string { return switchback.FormatAge(r.AppConsistentFor) }, func(s string) (err error) {
		r.AppConsistentFor, err = switchback.ParseAge(s)
		return err
	}}, "app-consistent-for", "how long application-consistent points are kept at least")
	f.Var(&textFlag{"age", func() string { return switchback.FormatAge(r.TaggedFor) }, func(s string) (err error) {
		r.TaggedFor, err = switchback.ParseAge(s)
		return err
	}}, "tagged-for", "how long tagged points are kept; 0s = until the tag is removed")
	f.IntVar(&r.MinPoints, "min-points", r.MinPoints, "how many of the newest points are never dropped")
	f.Var(&textFlag{"size", func() string { return sizeText(r.MaxBytes) }, func(s string) error {
		n, err := humanize.ParseBytes(s)
		if err != nil || n > 1<<62 {
			return fmt.Errorf("%q is no size, such as 20GiB", s)
		}
		r.MaxBytes = int64(n)
		return nil
	}}, "journal-max", "how large the journal may grow, as 20GiB; the oldest points go first; 0 = no limit")
	cmd.MarkFlagsMutuallyExclusive("keep", "retention")
}

func sizeText(n int64) string {
	if n == 0 {
		return "0"
	}
	return bytesText(n)
}

// textFlag is a flag with a text form of its own.
type textFlag struct {
	kind string
	text func() string
	set  func(string) error
}

func (f *textFlag) String() string {
	if f.text == nil {
		return ""
	}
	return f.text()
}
func (f *textFlag) Set(s string) error { return f.set(s) }
func (f *textFlag) Type() string       { return f.kind }

// keepUnnamed sets what no flag names to what it is now.
func keepUnnamed(cmd *cobra.Command, policy *switchback.Policy, now switchback.Policy) {
	named := cmd.Flags().Changed
	if !named("keep") && !named("retention") {
		policy.KeepPoints = now.KeepPoints
	}
	r, old := &policy.Retention, now.Retention
	if !named("retention") && len(old.Tiers) > 0 {
		r.Tiers = old.Tiers
	}
	r.Newest = old.Newest
	if !named("app-consistent-for") {
		r.AppConsistentFor = old.AppConsistentFor
	}
	if !named("tagged-for") {
		r.TaggedFor = old.TaggedFor
	}
	if !named("min-points") {
		r.MinPoints = old.MinPoints
	}
	if !named("journal-max") {
		r.MaxBytes = old.MaxBytes
	}
}

// retentionText is a policy's retention in one line.
func retentionText(r switchback.Retention) string {
	var parts []string
	if r.Newest > 0 {
		parts = append(parts, fmt.Sprintf("the newest %d", r.Newest))
	}
	if len(r.Tiers) > 0 {
		parts = append(parts, switchback.FormatTiers(r.Tiers))
	}
	if r.AppConsistentFor > 0 {
		parts = append(parts, "application-consistent "+switchback.FormatAge(r.AppConsistentFor))
	}
	if r.TaggedFor > 0 {
		parts = append(parts, "tagged "+switchback.FormatAge(r.TaggedFor))
	}
	parts = append(parts, fmt.Sprintf("at least %d", max(1, r.MinPoints)))
	if r.MaxBytes > 0 {
		parts = append(parts, "journal up to "+bytesText(r.MaxBytes))
	}
	return strings.Join(parts, ", ")
}

func oldestText(p *switchback.Point) string {
	if p == nil {
		return ""
	}
	return fmt.Sprintf(", the oldest %d of %s", p.Sequence, p.Time.Local().Format(time.DateTime))
}

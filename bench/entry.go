package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"text/tabwriter"
)

// goal is what a measure should reach.
type goal struct {
	Value  float64
	Better string // "higher" or "lower" ratios
}

// goals by name, from issue 2 where nothing else is said.
var goals = map[string]goal{
	"seed_vs_nbdcopy":   {0.7, "higher"},
	"cycle_1mb":         {1.0, "lower"},
	"cycle_1mb_core":    {0.5, "lower"},
	"cycle_1mb_vs_tool": {0.15, "lower"},
	"cycle_64mb_mixed":  {0.4, "lower"},
	"wire_per_changed":  {0.8, "lower"},
	"wire_rand4k":       {0.9, "lower"},
	"guest_p99":         {2.0, "lower"},
	"guest_p50":         {1.1, "lower"},
	"boot_ratio":        {1.15, "lower"},
	"view_seq":          {1.0, "higher"},
	"view_rand4k":       {1.2, "higher"},
	// from issue 3
	"view_seq_100":          {1.0, "higher"},
	"view_rand4k_100":       {1.2, "higher"},
	"boot_1000_points":      {1.10, "lower"},
	"journal_space":         {1.02, "lower"},
	"fold_throughput":       {0.5, "higher"},
	"merge_throughput":      {0.5, "higher"},
	"view_bytes_per_extent": {24, "lower"},
	// of a drill's bound, 2 s + 1.15 × boot
	"drill_seconds_over_boot": {1.0, "lower"},
	"rpo_during_drills":       {1.2, "lower"},
}

// samples are what was measured, in the order of measuring.
type samples struct {
	Ours []float64 `json:"ours"`
	Peer []float64 `json:"peer"`
}

// entry is one line of the report. Ours and Peer are medians. Ratio is what the
// goal is for; its kind is in Formula.
type entry struct {
	Name     string  `json:"name"`
	Ours     float64 `json:"ours"`
	Peer     float64 `json:"peer"`
	PeerName string  `json:"peer_name"`
	Ratio    float64 `json:"ratio"`
	Formula  string  `json:"formula"`
	Better   string  `json:"better"`
	Goal     float64 `json:"goal"`
	Met      bool    `json:"met"`
	Unit     string  `json:"unit"`
	Runs     int     `json:"runs"`
	OursMin  float64 `json:"ours_min"`
	OursMax  float64 `json:"ours_max"`
	PeerMin  float64 `json:"peer_min"`
	PeerMax  float64 `json:"peer_max"`
	RawRuns  samples `json:"raw_runs"`
	// Detail explains ours: phases of a cycle, the codec chosen, sizes.
	Detail string `json:"detail,omitempty"`
	// Load is the machine's load average over the last minute of measuring.
	Load float64 `json:"load"`
	// Quick marks a report of small sizes: its figures mean nothing.
	Quick bool `json:"quick,omitempty"`
}

// How a ratio comes about.
const (
	oursByPeer = "ours / peer"
	peerByOurs = "peer / ours"
	oursAlone  = "ours"
	// of a drill: how much of what it may take it takes
	oursByBootBound = "ours / (2 s + 1.15 × peer)"
)

func newEntry(name, unit, peerName, formula string, s samples, detail string) entry {
	e := entry{Name: name, Unit: unit, PeerName: peerName, Formula: formula, RawRuns: s, Detail: detail,
		Goal: goals[name].Value, Better: goals[name].Better, Runs: min(len(s.Ours), len(s.Peer))}
	if e.Runs == 0 {
		return e
	}
	e.Ours, e.Peer = median(s.Ours), median(s.Peer)
	e.OursMin, e.OursMax = slices.Min(s.Ours), slices.Max(s.Ours)
	e.PeerMin, e.PeerMax = slices.Min(s.Peer), slices.Max(s.Peer)
	switch formula {
	case oursAlone:
		e.Ratio = e.Ours
	case oursByPeer:
		e.Ratio = e.Ours / e.Peer
	case peerByOurs:
		e.Ratio = e.Peer / e.Ours
	case oursByBootBound:
		e.Ratio = e.Ours / (drillSeconds + drillBoots*e.Peer)
	}
	e.Met = e.Better == "higher" && e.Ratio >= e.Goal || e.Better == "lower" && e.Ratio <= e.Goal
	return e
}

// check reports what makes an entry unfit for the report.
func (e entry) check(runs int) error {
	if len(e.RawRuns.Ours) < runs || len(e.RawRuns.Peer) < runs {
		return fmt.Errorf("%s: %d samples of ours and %d of %s, want %d", e.Name, len(e.RawRuns.Ours), len(e.RawRuns.Peer), e.PeerName, runs)
	}
	for _, v := range slices.Concat(e.RawRuns.Ours, e.RawRuns.Peer) {
		if !(v > 0) {
			return fmt.Errorf("%s: a sample is %v", e.Name, v)
		}
	}
	return nil
}

// median of at least one value; of an even number the mean of the middle two.
func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	n := len(s)
	return (s[(n-1)/2] + s[n/2]) / 2
}

func writeReport(path string, entries []entry) error {
	if entries == nil {
		entries = []entry{}
	}
	b, err := json.MarshalIndent(entries, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

func printTable(w io.Writer, entries []entry) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "MEASURE\tOURS (MIN–MAX)\tPEER (MIN–MAX)\tUNIT\tRATIO\tGOAL\t\tPEER")
	for _, e := range entries {
		sign, verdict := "≤", "MISSED"
		if e.Better == "higher" {
			sign = "≥"
		}
		if e.Met {
			verdict = "met"
		}
		if e.Quick {
			verdict += " (quick: means nothing)"
		}
		fmt.Fprintf(t, "%s\t%s (%s–%s)\t%s (%s–%s)\t%s\t%.2f\t%s %g\t%s\t%s\n", e.Name, digits(e.Ours), digits(e.OursMin), digits(e.OursMax),
			digits(e.Peer), digits(e.PeerMin), digits(e.PeerMax), e.Unit, e.Ratio, sign, e.Goal, verdict, e.PeerName)
	}
	t.Flush()
	for _, e := range entries {
		if e.Detail != "" {
			fmt.Fprintf(w, "%s: %s\n", e.Name, e.Detail)
		}
	}
}

// digits shows three significant digits, and whole numbers above a hundred.
func digits(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	case v >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

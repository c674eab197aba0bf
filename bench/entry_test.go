package main

import (
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.in); got != c.want {
			t.Errorf("median of %v is %v, want %v", c.in, got, c.want)
		}
	}
}

func TestRatioAndGoal(t *testing.T) {
	s := samples{Ours: []float64{2, 4, 3}, Peer: []float64{6, 5, 7}}
	for _, c := range []struct {
		name, formula string
		ratio         float64
		met           bool
	}{
		{"seed_vs_nbdcopy", peerByOurs, 2, true},
		{"cycle_1mb", oursByPeer, 0.5, true},
		{"cycle_64mb_mixed", oursByPeer, 0.5, false},
		{"view_seq", oursByPeer, 0.5, false},
		{"wire_per_changed", oursAlone, 3, false},
		{"drill_seconds_over_boot", oursByBootBound, 0.337, true},
	} {
		e := newEntry(c.name, "s", "peer", c.formula, s, "")
		if math.Abs(e.Ratio-c.ratio) > 0.001 || e.Met != c.met || e.Runs != 3 || e.PeerMin != 5 || e.OursMax != 4 {
			t.Errorf("%s: %+v", c.name, e)
		}
	}
}

func TestTooFewSamplesAreAnError(t *testing.T) {
	five := []float64{1, 2, 3, 4, 5}
	for _, c := range []struct {
		what string
		s    samples
		ok   bool
	}{
		{"enough", samples{five, five}, true},
		{"no peer", samples{five, nil}, false},
		{"four of ours", samples{five[:4], five}, false},
		{"a sample of nothing", samples{[]float64{0, 1, 1, 1, 1}, five}, false},
	} {
		err := newEntry("cycle_1mb", "s", "peer", oursByPeer, c.s, "").check(5)
		if (err == nil) != c.ok {
			t.Errorf("%s: %v", c.what, err)
		}
	}
}

func TestReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "bench.json")
	e := newEntry("guest_p99", "µs", "peer", oursByPeer, samples{[]float64{1}, []float64{2}}, "")
	if err := writeReport(path, []entry{e}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var list []map[string]any
	if err := json.Unmarshal(b, &list); err != nil {
		t.Fatal(err)
	}
	for _, field := range []string{"name", "ours", "peer", "peer_name", "ratio", "better", "goal", "unit", "runs", "raw_runs"} {
		if _, ok := list[0][field]; !ok {
			t.Errorf("the report lacks %s", field)
		}
	}
}

func TestEachGoalIsMeasuredOnce(t *testing.T) {
	seen := map[string]int{}
	for _, m := range measures {
		for _, name := range m.names {
			seen[name]++
		}
	}
	for name := range goals {
		if seen[name] != 1 {
			t.Errorf("%s is measured %d times", name, seen[name])
		}
	}
	if len(seen) != len(goals) {
		t.Errorf("measures without a goal: %v", seen)
	}
}

func TestFlags(t *testing.T) {
	for _, c := range []struct{ args, refusal string }{
		{"", ""},
		{"-runs 7 -only view_seq,boot_ratio", ""},
		{"-runs 1 -quick", ""},
		{"-runs 4", "too few"},
		{"-only everything", "no measure"},
		{"quickly", "unexpected"},
	} {
		_, err := parse(strings.Fields(c.args))
		if (err == nil) != (c.refusal == "") || err != nil && !strings.Contains(err.Error(), c.refusal) {
			t.Errorf("%q: %v", c.args, err)
		}
	}
}

package replicator

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
)

func TestDecide(t *testing.T) {
	head := func(seq switchback.Sequence, checkpoint string) TargetState {
		return TargetState{Seeded: true, Head: switchback.Point{Sequence: seq, Checkpoint: checkpoint}}
	}
	for _, c := range []struct {
		name   string
		facts  Facts
		want   Decision
		reason string // part of it
	}{
		{"empty target", Facts{Target: TargetState{Session: "s"}},
			Decision{Mode: ModeSeed, Sequence: 1}, "no complete copy"},
		{"empty target, checkpoints of an interrupted copy and of others",
			Facts{Checkpoints: []string{"daily", "sb-1-1", "sb-1-2"}},
			Decision{Mode: ModeSeed, Sequence: 1, Drop: []string{"sb-1-2", "sb-1-1"}}, "no complete copy"},
		{"the match is the only one", Facts{Target: head(7, "sb-1-7"), Checkpoints: []string{"sb-1-7"}},
			Decision{Mode: ModeIncremental, From: "sb-1-7", Sequence: 8}, ""},
		{"a failed cycle left a newer one", Facts{Target: head(7, "sb-1-7"), Checkpoints: []string{"sb-1-7", "sb-1-8"}},
			Decision{Mode: ModeIncremental, From: "sb-1-7", Sequence: 8, Drop: []string{"sb-1-8"}}, ""},
		{"the older one was not dropped", Facts{Target: head(8, "sb-1-8"), Checkpoints: []string{"sb-1-7", "sb-1-8"}},
			Decision{Mode: ModeIncremental, From: "sb-1-8", Sequence: 9, Drop: []string{"sb-1-7"}}, ""},
		{"others' checkpoints stay", Facts{Target: head(7, "sb-1-7"), Checkpoints: []string{"a", "sb-1-7", "z-sb-1"}},
			Decision{Mode: ModeIncremental, From: "sb-1-7", Sequence: 8}, ""},
		{"after a shutdown the predecessor's", Facts{Target: head(9, "sb-1-8"), Checkpoints: []string{"sb-1-8"}, Epoch: 3},
			Decision{Mode: ModeIncremental, From: "sb-1-8", Sequence: 10}, ""},
		{"kept disks, no point yet", Facts{Target: head(0, "sb-2-0"), Checkpoints: []string{"sb-2-0"}, Epoch: 2},
			Decision{Mode: ModeIncremental, From: "sb-2-0", Sequence: 1}, ""},
		{"the match is gone", Facts{Target: head(7, "sb-1-7"), Checkpoints: []string{"sb-1-6"}},
			Decision{Mode: ModeResync, Sequence: 8, Drop: []string{"sb-1-6"}}, "sb-1-7 of the target's last point 7 is not in the domain"},
		{"no checkpoint at all", Facts{Target: head(7, "sb-1-7")},
			Decision{Mode: ModeResync, Sequence: 8}, "is not in the domain"},
		{"the head names none", Facts{Target: head(7, ""), Checkpoints: []string{"sb-1-6"}},
			Decision{Mode: ModeResync, Sequence: 8, Drop: []string{"sb-1-6"}}, "names no checkpoint"},
		{"the bitmap is lost", Facts{Target: head(7, "sb-1-7"), Checkpoints: []string{"sb-1-7"}, BitmapLost: true},
			Decision{Mode: ModeResync, Sequence: 8, Drop: []string{"sb-1-7"}}, "bitmap of checkpoint sb-1-7 is lost"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Decide(c.facts)
			if !strings.Contains(got.Reason, c.reason) || c.reason == "" && got.Reason != "" {
				t.Errorf("reason %q, want %q", got.Reason, c.reason)
			}
			if got.Mode == ModeResync && got.Reason == "" {
				t.Error("a resync without a reason")
			}
			got.Reason = ""
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestCheckpointNameIsOurs(t *testing.T) {
	name := CheckpointName(3, 12)
	if name != "sb-3-12" || len(ours([]string{name}, "")) != 1 {
		t.Errorf("checkpoint %q is not known as ours", name)
	}
}

func TestRetryDelay(t *testing.T) {
	for _, c := range []struct {
		interval time.Duration
		failures int
		want     time.Duration
	}{
		{time.Second, 1, time.Second},
		{time.Second, 2, 1500 * time.Millisecond},
		{5 * time.Second, 3, 11250 * time.Millisecond},
		{time.Hour, 1, 5 * time.Second},
		{time.Second, 10, 30 * time.Second},
		{time.Second, 1 << 30, 30 * time.Second},
	} {
		if got := retryDelay(c.interval, c.failures); got != c.want {
			t.Errorf("retryDelay(%v, %d) = %v, want %v", c.interval, c.failures, got, c.want)
		}
	}
	for last, n := time.Duration(0), 1; n < 20; n++ {
		d := retryDelay(time.Second, n)
		if d < last {
			t.Errorf("the delay shrinks from %v to %v", last, d)
		}
		last = d
	}
}

func TestConditionOf(t *testing.T) {
	for _, c := range []struct {
		err      error
		name     string
		severity switchback.Severity
	}{
		{switchback.Errorf(switchback.CodeNoSpace, "journal: 3 MiB free"), "target-out-of-space", switchback.SeverityCritical},
		{atSource(switchback.Errorf(switchback.CodeNoSpace, "scratch directory /x has 1 MiB left")), "source-scratch-out-of-space", switchback.SeverityCritical},
		{switchback.Errorf(switchback.CodeUnavailable, "cannot reach peer"), "target-unreachable", switchback.SeverityWarning},
		{switchback.Errorf(switchback.CodeTimeout, "no answer"), "target-unreachable", switchback.SeverityWarning},
		{switchback.Errorf(switchback.CodeStaleEpoch, "epoch 3"), "stale-epoch", switchback.SeverityCritical},
		{atSource(switchback.Errorf(switchback.CodeConflict, "VM is off")), "source-not-running", switchback.SeverityWarning},
		{switchback.Errorf(switchback.CodeConflict, "the head is point 4"), "replication-failing", switchback.SeverityWarning},
		{atSource(switchback.Errorf(switchback.CodeUnavailable, "libvirtd does not answer")), "hypervisor-unreachable", switchback.SeverityWarning},
		{switchback.Errorf(switchback.CodeCorrupt, "frame 3"), "data-corrupt", switchback.SeverityCritical},
		{fmt.Errorf("wrapped: %w", switchback.Errorf(switchback.CodeCorrupt, "frame 3")), "data-corrupt", switchback.SeverityCritical},
		{errors.New("anything"), "replication-failing", switchback.SeverityWarning},
	} {
		got := conditionOf(c.err)
		if got.Name != c.name || got.Severity != c.severity {
			t.Errorf("%v gives %s, %s; want %s, %s", c.err, got.Name, got.Severity, c.name, c.severity)
		}
		if got.Cause != c.err.Error() || got.Remedy == "" {
			t.Errorf("%v: cause %q, remedy %q", c.err, got.Cause, got.Remedy)
		}
	}
}

func TestConditionsKeepTheirBeginning(t *testing.T) {
	now := time.Unix(100, 0)
	e := &Engine{now: func() time.Time { return now }}
	full := switchback.Errorf(switchback.CodeNoSpace, "full")
	e.setCondition(full)
	began := now
	now = now.Add(time.Minute)
	e.setCondition(full)
	if c := e.Status().Conditions; len(c) != 1 || !c[0].Since.Equal(began) {
		t.Errorf("the same trouble again: %+v, want one since %v", c, began)
	}
	e.setCondition(switchback.Errorf(switchback.CodeUnavailable, "away"))
	if c := e.Status().Conditions; len(c) != 1 || c[0].Name != "target-unreachable" || !c[0].Since.Equal(now) {
		t.Errorf("another trouble: %+v, want one since %v", c, now)
	}
	e.setCondition(nil)
	if c := e.Status().Conditions; len(c) != 0 {
		t.Errorf("after a good cycle: %+v", c)
	}
}

func TestStatusRPO(t *testing.T) {
	at := time.Unix(0, 0)
	finish := func(h *history, rpo time.Duration) {
		h.finish(&CycleReport{RPO: rpo, SentBytes: 10, ChangedBytes: 20, Point: switchback.Point{Sequence: 1}})
	}
	for _, c := range []struct {
		name          string
		rpo           func(*history)
		p50, p99, max float64
		cycles        int64
	}{
		{"none", func(*history) {}, 0, 0, 0, 0},
		{"only the first point, which has none", func(h *history) { finish(h, 0) }, 0, 0, 0, 1},
		{"one", func(h *history) { finish(h, 3*time.Second) }, 3, 3, 3, 1},
		{"a hundred in disorder", func(h *history) {
			for i := range 100 {
				finish(h, time.Duration((i*37)%100+1)*time.Second)
			}
		}, 51, 100, 100, 100},
		{"a thousand", func(h *history) {
			for i := range 1000 {
				finish(h, time.Duration(i+1)*time.Second)
			}
		}, 501, 991, 1000, 1000},
		{"only the last thousand count", func(h *history) {
			finish(h, time.Hour)
			for range 1000 {
				finish(h, time.Second)
			}
		}, 1, 1, 1, 1001},
		{"a failed cycle does not count", func(h *history) { finish(h, time.Second); h.finish(nil) }, 1, 1, 1, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var h history
			c.rpo(&h)
			s := h.snapshot(at)
			if s.RPOP50Seconds != c.p50 || s.RPOP99Seconds != c.p99 || s.RPOMaxSeconds != c.max {
				t.Errorf("p50 %v, p99 %v, max %v; want %v, %v, %v", s.RPOP50Seconds, s.RPOP99Seconds, s.RPOMaxSeconds, c.p50, c.p99, c.max)
			}
			if s.Cycles != c.cycles || s.SentBytes != 10*c.cycles || s.ChangedBytes != 20*c.cycles {
				t.Errorf("%d cycles, %d sent, %d changed; want %d", s.Cycles, s.SentBytes, s.ChangedBytes, c.cycles)
			}
		})
	}
}

func TestStatusProgress(t *testing.T) {
	var h history
	begin := time.Unix(1000, 0)
	if s := h.snapshot(begin); s.Progress != nil {
		t.Errorf("progress of nothing: %+v", s.Progress)
	}
	h.begin("seed", begin)
	h.advance(1000, 0, 0)
	h.advance(0, 250, 100)
	got := h.snapshot(begin.Add(5 * time.Second))
	want := &Progress{TotalBytes: 1000, DoneBytes: 250, SentBytes: 100, Percent: 25, RateBytesPerSecond: 50, ETA: 15 * time.Second}
	if d := cmp.Diff(want, got.Progress); d != "" || got.Activity != "seed" {
		t.Errorf("%s while %q: %s", "progress", got.Activity, d)
	}
	h.finish(nil)
	if s := h.snapshot(begin); s.Progress != nil || s.Activity != "idle" {
		t.Errorf("after its end: %+v while %q", s.Progress, s.Activity)
	}
	h.begin("incremental", begin)
	if s := h.snapshot(begin); s.Progress != nil {
		t.Errorf("a new copy begins with %+v", s.Progress)
	}
}

package lab

import (
	"fmt"
	"slices"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/witness"
)

// TestRetention thins the points of a guest that writes, while its target agent is
// killed now and then: what is left reads as it did when it was new, a guest
// starts from a point into which others were merged, and nothing is dropped while
// that is undecided.
func TestRetention(t *testing.T) {
	f := addGuest(t, Guest{Name: "rt", ContentBytes: 32 << 20, Pace: time.Millisecond})
	policy := &switchback.Policy{Interval: time.Second, Compression: "auto", Retention: switchback.Retention{
		Tiers:     []switchback.RetentionTier{{For: 6 * time.Second}, {Every: 4 * time.Second, For: 40 * time.Second}},
		MinPoints: 3,
	}}
	f.operate(recovery.Protect, api.OperationRequest{To: Recovery, Policy: policy})
	f.morePoints(1)
	dir := f.vm().AtTarget.Replica.Dir

	// Points are looked at while they are new, and again when others were merged into them.
	fresh := map[switchback.Sequence][]string{}
	merged := func() (out []switchback.Sequence) {
		points := f.points()
		for i, p := range points {
			if i > 0 && p.Sequence > points[i-1].Sequence+1 && fresh[p.Sequence] != nil {
				out = append(out, p.Sequence)
			}
		}
		return out
	}
	f.poll(100*time.Millisecond, 240*time.Second, "points were merged into two that were looked at", func() (bool, string) {
		f.dirty(Primary, "vda", 2<<20)
		points := f.points()
		seq := points[len(points)-1].Sequence
		if fresh[seq] == nil {
			f.export(Recovery, dir, seq, func(uris []string) { fresh[seq] = f.shas(uris...) })
			if len(fresh)%5 == 4 { // once: the next point must be able to come
				f.crash(t, Recovery)
				f.awaitAgent(t, Recovery)
			}
		}
		found := merged()
		return len(found) >= 2, fmt.Sprintf("%d looked at, merged %v of %v", len(fresh), found, len(points))
	})
	same := func() (last switchback.Sequence) {
		for _, seq := range merged() {
			f.export(Recovery, dir, seq, func(uris []string) {
				if now := f.shas(uris...); !slices.Equal(now, fresh[seq]) {
					t.Errorf("point %d is no more what it was: %v, %v", seq, now, fresh[seq])
				}
			})
			last = seq
		}
		return last
	}
	f.operate(recovery.Pause, api.OperationRequest{}) // so that nothing is dropped while it is looked at
	chosen := same()
	f.operate(recovery.Resume, api.OperationRequest{})

	sum := f.operate(recovery.Failover, api.OperationRequest{Point: fmt.Sprint(chosen), AcceptLoss: true})
	if sum.Switch.Point.Sequence != chosen {
		t.Fatalf("the guest runs from point %d, chosen was %d", sum.Switch.Point.Sequence, chosen)
	}
	records, err := witness.VerifyRecords(t.Context(), ring, f.view(Recovery)...)
	f.must(err)
	if !records.OK() || records.Max == 0 {
		t.Errorf("records at point %d: %+v", chosen, records)
	}
	before := f.points()
	f.writes(Recovery)
	if after := f.points(); len(after) != len(before) {
		t.Errorf("%d points before, %d while the switch is undecided", len(before), len(after))
	}
	f.operate(recovery.Cancel, api.OperationRequest{})
	f.writes(Primary)
	f.morePoints(3)
	// What the run at the target wrote is kept, and holds its point, until it is dropped.
	kept := f.vm().AtTarget.Snapshots
	if len(kept) != 1 || kept[0].Point != chosen {
		t.Errorf("kept snapshots: %+v", kept)
	}
	for _, s := range kept {
		f.operate(recovery.DropSnapshot, api.OperationRequest{Snapshot: s.Name})
	}

	// A bound of the journal is told before it is met, and then kept.
	bounded := *policy
	bounded.Retention.Tiers = []switchback.RetentionTier{{For: time.Hour}}
	bounded.Retention.MaxBytes = 48 << 20
	f.operate(recovery.Edit, api.OperationRequest{Policy: &bounded})
	f.poll(200*time.Millisecond, 120*time.Second, "the condition history-shorter-than-policy", func() (bool, string) {
		f.dirty(Primary, "vda", 4<<20)
		v := f.vm()
		return slices.ContainsFunc(v.Conditions, func(c switchback.Condition) bool { return c.Name == "history-shorter-than-policy" }), fmt.Sprint(v.Conditions)
	})
	for range 8 {
		f.dirty(Primary, "vda", 6<<20)
		f.morePoints(1)
	}
	f.eventually(60*time.Second, "the journal is within its bound", func() (bool, string) {
		n := f.vm().AtTarget.Replica.JournalBytes
		return n <= bounded.Retention.MaxBytes, fmt.Sprintf("%d MiB", n>>20)
	})
	if len(f.points()) < 3 {
		t.Errorf("only %d points are left", len(f.points()))
	}
	f.operate(recovery.Failover, api.OperationRequest{})
	f.cutOver(Primary, Recovery)
}

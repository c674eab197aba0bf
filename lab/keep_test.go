package lab

import (
	"os"
	"slices"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
)

// TestCommitKeepsPoints commits with the points kept, while the agent is killed.
// What they read is the same after the guest has overwritten its disks; they go
// when the new direction has its own, which is reached by delta.
func TestCommitKeepsPoints(t *testing.T) {
	f := addGuest(t, Guest{Name: "keep", Disks: []int64{4 << 30, 4 << 30}})
	f.protect()
	var all []switchback.MarkedPoint
	for range 3 {
		f.dirty(Primary, "vdb", 4<<20)
		all = append(all, f.morePoints(1)...)
	}
	f.operate(recovery.Failover, api.OperationRequest{})
	f.cutOver(Primary, Recovery)
	f.writes(Recovery)
	chosen := f.vm().Switch.Point.Sequence
	dir := f.vm().AtSource.Replica.Dir
	look := []switchback.Sequence{all[0].Sequence, all[len(all)-1].Sequence, chosen}
	read := func() (sums [][]string) {
		for _, seq := range look {
			f.export(Recovery, dir, seq, func(uris []string) { sums = append(sums, f.shas(uris...)) })
		}
		return sums
	}
	before := read()
	if slices.Equal(before[0], before[2]) {
		t.Fatal("the points do not differ")
	}

	id := f.begin(recovery.Commit, api.OperationRequest{Points: "keep"})
	f.strike(id, strike{"keep", Recovery, 1e9})
	f.strike(id, strike{"collapse", Recovery, 1e9})
	sum := f.succeeded(f.end(id))
	if sum.Commit.KeptPoints < 4 || !sum.Commit.Live {
		t.Errorf("committed: %+v", sum.Commit)
	}
	t.Logf("%d points kept for %d MiB", sum.Commit.KeptPoints, sum.Commit.KeptBytes>>20)
	f.plain(Recovery)
	f.noViews(Recovery)
	points := f.points()
	if len(points) != sum.Commit.KeptPoints || points[len(points)-1].Sequence != chosen {
		t.Errorf("%d points are listed: %+v", len(points), points)
	}
	// The guest writes records and all over the range that the points changed.
	for range 4 {
		f.dirty(Recovery, "vdb", 24<<20)
	}
	f.dirty(Recovery, "vda", 16<<20)
	f.writes(Recovery)
	after := read()
	for i, seq := range look {
		if !slices.Equal(before[i], after[i]) {
			t.Errorf("point %d reads otherwise after the guest has written: %v, before %v", seq, after[i], before[i])
		}
	}
	f.refused(recovery.ChangePoint, api.OperationRequest{Point: "latest"}, switchback.CodeRefused, "only to be read")

	sent := f.wanSent(t, Recovery)
	f.operate(recovery.Reprotect, api.OperationRequest{})
	if sent = f.wanSent(t, Recovery) - sent; sent > 220<<20 {
		t.Errorf("the way home took %d MiB: no delta", sent>>20)
	}
	t.Logf("delta home: %d MiB", sent>>20)
	if v := f.vm(); v.KeptPoints || v.AtSource.Kept != nil {
		t.Errorf("points are still kept: %+v", v.AtSource.Kept)
	}
	if _, err := os.Stat(f.Site(Recovery).HostPath(dir)); !os.IsNotExist(err) {
		t.Errorf("%s is left: %v", dir, err)
	}
	f.operate(recovery.Failback, api.OperationRequest{})
	f.cutOver(Recovery, Primary)
	// At home, too: the kept base is the VM's own disk of before.
	sum = f.operate(recovery.Commit, api.OperationRequest{Points: "keep"})
	f.plain(Primary)
	f.writes(Primary)
	f.operate(recovery.DropKept, api.OperationRequest{})
	f.operate(recovery.Reprotect, api.OperationRequest{})
	f.operate(recovery.Failover, api.OperationRequest{})
	f.cutOver(Primary, Recovery)
}

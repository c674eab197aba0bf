package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/seal"
	"github.com/switchback-dr/switchback/witness"
)

// TestChangePoint switches to the latest point, changes to an older one and back
// to what the first run wrote, while agent and server are killed; reads that run's
// snapshot through server and offline; commits with a snapshot kept; and comes home
// by a delta that holds the writes of both runs that the disk consists of. On the
// way home a timer undoes a switch by itself. The points are encrypted, and so
// are the snapshots.
func TestChangePoint(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	if err := seal.MakeKeyFile(key); err != nil {
		t.Fatal(err)
	}
	restart := func(args ...string) {
		shared.agentArgs = map[string][]string{Primary: args, Recovery: args}
		for site := range shared.agentArgs {
			shared.crash(t, site)
			shared.awaitAgent(t, site)
		}
	}
	restart("--encryption-key-file", key)
	t.Cleanup(func() { restart() }) // once the guest is gone: as they were
	f := addGuest(t, Guest{Name: "chg", Disks: []int64{4 << 30, 4 << 30}})
	policy := testPolicy()
	policy.Encrypt = true
	f.operate(recovery.Protect, api.OperationRequest{To: Recovery, Policy: policy})
	f.dirty(Primary, "vdb", 6<<20)
	points := f.morePoints(2)
	chosen := points[len(points)-1].Sequence
	f.dirty(Primary, "vdb", 6<<20)
	f.morePoints(2)
	f.operate(recovery.Failover, api.OperationRequest{})
	f.cutOver(Primary, Recovery)
	f.writes(Recovery)
	f.dirty(Recovery, "vdb", 8<<20) // only this run writes so much
	first := f.lastBoot(Recovery)

	// To an older point: the guest sees less than it had written.
	id := f.begin(recovery.ChangePoint, api.OperationRequest{Point: fmt.Sprint(chosen)})
	f.strike(id, strike{"change", Recovery, 2 * time.Second})
	f.strike(id, strike{"change", theServer, time.Second})
	sum := f.succeeded(f.end(id))
	if sum.Change == nil || sum.Change.To.Sequence != chosen || sum.Change.SetAside == "" {
		t.Fatalf("changed: %+v", sum.Change)
	}
	f.running(Recovery)
	second := f.lastBoot(Recovery)
	if second.ID == first.ID || second.ResumedBoot == first.ID || second.Resumed == 0 || second.Resumed >= first.Resumed {
		t.Errorf("boot %s found record %d of boot %s; the run before, %s, had found %d", second.ID, second.Resumed, second.ResumedBoot, first.ID, first.Resumed)
	}
	f.export(Recovery, f.vm().AtSource.Replica.Dir, chosen, func(uris []string) {
		if a, b := f.shas(f.view(Recovery)...), f.shas(uris...); !slices.Equal(a, b) {
			t.Errorf("the view is not that of point %d: %v, %v", chosen, a, b)
		}
	})
	records, err := witness.VerifyRecords(t.Context(), ring, f.view(Recovery)...)
	f.must(err)
	if !records.OK() || records.Max == 0 || records.Max >= first.Resumed {
		t.Errorf("point %d has records up to %d: %+v", chosen, records.Max, records)
	}
	var kept agentapi.Snapshot
	f.eventually(60*time.Second, "the snapshot is in the journal", func() (bool, string) {
		kept = f.snapshot(sum.Change.SetAside)
		return !kept.Pending, fmt.Sprintf("%+v", kept)
	})
	if kept.Point != f.vm().Switch.Last.Sequence || kept.Pin == "" || kept.SizeBytes < 8<<20 || len(kept.Files) != 1 || f.vm().AtSource.Replica.SnapshotBytes != kept.SizeBytes {
		t.Errorf("the snapshot is %+v", kept)
	}
	b, err := os.ReadFile(f.hostPaths(Recovery, kept.Files)[0])
	if err != nil || !seal.Sealed(b) {
		t.Errorf("the snapshot is not encrypted, %v", err)
	}
	// Anybody can read it: with the command line, and with nothing but the directory.
	to := t.TempDir()
	f.says(f.cli(0, "points", "verify", f.Name, "--snapshot", kept.Name), "none")
	f.says(f.cli(0, "points", "export", f.Name, "--snapshot", kept.Name, "--to", filepath.Join(to, "server")), "exported", kept.Name)
	f.says(f.at(Recovery, 0, "replica", "inspect", kept.Dir, "--snapshot", kept.Name), kept.Name, kept.Pin)
	f.at(Recovery, 0, "replica", "export", kept.Dir, "--snapshot", kept.Name, "--to", filepath.Join(to, "tool"))
	f.holds(first, filepath.Join(to, "server"))
	f.holds(first, filepath.Join(to, "tool"))

	// Back: what the first run wrote is there.
	id = f.begin(recovery.ChangePoint, api.OperationRequest{Snapshot: kept.Name})
	f.strike(id, strike{"change", theServer, time.Second})
	f.strike(id, strike{"change", Recovery, 2 * time.Second})
	back := f.succeeded(f.end(id))
	f.running(Recovery)
	third := f.lastBoot(Recovery)
	if last := first.LastAck().Last; third.ResumedBoot != first.ID || third.Resumed < last {
		t.Errorf("it found record %d of boot %s; the first run, %s, had acknowledged %d", third.Resumed, third.ResumedBoot, first.ID, last)
	}
	if n := len(f.vm().AtSource.Snapshots); n != 2 || !f.snapshot(kept.Name).InUse {
		t.Errorf("%d snapshots are kept: %+v", n, f.snapshot(kept.Name))
	}

	// The commit asks about the older point's run, and keeps it whole.
	f.refused(recovery.Commit, api.OperationRequest{}, switchback.CodeRefused, "kept snapshots")
	commit := f.operate(recovery.Commit, api.OperationRequest{Snapshots: "keep"})
	if len(commit.Commit.Snapshots) != 1 || !commit.Commit.Live {
		t.Errorf("committed: %+v", commit.Commit)
	}
	f.plain(Recovery)
	f.noViews(Recovery)
	f.writes(Recovery)
	f.refused(recovery.ChangePoint, api.OperationRequest{Point: "latest"}, switchback.CodeRefused, "points are gone")
	kept = f.snapshot(back.Change.SetAside)
	if n := len(f.vm().AtSource.Snapshots); !kept.SelfContained || n != 1 {
		t.Errorf("%d snapshots are kept: %+v", n, kept)
	}
	f.says(f.cli(0, "points", "export", f.Name, "--snapshot", kept.Name, "--to", filepath.Join(to, "whole")), "exported")
	f.says(f.at(Recovery, 0, "replica", "inspect", kept.Dir, "--verify"), kept.Name, "self-contained", "none")
	f.holds(second, filepath.Join(to, "whole"))
	f.operate(recovery.DropSnapshot, api.OperationRequest{Snapshot: kept.Name})

	sent := f.wanSent(t, Recovery)
	f.operate(recovery.Reprotect, api.OperationRequest{})
	if sent = f.wanSent(t, Recovery) - sent; sent > 72<<20 {
		t.Errorf("the way home took %d MiB: no delta", sent>>20)
	}
	t.Logf("delta home: %d MiB", sent>>20)

	// A switch that nobody looks after is taken back.
	policy.Commit = switchback.CommitPolicy{Action: switchback.CommitUndo, After: 6 * time.Second}
	f.operate(recovery.Edit, api.OperationRequest{Policy: policy})
	f.operate(recovery.Failback, api.OperationRequest{})
	f.cutOver(Recovery, Primary)
	if v := f.vm(); v.Phase == switchback.PhaseSwitched && (v.Countdown == nil || v.Countdown.Action != switchback.CommitUndo) {
		t.Errorf("the countdown is %+v", v.Countdown)
	}
	f.crash(t, theServer)
	f.eventually(90*time.Second, "the switch is undone", func() (bool, string) {
		v := f.vm()
		return v.Phase == switchback.PhaseProtected && v.Source == Recovery && v.Current == nil, fmt.Sprintf("%s at %s", v.Phase, v.Source)
	})
	f.running(Recovery)
	for _, s := range f.vm().AtTarget.Snapshots {
		if !strings.HasPrefix(s.Name, "epoch-") || s.Pin == "" {
			t.Errorf("snapshot %+v", s)
		}
		f.operate(recovery.DropSnapshot, api.OperationRequest{Snapshot: s.Name})
	}
	f.incremental(f.morePoints(2))
	policy.Commit = switchback.CommitPolicy{}
	f.operate(recovery.Edit, api.OperationRequest{Policy: policy})
	f.operate(recovery.Failback, api.OperationRequest{})
	f.cutOver(Recovery, Primary)
}

// lastBoot is the guest's present life, which has acknowledged records.
func (f *fixture) lastBoot(site string) *witness.Boot {
	f.t.Helper()
	c, err := witness.ParseConsole(f.Console(site, f.Name))
	f.must(err)
	if b := c.Last(); b != nil && len(b.Acks) > 0 {
		return b
	}
	f.t.Fatalf("%s has acknowledged nothing at %s", f.Name, site)
	return nil
}

// snapshot finds a snapshot kept where the VM is active.
func (f *fixture) snapshot(name string) agentapi.Snapshot {
	f.t.Helper()
	for _, s := range f.vm().AtSource.Snapshots {
		if s.Name == name {
			return s
		}
	}
	f.t.Fatalf("no snapshot %s", name)
	return agentapi.Snapshot{}
}

// holds fails the test unless the images in dir have all that a boot acknowledged.
func (f *fixture) holds(boot *witness.Boot, dir string) {
	f.t.Helper()
	var images []string
	for i := range f.Disks {
		images = append(images, filepath.Join(dir, diskName(i)+".qcow2"))
	}
	records, err := witness.VerifyRecords(f.t.Context(), ring, images...)
	f.must(err)
	if loss := witness.AcknowledgedLost(boot, records); !records.OK() || loss.Lost > 0 || loss.Acknowledged == 0 {
		f.t.Errorf("%s: %+v, %+v", dir, records, loss)
	}
}

func (f *fixture) hostPaths(site string, paths []string) []string {
	var list []string
	for _, p := range paths {
		list = append(list, f.Site(site).HostPath(p))
	}
	return list
}

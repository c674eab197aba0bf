package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
)

// TestOutOfSpace fills the target's storage and the source's scratch space. In
// either case the guest goes on, the points stay, the condition says which space
// it is, and replication goes on by itself when there is room again.
func TestOutOfSpace(t *testing.T) {
	f := addGuest(t, Guest{Name: "sp", ContentBytes: 32 << 20})
	storage, scratch := filepath.Join(shared.small, "storage"), filepath.Join(shared.small, "scratch")
	restart := func(site string, args ...string) {
		f.kill(t, site)
		f.start(t, site, args...)
		f.awaitAgent(t, site)
	}
	t.Cleanup(func() {
		restart(Primary)
		restart(Recovery)
	})

	// More is kept free than the small file system has: the VM is refused at once.
	restart(Recovery, "--storage", storage, "--storage-reserve", fmt.Sprint(smallBytes-8<<20))
	f.refused(recovery.Protect, api.OperationRequest{To: Recovery, Policy: testPolicy()}, switchback.CodeNoSpace, storage)
	if _, err := f.client.VM(t.Context(), f.Name); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("a refused protection left something: %v", err)
	}
	if left, err := os.ReadDir(storage); err != nil || len(left) > 0 {
		t.Errorf("a refused protection left %v, %v", left, err)
	}

	restart(Recovery, "--storage", storage, "--storage-reserve", fmt.Sprint(200<<20))
	restart(Primary, "--scratch", scratch)
	f.protect()
	f.morePoints(1)

	t.Run("Target", func(t *testing.T) {
		g := *f
		g.t = t
		defer g.room(smallBytes)
		g.room(160 << 20) // the source keeps 128 MiB free, the target 200
		g.condition("target-out-of-space", switchback.SeverityCritical)
		last := g.newest()
		g.dirty(Primary, "vda", 4<<20)
		time.Sleep(1500 * time.Millisecond)
		if n := g.newest(); n != last {
			t.Errorf("point %d was taken without room, after %d", n, last)
		}
		g.running(Primary)
		g.export(Recovery, g.vm().AtTarget.Replica.Dir, last, func(uris []string) { g.shas(uris...) })
		g.room(smallBytes)
		g.incremental(g.pointsAfter(last, 2))
		g.healthy()
	})

	t.Run("ScratchLow", func(t *testing.T) {
		g := *f
		g.t = t
		defer g.room(smallBytes)
		g.room(100 << 20)
		g.condition("source-scratch-out-of-space", switchback.SeverityCritical)
		g.running(Primary)
		last := g.newest()
		g.room(smallBytes)
		g.incremental(g.pointsAfter(last, 2))
		g.healthy()
	})

	t.Run("ScratchFull", func(t *testing.T) {
		g := *f
		g.t = t
		defer g.room(smallBytes)
		// A cycle that takes long, and no room at all for what the guest overwrites meanwhile.
		g.throttle(t, Primary, 2<<20)
		defer g.throttle(t, Primary, 0)
		last := g.newest()
		g.dirty(Primary, "vda", 24<<20)
		g.poll(20*time.Millisecond, 120*time.Second, "a cycle is under way", func() (bool, string) {
			out, err := g.Virsh(t.Context(), Primary, "backup-dumpxml", g.Name)
			v := g.vm()
			r := v.AtSource.Replication
			return err == nil && r.Progress != nil && r.Progress.TotalBytes > 16<<20, out
		})
		g.room(0)
		for range 5 {
			g.writes(Primary) // paused by the full scratch space, if at all, for moments
		}
		g.condition("source-scratch-out-of-space", switchback.SeverityCritical)
		g.throttle(t, Primary, 0)
		g.room(smallBytes)
		g.pointsAfter(last, 2)
		g.healthy()
		g.writes(Primary)
	})

	t.Run("ThenFailover", func(t *testing.T) {
		g := *f
		g.t = t
		g.incremental(g.morePoints(1))
		g.operate(recovery.Failover, api.OperationRequest{})
		g.cutOver(Primary, Recovery)
		g.operate(recovery.Cancel, api.OperationRequest{})
	})
}

// room lets the small file system have so many bytes free, from one moment to the next.
func (f *fixture) room(free int64) {
	f.t.Helper()
	var st unix.Statfs_t
	f.must(unix.Statfs(f.small, &st))
	f.must(unix.Mount("", f.small, "", unix.MS_REMOUNT, fmt.Sprintf("size=%d", int64(st.Blocks-st.Bfree)*st.Bsize+free)))
}

func (f *fixture) condition(name string, severity switchback.Severity) {
	f.t.Helper()
	f.eventually(120*time.Second, "condition "+name, func() (bool, string) {
		v := f.vm()
		for _, c := range v.Conditions {
			if c.Name == name && c.Severity == severity && c.Remedy != "" && v.Health == string(severity) {
				return true, ""
			}
		}
		return false, fmt.Sprintf("%+v", v.Conditions)
	})
}

func (f *fixture) healthy() {
	f.t.Helper()
	f.eventually(15*time.Second, "healthy again", func() (bool, string) {
		v := f.vm()
		return v.Health == "normal", fmt.Sprintf("%+v", v.Conditions)
	})
}

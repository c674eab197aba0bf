package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// TestReplicationUnderFaults replicates two guests while agents are killed, the
// network is cut, libvirtd restarts and QEMU dies: one in cycles, one in its
// first full copy. At the end the target must have what the source has.
func TestReplicationUnderFaults(t *testing.T) {
	cyc := bootGuest(t, Guest{Name: "cyc", Disks: []int64{4 << 30, 4 << 30}})
	big := addGuest(t, Guest{Name: "seed", ContentBytes: seedBytes, Pace: 50 * time.Millisecond})
	cyc.awaitLine(Primary, 0, "SB ACK")
	cyc.protect()
	cyc.incremental(cyc.morePoints(2))

	t.Run("AgentsKilledInCycles", func(t *testing.T) {
		f := *cyc
		f.t = t
		from := f.newest()
		sent := f.wanSent(t, Primary)
		for i := range 4 {
			victim := []string{Primary, Recovery}[i%2]
			f.dirty(Primary, "vdb", 6<<20)
			time.Sleep(time.Duration(randomUpTo(1000)) * time.Millisecond)
			f.crash(t, victim)
			f.incremental(f.morePoints(1))
		}
		f.incremental(f.pointsAfter(from, 4))
		// Each change once, and once more where its cycle was not acknowledged.
		if sent = f.wanSent(t, Primary) - sent; sent < 24<<20 || sent > 2*24<<20+16<<20 {
			t.Errorf("%d MiB were sent for 24 MiB of changes", sent>>20)
		}
		f.writes(Primary)
	})
	if t.Failed() {
		return
	}
	t.Run("FirstCopyInterrupted", func(t *testing.T) { testFirstCopy(t, *cyc, *big) })
	if t.Failed() {
		return
	}

	t.Run("LibvirtdRestarted", func(t *testing.T) {
		f := *cyc
		f.t = t
		pid := f.qemu()
		f.must(f.Site(Primary).Kill(t.Context()))
		f.must(f.Site(Primary).Restart(t.Context()))
		f.incremental(f.morePoints(2))
		f.must(f.Site(Primary).Restart(t.Context()))
		f.must(f.Site(Recovery).Restart(t.Context()))
		f.incremental(f.morePoints(2))
		if f.qemu() != pid {
			t.Error("the guest did not outlive libvirtd")
		}
		f.writes(Primary)
	})

	t.Run("Rebooted", func(t *testing.T) {
		f := *cyc
		f.t = t
		f.virsh(Primary, "autostart", f.Name)
		f.eventually(20*time.Second, "autostart is the agent's", func() (bool, string) {
			info := strings.Join(strings.Fields(f.virsh(Primary, "dominfo", f.Name)), " ")
			return strings.Contains(info, "Autostart: disable"), info
		})
		pid := f.qemu()
		f.kill(t, Primary)
		// What a reboot takes away.
		for _, gone := range []string{"boot", "grants", "begun"} {
			f.must(os.RemoveAll(filepath.Join(f.Site(Primary).HostPath("/run/switchback"), gone)))
		}
		f.must(f.Site(Primary).Kill(t.Context()))
		f.must(f.Site(Primary).Restart(t.Context()))
		if f.qemu() != pid {
			t.Error("the guest, which has no grant now, did not outlive libvirtd")
		}
		f.virsh(Primary, "destroy", f.Name)
		for range 2 {
			_, err := f.Virsh(t.Context(), Primary, "start", f.Name)
			if err == nil || !strings.Contains(err.Error(), "held by Switchback") || !strings.Contains(err.Error(), "agent override") {
				t.Errorf("a start without a grant: %v", err)
			}
			f.must(f.Site(Primary).Restart(t.Context()))
		}
		f.start(t, Primary)
		f.eventually(60*time.Second, "the agent starts the guest", func() (bool, string) {
			s := f.virsh(Primary, "domstate", f.Name)
			return s == "running", s
		})
		f.writes(Primary)
		f.pointsAfter(f.newest(), 1)
	})

	t.Run("QEMUKilled", func(t *testing.T) {
		f := *cyc
		f.t = t
		last := f.newest()
		f.must(syscall.Kill(f.qemu(), syscall.SIGKILL))
		f.eventually(120*time.Second, "the domain is off", func() (bool, string) {
			s := f.virsh(Primary, "domstate", f.Name)
			return s == "shut off", s
		})
		f.virsh(Primary, "start", f.Name)
		points := f.pointsAfter(last, 1)
		for _, p := range points {
			if p.Resync {
				t.Logf("point %d: %s", p.Sequence, p.ResyncReason)
			}
		}
		i := slices.IndexFunc(points, func(p switchback.MarkedPoint) bool { return p.Resync })
		if i < 0 || !strings.Contains(points[i].ResyncReason, "lost") {
			t.Fatalf("no resync says that the bitmap was lost: %+v", points)
		}
		f.incremental(f.pointsAfter(points[i].Sequence, 2))
		f.writes(Primary)
	})

	t.Run("ThenFailover", func(t *testing.T) {
		both := []fixture{*cyc, *big}
		ids := make([]switchback.OperationID, len(both))
		for i := range both {
			f := &both[i]
			f.t = t
			f.virsh(Primary, "autostart", f.Name)
			if n := f.checkpoints(Primary); len(n) != 1 && len(n) != 2 {
				t.Errorf("%s has the checkpoints %v", f.Name, n)
			}
			ids[i] = f.begin(recovery.Failover, api.OperationRequest{})
		}
		for i := range both {
			both[i].succeeded(both[i].end(ids[i]))
			both[i].cutOver(Primary, Recovery)
		}
	})
	if t.Failed() {
		return
	}

	t.Run("Fenced", func(t *testing.T) {
		f := *cyc
		f.t = t
		pid := f.qemu()
		out, err := f.Virsh(t.Context(), Primary, "start", f.Name)
		if err == nil || !strings.Contains(err.Error(), "fenced by Switchback") || !strings.Contains(err.Error(), "failback") {
			t.Errorf("the start of the old side: %q, %v", out, err)
		}
		if info := f.virsh(Primary, "dominfo", f.Name); !strings.Contains(strings.Join(strings.Fields(info), " "), "Autostart: disable") {
			t.Errorf("the old side starts with its host: %s", info)
		}
		f.must(f.Site(Recovery).Kill(t.Context()))
		f.must(f.Site(Recovery).Restart(t.Context()))
		f.must(f.Site(Primary).Restart(t.Context()))
		if _, err := f.Virsh(t.Context(), Primary, "start", f.Name); err == nil {
			t.Error("the old side starts after a restart of libvirtd")
		}
		if f.qemu() != pid || pid == 0 {
			t.Error("the guest did not outlive libvirtd")
		}
		f.writes(Recovery)
	})
}

// seedBytes of content make a first copy of half a minute over the slow WAN.
const seedBytes = 160 << 20

// testFirstCopy makes the first full copy of one guest over a slow WAN. The
// target's agent dies in it, then the source's, then the WAN is cut for 20 s;
// the other guest's cycles meet all of it, too.
func testFirstCopy(t *testing.T, cyc, f fixture) {
	const rate = 6 << 20
	cyc.t, f.t = t, t
	lastPoint := cyc.newest()
	f.throttle(t, Primary, rate)
	defer f.throttle(t, Primary, 0)
	policy := testPolicy()
	policy.Compression = "none"
	begin, before := time.Now(), f.wanSent(t, Primary)
	id := f.begin(recovery.Protect, api.OperationRequest{To: Recovery, Policy: policy})
	f.eventually(120*time.Second, "the copy begins", func() (bool, string) { return f.wanSent(t, Primary)-before > 4<<20, "" })
	f.crash(t, Recovery) // nothing is durable yet
	f.eventually(120*time.Second, "the copy begins again", func() (bool, string) { return f.wanSent(t, Primary)-before > 24<<20, "" })

	// What was copied in ten seconds is durable once the 24 MiB under way are there.
	atMark := int64(0)
	f.eventually(120*time.Second, "a durable part of the copy", func() (bool, string) {
		atMark = f.wanSent(t, Primary) - before
		return atMark > 24<<20+16*rate, fmt.Sprintf("%d MiB sent after %v", atMark>>20, time.Since(begin))
	})
	time.Sleep(time.Duration(randomUpTo(500)) * time.Millisecond)
	f.kill(t, Primary)
	if out, err := f.Virsh(t.Context(), Primary, "backup-dumpxml", f.Name); err != nil {
		t.Errorf("the killed agent left no job open, so that nothing is tested: %s %v", out, err)
	}
	f.writes(Primary)
	rest := f.wanSent(t, Primary)
	f.start(t, Primary)
	f.eventually(120*time.Second, "the copy goes on", func() (bool, string) { return f.wanSent(t, Primary)-rest > 2<<20, "" })

	cut := time.Now()
	f.must(f.Network().CutWAN(t.Context(), true))
	f.throttle(t, Primary, 0)
	f.eventually(40*time.Second, "the condition target-unreachable", func() (bool, string) {
		v := cyc.vm()
		return hasCondition(v, "target-unreachable"), fmt.Sprintf("%+v", v.Conditions)
	})
	f.writes(Primary)
	cyc.writes(Primary)
	time.Sleep(time.Until(cut.Add(20 * time.Second)))
	f.must(f.Network().CutWAN(t.Context(), false))

	rec := f.end(id)
	if rec.State != operation.StateSucceeded {
		t.Fatalf("protect is %s: %v", rec.State, rec.Error)
	}
	cyc.incremental(cyc.pointsAfter(lastPoint, 2))
	f.incremental(f.morePoints(2))
	f.eventually(10*time.Second, "no conditions", func() (bool, string) {
		c := append(f.vm().Conditions, cyc.vm().Conditions...)
		return len(c) == 0, fmt.Sprintf("%+v", c)
	})
	// What was durable ten seconds after the second beginning is not sent again.
	rest = f.wanSent(t, Primary) - rest
	t.Logf("%d MiB sent until the agent died, %d MiB afterwards", atMark>>20, rest>>20)
	if allocated := int64(seedBytes); rest > allocated-8*rate+24<<20 {
		t.Errorf("%d MiB were sent after the copy had come to %d MiB of %d", rest>>20, atMark>>20, allocated>>20)
	}
}

func hasCondition(v api.VM, name string) bool {
	return slices.ContainsFunc(v.Conditions, func(c switchback.Condition) bool { return c.Name == name })
}

package lab

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
)

// TestApplicationConsistent takes points with the guest's file system frozen, on
// request and by the policy: their file system needs no recovery, that of the
// others does. A guest that a killed agent has left frozen is thawed.
func TestApplicationConsistent(t *testing.T) {
	t.Parallel()
	f := addGuest(t, Guest{Name: "app"})
	f.protect()
	f.morePoints(1)
	sum := f.operate(recovery.TakePoint, api.OperationRequest{ApplicationConsistent: true})
	app := sum.Copy.Point
	if app.Kind != switchback.ApplicationConsistent || sum.Copy.Frozen <= 0 || sum.Copy.Frozen > 10*time.Second {
		t.Fatalf("the point is %s, frozen for %v", app.Kind, sum.Copy.Frozen)
	}
	t.Logf("frozen for %v", sum.Copy.Frozen)
	f.writes(Primary)
	after := f.pointsAfter(app.Sequence, 1)[0]
	f.recovers(app.Sequence, false)
	f.recovers(after.Sequence, true)

	a, err := f.client.Request(t.Context(), f.Name, recovery.Failover, api.OperationRequest{Point: "latest-app", DryRun: true})
	f.must(err)
	if len(a.Plan.Warnings) == 0 || len(a.Plan.Changes) < 2 || a.Plan.Changes[1][:len("the guest starts from point ")] != "the guest starts from point " {
		t.Errorf("the plan is %+v", a.Plan)
	}

	policy := testPolicy()
	policy.AppConsistentEvery = 4 * time.Second
	f.operate(recovery.Edit, api.OperationRequest{Policy: policy})
	from := f.newest()
	var kinds []switchback.PointKind
	f.eventually(90*time.Second, "two application-consistent points", func() (bool, string) {
		kinds = nil
		n := 0
		for _, p := range f.points() {
			if p.Sequence > from {
				kinds = append(kinds, p.Kind)
				if p.Kind == switchback.ApplicationConsistent {
					n++
				}
			}
		}
		return n >= 2, fmt.Sprint(kinds)
	})
	t.Logf("kinds: %v", kinds)
	if c := f.vm().Conditions; len(c) > 0 {
		t.Errorf("conditions %+v", c)
	}
	f.operate(recovery.Edit, api.OperationRequest{Policy: testPolicy()})

	// What an agent that dies between freeze and thaw leaves: a frozen guest and its note.
	note := filepath.Join(f.Site(Primary).HostPath("/var/lib/switchback/index"), string(f.vm().ID), "frozen")
	f.kill(t, Primary)
	f.virsh(Primary, "domfsfreeze", f.Name)
	f.must(os.WriteFile(note, []byte(f.UUID()+"\n"), 0o600))
	f.start(t, Primary)
	f.eventually(60*time.Second, "the guest is thawed", func() (bool, string) { _, err := os.Stat(note); return os.IsNotExist(err), fmt.Sprint(err) })
	f.virsh(Primary, "domfsfreeze", f.Name) // refused if it were frozen
	f.virsh(Primary, "domfsthaw", f.Name)
	f.incremental(f.morePoints(2))

	f.operate(recovery.Failover, api.OperationRequest{Point: "latest-app", AcceptLoss: true})
	f.running(Recovery)
}

// recovers fails the test unless the file system on the guest's first disk, as
// of a point, needs recovery, or does not (superblock, s_feature_incompat,
// INCOMPAT_RECOVER: https://docs.kernel.org/filesystems/ext4/super.html).
func (f *fixture) recovers(point switchback.Sequence, want bool) {
	f.t.Helper()
	f.export(Recovery, f.vm().AtTarget.Replica.Dir, point, func(uris []string) {
		out := filepath.Join(f.t.TempDir(), "superblock")
		if b, err := exec.CommandContext(f.t.Context(), "qemu-img", "dd", "-f", "raw", "-O", "raw", "bs=1k", "count=2", "if="+uris[0], "of="+out).CombinedOutput(); err != nil {
			f.t.Fatalf("%v: %s", err, b)
		}
		b, err := os.ReadFile(out)
		f.must(err)
		if len(b) < 2048 || binary.LittleEndian.Uint16(b[1024+0x38:]) != 0xef53 {
			f.t.Fatalf("point %d has no ext4 superblock", point)
		}
		if got := binary.LittleEndian.Uint32(b[1024+0x60:])&4 != 0; got != want {
			f.t.Errorf("the file system of point %d needs recovery: %v, expected %v", point, got, want)
		}
	})
}

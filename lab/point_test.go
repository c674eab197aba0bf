package lab

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/witness"
)

// TestOlderPointAndBack fails over to a point several back, commits while the
// guest writes, comes home by delta, and commits there with the VM shut off.
// Each delta is proved complete by the next cut-over.
func TestOlderPointAndBack(t *testing.T) {
	t.Parallel()
	f := addGuest(t, Guest{Name: "pt", Disks: []int64{4 << 30, 4 << 30}, ContentBytes: 96 << 20, Pace: time.Millisecond})
	f.protect()
	f.morePoints(3)
	f.dirty(Primary, "vdb", 8<<20)
	points := f.morePoints(2)
	chosen := points[len(points)-1].Sequence
	f.dirty(Primary, "vdb", 8<<20)
	f.morePoints(3)

	f.refused(recovery.Failover, api.OperationRequest{Point: fmt.Sprint(chosen)}, switchback.CodeRefused, "would be lost")
	f.refused(recovery.Failover, api.OperationRequest{Point: "9999", AcceptLoss: true}, switchback.CodeNotFound, "no point 9999")
	f.writes(Primary)
	sum := f.operate(recovery.Failover, api.OperationRequest{Point: fmt.Sprint(chosen), AcceptLoss: true})
	if sum.Switch.Point.Sequence != chosen || sum.Switch.Last.Sequence < chosen+4 {
		t.Fatalf("the guest runs from point %d, chosen was %d; the last is %d", sum.Switch.Point.Sequence, chosen, sum.Switch.Last.Sequence)
	}
	// The chosen point is an earlier state, whole in itself; the last one is what was left behind.
	old := f.disks(Primary)
	records, err := witness.VerifyRecords(t.Context(), ring, f.view(Recovery)...)
	f.must(err)
	latest, err := witness.VerifyRecords(t.Context(), ring, old...)
	f.must(err)
	if !records.OK() || records.Max == 0 || records.Max >= latest.Max {
		t.Errorf("the chosen point has records up to %d, the source %d: %+v", records.Max, latest.Max, records)
	}
	f.export(Recovery, f.vm().AtSource.Replica.Dir, sum.Switch.Last.Sequence, func(uris []string) {
		if a, b := f.shas(old...), f.shas(uris...); !slices.Equal(a, b) {
			t.Errorf("the point after the shutdown is not what the source has: %v, %v", a, b)
		}
	})

	// The guest writes records all through the commit, and much on one disk.
	f.writes(Recovery)
	stop := make(chan struct{})
	wrote := make(chan error, 1)
	go func() {
		c, err := f.Control(t.Context(), Recovery, f.Name)
		for n := uint64(0); err == nil; n++ {
			select {
			case <-stop:
				wrote <- c.Close()
				return
			default:
				_, err = c.Dirty(t.Context(), guest.Changes{Disk: "vdb", Bytes: 3 << 20, Seed: n + 1, Span: 16 << 20})
			}
		}
		wrote <- err
	}()
	time.Sleep(time.Second)
	commit := f.operate(recovery.Commit, api.OperationRequest{})
	close(stop)
	f.must(<-wrote)
	if !commit.Commit.Live {
		t.Error("the guest did not run during the commit")
	}
	f.plain(Recovery)
	f.noViews(Recovery)
	f.writes(Recovery)
	if out, err := f.Virsh(t.Context(), Primary, "start", f.Name); err == nil {
		t.Errorf("the old side starts after the commit: %s", out)
	}

	sent := f.wanSent(t, Recovery)
	f.operate(recovery.Reprotect, api.OperationRequest{})
	if sent = f.wanSent(t, Recovery) - sent; sent > 72<<20 {
		t.Errorf("the way home took %d MiB: no delta", sent>>20)
	}
	t.Logf("delta home: %d MiB", sent>>20)
	f.incremental(f.morePoints(2))
	f.operate(recovery.Failback, api.OperationRequest{})
	f.cutOver(Recovery, Primary)

	// Home again: off, committed at rest, on, and away by delta.
	f.dirty(Primary, "vda", 6<<20)
	f.dirty(Primary, "vdb", 6<<20)
	c, err := f.Control(t.Context(), Primary, f.Name)
	f.must(err)
	f.must(c.PowerOff(t.Context()))
	c.Close()
	f.eventually(120*time.Second, "the guest is off", func() (bool, string) { s := f.virsh(Primary, "domstate", f.Name); return s == "shut off", s })
	if commit = f.operate(recovery.Commit, api.OperationRequest{}); commit.Commit.Live {
		t.Error("the commit says that the guest ran")
	}
	f.plain(Primary)
	f.noViews(Primary)
	f.nothingLost(Primary, f.disks(Primary)...)
	from := witness.ConsoleSize(f.Console(Primary, f.Name))
	f.virsh(Primary, "start", f.Name)
	f.awaitLine(Primary, from, "SB ACK")
	sent = f.wanSent(t, Primary)
	f.operate(recovery.Reprotect, api.OperationRequest{})
	if sent = f.wanSent(t, Primary) - sent; sent > 80<<20 {
		t.Errorf("the way back took %d MiB: no delta", sent>>20)
	}
	f.incremental(f.morePoints(1))
	f.operate(recovery.Failover, api.OperationRequest{})
	f.cutOver(Primary, Recovery)
}

// TestCancel takes a switch back: in the middle, and after the guest has
// written at the new side.
func TestCancel(t *testing.T) {
	t.Parallel()
	f := addGuest(t, Guest{Name: "cx"})
	f.protect()
	f.morePoints(1)

	for _, step := range []string{"shutdown", "check"} {
		t.Run("During"+step, func(t *testing.T) {
			g := *f
			g.t = t
			epoch := g.vm().Epoch
			id := g.begin(recovery.Failover, api.OperationRequest{})
			g.poll(20*time.Millisecond, 120*time.Second, "step "+step, func() (bool, string) {
				rec, err := g.client.Operation(t.Context(), id)
				for _, s := range rec.Steps {
					if s.Name == step {
						return s.State != "pending", string(s.State)
					}
				}
				return false, fmt.Sprint(err)
			})
			g.operationCancelled(id)
			g.running(Primary)
			if v := g.vm(); v.Phase != switchback.PhaseProtected || v.Source != Primary || v.Epoch <= epoch {
				t.Errorf("it is %s at %s under epoch %d", v.Phase, v.Source, v.Epoch)
			}
			g.incremental(g.morePoints(2))
		})
	}

	t.Run("AfterTheSwitch", func(t *testing.T) {
		g := *f
		g.t = t
		g.operate(recovery.Failover, api.OperationRequest{})
		g.cutOver(Primary, Recovery)
		g.writes(Recovery)
		c, err := witness.ParseConsole(g.Console(Recovery, g.Name))
		g.must(err)
		there := c.Last()
		g.operate(recovery.Cancel, api.OperationRequest{})
		g.running(Primary)
		g.noViews(Recovery)
		if out, err := g.Virsh(t.Context(), Recovery, "start", g.Name); err == nil {
			t.Errorf("the abandoned side starts: %s", out)
		}
		// What was written there is kept, and only there.
		to, found := t.TempDir(), false
		kept := g.vm().AtTarget.Snapshots
		for _, s := range kept {
			image := filepath.Join(to, s.Name+".qcow2")
			g.cli(0, "points", "export", g.Name, "--snapshot", s.Name, "--to", image)
			r, err := witness.VerifyRecords(t.Context(), ring, image)
			g.must(err)
			for _, b := range r.Boots {
				found = found || b.ID == there.ID
			}
		}
		if !found {
			t.Errorf("the records of boot %s are in none of %v", there.ID, kept)
		}
		g.incremental(g.morePoints(2))
		g.staleEpochs()
		g.incremental(g.morePoints(1))
	})

	t.Run("ThenFailover", func(t *testing.T) {
		g := *f
		g.t = t
		g.operate(recovery.Failover, api.OperationRequest{})
		g.cutOver(Primary, Recovery)
		g.writes(Recovery)
	})
}

// operationCancelled cancels with the command line and waits for the end.
func (f *fixture) operationCancelled(id switchback.OperationID) {
	f.t.Helper()
	out, err := exec.CommandContext(f.t.Context(), f.cfg.Executable, "--config", f.ConfigDir(), "vm", "cancel", f.Name).CombinedOutput()
	f.t.Logf("vm cancel: %v\n%s", err, out)
	if rec := f.end(id); rec.State != "cancelled" {
		f.t.Fatalf("%s is %s: %v", rec.Title, rec.State, rec.Error)
	}
}

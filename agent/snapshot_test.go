package agent

import (
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/qemu"
)

// TestSnapshotsComeAndGo: what a run wrote is set aside with its point pinned,
// taken up again by the next run, which learns what was written, and dropped
// without a trace; each part also when it is repeated.
func TestSnapshotsComeAndGo(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	base := filepath.Join(dir, "vda.qcow2")
	must(qemu.Create(ctx, base, qemu.CreateOptions{Format: "qcow2", SizeBytes: 8 << 20}))
	disks := []switchback.Disk{{Name: "vda", SizeBytes: 8 << 20, Path: base, Format: "qcow2"}}
	replicaDir := filepath.Join(dir, "journal-1")
	replica, err := journal.Create(replicaDir, journal.Spec{Protection: "p-1", VM: "u", Name: "web", Epoch: 1, BaseIsOriginal: true,
		Disks: []journal.ReplicaDisk{{Name: "vda", SizeBytes: 8 << 20, BasePath: base}}})
	must(err)
	a := &Agent{cfg: Config{StateDir: dir, RunDir: dir}, log: slog.New(slog.DiscardHandler)}
	v := &vm{agent: a, replica: replica, a: Assignment{Protection: "p-1", VM: "u", Name: "web", Epoch: 2, Role: agentapi.RoleActive, Disks: disks, Dir: dir, ReplicaDir: replicaDir}}
	t.Cleanup(v.closeReplica)
	pins := func() (names []string) {
		for _, p := range replica.Pins() {
			names = append(names, p.Name)
		}
		return names
	}

	run := v.newRun(2, 0)
	run.Started = true
	must(replica.Pin(run.Pin, 0, nil))
	must(qemu.Create(ctx, run.Overlays["vda"], qemu.CreateOptions{Format: "qcow2", Backing: base, BackingFormat: "qcow2"}))
	must(qemu.AddBitmap(ctx, run.Overlays["vda"], run.Checkpoint, 0))
	if out, err := exec.CommandContext(ctx, "qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", run.Overlays["vda"]).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	must(v.change(func(x *Assignment) { x.Run = run }))
	for range 2 { // the second finds the files moved
		s, ok, err := v.setAside(ctx, v.assignment(), run)
		must(err)
		if !ok || s.Name != "epoch-2-from-point-0" || s.Sequence != 0 || s.Epoch != 2 || s.Files["vda"] != filepath.Join(dir, "snapshots", s.Name, "vda.qcow2") {
			t.Fatalf("set aside: %+v, %v", s, ok)
		}
		info, err := qemu.Info(ctx, s.Files["vda"])
		must(err)
		if info.Backing != "" {
			t.Errorf("it stands on %s", info.Backing)
		}
		must(v.change(func(x *Assignment) { x.Run, x.Snapshots = nil, append(without(x.Snapshots, s.Name), s) }))
	}
	must(v.tidyPins())
	if d := cmp.Diff([]string{"snapshot-epoch-2-from-point-0"}, pins()); d != "" {
		t.Errorf("pins: %s", d)
	}
	if list := v.assignment().snapshots(nil); len(list) != 1 || list[0].SizeBytes == 0 || list[0].WholeBytes <= list[0].SizeBytes || len(list[0].Files) != 1 {
		t.Errorf("reported: %+v", list)
	}
	if err := v.settled(v.assignment()); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("a commit under a snapshot: %v", err)
	}

	next := v.newRun(3, 0)
	next.Snapshot = "epoch-2-from-point-0"
	must(replica.Pin(next.Pin, 0, nil))
	must(v.change(func(x *Assignment) { x.Run, x.Snapshots = next, without(x.Snapshots, next.Snapshot) }))
	for range 2 {
		must(takeUpSnapshot(ctx, v.assignment(), next))
	}
	must(v.tidyPins())
	if d := cmp.Diff([]string{"run-3"}, pins()); d != "" {
		t.Errorf("pins: %s", d)
	}
	info, err := qemu.Info(ctx, next.Overlays["vda"])
	must(err)
	if len(info.Bitmaps) > 0 {
		t.Errorf("bitmaps of its former life: %+v", info.Bitmaps)
	}
	written, err := qemu.Allocated(ctx, next.Overlays["vda"])
	must(err)
	next.Started, next.Written = true, map[string]extent.Set{"vda": written}
	must(v.fixAbandonedOf(replica, next))
	if got, want := v.assignment().Run.Abandoned["vda"], extent.NewSet(extent.Range{Offset: 1 << 20, Length: 64 << 10}); !got.Equal(want) {
		t.Errorf("the way home carries %v, want %v", got.Ranges(), want.Ranges())
	}

	s, ok, err := v.setAside(ctx, v.assignment(), next)
	must(err)
	if !ok || s.Name != "epoch-3-from-point-0" {
		t.Fatalf("set aside: %+v, %v", s, ok)
	}
	must(v.change(func(x *Assignment) { x.Run, x.Snapshots = nil, []Snapshot{s} }))
	for range 2 {
		must(v.removeSnapshot(s.Name))
	}
	must(v.tidyPins())
	if left, _ := filepath.Glob(filepath.Join(dir, "snapshots", "*")); len(left)+len(pins())+len(v.assignment().Snapshots) > 0 {
		t.Errorf("left: %v, pins %v, records %v", left, pins(), v.assignment().Snapshots)
	}
}

// fixAbandonedOf makes the run the assignment's and fixes what it leaves behind.
func (v *vm) fixAbandonedOf(replica *journal.Replica, run *Run) error {
	if err := v.change(func(x *Assignment) { x.Run = run }); err != nil {
		return err
	}
	return v.fixAbandoned(replica, run)
}

// TestCopyChosen replaces the VM's disk once, and leaves the journal's base alone.
func TestCopyChosen(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	disk, point := filepath.Join(dir, "vda.qcow2"), filepath.Join(dir, "point.raw")
	for _, err := range []error{
		qemu.Create(ctx, disk, qemu.CreateOptions{Format: "qcow2", SizeBytes: 4 << 20}),
		os.WriteFile(point, make([]byte, 4<<20), 0o600),
		os.Link(disk, keptBase(disk, 7)),
		os.Chmod(disk, 0o640),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	d := switchback.Disk{Name: "vda", Path: disk}
	if err := copyChosen(ctx, d, keptBase(disk, 7), point); err != nil {
		t.Fatal(err)
	}
	first, err := os.Stat(disk)
	if err != nil {
		t.Fatal(err)
	}
	kept, err := os.Stat(keptBase(disk, 7))
	if err != nil || os.SameFile(first, kept) || first.Mode() != kept.Mode() {
		t.Errorf("%v and %v, %v", first, kept, err)
	}
	if err := copyChosen(ctx, d, keptBase(disk, 7), point); err != nil {
		t.Fatal(err)
	}
	if again, err := os.Stat(disk); err != nil || !os.SameFile(first, again) {
		t.Errorf("it was copied again: %v", err)
	}
}

package agent

import (
	"bytes"
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
	"github.com/switchback-dr/switchback/seal"
)

// snapshotBed is a VM that is about to run from point 0 of a sealed replica, in dir.
func snapshotBed(t *testing.T, dir string) (*vm, *journal.Replica) {
	t.Helper()
	base := filepath.Join(dir, "vda.qcow2")
	mustDo(t, qemu.Create(t.Context(), base, qemu.CreateOptions{Format: "qcow2", SizeBytes: 8 << 20}))
	imageIO(t, base, "write -P 1 0 2M")
	replicaDir := filepath.Join(dir, "journal-1")
	replica, err := journal.Create(replicaDir, journal.Spec{Protection: "p-1", VM: "u", Name: "web", Epoch: 1, BaseIsOriginal: true,
		Disks: []journal.ReplicaDisk{{Name: "vda", SizeBytes: 8 << 20, BasePath: base}}})
	mustDo(t, err)
	key := filepath.Join(dir, "key")
	mustDo(t, seal.MakeKeyFile(key))
	mustDo(t, replica.SetSealing(t.Context(), true, &seal.Source{File: key}))
	log := slog.New(slog.DiscardHandler)
	a := &Agent{cfg: Config{StateDir: dir, RunDir: dir, KeySource: &seal.Source{File: key}}, log: log, tasks: &taskTable{ctx: t.Context()}}
	v := &vm{agent: a, replica: replica, a: Assignment{Protection: "p-1", VM: "u", Name: "web", Epoch: 2, Role: agentapi.RoleActive, Dir: dir, ReplicaDir: replicaDir,
		Policy: switchback.Policy{Encrypt: true}, Disks: []switchback.Disk{{Name: "vda", SizeBytes: 8 << 20, Path: base, Format: "qcow2"}}}}
	t.Cleanup(v.closeReplica)
	return v, replica
}

func mustDo(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func imageIO(t *testing.T, path string, commands ...string) {
	t.Helper()
	args := []string{"-f", "qcow2"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	if out, err := exec.CommandContext(t.Context(), "qemu-io", append(args, path)...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// abandonRun has a run write and sets it aside, each part twice as after a kill.
func (v *vm) abandonRun(t *testing.T, epoch switchback.Epoch, from string, commands ...string) Snapshot {
	t.Helper()
	run := v.newRun(epoch, 0)
	run.Started, run.Snapshot = true, from
	mustDo(t, v.replica.Pin(run.Pin, 0, nil))
	mustDo(t, qemu.Create(t.Context(), run.Overlays["vda"], qemu.CreateOptions{Format: "qcow2", SizeBytes: 8 << 20}))
	mustDo(t, qemu.AddBitmap(t.Context(), run.Overlays["vda"], run.Checkpoint, 0))
	imageIO(t, run.Overlays["vda"], commands...)
	mustDo(t, v.change(func(x *Assignment) { x.Run = run }))
	var s Snapshot
	for range 2 { // the second finds the files moved
		var ok bool
		var err error
		if s, ok, err = v.setAside(t.Context(), v.assignment(), run); !ok || err != nil {
			t.Fatalf("set aside: %v, %v", ok, err)
		}
	}
	mustDo(t, v.change(func(x *Assignment) { x.Run, x.Snapshots = nil, append(without(x.Snapshots, s.Name), s) }))
	mustDo(t, v.tidyPins())
	return s
}

// wantBytes compares ranges of a snapshot with what they should hold.
func wantBytes(t *testing.T, dir, name string, want map[int64]byte) {
	t.Helper()
	view, err := journal.OpenBranch(dir, name)
	mustDo(t, err)
	defer view.Close()
	for off, c := range want {
		p := make([]byte, 4096)
		if _, err := view.Disk("vda").ReadAt(p, off); err != nil || !bytes.Equal(p, bytes.Repeat([]byte{c}, len(p))) {
			t.Errorf("%s at %d: %d..., %v; want %d", name, off, p[0], err, c)
		}
	}
}

// TestSnapshotsComeAndGo: what a run wrote is set aside with its point pinned,
// moved into the journal, run from again by the next run, whose own snapshot needs
// nothing of it, made self-contained, and dropped without a trace; each part
// also when it is repeated.
func TestSnapshotsComeAndGo(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	v, replica := snapshotBed(t, dir)
	as := v.assignment()
	pins := func() (names []string) {
		for _, p := range replica.Pins() {
			names = append(names, p.Name)
		}
		return names
	}
	first := v.abandonRun(t, 2, "", "write -P 7 1M 64k", "write -z 64k 64k")
	if first.Name != "epoch-2-from-point-0" || first.Sequence != 0 || first.Epoch != 2 || len(first.Files) != 1 {
		t.Fatalf("set aside: %+v", first)
	}
	if list := v.assignment().snapshots(nil); len(list) != 1 || !list[0].Pending || list[0].SizeBytes == 0 || list[0].WholeBytes <= list[0].SizeBytes {
		t.Errorf("reported: %+v", list)
	}
	if err := v.settled(v.assignment()); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("a commit under a snapshot: %v", err)
	}
	for range 2 {
		mustDo(t, v.keepBranches(ctx, nil))
	}
	// As if it had been killed after the branch was durable, before the record was.
	overlay := writesDir(as, first.Name)
	mustDo(t, os.Mkdir(overlay, 0o700))
	mustDo(t, qemu.Create(ctx, first.Files["vda"], qemu.CreateOptions{Format: "qcow2", SizeBytes: 8 << 20}))
	mustDo(t, v.change(func(x *Assignment) { x.Snapshots = []Snapshot{first} }))
	mustDo(t, v.keepBranches(ctx, nil))
	if _, err := os.Stat(overlay); err == nil {
		t.Error("overlays are left")
	}
	if d := cmp.Diff([]string{"snapshot-epoch-2-from-point-0"}, pins()); d != "" {
		t.Errorf("pins: %s", d)
	}
	wrote := map[int64]byte{0: 1, 64 << 10: 0, 1 << 20: 7, 3 << 20: 0}
	wantBytes(t, as.ReplicaDir, first.Name, wrote)
	if b, err := os.ReadFile(replica.Branches()[0].File); err != nil || !seal.Sealed(b) {
		t.Errorf("the branch is not sealed, %v", err)
	}
	changed, err := journal.BranchChanged(as.ReplicaDir, first.Name)
	mustDo(t, err)
	next := v.newRun(3, 0)
	next.Started, next.Written = true, changed
	mustDo(t, v.fixAbandonedOf(replica, next))
	if got, want := v.assignment().Run.Abandoned["vda"], extent.NewSet(extent.Range{Offset: 64 << 10, Length: 64 << 10}, extent.Range{Offset: 1 << 20, Length: 64 << 10}); !got.Equal(want) {
		t.Errorf("the way home carries %v, want %v", got.Ranges(), want.Ranges())
	}

	// A run from it leaves one that stands on the same point.
	mustDo(t, v.change(func(x *Assignment) { x.Run = &Run{Snapshot: first.Name} }))
	if err := v.removeSnapshot(ctx, first.Name); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("the snapshot that the VM runs from is dropped: %v", err)
	}
	if err := v.settled(v.assignment()); err != nil {
		t.Errorf("a commit of a run from a snapshot: %v", err)
	}
	second := v.abandonRun(t, 4, first.Name, "write -P 9 3M 64k", "write -P 8 64k 4k")
	for range 2 {
		mustDo(t, v.removeSnapshot(ctx, first.Name)) // moves the other into the journal
	}
	wrote[3<<20], wrote[64<<10], wrote[68<<10] = 9, 8, 0
	wantBytes(t, as.ReplicaDir, second.Name, wrote)

	for range 2 { // without its point
		now, _ := v.assignment().snapshot(second.Name)
		n, err := v.makeWhole(ctx, new(task), now)
		if err != nil || n == 0 {
			t.Fatalf("%d bytes, %v", n, err)
		}
	}
	if left := append(pins(), as.Name); len(left) != 1 || len(replica.Branches()) > 0 {
		t.Errorf("left: pins %v, branches %v", left, replica.Branches())
	}
	whole, _ := v.assignment().snapshot(second.Name)
	wantBytes(t, whole.Dir, whole.Name, wrote)
	// Its keys follow the agent's.
	other := filepath.Join(dir, "key-2")
	mustDo(t, seal.MakeKeyFile(other))
	v.agent.cfg.KeySource = &seal.Source{File: other}
	v.rewrapSnapshots()
	mustDo(t, os.Remove(filepath.Join(dir, "key")))
	wantBytes(t, whole.Dir, whole.Name, wrote)
	if list := v.assignment().snapshots(nil); !list[0].SelfContained || list[0].Dir != whole.Dir || list[0].SizeBytes == 0 {
		t.Errorf("reported: %+v", list)
	}
	for range 2 {
		mustDo(t, v.removeSnapshot(ctx, whole.Name))
	}
	left, _ := filepath.Glob(filepath.Join(dir, "snapshots", "*"))
	branches, _ := filepath.Glob(filepath.Join(as.ReplicaDir, "branches", "*"))
	if len(left)+len(branches)+len(v.assignment().Snapshots) > 0 {
		t.Errorf("left: %v, %v, records %v", left, branches, v.assignment().Snapshots)
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

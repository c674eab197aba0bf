package agent

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
)

// checkedVM is a target whose replica has one point over a raw base.
func checkedVM(t *testing.T) (v *vm, base string) {
	t.Helper()
	const size = 1 << 20
	base = filepath.Join(t.TempDir(), "vda.raw")
	if err := os.WriteFile(base, bytes.Repeat([]byte("base"), size/4), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := journal.Create(filepath.Join(t.TempDir(), "replica"), journal.Spec{Protection: "p-1", Epoch: 1, Name: "web", BaseIsOriginal: true,
		Disks: []journal.ReplicaDisk{{Name: "vda", SizeBytes: size, BasePath: base, BaseFormat: "raw"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	var b bytes.Buffer
	w, err := journal.NewSegmentWriter(&b, journal.Header{Protection: "p-1", Epoch: 1, Sequence: 1, Time: time.Now(),
		Disks: []journal.DiskGeometry{{Name: "vda", SizeBytes: size}}}, journal.CodecNone)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Data(0, 0, bytes.Repeat([]byte("new "), 2048)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Receive(t.Context(), 1, &b); err != nil {
		t.Fatal(err)
	}
	a := &Agent{log: slog.New(slog.DiscardHandler), vms: map[switchback.ProtectionID]*vm{}}
	v = &vm{agent: a, replica: r, a: Assignment{Protection: "p-1", Name: "web", Role: agentapi.RoleTarget, Policy: switchback.DefaultPolicy()}}
	return v, base
}

// TestBackgroundCheck: a check begins when it is due and not before, goes on
// where an earlier process was, and what it finds is a condition.
func TestBackgroundCheck(t *testing.T) {
	v, base := checkedVM(t)
	last := func() *agentapi.ReplicaCheck {
		t.Helper()
		st, _ := v.checkStatus(v.replica, v.assignment())
		if st == nil {
			t.Fatal("no status")
		}
		return st.Last
	}
	v.checkIfDue(t.Context())
	if last() != nil {
		t.Fatal("a replica that was just made was checked")
	}
	past := time.Now().Add(-2 * time.Hour) // original disks are proven an hour after
	if err := v.checks.change(v.replica, func(x *checkRecord) { x.Since = past }); err != nil {
		t.Fatal(err)
	}
	v.checkIfDue(t.Context())
	first := last()
	if first == nil || first.Points != 1 || first.UnprovenBytes != 1<<20 || len(first.Damage) > 0 {
		t.Fatalf("%+v", first)
	}
	v.checkIfDue(t.Context())
	if last().At != first.At {
		t.Error("checked again at once")
	}

	// A week later, by an agent that was restarted in the middle.
	f, err := os.OpenFile(base, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte("x"), 600<<10)
	f.Close()
	err = v.checks.change(v.replica, func(x *checkRecord) {
		x.Running = &journal.CheckState{Segment: 1, Segments: 1, DoneBytes: 1}
		x.StartedAt = past
	})
	if err != nil {
		t.Fatal(err)
	}
	v.checks = checks{}
	v.checkIfDue(t.Context())
	got := last()
	if got.At == first.At || len(got.Damage) != 1 || got.UnprovenBytes != 0 || got.Took < time.Hour {
		t.Errorf("%+v", got)
	}
	_, conditions := v.checkStatus(v.replica, v.assignment())
	if len(conditions) != 1 || conditions[0].Name != "replica-damaged" || conditions[0].Severity != switchback.SeverityCritical {
		t.Fatalf("%+v", conditions)
	}
	for _, want := range []string{"disk vda", "[614400, 618496)", "all points"} {
		if !strings.Contains(conditions[0].Cause, want) {
			t.Errorf("%q is not in %q", want, conditions[0].Cause)
		}
	}
	if !strings.Contains(conditions[0].Remedy, "points repair web") {
		t.Errorf("remedy %q", conditions[0].Remedy)
	}

	// Never, and not where the VM runs.
	v.a.Policy.VerifyEvery = -1
	if st, _ := v.checkStatus(v.replica, v.a); !st.Next.IsZero() {
		t.Errorf("next %v", st.Next)
	}
	v.a.Role = agentapi.RoleActive
	if err := v.checkable(); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("checkable without a run: %v", err)
	}
}

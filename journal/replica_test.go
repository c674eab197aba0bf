package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/retention"
)

func wantCode(t *testing.T, what string, err error, code switchback.Code) {
	t.Helper()
	if switchback.CodeOf(err) != code {
		t.Errorf("%s: %v, want %s", what, err, code)
	}
}

func TestReceiveRefuses(t *testing.T) {
	w := newWorld(t, 1)
	ctx := context.Background()
	for range 3 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	head := w.head()
	send := func(epoch switchback.Epoch, change func(*Header)) error {
		h := testHeader(head.Sequence+1, head.Digest)
		for name, b := range w.states[head.Digest] {
			h.Disks = append(h.Disks, DiskGeometry{name, int64(len(b))})
		}
		change(&h)
		seg, _ := buildSegment(t, h, CodecNone, func(s *SegmentWriter) error { return s.Zero(0, 0, 512) })
		_, err := w.r.Receive(ctx, epoch, bytes.NewReader(seg))
		return err
	}
	wantCode(t, "old epoch", send(2, func(h *Header) { h.Epoch = 2 }), switchback.CodeStaleEpoch)
	wantCode(t, "old epoch in the header", send(3, func(h *Header) { h.Epoch = 2 }), switchback.CodeStaleEpoch)
	wantCode(t, "two epochs", send(4, func(h *Header) { h.Epoch = 5 }), switchback.CodeInvalid)
	wantCode(t, "gap", send(3, func(h *Header) { h.Sequence++ }), switchback.CodeConflict)
	wantCode(t, "parent", send(3, func(h *Header) { h.Parent = "abc" }), switchback.CodeConflict)
	wantCode(t, "other content for the head", send(3, func(h *Header) { h.Sequence, h.Parent = head.Sequence, head.Parent }), switchback.CodeConflict)
	wantCode(t, "other VM", send(3, func(h *Header) { h.Protection = "p-other" }), switchback.CodeInvalid)
	wantCode(t, "seed", send(3, func(h *Header) { h.Seed = true }), switchback.CodeInvalid)
	wantCode(t, "shrunk", send(3, func(h *Header) { h.Disks[0].SizeBytes = 512 }), switchback.CodeRefused)
	if err := send(3, func(h *Header) { h.Sequence += 2 }); err == nil || !strings.Contains(err.Error(), shortDigest(head.Digest)) {
		t.Errorf("conflict does not name the head: %v", err)
	}
	if w.r.Manifest().Epoch != 3 {
		t.Error("a refused segment changed the epoch")
	}
	w.fs.room = 1 << 20
	w.r.opts.ReserveBytes = 64 << 20
	wantCode(t, "reserve", w.receive(), switchback.CodeNoSpace)
	w.fs.room = 1 << 40
	wantCode(t, "newer epoch", send(7, func(h *Header) { h.Epoch = 7 }), "")
	wantCode(t, "epoch before", w.r.SetEpoch(6), switchback.CodeStaleEpoch)
	if left, _ := os.ReadDir(filepath.Join(w.dir, segmentDir)); len(left) != 4 {
		t.Errorf("%d files", len(left))
	}
}

func TestReceiveAgain(t *testing.T) {
	w := newWorld(t, 2)
	ctx := context.Background()
	seg, point, next := w.nextSegment()
	w.states[point.Digest] = next
	for i := range 3 {
		got, err := w.r.Receive(ctx, 3, bytes.NewReader(seg))
		if err != nil || got != point {
			t.Fatalf("time %d: %+v, %v", i, got, err)
		}
	}
	w.acked = append(w.acked, point)
	// Two streams of the same segment at once, the first hanging in the middle.
	seg, point, next = w.nextSegment()
	w.states[point.Digest] = next
	pr, pw := io.Pipe()
	first := make(chan error, 1)
	go func() {
		_, err := w.r.Receive(ctx, 3, pr)
		first <- err
	}()
	pw.Write(seg[:len(seg)/2])
	if _, err := w.r.Receive(ctx, 3, bytes.NewReader(seg)); err != nil {
		t.Fatal(err)
	}
	pw.Write(seg[len(seg)/2:])
	pw.Close()
	if err := <-first; err != nil {
		t.Errorf("the slower stream: %v", err)
	}
	w.acked = append(w.acked, point)
	w.check(w.r, w.dir, "afterwards")
}

func TestOpenTwice(t *testing.T) {
	w := newWorld(t, 3)
	_, err := Open(w.dir)
	wantCode(t, "second open", err, switchback.CodeConflict)
	if err == nil || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
		t.Errorf("error does not name the holder: %v", err)
	}
	wantCode(t, "remove while open", Remove(w.dir), switchback.CodeConflict)
	_, err = Open(t.TempDir())
	wantCode(t, "nothing there", err, switchback.CodeNotFound)
	_, err = Create(w.dir, w.r.Manifest().Spec)
	wantCode(t, "create over it", err, switchback.CodeConflict)
}

func TestPins(t *testing.T) {
	w := newWorld(t, 4)
	for range 4 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.r.Pin("drill-1", 2, map[string]string{"operation": "o1"}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "fold past the pin", w.r.Fold(context.Background(), 3, w.openBase(w.dir, w.fs)), switchback.CodeRefused)
	wantCode(t, "drop the pinned", w.r.DropAfter(1), switchback.CodeRefused)
	wantCode(t, "move the pin", w.r.Pin("drill-1", 3, nil), switchback.CodeConflict)
	wantCode(t, "pin nothing", w.r.Pin("x", 9, nil), switchback.CodeNotFound)
	wantCode(t, "bad name", w.r.Pin("../x", 2, nil), switchback.CodeInvalid)
	plan := w.r.PlanRetention(switchback.Retention{Newest: 1}, w.head().Time)
	if diff := cmp.Diff([]retention.Step{{Into: 2}, {First: 3, Into: 4}}, plan.Steps); diff != "" {
		t.Error(diff)
	}
	// A view of the pinned point reads right through a fold up to it.
	v, err := OpenView(w.dir, 2)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	want := w.states[w.acked[1].Digest]
	if err := w.fold(2); err != nil {
		t.Fatal(err)
	}
	for _, d := range v.Disks() {
		compareDisk(t, "view through a fold", d, want[d.Name()], w.rng)
	}
	w.r.Close()
	if w.r, err = Open(w.dir); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Pin{{Name: "drill-1", Sequence: 2, Info: map[string]string{"operation": "o1"}}}, w.r.Pins()); diff != "" {
		t.Error(diff)
	}
	// A pin that cannot be read keeps everything.
	w.r.Close()
	path := pinPath(w.dir, "drill-1")
	b, _ := os.ReadFile(path)
	os.WriteFile(path, bytes.Replace(b, []byte("2"), []byte("3"), 1), 0o600)
	if w.r, err = Open(w.dir); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "fold past a damaged pin", w.r.Fold(context.Background(), 4, nil), switchback.CodeRefused)
	wantCode(t, "drop past a damaged pin", w.r.DropAfter(3), switchback.CodeRefused)
	for range 2 {
		if err := w.r.Unpin("drill-1"); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.r.DropAfter(3); err != nil {
		t.Error(err)
	}
	w.r.Close()
	if err := Remove(w.dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(w.dir, "vda.raw")); err != nil {
		t.Errorf("base is gone: %v", err)
	}
}

func TestChangedAfter(t *testing.T) {
	w := newWorld(t, 6)
	for range 6 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	changed, err := w.r.ChangedAfter(2)
	if err != nil {
		t.Fatal(err)
	}
	old, head := w.states[w.acked[1].Digest], w.states[w.head().Digest]
	for name, b := range head {
		var differs extent.Set
		for at := 0; at < len(b); at += sector {
			if at >= len(old[name]) && bytes.Count(b[at:at+sector], []byte{0}) == sector {
				continue
			}
			if at >= len(old[name]) || !bytes.Equal(b[at:at+sector], old[name][at:at+sector]) {
				differs.Add(int64(at), sector)
			}
		}
		if missing := differs.Subtract(changed[name]); old[name] != nil && !missing.IsEmpty() {
			t.Errorf("disk %s: %v is not among the changes", name, missing.Ranges())
		}
	}
	if none, err := w.r.ChangedAfter(6); err != nil || len(none) != 0 {
		t.Errorf("after the head: %v, %v", none, err)
	}
}

// TestNoSpace lets the nth operation fail in receive, fold and drop. The
// replica goes on with the same process and no repair.
func TestNoSpace(t *testing.T) {
	for n := 1; n < 40; n++ {
		w := newWorld(t, 77)
		for range 3 {
			if err := w.receive(); err != nil {
				t.Fatal(err)
			}
		}
		w.ensureBase("vdc")
		for _, action := range []func() error{w.receive, func() error { return w.fold(2) }, func() error { return w.drop(w.head().Sequence - 1) }} {
			w.fs.ops, w.fs.failAt, w.fs.fault = 0, n, unix.ENOSPC
			err := action()
			failed := w.fs.ops >= n
			w.fs.failAt = 0
			if err != nil && switchback.CodeOf(err) != switchback.CodeNoSpace {
				t.Fatalf("operation %d: %v", n, err)
			}
			if err == nil && failed && n < 4 {
				t.Fatalf("operation %d failed and nobody said so", n)
			}
			if w.r.Manifest().Folding > 0 {
				if err := w.fold(w.r.Manifest().Folding); err != nil {
					t.Fatalf("operation %d: fold again: %v", n, err)
				}
			}
			if err := w.receive(); err != nil { // also completes a drop
				t.Fatalf("operation %d: receive afterwards: %v", n, err)
			}
			w.check(w.r, w.dir, fmt.Sprintf("after operation %d failed", n))
		}
		w.r.Close()
	}
}

// TestDamage flips a byte, or cuts, each file at random: what is read is right
// or an error with CodeCorrupt, and Verify finds damage in segments.
func TestDamage(t *testing.T) {
	w := newWorld(t, 9)
	for range 7 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	for _, err := range []error{w.fold(2), w.merge(4, 6), w.pin("p", 6), w.mark(3, switchback.Mark{Locked: true})} {
		if err != nil {
			t.Fatal(err)
		}
	}
	w.r.Close()
	segments, _ := filepath.Glob(filepath.Join(w.dir, segmentDir, "*"))
	files := append(segments, manifestPath(w.dir), pinPath(w.dir, "p"), marksPath(w.dir))
	found, tried := 0, 0
	for i := range 1500 {
		path := files[i%len(files)]
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bad := bytes.Clone(good)
		at := w.rng.IntN(len(bad))
		what := fmt.Sprintf("%s, byte %d", path, at)
		if i%7 == 0 {
			bad = bad[:at]
		} else {
			bad[at] ^= 1 << w.rng.IntN(8)
		}
		os.WriteFile(path, bad, 0o600)
		for _, p := range w.acked {
			v, err := OpenView(w.dir, p.Sequence)
			if err != nil {
				wantDamage(t, what, err)
				continue
			}
			for _, d := range v.Disks() {
				got := make([]byte, d.Size())
				if _, err := d.ReadAt(got, 0); err != nil {
					wantDamage(t, what, err)
					var damage Damage
					if !errors.As(err, &damage) || damage.Disk != d.Name() || len(damage.Ranges) == 0 {
						t.Fatalf("%s: %v does not name disk and range", what, err)
					}
				} else if !bytes.Equal(got, w.states[p.Digest][d.Name()]) {
					t.Fatalf("%s: wrong data of point %d", what, p.Sequence)
				}
			}
			v.Close()
		}
		r, err := Open(w.dir)
		if err != nil {
			wantDamage(t, what, err)
		} else {
			damages, err := r.Verify(context.Background(), nil)
			if err != nil {
				t.Fatal(err)
			}
			if slices.Contains(segments, path) {
				tried++
			}
			if len(damages) > 0 {
				found++
			}
			// Pin and lock hold, or cannot be read and hold everything.
			for _, step := range r.PlanRetention(switchback.Retention{Newest: 1}, w.head().Time).Steps {
				if len(r.Damaged()) == 0 && (step.Into != 3 && step.Into != 6 && step.Into != 7 || step.First == 3 || step.First == 6 || step.Into == 7 && step.Fold()) {
					t.Fatalf("%s: step %+v", what, step)
				}
			}
			if len(r.Damaged()) > 0 && i%3 == 0 {
				_, err := r.Receive(context.Background(), 3, bytes.NewReader(nil))
				wantDamage(t, what, err)
			}
			r.Close()
		}
		os.WriteFile(path, good, 0o600)
	}
	if found < tried*9/10 || tried < 500 {
		t.Errorf("verify found only %d of %d damages", found, tried)
	}
}

func wantDamage(t *testing.T, what string, err error) {
	t.Helper()
	if code := switchback.CodeOf(err); code != switchback.CodeCorrupt && code != switchback.CodeUnsupported {
		t.Fatalf("%s: %v", what, err)
	}
}

// TestDamagedTail repairs a replica whose newest segments are damaged.
func TestDamagedTail(t *testing.T) {
	w := newWorld(t, 10)
	for range 4 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	w.r.Close()
	os.Truncate(segmentPath(w.dir, 3), 100)
	var err error
	if w.r, err = (Options{ReserveBytes: 1, fs: w.fs}).Open(w.dir); err != nil {
		t.Fatal(err)
	}
	if got := sequences(w.r.Points()); !slices.Equal(got, []switchback.Sequence{1, 2}) || len(w.r.Damaged()) != 2 {
		t.Fatalf("points %v, damaged %v", got, w.r.Damaged())
	}
	wantCode(t, "receive", w.receive(), switchback.CodeCorrupt)
	if err := w.drop(2); err != nil {
		t.Fatal(err)
	}
	if err := w.receive(); err != nil {
		t.Fatal(err)
	}
	w.check(w.r, w.dir, "repaired")
}

func TestSeeding(t *testing.T) {
	dir, ctx := tempDir(t), context.Background()
	fs := newRecorder(dir)
	path := filepath.Join(t.TempDir(), "vda.raw")
	const size = 1 << 20
	spec := Spec{Protection: "p-0123456789ab", Epoch: 3, Name: "vm",
		Disks: []ReplicaDisk{{Name: "vda", SizeBytes: size, BasePath: path, BaseFormat: "raw"}}}
	r, err := Options{ReserveBytes: 1, fs: fs}.Create(dir, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { r.Close() }()
	base, err := fs.openBase(path, size)
	if err != nil {
		t.Fatal(err)
	}
	writers := map[string]BaseWriter{"vda": base}
	want := make([]byte, size)
	content(want[:size/2], 3)
	h := testHeader(0, "", size)
	h.Seed = true
	batch := func(fill func(*SegmentWriter) error) []byte {
		seg, _ := buildSegment(t, h, CodecZstd, fill)
		return seg
	}
	first := batch(func(w *SegmentWriter) error { return w.Data(0, 0, want[:size/4]) })
	second := batch(func(w *SegmentWriter) error {
		w.Data(0, size/4, want[size/4:size/2])
		return w.Zero(0, size/2, size/2)
	})
	bad := bytes.Clone(second)
	bad[len(bad)/2] ^= 1
	if err := r.ApplySeed(ctx, bytes.NewReader(first), writers); err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(base.node.live)
	wantCode(t, "damaged batch", r.ApplySeed(ctx, bytes.NewReader(bad), writers), switchback.CodeCorrupt)
	if !bytes.Equal(before, base.node.live) {
		t.Error("a damaged batch was written")
	}
	if _, err := OpenView(dir, 1); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("view while seeding: %v", err)
	}
	// The copy goes on after a restart.
	r.Close()
	if r, err = (Options{ReserveBytes: 1, fs: fs}).Open(dir); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := r.ApplySeed(ctx, bytes.NewReader(second), writers); err != nil {
			t.Fatal(err)
		}
	}
	if err := base.Flush(); err != nil {
		t.Fatal(err)
	}
	point := switchback.Point{Protection: "p-0123456789ab", Sequence: 1, Epoch: 3, Digest: "5eed"}
	for range 2 {
		if err := r.FinishSeed(point); err != nil {
			t.Fatal(err)
		}
	}
	wantCode(t, "seed afterwards", r.ApplySeed(ctx, bytes.NewReader(first), writers), switchback.CodeConflict)
	next, sum := buildSegment(t, testHeader(2, "5eed", size), CodecNone, func(w *SegmentWriter) error { return w.Zero(0, 0, 4096) })
	if _, err := r.Receive(ctx, 3, bytes.NewReader(next)); err != nil {
		t.Fatal(err)
	}
	if got := r.Points(); len(got) != 2 || got[0] != point || got[1].Digest != sum.Digest {
		t.Errorf("points %v", got)
	}
	for seq, clearTo := range map[switchback.Sequence]int{1: 0, 2: 4096} {
		v, err := OpenView(dir, seq)
		if err != nil {
			t.Fatal(err)
		}
		clear(want[:clearTo])
		if seq == 1 {
			content(want[:size/2], 3)
		}
		compareDisk(t, fmt.Sprint("point ", seq), v.Disk("vda"), want, rand.New(rand.NewPCG(1, 1)))
		v.Close()
	}
}

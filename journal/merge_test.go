package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/switchback-dr/switchback"
)

// mergeSample is a replica of one disk over which three segments lie: the frames
// of the first survive whole, in part and not at all.
func mergeSample(t testing.TB, dir string, c Codec) (*Replica, []switchback.Point, []byte) {
	t.Helper()
	const size = 1 << 20
	base := filepath.Join(t.TempDir(), "vda.raw")
	if err := os.WriteFile(base, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := Options{ReserveBytes: 1}.Create(dir, Spec{Protection: "p-0123456789ab", Epoch: 3, BaseIsOriginal: true,
		Disks: []ReplicaDisk{{Name: "vda", SizeBytes: size, BasePath: base, BaseFormat: "raw"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	want := make([]byte, size)
	var points []switchback.Point
	for i, writes := range [][][2]int{
		{{0, 64 << 10}, {128 << 10, 64 << 10}, {256 << 10, 64 << 10}}, // three frames
		{{128 << 10, 64 << 10}, {256 << 10, 8 << 10}},                 // the second is hidden, the third in part
		{{512 << 10, 8 << 10}},
	} {
		head := r.Head()
		h := testHeader(head.Sequence+1, head.Digest, size)
		seg, _ := buildSegment(t, h, c, func(w *SegmentWriter) error {
			for _, x := range writes {
				content(want[x[0]:x[0]+x[1]], uint64(x[0]+i+1))
				w.Data(0, int64(x[0]), want[x[0]:x[0]+x[1]])
			}
			if i == 2 {
				clear(want[:4096])
				w.Zero(0, 0, 4096)
			}
			return nil
		})
		p, err := r.Receive(context.Background(), 3, bytes.NewReader(seg))
		if err != nil {
			t.Fatal(err)
		}
		points = append(points, p)
	}
	return r, points, want
}

func readPoint(t testing.TB, dir string, seq switchback.Sequence, name string) []byte {
	t.Helper()
	v, err := OpenView(dir, seq)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	d := v.Disk(name)
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestMergeSegments(t *testing.T) {
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		dir := filepath.Join(t.TempDir(), "replica")
		r, points, want := mergeSample(t, dir, c)
		if err := r.Merge(context.Background(), 1, 3, 0); err != nil {
			t.Fatal(err)
		}
		if at := firstDifference(readPoint(t, dir, 3, "vda"), want); at >= 0 {
			t.Errorf("%v: differs at %d", c, at)
		}
		got := r.Points()
		if len(got) != 1 || identity(got[0]) != identity(points[2]) {
			t.Fatalf("%v: points %+v", c, got)
		}
		// 192 KiB and 8 KiB that are left of the first two, less 4 KiB that are zero, and 8 KiB.
		s, err := r.storage.openSegment(3)
		if err != nil {
			t.Fatal(err)
		}
		defer s.close()
		if err := s.loadIndex(); err != nil {
			t.Fatal(err)
		}
		if data, zero := s.index.totals(); data != 196<<10 || zero != 4096 || got[0].StoredBytes != s.size || got[0].ChangedBytes != 200<<10 {
			t.Errorf("%v: %d bytes of data, %d of zeros, %+v", c, data, zero, got[0])
		}
		if diff := cmp.Diff(&Merged{Digest: points[2].Digest}, s.header.Merged); diff != "" {
			t.Error(diff)
		}
		for _, seq := range []switchback.Sequence{1, 2} {
			_, err := OpenView(dir, seq)
			wantCode(t, fmt.Sprint("view of ", seq), err, switchback.CodeNotFound)
			_, err = r.ChangedAfter(seq)
			wantCode(t, fmt.Sprint("changes after ", seq), err, switchback.CodeNotFound)
			wantCode(t, fmt.Sprint("pin ", seq), r.Pin("x", seq, nil), switchback.CodeNotFound)
		}
		if damage, err := r.Verify(context.Background(), nil); err != nil || len(damage) > 0 {
			t.Error(damage, err)
		}
		// What follows continues the point, not the file.
		h := testHeader(4, points[2].Digest, 1<<20)
		seg, _ := buildSegment(t, h, c, func(w *SegmentWriter) error { return w.Zero(0, 0, 512) })
		if _, err := r.Receive(context.Background(), 3, bytes.NewReader(seg)); err != nil {
			t.Error(err)
		}
		merged, _ := os.ReadFile(segmentPath(dir, 3))
		_, err = r.Receive(context.Background(), 3, bytes.NewReader(merged))
		wantCode(t, "a merged segment is sent", err, switchback.CodeInvalid)
	}
}

// TestMergeCopies: a frame that survives whole is stored as it was.
func TestMergeCopies(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "replica")
	r, _, _ := mergeSample(t, dir, CodecS2)
	first, _ := os.ReadFile(segmentPath(dir, 2))
	s, err := (&storage{dir: dir}).openSegment(2)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if err := s.loadIndex(); err != nil {
		t.Fatal(err)
	}
	f := s.index.frames[0]
	if err := r.Merge(context.Background(), 1, 2, 0); err != nil {
		t.Fatal(err)
	}
	merged, _ := os.ReadFile(segmentPath(dir, 2))
	if !bytes.Contains(merged, first[f.offset:f.offset+int64(f.stored)]) {
		t.Error("a frame was compressed anew")
	}
}

func TestMergeRefuses(t *testing.T) {
	dir, ctx := filepath.Join(t.TempDir(), "replica"), context.Background()
	r, _, want := mergeSample(t, dir, CodecZstd)
	merge := func(first, into switchback.Sequence) error { return r.Merge(ctx, first, into, 0) }
	wantCode(t, "backwards", merge(3, 2), switchback.CodeInvalid)
	wantCode(t, "into itself", merge(2, 2), switchback.CodeInvalid)
	wantCode(t, "no such point", merge(2, 9), switchback.CodeNotFound)
	wantCode(t, "the base", merge(0, 2), switchback.CodeRefused)
	r.Pin("p", 2, nil)
	wantCode(t, "pinned", merge(1, 3), switchback.CodeRefused)
	wantCode(t, "pinned, into it", merge(1, 2), "")
	r.Unpin("p")
	r.SetMark(2, func(m *switchback.Mark) error { m.Locked = true; return nil })
	wantCode(t, "locked", merge(2, 3), switchback.CodeRefused)
	wantCode(t, "fold past the locked", r.Fold(ctx, 3, nil), switchback.CodeRefused)
	wantCode(t, "check of it", r.CheckFold(3), switchback.CodeRefused)
	wantCode(t, "drop the locked", r.DropAfter(0), switchback.CodeRefused)
	r.SetMark(2, func(m *switchback.Mark) error { m.Locked = false; return nil })
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	wantCode(t, "cancelled", r.Merge(cancelled, 2, 3, 0), switchback.CodeCancelled)

	b, _ := os.ReadFile(segmentPath(dir, 2))
	bad := bytes.Clone(b)
	bad[600] ^= 1 // in a frame
	os.WriteFile(segmentPath(dir, 2), bad, 0o600)
	err := merge(2, 3)
	var damage Damage
	if !errors.As(err, &damage) || damage.Segment != 2 || damage.Disk != "vda" {
		t.Errorf("damaged: %v", err)
	}
	os.WriteFile(segmentPath(dir, 2), b, 0o600)
	if left, _ := filepath.Glob(filepath.Join(dir, segmentDir, "*.tmp")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	if got := sequences(r.Points()); !slices.Equal(got, []switchback.Sequence{2, 3}) {
		t.Errorf("points %v", got)
	}
	if at := firstDifference(readPoint(t, dir, 3, "vda"), want); at >= 0 {
		t.Errorf("differs at %d", at)
	}
}

// TestMergePace: the rate is kept to, and the end of the context is not waited for.
func TestMergePace(t *testing.T) {
	r, _, _ := mergeSample(t, filepath.Join(t.TempDir(), "replica"), CodecNone)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	wantCode(t, "a byte a second", r.Merge(ctx, 1, 3, 1), switchback.CodeCancelled)
	if n := len(r.Points()); n != 3 {
		t.Errorf("%d points", n)
	}
}

// TestMergeFresh: a disk that went and came back smaller is zero where the old
// one held data, also when it grows again.
func TestMergeFresh(t *testing.T) {
	w := newWorld(t, 3)
	ctx := context.Background()
	send := func(sizes map[string]int64, fill func(*SegmentWriter) error) switchback.Sequence {
		t.Helper()
		head := w.r.Head()
		h := testHeader(head.Sequence+1, head.Digest)
		for _, name := range []string{"vda", "vdx"} {
			if sizes[name] > 0 {
				h.Disks = append(h.Disks, DiskGeometry{name, sizes[name]})
			}
		}
		seg, _ := buildSegment(t, h, CodecS2, fill)
		p, err := w.r.Receive(ctx, 3, bytes.NewReader(seg))
		if err != nil {
			t.Fatal(err)
		}
		return p.Sequence
	}
	full := bytes.Repeat([]byte{7}, 64<<10)
	send(map[string]int64{"vda": 64 << 10, "vdx": 64 << 10}, func(s *SegmentWriter) error { return s.Data(1, 0, full) })
	gone := send(map[string]int64{"vda": 64 << 10}, func(s *SegmentWriter) error { return nil })
	back := send(map[string]int64{"vda": 64 << 10, "vdx": 16 << 10}, func(s *SegmentWriter) error { return s.Data(1, 0, full[:512]) })
	grown := send(map[string]int64{"vda": 64 << 10, "vdx": 64 << 10}, func(s *SegmentWriter) error { return nil })
	want := slices.Concat(full[:512], make([]byte, 64<<10-512))
	for _, merge := range []func() error{
		func() error { return nil },
		func() error { return w.r.Merge(ctx, gone, back, 0) },
		func() error { return w.r.Merge(ctx, 1, back, 0) },
		func() error { return w.r.Merge(ctx, back, grown, 0) },
	} {
		if err := merge(); err != nil {
			t.Fatal(err)
		}
		if at := firstDifference(readPoint(t, w.dir, grown, "vdx"), want); at >= 0 {
			t.Errorf("differs at %d", at)
		}
	}
}

// TestMeanwhile merges and folds while points are received and views are opened.
func TestMeanwhile(t *testing.T) {
	w := newWorld(t, 21)
	for range 30 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	const pinned = 20
	if err := w.r.Pin("p", pinned, nil); err != nil {
		t.Fatal(err)
	}
	w.ensureBase("vdc")
	old, err := OpenView(w.dir, 27) // to be merged away
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	states := map[switchback.Sequence]state{}
	for _, p := range w.acked {
		states[p.Sequence] = w.states[p.Digest]
	}
	last := w.head().Sequence
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		defer close(done)
		for into := switchback.Sequence(2); into < last; into++ {
			if into == pinned+1 {
				continue
			}
			if err := w.r.Merge(context.Background(), into-1, into, 0); err != nil {
				t.Error(into, err)
				return
			}
			if into%6 == 0 && into <= pinned {
				if err := w.r.Fold(context.Background(), into, w.openBase(w.dir, w.fs)); err != nil {
					t.Error(into, err)
					return
				}
				if into++; into < pinned {
					into++
				}
			}
		}
	})
	wg.Go(func() {
		for range 15 {
			if err := w.receive(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for _, seq := range []switchback.Sequence{pinned, last} {
		wg.Go(func() {
			for running := true; running; {
				select {
				case <-done:
					running = false
				default:
				}
				v, err := OpenView(w.dir, seq)
				if err != nil {
					t.Errorf("view of %d: %v", seq, err)
					return
				}
				for _, d := range v.Disks() {
					b := make([]byte, d.Size())
					if _, err := d.ReadAt(b, 0); err != nil || !bytes.Equal(b, states[seq][d.Name()]) {
						t.Errorf("view of %d: disk %s differs (%v)", seq, d.Name(), err)
					}
				}
				v.Close()
			}
		})
	}
	wg.Wait()
	for _, d := range old.Disks() { // its point is gone, its files are open
		compareDisk(t, "a view of a point that was merged away", d, states[27][d.Name()], w.eyes)
	}
	w.acked = slices.DeleteFunc(w.acked, func(p switchback.Point) bool { return !has(w.r.Points(), p) })
	w.labels.pins["p"] = pinned
	w.check(w.r, w.dir, "afterwards")
}

// TestMarksDamaged: what cannot be read may be a lock, so that nothing is
// dropped; points come all the same.
func TestMarksDamaged(t *testing.T) {
	w := newWorld(t, 22)
	for range 5 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.r.SetMark(2, func(m *switchback.Mark) error { m.Tag = "x"; return nil }); err != nil {
		t.Fatal(err)
	}
	w.r.Close()
	path := marksPath(w.dir)
	b, _ := os.ReadFile(path)
	os.WriteFile(path, bytes.Replace(b, []byte(`"x"`), []byte(`"y"`), 1), 0o600)
	var err error
	if w.r, err = (Options{ReserveBytes: 1, fs: w.fs}).Open(w.dir); err != nil {
		t.Fatal(err)
	}
	if err := w.receive(); err != nil {
		t.Error(err)
	}
	wantCode(t, "report", w.r.MarksDamage(), switchback.CodeCorrupt)
	if plan := w.r.PlanRetention(switchback.Retention{Newest: 1}, time.Now()); len(plan.Steps) > 0 {
		t.Errorf("plan %+v", plan)
	}
	for what, do := range map[string]func() error{
		"fold":  func() error { return w.r.Fold(context.Background(), 3, nil) },
		"merge": func() error { return w.r.Merge(context.Background(), 2, 3, 0) },
		"drop":  func() error { return w.r.DropAfter(3) },
		"mark":  func() error { return w.r.SetMark(3, func(m *switchback.Mark) error { m.Tag = "z"; return nil }) },
	} {
		wantCode(t, what, do(), switchback.CodeCorrupt)
	}
	if n := len(w.r.Points()); n != 6 {
		t.Errorf("%d points", n)
	}
}

// TestMarksGoWithTheirPoints: a sequence that is used again begins without mark.
func TestMarksGoWithTheirPoints(t *testing.T) {
	w := newWorld(t, 23)
	for range 4 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.mark(4, switchback.Mark{Tag: "x"}); err != nil {
		t.Fatal(err)
	}
	if err := w.drop(3); err != nil {
		t.Fatal(err)
	}
	if err := w.receive(); err != nil {
		t.Fatal(err)
	}
	w.check(w.r, w.dir, "a new point 4")
}

// TestFaults lets the nth operation fail, with no space and with an I/O error, in
// everything that changes a replica; the same process goes on.
func TestFaults(t *testing.T) {
	for _, fault := range []unix.Errno{unix.ENOSPC, unix.EIO} {
		for n := 1; n < 30; n++ {
			w := newWorld(t, 78)
			w.ensureBase("vdc")
			for range 7 {
				if err := w.receive(); err != nil {
					t.Fatal(err)
				}
			}
			for _, a := range []struct {
				name string
				do   func() error
			}{
				{"merge", func() error { return w.merge(3, 5) }},
				{"mark", func() error { return w.mark(7, switchback.Mark{Tag: "x"}) }},
				{"pin", func() error { return w.pin("p", 7) }},
				{"fold", func() error { return w.fold(2) }},
				{"unpin", func() error { return w.unpin("p") }},
			} {
				name, do := a.name, a.do
				what := fmt.Sprintf("%v at operation %d of %s", fault, n, name)
				w.fs.ops, w.fs.failAt, w.fs.fault = 0, n, fault
				err := do()
				w.fs.failAt = 0
				want := switchback.CodeInternal
				if fault == unix.ENOSPC {
					want = switchback.CodeNoSpace
				}
				if err != nil && switchback.CodeOf(err) != want {
					t.Fatalf("%s: %v", what, err)
				}
				if f := w.r.Manifest().Folding; f > 0 {
					if err := w.fold(f); err != nil {
						t.Fatalf("%s: again: %v", what, err)
					}
				}
				if err != nil && (name == "mark" || name == "pin" || name == "unpin") {
					if err := do(); err != nil { // what is asked for again is done
						t.Fatalf("%s: again: %v", what, err)
					}
				}
				if err := w.receive(); err != nil {
					t.Fatalf("%s: receive afterwards: %v", what, err)
				}
				w.check(w.r, w.dir, what)
			}
			w.r.Close()
			r, err := Options{ReserveBytes: 1, fs: w.fs}.Open(w.dir)
			if err != nil {
				t.Fatal(err)
			}
			w.r = r
			w.check(r, w.dir, fmt.Sprintf("%v at operation %d, opened again", fault, n))
		}
	}
}

package journal

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// spoil flips a bit in the file at path, as the disk does it: nobody is told.
func (w *world) spoil(path string, at int64) {
	w.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		w.t.Fatal(err)
	}
	b[at] ^= 0x10
	if err := os.WriteFile(path, b, 0o600); err != nil {
		w.t.Fatal(err)
	}
	node := w.fs.live[path]
	node.live, node.durable = bytes.Clone(b), bytes.Clone(b)
}

// resend makes a point that carries ranges of the head again, as the source does.
func (w *world) resend(ranges map[string]extent.Set) {
	w.t.Helper()
	head := w.head()
	state := w.states[head.Digest].clone()
	h := testHeader(head.Sequence+1, head.Digest)
	h.Epoch = w.epoch
	for _, d := range []string{"vda", "vdb", "vdc"} {
		if b := state[d]; b != nil {
			h.Disks = append(h.Disks, DiskGeometry{d, int64(len(b))})
		}
	}
	seg, sum := buildSegment(w.t, h, CodecZstd, func(s *SegmentWriter) error {
		for i, d := range h.Disks {
			for _, x := range ranges[d.Name].Ranges() {
				if err := s.Data(i, x.Offset, state[d.Name][x.Offset:x.End()]); err != nil {
					return err
				}
			}
		}
		return nil
	})
	point := h.Point(sum)
	w.states[point.Digest] = state
	if _, err := w.r.Receive(context.Background(), w.epoch, bytes.NewReader(seg)); err != nil {
		w.t.Fatal(err)
	}
	w.acked = append(w.acked, point)
}

// wholeOrDamaged reads every sector of every point: it is what the model says, or,
// in damaged ranges, an error.
func (w *world) wholeOrDamaged(r *Replica, dir string, damage []Damage, what string) {
	w.t.Helper()
	points := r.Points()
	for _, p := range w.acked {
		if !has(points, p) {
			w.t.Fatalf("%s: point %d is lost; there are %v", what, p.Sequence, sequences(points))
		}
		v, err := OpenView(dir, p.Sequence)
		if err != nil {
			w.t.Fatalf("%s: point %d: %v", what, p.Sequence, err)
		}
		for name, want := range w.states[p.Digest] {
			buf := make([]byte, sector)
			for at := int64(0); at < int64(len(want)); at += sector {
				_, err := v.Disk(name).ReadAt(buf, at)
				expected := slices.ContainsFunc(damage, func(d Damage) bool {
					return d.Disk == name && d.Affects(p.Sequence) && slices.ContainsFunc(d.Ranges, func(x extent.Range) bool { return x.Offset <= at && at < x.End() })
				})
				switch {
				case err != nil && (!expected || switchback.CodeOf(err) != switchback.CodeCorrupt):
					w.t.Fatalf("%s: point %d, %s at %d: %v", what, p.Sequence, name, at, err)
				case err == nil && !bytes.Equal(buf, want[at:at+sector]):
					w.t.Fatalf("%s: point %d, %s at %d: wrong data", what, p.Sequence, name, at)
				}
			}
		}
		v.Close()
	}
}

// TestMend: damaged frames of old points are put back where the newest point has
// their content, and only there; whenever it crashes, every point reads as before
// or better.
func TestMend(t *testing.T) {
	mended, left := 0, 0
	for seed := range uint64(6) {
		w := newWorld(t, seed)
		rng := rand.New(rand.NewPCG(seed, 7))
		for len(w.acked) < 5 {
			if err := w.receive(); err != nil {
				t.Fatal(err)
			}
		}
		if seed%2 == 1 { // a merged segment, too
			if err := w.merge(2, 3); err != nil {
				t.Fatal(err)
			}
		}
		if seed%3 == 2 { // segments are sealed when they are written anew
			if err := w.changeKeys(); err != nil {
				t.Fatal(err)
			}
		}
		for _, p := range w.acked {
			s, err := w.r.storage.openSegment(p.Sequence)
			if err != nil || s.loadIndex() != nil {
				t.Fatal(err)
			}
			x := s.index.frames[rng.IntN(len(s.index.frames))]
			s.close()
			at := x.offset + int64(rng.IntN(int(x.stored)))
			if p.Sequence == 5 {
				at = x.offset - frameHeadSize + 2 // of the frame's head
			}
			w.spoil(segmentPath(w.dir, p.Sequence), at)
		}
		found, err := w.r.Check(t.Context(), CheckOptions{})
		if err != nil || len(found.Damage) == 0 { // a bit may mean nothing
			t.Fatalf("%v, %v", found.Damage, err)
		}
		head := w.head()
		ranges := map[string]extent.Set{}
		want := map[string]bool{} // by place: is its content still there?
		for _, d := range found.Damage {
			if d.Affects(head.Sequence) {
				ranges[d.Disk] = ranges[d.Disk].Union(extent.NewSet(d.Ranges...))
			}
			same := true
			for _, p := range w.acked {
				if p.Sequence == d.Segment {
					was, is := w.states[p.Digest][d.Disk], w.states[head.Digest][d.Disk]
					for _, x := range d.Ranges {
						same = same && x.End() <= int64(len(is)) && bytes.Equal(was[x.Offset:x.End()], is[x.Offset:x.End()])
					}
				}
			}
			want[fmt.Sprint(d.Segment, d.Disk, d.Ranges)] = same || d.Segment == 5
		}
		w.resend(ranges)

		clones, crashed, inside := tempDir(t), 0, false
		w.fs.before = func(op string) {
			if inside || op[:5] == "write" {
				return
			}
			inside = true
			defer func() { inside = false }()
			for variant := range crashes {
				crashed++
				what := fmt.Sprintf("seed %d, crash before %s, variant %d", seed, op, variant)
				dir := filepath.Join(clones, fmt.Sprint(crashed))
				fs := w.fs.crash(t, dir, variant, rng)
				r, err := Options{ReserveBytes: 1, fs: fs}.Open(dir)
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				w.wholeOrDamaged(r, dir, found.Damage, what)
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				os.RemoveAll(dir)
			}
		}
		result, err := w.r.Mend(t.Context(), found.Damage, w.openBase(w.dir, w.fs))
		w.fs.before = func(string) {}
		if err != nil {
			t.Fatal(err)
		}
		if len(result.Mended)+len(result.Left) != len(found.Damage) || crashed == 0 {
			t.Errorf("seed %d: %d mended, %d left of %d; %d crashes", seed, len(result.Mended), len(result.Left), len(found.Damage), crashed)
		}
		for i, list := range [][]Damage{result.Mended, result.Left} {
			for _, d := range list {
				if want[fmt.Sprint(d.Segment, d.Disk, d.Ranges)] != (i == 0) {
					t.Errorf("seed %d: mended is %v: %v", seed, i == 0, d)
				}
			}
		}
		mended, left = mended+len(result.Mended), left+len(result.Left)
		w.wholeOrDamaged(w.r, w.dir, result.Left, "mended")
		again, err := w.r.Check(t.Context(), CheckOptions{})
		if err != nil || len(again.Damage) != len(result.Left) {
			t.Errorf("seed %d: %v, %v; left is %v", seed, again.Damage, err, result.Left)
		}
		if once, err := w.r.Mend(t.Context(), again.Damage, w.openBase(w.dir, w.fs)); err != nil || len(once.Mended) > 0 {
			t.Errorf("once more: %+v, %v", once, err)
		}
		if err := w.receive(); err != nil {
			t.Error(err)
		}
		w.wholeOrDamaged(w.r, w.dir, result.Left, "and a point more")
	}
	if mended == 0 || left == 0 {
		t.Errorf("%d mended, %d left: the test shows nothing", mended, left)
	}
}

// TestMendBase: blocks of a base that a fold has written are put back while the
// newest point has their content.
func TestMendBase(t *testing.T) {
	w := newWorld(t, 3)
	for len(w.acked) < 3 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	before := w.states[baseDigest]["vda"]
	if err := w.fold(2); err != nil {
		t.Fatal(err)
	}
	base, head := w.states[w.acked[0].Digest]["vda"], w.states[w.head().Digest]["vda"]
	// One block that the fold has written and the head still has, one that it has not.
	same, other := int64(-1), int64(-1)
	for at := int64(0); at < int64(len(base)); at += sumBlock {
		b := base[at : at+sumBlock]
		if bytes.Equal(b, before[at:at+sumBlock]) {
			continue
		}
		if bytes.Equal(b, head[at:at+sumBlock]) {
			same = at
		} else {
			other = at
		}
	}
	proved, err := w.r.Check(t.Context(), CheckOptions{})
	if err != nil || len(proved.Damage) > 0 || same < 0 || other < 0 {
		t.Fatalf("%+v, %v; %d, %d", proved.Damage, err, same, other)
	}
	path := filepath.Join(w.dir, "vda.raw")
	w.spoil(path, same+5)
	w.spoil(path, other+5)
	found, err := w.r.Check(t.Context(), CheckOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ranges := map[string]extent.Set{}
	for _, d := range found.Damage {
		if d.Affects(w.head().Sequence) {
			ranges[d.Disk] = ranges[d.Disk].Union(extent.NewSet(d.Ranges...))
		}
	}
	w.resend(ranges)
	result, err := w.r.Mend(t.Context(), found.Damage, w.openBase(w.dir, w.fs))
	if err != nil {
		t.Fatal(err)
	}
	bytesOf := func(list []Damage) (n int64) {
		for _, d := range list {
			for _, x := range d.Ranges {
				n += x.Length
			}
		}
		return n
	}
	if bytesOf(result.Mended) != sumBlock || bytesOf(result.Left) != sumBlock || result.Mended[0].Ranges[0].Offset != same {
		t.Errorf("%+v", result)
	}
	w.wholeOrDamaged(w.r, w.dir, result.Left, "mended")
	again, err := w.r.Check(t.Context(), CheckOptions{})
	if err != nil || bytesOf(again.Damage) != sumBlock {
		t.Errorf("%v, %v", again.Damage, err)
	}
}

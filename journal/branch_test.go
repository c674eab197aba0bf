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
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/seal"
)

// branchWorld has three points, and branches b0 on the second and b1 over b0.
func branchWorld(t *testing.T, seed uint64) *world {
	t.Helper()
	w := newWorld(t, seed)
	for range 3 {
		w.must(w.receive())
	}
	w.must(w.branch("b0", "", 2))
	w.must(w.branch("b1", "b0", 2))
	return w
}

func (w *world) compareBranch(dir, name, what string) {
	w.t.Helper()
	v, err := OpenBranch(dir, name)
	if err != nil {
		w.t.Fatalf("%s: open branch %s: %v", what, name, err)
	}
	w.compareView(v, w.states[w.labels.branches[name]], what+": branch "+name)
}

func TestBranchRefuses(t *testing.T) {
	w := branchWorld(t, 1)
	ctx := context.Background()
	write := func(change func(*BranchSpec)) error {
		spec := BranchSpec{Name: "x", Point: 2, Pin: "b0", Epoch: 3, Disks: map[string]Written{}}
		for name := range w.states[w.acked[1].Digest] {
			spec.Disks[name] = Written{}
		}
		change(&spec)
		_, err := w.r.WriteBranch(ctx, spec, nil)
		return err
	}
	wantCode(t, "without its pin", write(func(s *BranchSpec) { s.Pin = "none" }), switchback.CodeRefused)
	wantCode(t, "with a pin at another point", write(func(s *BranchSpec) { s.Point = 3 }), switchback.CodeRefused)
	wantCode(t, "a point that is not there", write(func(s *BranchSpec) { s.Point = 9 }), switchback.CodeNotFound)
	wantCode(t, "a name that is a path", write(func(s *BranchSpec) { s.Name = "../x" }), switchback.CodeInvalid)
	wantCode(t, "a disk is missing", write(func(s *BranchSpec) { s.Disks = nil }), switchback.CodeInvalid)
	wantCode(t, "over one that is not there", write(func(s *BranchSpec) { s.Over = "none" }), switchback.CodeNotFound)
	wantCode(t, "another parent's pin", w.r.Unpin("b0"), switchback.CodeRefused)
	wantCode(t, "fold past its point", w.r.Fold(ctx, 3, w.openBase(w.dir, w.fs)), switchback.CodeRefused)
	wantCode(t, "merge its point", w.r.Merge(ctx, 2, 3, 0), switchback.CodeRefused)
	wantCode(t, "drop its point", w.r.DropAfter(1), switchback.CodeRefused)
	failed := write(func(s *BranchSpec) {
		s.Disks["vda"] = Written{extent.NewSet(extent.Range{Length: 4096}), bytes.NewReader(nil)}
	})
	if failed == nil {
		t.Error("content that ends early was accepted")
	}
	w.fs.room = 1 << 20
	w.r.opts.ReserveBytes = 64 << 20
	wantCode(t, "reserve", write(func(*BranchSpec) {}), switchback.CodeNoSpace)
	if left, _ := filepath.Glob(filepath.Join(w.dir, branchDir, "*")); len(left) != 2 {
		t.Errorf("left: %v", left)
	}
	// It is no point: neither its sequence nor its file passes for one.
	b, err := os.ReadFile(branchPath(w.dir, "b0"))
	w.must(err)
	_, err = w.r.Receive(ctx, 3, bytes.NewReader(b))
	wantCode(t, "receive a branch", err, switchback.CodeInvalid)
	w.check(w.r, w.dir, "afterwards")
}

// TestBranchLeavesOutWhatIsTheSame: what is as at the parent point takes no room.
func TestBranchLeavesOutWhatIsTheSame(t *testing.T) {
	w := newWorld(t, 2)
	w.must(w.receive())
	disks := w.states[w.acked[0].Digest].clone()
	content(disks["vda"][8192:12288], 99)
	clear(disks["vda"][20480:24576])
	spec := BranchSpec{Name: "x", Point: 1, Pin: "x", Epoch: 3, Disks: map[string]Written{}}
	for name, b := range disks {
		spec.Disks[name] = Written{extent.NewSet(extent.Range{Length: 1 << 40}), bytes.NewReader(b)}
	}
	w.must(w.r.Pin("x", 1, nil))
	b, err := w.r.WriteBranch(context.Background(), spec, nil)
	w.must(err)
	d, err := InspectBranch(w.dir, "x")
	w.must(err)
	if diff := cmp.Diff(b, d.BranchInfo); diff != "" || b.Point != 1 || b.Pin != "x" || b.ChangedBytes > 8192 || b.StoredBytes == 0 {
		t.Errorf("%+v: %s", b, diff)
	}
	changed, err := BranchChanged(w.dir, "x")
	w.must(err)
	if !changed["vda"].Contains(8192, 4096) || changed["vda"].Bytes()+changed["vdb"].Bytes() != b.ChangedBytes {
		t.Errorf("changed: %v", changed)
	}
	w.labels.branches["x"], w.states["x"] = "x", disks
	w.compareBranch(w.dir, "x", "written")
}

// TestBranchDamaged: damage of a branch is met by its readers, and by no other.
func TestBranchDamaged(t *testing.T) {
	for seed := range uint64(24) {
		w := branchWorld(t, seed)
		path := branchPath(w.dir, "b1")
		whole, err := os.ReadFile(path)
		w.must(err)
		rng := rand.New(rand.NewPCG(seed, 1))
		bad := bytes.Clone(whole)
		bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
		if seed%4 == 0 {
			bad = bad[:rng.IntN(len(bad))]
		}
		w.must(os.WriteFile(path, bad, 0o600))
		read := func() error {
			v, err := OpenBranch(w.dir, "b1")
			if err != nil {
				return err
			}
			defer v.Close()
			for _, d := range v.Disks() {
				got := make([]byte, d.Size())
				if _, err := d.ReadAt(got, 0); err != nil && err != io.EOF {
					return err
				}
				if !bytes.Equal(got, w.states[w.labels.branches["b1"]][d.Name()]) {
					return errors.New("wrong data")
				}
			}
			return nil
		}
		// A flipped bit in the head of a frame is seen by checks only.
		if err := read(); err != nil && switchback.CodeOf(err) != switchback.CodeCorrupt {
			t.Errorf("seed %d: %v", seed, err)
		}
		for _, o := range []CheckOptions{{}, {Branch: "b1"}} {
			st, err := Check(context.Background(), w.dir, o)
			w.must(err)
			if len(st.Damage) == 0 || st.Damage[0].Branch != "b1" || st.Damage[0].Points() != "snapshot b1" || st.Damage[0].Affects(3) {
				t.Errorf("seed %d: %+v finds %v", seed, o, st.Damage)
			}
		}
		for _, o := range []CheckOptions{{Branch: "b0"}, {Point: 2}} {
			if st, err := Check(context.Background(), w.dir, o); err != nil || len(st.Damage) > 0 {
				t.Errorf("seed %d: %+v finds %v, %v", seed, o, st.Damage, err)
			}
		}
		in, err := Inspect(w.dir)
		if err != nil || len(in.Branches) != 2 || len(in.Points) != 3 {
			t.Errorf("seed %d: %+v, %v", seed, in, err)
		}
		// It hinders nothing, and can be dropped.
		w.must(w.r.Close())
		w.r, err = Open(w.dir)
		w.must(err)
		w.compareBranch(w.dir, "b0", "beside it")
		w.must(w.r.DropBranch("b1"))
		w.must(w.r.Unpin("b1"))
	}
	_, err := Check(context.Background(), branchWorld(t, 1).dir, CheckOptions{Branch: "none"})
	wantCode(t, "check of one that is not there", err, switchback.CodeNotFound)
}

// TestBranchSealed: a branch is sealed as points are, under its own name.
func TestBranchSealed(t *testing.T) {
	w := newWorld(t, 4)
	w.must(w.receive())
	w.must(w.branch("b0", "", 1))
	w.must(w.r.SetSealing(context.Background(), true, keyFile(t)))
	w.must(w.branch("b1", "b0", 1))
	w.must(w.r.RotateKey(context.Background()))
	w.must(w.branch("b2", "b1", 1))
	for i, want := range []bool{false, true, true} {
		name := fmt.Sprint("b", i)
		b, err := os.ReadFile(branchPath(w.dir, name))
		w.must(err)
		if seal.Sealed(b) != want {
			t.Errorf("%s is sealed: %v", name, !want)
		}
		w.compareBranch(w.dir, name, "sealed or not")
	}
	w.must(os.Rename(branchPath(w.dir, "b1"), branchPath(w.dir, "b2")))
	_, err := OpenBranch(w.dir, "b2")
	wantCode(t, "under another's name", err, switchback.CodeCorrupt)
}

// TestDetachBranch: it needs nothing of the replica, nor of its files, and is
// sealed with its keys.
func TestDetachBranch(t *testing.T) {
	ctx := context.Background()
	w := branchWorld(t, 5)
	w.must(w.r.SetSealing(ctx, true, keyFile(t)))
	to := filepath.Join(t.TempDir(), "alone")
	w.must(os.MkdirAll(filepath.Join(to+tempSuffix, "rest", "of", "a", "crash"), 0o700))
	for range 2 {
		w.must(w.r.DetachBranch(ctx, "b1", to, nil))
	}
	if _, err := os.Stat(to + tempSuffix); err == nil {
		t.Error("the temporary directory is left")
	}
	w.must(w.r.Close())
	w.must(os.RemoveAll(w.dir))
	w.compareBranch(to, "b1", "alone")
	b, err := os.ReadFile(branchPath(to, "b1"))
	if err != nil || !seal.Sealed(b) {
		t.Errorf("it is not sealed, %v", err)
	}
	for _, seq := range []switchback.Sequence{0, 2, 3} {
		_, err = OpenView(to, seq)
		wantCode(t, "a point of it", err, switchback.CodeNotFound)
	}
	in, err := Inspect(to)
	if err != nil || len(in.Branches) != 1 || !in.Branches[0].Whole || in.Branches[0].Point != 2 || len(in.Points)+len(in.Damage) > 0 {
		t.Errorf("%+v, %v", in, err)
	}
	for _, o := range []CheckOptions{{}, {Branch: "b1"}} {
		if st, err := Check(ctx, to, o); err != nil || st.Branches != 1 || len(st.Damage) > 0 {
			t.Errorf("%+v, %v", st, err)
		}
	}
	w.r, err = Open(to)
	w.must(err)
	wantCode(t, "pin a point of it", w.r.Pin("p", 0, nil), switchback.CodeNotFound)
}

// TestFoldBranch lets a crash come before every operation of it, in each way:
// the branch reads the same, and the repeated fold leaves its content in the bases.
func TestFoldBranch(t *testing.T) {
	ctx := context.Background()
	for seed := range uint64(4) {
		w := branchWorld(t, seed)
		want := w.states[w.labels.branches["b1"]]
		wantCode(t, "before its point", w.r.FoldBranch(ctx, "b1", w.openBase(w.dir, w.fs)), switchback.CodeRefused)
		w.must(w.r.DropAfter(2))
		w.must(w.fold(2))
		wantCode(t, "beside another", w.r.CheckFoldBranch("b1", "b0"), switchback.CodeRefused)
		w.must(w.dropBranch("b0"))
		w.must(w.r.Pin("run", 2, nil))
		wantCode(t, "beside a pin", w.r.CheckFoldBranch("b1"), switchback.CodeRefused)
		w.must(w.r.CheckFoldBranch("b1", "run"))

		rng := rand.New(rand.NewPCG(seed, 2))
		clones, runs := tempDir(t), 0
		w.fs.before = func(op string) {
			for variant := range crashes {
				runs++
				what := fmt.Sprintf("seed %d, crash %d before %s, variant %d", seed, runs, op, variant)
				dir := filepath.Join(clones, fmt.Sprint(runs))
				fs := w.fs.crash(t, dir, variant, rng)
				r, err := Options{ReserveBytes: 1, fs: fs}.Open(dir)
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				w.compareBranch(dir, "b1", what)
				if err := r.FoldBranch(ctx, "b1", w.openBase(dir, fs), "run"); err != nil {
					t.Fatalf("%s: once more: %v", what, err)
				}
				w.compareBranch(dir, "b1", what+", folded")
				for name, b := range want {
					got, err := os.ReadFile(filepath.Join(dir, name+".raw"))
					if err != nil || !bytes.Equal(got[:len(b)], b) {
						t.Fatalf("%s: base of %s differs at %d, %v", what, name, firstDifference(got[:len(b)], b), err)
					}
				}
				w.must(r.Close())
				w.must(os.RemoveAll(dir))
			}
		}
		w.ensureBaseOf(want)
		view, err := OpenBranch(w.dir, "b1")
		w.must(err)
		w.must(w.r.FoldBranch(ctx, "b1", w.openBase(w.dir, w.fs), "run"))
		w.fs.before = func(string) {}
		w.compareView(view, want, "a view that was open")
		if points := w.r.Points(); len(points) > 0 || runs < 2*crashes {
			t.Errorf("points %v are there after %d crashes", sequences(points), runs)
		}
		_, err = OpenView(w.dir, 2)
		wantCode(t, "its point", err, switchback.CodeNotFound)
		wantCode(t, "fold", w.r.Fold(ctx, 2, w.openBase(w.dir, w.fs)), switchback.CodeNotFound)
		w.must(w.r.DropBranch("b1"))
	}
}

// ensureBaseOf gives every disk of a state a base.
func (w *world) ensureBaseOf(s state) {
	if s["vdc"] != nil {
		w.ensureBase("vdc")
	}
}

// TestGoldenBranch fixes the header of a branch; all else is a segment's.
func TestGoldenBranch(t *testing.T) {
	h := testHeader(8, "0011", 1<<20)
	h.Kind, h.Time = switchback.CrashConsistent, time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	h.Branch = &Branch{Name: "epoch-4-from-point-7", Pin: "snapshot-epoch-4-from-point-7"}
	b := make([]byte, 8192)
	content(b, 5)
	fresh, _ := buildSegment(t, h, CodecNone, func(w *SegmentWriter) error {
		return errors.Join(w.Data(0, 8192, b), w.Zero(0, 64<<10, 4096))
	})
	path := filepath.Join("testdata", "segment-v1-branch.seg")
	if *update {
		if err := os.WriteFile(path, fresh, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got := [][]byte{bytes.Repeat([]byte{0xee}, 1<<20)}
	read, err := replay(golden, got)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(h, read); diff != "" {
		t.Error(diff)
	}
	want := bytes.Repeat([]byte{0xee}, 1<<20)
	copy(want[8192:], b)
	clear(want[64<<10:][:4096])
	if !slices.Equal(got[0], want) {
		t.Errorf("differs at %d", firstDifference(got[0], want))
	}
	n, err := headerLength(golden)
	if err != nil || !bytes.Equal(golden[:n], fresh[:n]) {
		t.Errorf("the format has changed: raise its version and keep reading this one, %v", err)
	}
}

package journal

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/objectstore/s3test"
	"github.com/switchback-dr/switchback/seal"
)

func keyFile(t *testing.T) *seal.Source {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key")
	if err := seal.MakeKeyFile(path); err != nil {
		t.Fatal(err)
	}
	return &seal.Source{File: path}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// checkAll compares all points with the model, in this process and reopened.
func (w *world) checkAll(what string) {
	w.t.Helper()
	for _, p := range w.r.Points() {
		w.comparePoint(w.dir, p, what)
	}
	w.must(w.r.Close())
	r, err := Options{ReserveBytes: 1, fs: w.fs}.Open(w.dir)
	if err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
	if d := r.Damaged(); len(d) > 0 {
		w.t.Fatalf("%s: damaged: %v", what, d)
	}
	w.r = r
	for _, p := range r.Points() {
		w.comparePoint(w.dir, p, what+", reopened")
	}
}

func sealedFiles(t *testing.T, dir string) (sealed, plain int) {
	t.Helper()
	sequences, err := listSegments(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, seq := range sequences {
		b, err := os.ReadFile(segmentPath(dir, seq))
		if err != nil {
			t.Fatal(err)
		}
		if seal.Sealed(b) {
			sealed++
		} else {
			plain++
		}
	}
	return sealed, plain
}

func TestSealedReplica(t *testing.T) {
	w := newWorld(t, 21)
	w.must(w.receive())
	first, second := keyFile(t), keyFile(t)
	w.must(w.r.SetSealing(t.Context(), true, first))
	for range 3 {
		w.must(w.receive())
	}
	if sealed, plain := sealedFiles(t, w.dir); sealed != 3 || plain != 1 {
		t.Errorf("%d sealed and %d plain segments", sealed, plain)
	}
	w.checkAll("sealed")

	w.must(w.r.RotateKey(t.Context()))
	w.must(w.receive())
	w.must(w.r.SetSealing(t.Context(), true, second)) // wraps anew
	w.must(w.receive())
	w.checkAll("rotated and wrapped anew")
	if n := len(w.r.Storage().Keyring.Keys); n != 2 {
		t.Errorf("%d data keys", n)
	}

	points := w.r.Points()
	first2, into := points[len(points)-4].Sequence, points[len(points)-2].Sequence
	w.must(w.r.Merge(t.Context(), first2, into, 0))
	w.checkAll("merged")
	w.must(w.fold(into))
	w.checkAll("folded")
	if sealed, plain := sealedFiles(t, w.dir); plain != 0 || sealed == 0 {
		t.Errorf("%d sealed and %d plain segments in the end", sealed, plain)
	}

	head := w.r.Head()
	b, err := os.ReadFile(segmentPath(w.dir, head.Sequence))
	w.must(err)
	if bytes.Contains(b, []byte(head.Parent)) || bytes.Contains(b, []byte("vda")) {
		t.Error("the sealed segment shows what is in it")
	}

	// The key is gone: nothing is called damaged, nothing is lost.
	w.must(os.Rename(second.File, second.File+".away"))
	_, err = OpenView(w.dir, head.Sequence)
	wantCode(t, "a view without the key", err, switchback.CodeUnauthorized)
	w.must(w.r.Close())
	_, err = Open(w.dir)
	wantCode(t, "opening without the key", err, switchback.CodeUnauthorized)
	w.must(os.Rename(second.File+".away", second.File))
	w.r, err = Options{ReserveBytes: 1, fs: w.fs}.Open(w.dir)
	w.must(err)
	w.checkAll("the key is back")

	// Flipped bits are found wherever they are.
	rng := rand.New(rand.NewPCG(5, 6))
	for range 100 {
		bad := bytes.Clone(b)
		at := rng.IntN(len(bad))
		bad[at] ^= 1 << rng.IntN(8)
		w.must(os.WriteFile(segmentPath(w.dir, head.Sequence), bad, 0o600))
		v, err := OpenView(w.dir, head.Sequence)
		if err == nil {
			for _, d := range v.Disks() {
				got := make([]byte, d.Size())
				if _, e := d.ReadAt(got, 0); e != nil {
					err = e
				} else if want := w.states[head.Digest][d.Name()]; !bytes.Equal(got, want) {
					t.Fatalf("a bit flipped at %d: wrong data is served", at)
				}
			}
			v.Close()
		}
		if c := switchback.CodeOf(err); err != nil && c != switchback.CodeCorrupt && c != switchback.CodeUnsupported && c != switchback.CodeUnauthorized {
			t.Errorf("a bit flipped at %d: %v", at, err)
		}
	}
	w.must(os.WriteFile(segmentPath(w.dir, head.Sequence), b, 0o600))
	w.checkAll("put back")
}

func TestOffload(t *testing.T) {
	srv := s3test.Start(t, "127.0.0.1")
	srv.MakeBucket("points", true)
	place := srv.Config("points", "riga")
	w := newWorld(t, 22)
	w.must(w.r.SetSealing(t.Context(), true, keyFile(t)))
	for range 6 {
		w.must(w.receive())
	}
	w.must(w.r.SetObjects(t.Context(), &place))
	points := w.r.Points()
	upTo := points[len(points)-2].Sequence
	locked := points[1].Sequence
	w.must(w.r.SetMark(locked, func(m *switchback.Mark) error { m.Locked = true; return nil }))

	v, err := OpenView(w.dir, upTo) // opened before, read after
	w.must(err)
	defer v.Close()
	moved, err := w.r.Offload(t.Context(), upTo, 0)
	w.must(err)
	if want := len(points) - 2; moved != want && moved != want+1 { // the base may stand for the first
		t.Errorf("%d segments were moved, want %d", moved, want)
	}
	files, err := filepath.Glob(filepath.Join(w.dir, segmentDir, "*"+segmentSuffix))
	w.must(err)
	if len(files) != 1 {
		t.Errorf("%d segment files are left", len(files))
	}
	for _, d := range v.Disks() {
		got := make([]byte, d.Size())
		if _, err := d.ReadAt(got, 0); err != nil {
			t.Errorf("the view opened before: %v", err)
		}
	}
	w.checkAll("moved")
	if d, err := w.r.Verify(t.Context(), nil); err != nil || len(d) > 0 {
		t.Errorf("verify: %v, %v", d, err)
	}
	wantCode(t, "another place while segments are at this one", w.r.SetObjects(t.Context(), nil), switchback.CodeRefused)

	t.Run("StoreDown", func(t *testing.T) {
		srv.Stop()
		defer srv.Start()
		w.must(w.receive()) // new points do not need the store
		_, err := w.r.Offload(t.Context(), w.r.Head().Sequence, 0)
		wantCode(t, "offload", err, switchback.CodeUnavailable)
		_, err = OpenView(w.dir, upTo)
		wantCode(t, "a view", err, switchback.CodeUnavailable)
		w.must(w.r.Close())
		r, err := Options{ReserveBytes: 1, fs: w.fs}.Open(w.dir)
		w.must(err)
		w.r = r
		if len(r.Damaged()) > 0 {
			t.Errorf("called damaged: %v", r.Damaged())
		}
		w.must(w.receive())
	})
	w.checkAll("the store is back")

	t.Run("Merge", func(t *testing.T) {
		all := w.r.Points()
		w.must(w.r.Merge(t.Context(), all[2].Sequence, all[4].Sequence, 0))
		w.checkAll("merged")
		if _, garbage, err := listReferences(w.dir); err != nil || len(garbage) < 2 {
			t.Errorf("%d objects wait for removal, %v", len(garbage), err)
		}
		w.must(w.r.Pin("view", upTo, nil))
		w.must(w.r.TendObjects(t.Context()))
		if _, garbage, _ := listReferences(w.dir); len(garbage) < 2 {
			t.Error("objects were removed while a view may read them")
		}
		w.must(w.r.Unpin("view"))
		w.must(w.r.TendObjects(t.Context()))
		if _, garbage, _ := listReferences(w.dir); len(garbage) != 0 {
			t.Errorf("%d objects still wait for removal", len(garbage))
		}
		w.checkAll("tended")
	})

	t.Run("LockedIsHeld", func(t *testing.T) {
		ref, err := readReference(w.dir, locked)
		w.must(err)
		if !ref.Held {
			t.Error("the locked point's object is not held")
		}
		wantCode(t, "removing its object", w.r.storage.objects.Remove(t.Context(), ref.Object), switchback.CodeRefused)
		w.must(w.r.SetMark(locked, func(m *switchback.Mark) error { m.Locked = false; return nil }))
		w.must(w.r.TendObjects(t.Context()))
		if ref, err = readReference(w.dir, locked); err != nil || ref.Held {
			t.Errorf("still held after unlocking, %v", err)
		}
	})

	t.Run("Fold", func(t *testing.T) {
		w.must(w.fold(upTo))
		w.checkAll("folded")
		w.must(w.r.TendObjects(t.Context()))
	})

	t.Run("Remove", func(t *testing.T) {
		w.must(w.r.Close())
		objects := w.r.storage.objects
		w.must(Remove(w.dir))
		list, err := objects.List(t.Context(), "")
		w.must(err)
		for _, o := range list {
			if !strings.HasPrefix(o.Key, "probe-") {
				t.Errorf("object %s is left", o.Key)
			}
		}
	})
}

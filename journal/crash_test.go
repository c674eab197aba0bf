package journal

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var (
	crashRuns    = flag.Int("crash.runs", 800, "how many crashes TestCrash simulates at least")
	crashSeed    = flag.Uint64("crash.seed", 1000, "seed of the first history of TestCrash; each has the next one")
	crashMutants = flag.Bool("crash.mutants", false, "plant each known bug and see whether TestCrash finds it")
)

// crashLine is what TestCrash has to say last.
var crashLine string

func TestMain(m *testing.M) {
	code := m.Run()
	if crashLine != "" {
		fmt.Println(crashLine)
	}
	os.Exit(code)
}

// violation is what a history found.
type violation string

// judge turns failures into violations.
type judge struct{ testing.TB }

func (judge) Fatalf(format string, args ...any) { panic(violation(fmt.Sprintf(format, args...))) }
func (judge) Fatal(args ...any)                 { panic(violation(fmt.Sprint(args...))) }
func (judge) Helper()                           {}

// history is one random life of a replica, with a crash before every operation.
type history struct {
	seed   uint64
	limit  int // crashes
	runs   int
	clones string
	found  violation
	w      *world
	rng    *rand.Rand
	// onClone plants a bug in the process after the crash.
	onClone func(*recorder)
	inside  bool
}

// watch runs f and keeps the violation that it ends in.
func (h *history) watch(f func()) {
	defer func() {
		switch x := recover().(type) {
		case nil:
		case violation:
			if h.found == "" {
				h.found = x
			}
		default:
			panic(x)
		}
	}()
	f()
}

func (h *history) live(t testing.TB, plant func(*history)) {
	h.rng = rand.New(rand.NewPCG(h.seed, 13))
	h.watch(func() {
		h.w = newWorld(judge{t}, h.seed)
		if plant != nil {
			plant(h)
		}
		h.w.fs.before = h.before
		for range 24 {
			h.w.act()
			if h.found != "" || h.runs >= h.limit {
				break
			}
		}
	})
	if h.w != nil {
		h.w.fs.before = func(string) {}
		h.w.r.Close()
		os.RemoveAll(filepath.Dir(h.w.dir))
	}
}

// before lets the world crash in each way. It may run on any goroutine, under the
// recorder's lock.
func (h *history) before(op string) {
	if strings.HasPrefix(op, "write") || h.found != "" || h.inside {
		return // a write is the same as before the sync that follows
	}
	h.inside = true
	defer func() { h.inside = false }()
	for variant := range crashes {
		h.runs++
		what := fmt.Sprintf("seed %d, crash %d before %s, variant %d", h.seed, h.runs, op, variant)
		h.watch(func() { h.crash(fmt.Sprint(h.seed, "-", h.runs), variant, what) })
	}
}

// crash looks at what a crash leaves, once the replica was opened again and, now and
// then, once that crashed too.
func (h *history) crash(name string, variant int, what string) {
	w := h.w
	dir := filepath.Join(h.clones, name)
	defer os.RemoveAll(dir)
	fs := w.fs.crash(w.t, dir, variant, h.rng)
	if h.onClone != nil {
		h.onClone(fs)
	}
	// Before the third operation a restart has only synced what is there.
	if at := 2 + h.rng.IntN(6); variant == 0 || h.rng.IntN(4) == 0 {
		again := dir + "-again"
		fs.before = func(op string) {
			if at--; at == -1 {
				defer os.RemoveAll(again)
				what := what + ", then before " + op
				fs.before = func(string) {}
				h.reopen(again, fs.crash(w.t, again, 1+h.rng.IntN(crashes-1), h.rng), what)
			}
		}
	}
	h.reopen(dir, fs, what)
}

func (h *history) reopen(dir string, fs *recorder, what string) {
	w := h.w
	r, err := Options{ReserveBytes: 1, fs: fs}.Open(dir)
	if err != nil {
		w.t.Fatalf("%s: open: %v", what, err)
	}
	defer r.Close()
	w.check(r, dir, what)
	// An interrupted fold is repeated and the result is right.
	if upTo := r.Manifest().Folding; upTo > 0 {
		err := r.Fold(context.Background(), upTo, func(d DiskGeometry) (BaseWriter, func() error, error) {
			f, err := os.OpenFile(filepath.Join(dir, d.Name+".raw"), os.O_RDWR|os.O_CREATE, 0o600)
			if err != nil {
				return nil, nil, err
			}
			st, _ := f.Stat()
			return plainBase{f}, f.Close, f.Truncate(max(st.Size(), d.SizeBytes))
		})
		if err != nil {
			w.t.Fatalf("%s: repeat fold: %v", what, err)
		}
		w.check(r, dir, what+", fold repeated")
	}
}

// TestCrash stops random histories of receive, fold, merge, drop, pins, marks,
// branches and retention before every operation on the file system, in each way a crash may
// leave it, and looks whether everything acknowledged is there.
func TestCrash(t *testing.T) {
	if *crashMutants {
		t.Skip("planting bugs instead")
	}
	runs, violations := 0, 0
	for seed := *crashSeed; runs < *crashRuns && violations < 10; seed++ {
		h := history{seed: seed, limit: 1 << 30, clones: tempDir(t)}
		h.live(t, nil)
		if testing.Verbose() {
			fmt.Printf("seed %d: %d runs\n", seed, h.runs)
		}
		runs += h.runs
		if h.found != "" {
			violations++
			t.Errorf("%s\nonce more: go test ./journal -run TestCrash -crash.runs 1 -crash.seed %d", h.found, seed)
		}
		os.RemoveAll(h.clones)
	}
	crashLine = fmt.Sprintf("%d runs, %d violations", runs, violations)
}

// mutants are known bugs, as a fileSystem that does not do what it is asked, or as
// a replica that is blind for a guard.
// Rare ones take thousands of runs to find, and are planted on request only.
var mutants = []struct {
	name  string
	plant func(*history)
	rare  bool
}{
	{"a received segment is not synced", skipSync(func(h *history, path string) bool { return isTemp(path) && !h.merging(path) }), false},
	{"a merged segment is not synced", skipSync(func(h *history, path string) bool { return isTemp(path) && h.merging(path) }), false},
	{"the manifest is not synced", skipSync(func(_ *history, path string) bool { return filepath.Base(path) == "manifest.json.tmp" }), false},
	{"pins are not synced", skipSync(func(_ *history, path string) bool { return filepath.Base(filepath.Dir(path)) == pinDir }), false},
	{"marks are not synced", skipSync(func(_ *history, path string) bool { return filepath.Base(path) == "marks.json.tmp" }), false},
	{"the base is not flushed before the manifest", skipSync(func(_ *history, path string) bool { return path == "base" }), false},
	{"the directory of segments is not synced", skipSyncDir(segmentDir), false},
	{"the directory of pins is not synced", skipSyncDir(pinDir), false},
	{"the replica's directory is not synced", skipSyncDir("replica"), false},
	{"a received segment is renamed before it is synced", renamed(func(h *history, path string) bool { return isTemp(path) && !h.merging(path) }), false},
	{"a merged segment is renamed before it is synced", renamed(func(h *history, path string) bool { return isTemp(path) && h.merging(path) }), false},
	{"the manifest is renamed before it is synced", renamed(func(_ *history, path string) bool { return filepath.Base(path) == "manifest.json.tmp" }), false},
	{"a branch is not synced", skipSync(func(_ *history, path string) bool { return isTempIn(path, branchDir) }), false},
	{"a branch is renamed before it is synced", renamed(func(_ *history, path string) bool { return isTempIn(path, branchDir) }), false},
	{"the directory of branches is not synced", skipSyncDir(branchDir), false},
	{"fold, merge and drop past a pin or a lock", func(h *history) { h.w.blind = true }, false},
	{"a merge removes the older segments before the newer is there", func(h *history) {
		h.w.fs.early = func(to string) {
			if filepath.Base(filepath.Dir(to)) != segmentDir || h.w.fs.live[to] == nil {
				return
			}
			h.vanishLeaving()
			h.before("rename " + filepath.Base(to) + ", the older are gone")
		}
	}, false},
	{"a merge removes the older segments before its rename is durable", func(h *history) {
		var merged bool
		h.w.fs.early = func(to string) {
			merged = filepath.Base(filepath.Dir(to)) == segmentDir && h.w.fs.live[to] != nil
		}
		h.w.fs.skipSyncDir = func(dir string) bool {
			if !merged || filepath.Base(dir) != segmentDir {
				return false
			}
			merged = false
			h.vanishLeaving()
			h.before("syncdir, the older are gone")
			return false
		}
	}, false},
	{"fold and drop remove segments before the manifest says so", func(h *history) {
		h.w.fs.early = func(to string) {
			if filepath.Base(to) == "manifest.json" && h.w.leaving != nil {
				h.vanishLeaving()
				h.before("rename manifest.json, the segments are gone")
			}
		}
	}, false},
	{"a fold writes without having said so", func(h *history) {
		h.w.fs.skipRename = func(from, _ string) bool {
			var m Manifest
			return filepath.Base(from) == "manifest.json.tmp" && readDocument(from, &m) == nil && m.Folding > 0
		}
	}, false},
	{"keys are not synced", skipSync(func(_ *history, path string) bool { return filepath.Base(path) == "storage.json.tmp" }), false},
	{"a key is written after the data it protects", func(h *history) {
		h.w.fs.late = func(path string) bool { return filepath.Base(path) == "storage.json" }
	}, false},
	{"the restart removes what it replaced before that is durable", func(h *history) {
		h.onClone = func(fs *recorder) { fs.skipSyncDir = func(string) bool { return true } }
	}, true},
}

func isTemp(path string) bool { return isTempIn(path, segmentDir) }

func isTempIn(path, dir string) bool {
	return filepath.Base(filepath.Dir(path)) == dir && strings.HasSuffix(path, tempSuffix)
}

// merging reports whether the temporary segment at path is to replace another.
func (h *history) merging(path string) bool { return h.w.fs.live[h.target(path)] != nil }

// target is the name that the temporary file at path gets.
func (h *history) target(path string) string {
	if isTempIn(path, branchDir) {
		return filepath.Join(filepath.Dir(path), path[len(filepath.Dir(path))+1:strings.LastIndex(path, "-")]+segmentSuffix)
	}
	if isTemp(path) {
		number, _, _ := strings.Cut(filepath.Base(path), "-")
		return filepath.Join(filepath.Dir(path), number+segmentSuffix)
	}
	return strings.TrimSuffix(path, ".tmp")
}

// vanishLeaving removes the segments of the points that leave.
func (h *history) vanishLeaving() {
	if h.w.leaving == nil {
		return
	}
	for _, p := range h.w.acked {
		if path := segmentPath(h.w.dir, p.Sequence); h.w.leaving(p.Sequence) {
			h.w.fs.vanish(path)
		}
	}
}

func skipSync(which func(*history, string) bool) func(*history) {
	return func(h *history) { h.w.fs.skipSync = func(path string) bool { return which(h, path) } }
}

func skipSyncDir(name string) func(*history) {
	return func(h *history) { h.w.fs.skipSyncDir = func(dir string) bool { return filepath.Base(dir) == name } }
}

func renamed(which func(*history, string) bool) func(*history) {
	return func(h *history) {
		h.w.fs.renamed = func(path string) string {
			if which(h, path) {
				return h.target(path)
			}
			return ""
		}
	}
}

// TestCrashFindsBugs plants each mutant and fails when TestCrash would not see it.
func TestCrashFindsBugs(t *testing.T) {
	caught := 0
	for _, m := range mutants {
		if m.rare && !*crashMutants {
			continue
		}
		runs := 0
		var h history
		for seed := *crashSeed; h.found == "" && runs < 20000; seed++ {
			h = history{seed: seed, limit: 1 << 30, clones: tempDir(t)}
			h.live(t, m.plant)
			runs += h.runs
		}
		if h.found == "" {
			t.Errorf("not caught in %d runs: %s", runs, m.name)
			fmt.Printf("NOT CAUGHT  %s\n", m.name)
			continue
		}
		caught++
		if *crashMutants {
			fmt.Printf("caught      %s (run %d: %s)\n", m.name, runs, h.found)
		}
	}
	if *crashMutants {
		crashLine = fmt.Sprintf("%d mutants, %d caught", len(mutants), caught)
	}
}

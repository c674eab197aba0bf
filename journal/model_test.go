package journal

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/switchback-dr/switchback"
)

// recorder is a file system that mirrors what is written, so that a test can
// ask what a crash at this moment may leave: everything, only what was synced,
// or names without their data, or any
// mixture. It can also fail the nth operation.
type recorder struct {
	osFileSystem
	root          string
	mu            sync.Mutex // guards all below
	live, durable map[string]*inode
	// before is called before each operation, with its description.
	before func(op string)
	ops    int
	failAt int // the operation that fails, counted from 1; 0 for none
	fault  error
	room   int64
}

type inode struct{ live, durable []byte }

func newRecorder(root string) *recorder {
	return &recorder{root: root, live: map[string]*inode{}, durable: map[string]*inode{}, before: func(string) {}, room: 1 << 40}
}

func (f *recorder) step(op, path string) error {
	f.before(op + " " + strings.TrimPrefix(path, f.root))
	f.ops++
	if f.ops == f.failAt {
		return f.fault
	}
	return nil
}

func (f *recorder) create(path string) (file, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.step("create", path); err != nil {
		return nil, err
	}
	real, err := f.osFileSystem.create(path)
	node := &inode{}
	f.live[path] = node
	return &recordedFile{real, f, node, path}, err
}

type recordedFile struct {
	file
	fs   *recorder
	node *inode
	path string
}

func (w *recordedFile) Write(p []byte) (int, error) {
	w.fs.mu.Lock()
	defer w.fs.mu.Unlock()
	if err := w.fs.step("write", w.path); err != nil {
		n, _ := w.file.Write(p[:len(p)/2])
		w.node.live = append(w.node.live, p[:n]...)
		return n, err
	}
	w.node.live = append(w.node.live, p...)
	return w.file.Write(p)
}

func (w *recordedFile) Sync() error {
	w.fs.mu.Lock()
	defer w.fs.mu.Unlock()
	if err := w.fs.step("sync", w.path); err != nil {
		return err
	}
	w.node.durable = bytes.Clone(w.node.live)
	return nil
}

func (f *recorder) rename(from, to string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.step("rename", to); err != nil {
		return err
	}
	f.live[to] = f.live[from]
	delete(f.live, from)
	return f.osFileSystem.rename(from, to)
}

func (f *recorder) remove(path string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.step("remove", path); err != nil {
		return err
	}
	delete(f.live, path)
	return f.osFileSystem.remove(path)
}

func (f *recorder) syncDir(dir string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.step("syncdir", dir); err != nil {
		return err
	}
	for path := range f.durable {
		if filepath.Dir(path) == dir && f.live[path] == nil {
			delete(f.durable, path)
		}
	}
	for path, node := range f.live {
		if filepath.Dir(path) == dir {
			f.durable[path] = node
		}
	}
	return nil
}

func (f *recorder) free(string) (int64, error) { return f.room, nil }

// crash writes to dir what a crash may leave of root.
func (f *recorder) crash(t *testing.T, dir string, variant int, rng *rand.Rand) {
	t.Helper()
	for _, d := range []string{segmentDir, pinDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	names := f.live
	switch variant {
	case 1:
		names = f.durable
	case 3: // any of the renames and removals since the last sync
		names = map[string]*inode{}
		for _, path := range slices.Sorted(maps.Keys(f.live)) {
			if rng.IntN(2) == 0 || f.durable[path] == f.live[path] {
				names[path] = f.live[path]
			} else if node := f.durable[path]; node != nil {
				names[path] = node
			}
		}
		for _, path := range slices.Sorted(maps.Keys(f.durable)) {
			if f.live[path] == nil && rng.IntN(2) == 0 {
				names[path] = f.durable[path]
			}
		}
	}
	for path, node := range names {
		content := node.live
		switch {
		case strings.HasSuffix(path, ".raw"): // bases: any sector may be old or new
			content = bytes.Clone(node.live)
			for at := 0; at < len(content); at += sector {
				if variant == 1 || variant >= 2 && rng.IntN(2) == 0 {
					clear(content[at : at+sector])
					if at < len(node.durable) {
						copy(content[at:at+sector], node.durable[at:])
					}
				}
			}
		case variant > 0:
			content = node.durable
		}
		if err := os.WriteFile(filepath.Join(dir, strings.TrimPrefix(path, f.root)), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// memoryBase is a BaseWriter on a raw file that the recorder knows.
type memoryBase struct {
	fs   *recorder
	node *inode
	f    *os.File
}

func (f *recorder) openBase(path string, size int64) (*memoryBase, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	node := f.live[path]
	if node == nil {
		node = &inode{}
		f.live[path], f.durable[path] = node, node
	}
	if int64(len(node.live)) < size {
		node.live = append(node.live, make([]byte, size-int64(len(node.live)))...)
	}
	return &memoryBase{f, node, file}, file.Truncate(max(size, int64(len(node.live))))
}

func (b *memoryBase) WriteAt(p []byte, off int64) (int, error) {
	b.fs.mu.Lock()
	defer b.fs.mu.Unlock()
	if err := b.fs.step("base write", ""); err != nil {
		return 0, err
	}
	copy(b.node.live[off:], p)
	return b.f.WriteAt(p, off)
}

func (b *memoryBase) WriteZeroes(off, length int64) error {
	_, err := b.WriteAt(make([]byte, length), off)
	return err
}

func (b *memoryBase) Flush() error {
	b.fs.mu.Lock()
	defer b.fs.mu.Unlock()
	if err := b.fs.step("base flush", ""); err != nil {
		return err
	}
	b.node.durable = bytes.Clone(b.node.live)
	return nil
}

// state is the disks of a VM at a point.
type state map[string][]byte

func (s state) clone() state {
	out := state{}
	for name, b := range s {
		out[name] = bytes.Clone(b)
	}
	return out
}

// world is a replica, its model, and what is allowed to be missing at the moment.
type world struct {
	t       *testing.T
	rng     *rand.Rand
	dir     string
	fs      *recorder
	r       *Replica
	states  map[string]state // by digest
	acked   []switchback.Point
	maybe   *switchback.Point   // a point being received
	gone    switchback.Sequence // points before it may be gone
	dropped switchback.Sequence // points after it may be gone; 0 for none
	epoch   switchback.Epoch
}

// tempDir is a directory in memory where there is one: crashes are simulated,
// so real durability only costs time.
func tempDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "journal-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sub := filepath.Join(dir, "replica")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	return sub
}

const baseDigest = "" // of sequence 0

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 11)), dir: tempDir(t), states: map[string]state{}, epoch: 3}
	w.fs = newRecorder(w.dir)
	first := state{"vda": make([]byte, 64<<10), "vdb": make([]byte, 32<<10)}
	spec := Spec{Protection: "p-0123456789ab", Epoch: 3, BaseIsOriginal: true, Name: "vm"}
	for _, name := range []string{"vda", "vdb"} {
		content(first[name], seed)
		path := filepath.Join(w.dir, name+".raw")
		b, err := w.fs.openBase(path, int64(len(first[name])))
		if err != nil {
			t.Fatal(err)
		}
		b.WriteAt(first[name], 0)
		b.Flush()
		spec.Disks = append(spec.Disks, ReplicaDisk{Name: name, SizeBytes: int64(len(first[name])), BasePath: path, BaseFormat: "raw"})
	}
	w.states[baseDigest] = first
	// Create wants a directory of its own; the bases lie in it for the crash clone.
	for _, d := range []string{"vda.raw", "vdb.raw"} {
		os.Rename(filepath.Join(w.dir, d), filepath.Join(w.dir, "..", d))
	}
	r, err := Options{ReserveBytes: 1, fs: w.fs}.Create(w.dir, spec)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"vda.raw", "vdb.raw"} {
		os.Rename(filepath.Join(w.dir, "..", d), filepath.Join(w.dir, d))
	}
	w.r = r
	t.Cleanup(func() { w.r.Close() })
	return w
}

func (w *world) head() switchback.Point {
	if n := len(w.acked); n > 0 {
		return w.acked[n-1]
	}
	return switchback.Point{}
}

// nextSegment invents what the guest did since the head.
func (w *world) nextSegment() ([]byte, switchback.Point, state) {
	head := w.head()
	next := w.states[head.Digest].clone()
	h := testHeader(head.Sequence+1, head.Digest)
	h.Epoch = w.epoch
	switch w.rng.IntN(6) {
	case 0, 1:
		if next["vdc"] == nil {
			next["vdc"] = make([]byte, 16<<10)
		} else {
			delete(next, "vdc")
		}
	case 2:
		next["vdb"] = append(next["vdb"], make([]byte, 4096)...)
	}
	for _, name := range []string{"vdc", "vdb", "vda"} { // another order than the base's
		if b := next[name]; b != nil {
			h.Disks = append(h.Disks, DiskGeometry{name, int64(len(b))})
		}
	}
	seg, sum := buildSegment(w.t, h, Codec(w.rng.IntN(3)), func(s *SegmentWriter) error {
		for i, d := range h.Disks {
			disk := next[d.Name]
			for at := int64(w.rng.IntN(8)) * 512; at < d.SizeBytes; {
				n := min(int64(1+w.rng.IntN(24))*512, d.SizeBytes-at)
				if w.rng.IntN(4) == 0 {
					clear(disk[at : at+n])
					s.Zero(i, at, n)
				} else {
					content(disk[at:at+n], w.rng.Uint64())
					s.Data(i, at, disk[at:at+n])
				}
				at += n + int64(w.rng.IntN(48))*512
			}
		}
		return nil
	})
	return seg, h.Point(sum), next
}

func (w *world) receive() error {
	seg, point, next := w.nextSegment()
	w.states[point.Digest] = next
	w.maybe = &point
	got, err := w.r.Receive(context.Background(), w.epoch, bytes.NewReader(seg))
	if err == nil {
		if got != point {
			w.t.Fatalf("received %+v, want %+v", got, point)
		}
		w.acked = append(w.acked, point)
	}
	w.maybe = nil
	return err
}

func (w *world) openBase(dir string, fs *recorder) OpenBaseFunc {
	return func(d DiskGeometry) (BaseWriter, func() error, error) {
		b, err := fs.openBase(filepath.Join(dir, d.Name+".raw"), d.SizeBytes)
		if err != nil {
			return nil, nil, err
		}
		return b, b.f.Close, nil
	}
}

func (w *world) fold(upTo switchback.Sequence) error {
	w.ensureBase("vdc")
	w.gone = upTo
	err := w.r.Fold(context.Background(), upTo, w.openBase(w.dir, w.fs))
	if err == nil || w.r.Manifest().Folding == upTo {
		w.acked = slices.DeleteFunc(w.acked, func(p switchback.Point) bool { return p.Sequence < upTo })
	}
	return err
}

// ensureBase gives a disk that appeared a base image.
func (w *world) ensureBase(name string) {
	m := w.r.Manifest()
	if m.disk(name) != nil {
		return
	}
	path := filepath.Join(w.dir, name+".raw")
	b, err := w.fs.openBase(path, 16<<10)
	if err != nil {
		w.t.Fatal(err)
	}
	content(b.node.live, 5) // what an absent disk's file holds must not matter
	b.f.WriteAt(b.node.live, 0)
	b.f.Close()
	if err := w.r.SetDisk(ReplicaDisk{Name: name, SizeBytes: 16 << 10, BasePath: path, BaseFormat: "raw"}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) drop(seq switchback.Sequence) error {
	w.dropped = seq
	err := w.r.DropAfter(seq)
	if err != nil { // it may have come to pass or not
		w.acked = w.r.Points()
	} else {
		w.acked = slices.DeleteFunc(w.acked, func(p switchback.Point) bool { return p.Sequence > seq })
	}
	if err == nil {
		w.dropped = 0
	}
	return err
}

// act does something at random.
func (w *world) act() {
	must := func(err error) {
		if err != nil {
			w.t.Fatal(err)
		}
	}
	switch n := w.rng.IntN(10); {
	case n < 6:
		must(w.receive())
	case n < 8 && len(w.acked) > 1:
		must(w.fold(w.acked[w.rng.IntN(len(w.acked))].Sequence))
	case n < 9 && len(w.acked) > 1:
		must(w.drop(w.acked[w.rng.IntN(len(w.acked))].Sequence))
	default:
		w.epoch++
		must(w.r.SetEpoch(w.epoch))
		if len(w.acked) > 0 {
			must(w.r.Pin("p", w.head().Sequence, nil))
			must(w.r.Unpin("p"))
		}
	}
}

// check compares all points of the replica in dir with the model.
func (w *world) check(r *Replica, dir, what string) {
	w.t.Helper()
	points := r.Points()
	for _, p := range w.acked {
		may := p.Sequence < w.gone || w.dropped > 0 && p.Sequence > w.dropped
		if !may && !slices.Contains(points, p) {
			w.t.Fatalf("%s: point %d is lost; there are %v", what, p.Sequence, sequences(points))
		}
	}
	for _, p := range points {
		if !slices.Contains(w.acked, p) && (w.maybe == nil || p != *w.maybe) {
			w.t.Fatalf("%s: point %d came from nowhere", what, p.Sequence)
		}
		w.comparePoint(dir, p, what)
	}
	if d := r.Damaged(); len(d) > 0 {
		w.t.Fatalf("%s: damaged: %v", what, d)
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*", "*.tmp"))
	if len(left) > 0 {
		w.t.Fatalf("%s: left behind: %v", what, left)
	}
}

func sequences(points []switchback.Point) (out []switchback.Sequence) {
	for _, p := range points {
		out = append(out, p.Sequence)
	}
	return out
}

func (w *world) comparePoint(dir string, p switchback.Point, what string) {
	w.t.Helper()
	v, err := ViewOptions{CacheBytes: 1}.Open(dir, p.Sequence)
	if err != nil {
		w.t.Fatalf("%s: open point %d: %v", what, p.Sequence, err)
	}
	defer v.Close()
	want := w.states[p.Digest]
	if len(v.Disks()) != len(want) {
		w.t.Fatalf("%s: point %d has %d disks, want %d", what, p.Sequence, len(v.Disks()), len(want))
	}
	for _, d := range v.Disks() {
		compareDisk(w.t, fmt.Sprintf("%s: point %d, disk %s", what, p.Sequence, d.Name()), d, want[d.Name()], w.rng)
	}
}

// compareDisk reads a disk as a whole and in pieces, and its extents.
func compareDisk(t *testing.T, what string, d *DiskView, want []byte, rng *rand.Rand) {
	t.Helper()
	got := make([]byte, d.Size()+1)
	if n, err := d.ReadAt(got, 0); err != io.EOF || n != len(want) {
		t.Fatalf("%s: read %d bytes, %v; want %d", what, n, err, len(want))
	}
	if at := firstDifference(got[:len(got)-1], want); at >= 0 {
		t.Fatalf("%s: differs at %d", what, at)
	}
	for range 4 {
		off := rng.IntN(len(want))
		n := 1 + rng.IntN(len(want)-off)
		piece := make([]byte, n)
		if _, err := d.ReadAt(piece, int64(off)); err != nil || !bytes.Equal(piece, want[off:off+n]) {
			t.Fatalf("%s: piece [%d, %d) differs, %v", what, off, off+n, err)
		}
	}
	extents, err := d.Extents(0, 1<<40)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	var at int64
	for i, e := range extents {
		if e.Offset != at || e.Length <= 0 || i > 0 && e.Zero == extents[i-1].Zero {
			t.Fatalf("%s: extents %v", what, extents)
		}
		at += e.Length
		if e.Zero && bytes.Count(want[e.Offset:at], []byte{0}) != int(e.Length) {
			t.Fatalf("%s: extent %+v is not zero", what, e)
		}
	}
	if at != d.Size() {
		t.Fatalf("%s: extents end at %d of %d", what, at, d.Size())
	}
}

func firstDifference(a, b []byte) int {
	if len(a) != len(b) {
		return min(len(a), len(b))
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// TestModel runs random histories and compares every point after each action.
func TestModel(t *testing.T) {
	for seed := range uint64(20) {
		w := newWorld(t, seed)
		for i := range 25 {
			w.act()
			w.check(w.r, w.dir, fmt.Sprintf("seed %d, action %d", seed, i))
		}
		w.r.Close()
		r, err := Options{fs: w.fs}.Open(w.dir)
		if err != nil {
			t.Fatal(err)
		}
		w.r = r
		w.check(r, w.dir, "reopened")
		if damage, err := r.Verify(context.Background(), nil); err != nil || len(damage) > 0 {
			t.Fatal(damage, err)
		}
	}
}

// TestCrash stops the world before every operation on the file system, in each
// way a crash may leave it, and looks whether everything acknowledged is there.
func TestCrash(t *testing.T) {
	histories, checks := 3, 0
	if testing.Short() {
		histories = 1
	}
	clones := tempDir(t)
	for seed := range uint64(histories) {
		w := newWorld(t, 1000+seed)
		w.fs.before = func(op string) {
			if strings.HasPrefix(op, "write") {
				return // the same as before the sync that follows
			}
			for variant := range 4 {
				checks++
				what := fmt.Sprintf("seed %d, crash %d before %s, variant %d", seed, checks, op, variant)
				w.checkCrash(filepath.Join(clones, fmt.Sprint(checks)), variant, what)
			}
		}
		for range 18 {
			w.act()
		}
		w.fs.before = func(string) {}
		w.r.Close()
	}
	t.Logf("%d crashes", checks)
}

func (w *world) checkCrash(dir string, variant int, what string) {
	w.t.Helper()
	defer os.RemoveAll(dir)
	w.fs.crash(w.t, dir, variant, w.rng)
	var m Manifest
	if err := readDocument(manifestPath(dir), &m); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
	for i := range m.Disks {
		m.Disks[i].BasePath = filepath.Join(dir, m.Disks[i].Name+".raw")
	}
	if err := writeDocument(newRecorder(dir), manifestPath(dir), m); err != nil {
		w.t.Fatal(err)
	}
	fs := newRecorder(dir)
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

// plainBase is a BaseWriter on a raw file.
type plainBase struct{ *os.File }

func (b plainBase) WriteZeroes(off, length int64) error {
	_, err := b.WriteAt(make([]byte, length), off)
	return err
}
func (b plainBase) Flush() error { return nil }

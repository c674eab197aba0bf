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
	"testing"
	"time"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/seal"
)

// state is the disks of a VM at a point.
type state map[string][]byte

func (s state) clone() state {
	out := state{}
	for name, b := range s {
		out[name] = bytes.Clone(b)
	}
	return out
}

// labels are the pins, marks and branches of a replica.
type labels struct {
	pins  map[string]switchback.Sequence
	marks map[switchback.Sequence]switchback.Mark
	// branches are by name; the pin of each has its name. states holds what they read.
	branches map[string]string
}

func (l labels) clone() labels {
	return labels{maps.Clone(l.pins), maps.Clone(l.marks), maps.Clone(l.branches)}
}

// world is a replica, its model, and what is allowed to be missing at the moment.
type world struct {
	t      testing.TB
	rng    *rand.Rand // what happens
	eyes   *rand.Rand // where it is looked
	dir    string
	fs     *recorder
	r      *Replica
	states map[string]state // by digest
	acked  []switchback.Point
	maybe  *switchback.Point // a point being received
	// leaving says which points may be gone, all of them or none; nil for none.
	leaving func(switchback.Sequence) bool
	// labels are what pins and marks are; coming what they are being changed to.
	labels, coming labels
	epoch          switchback.Epoch
	// blind: a bug that the crash test must find: what is pinned or locked goes.
	blind bool
}

// identity is a point without what merging changes.
func identity(p switchback.Point) switchback.Point {
	p.StoredBytes, p.ChangedBytes = 0, 0
	return p
}

func has(points []switchback.Point, p switchback.Point) bool {
	return slices.ContainsFunc(points, func(x switchback.Point) bool { return identity(x) == identity(p) })
}

// tempDir is a directory in memory where there is one: crashes are simulated,
// so real durability only costs time.
func tempDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "journal-test-")
	if err != nil {
		dir = t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	sub := filepath.Join(dir, "replica")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	return sub
}

const baseDigest = "" // of sequence 0

func newWorld(t testing.TB, seed uint64) *world {
	w := &world{t: t, rng: rand.New(rand.NewPCG(seed, 11)), eyes: rand.New(rand.NewPCG(seed, 12)), dir: tempDir(t), states: map[string]state{}, epoch: 3,
		labels: labels{map[string]switchback.Sequence{}, map[switchback.Sequence]switchback.Mark{}, map[string]string{}}}
	w.coming = w.labels.clone()
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

// mayGo reports whether no point that leaves is pinned or locked.
func (w *world) mayGo(leaving func(switchback.Sequence) bool) bool {
	for _, seq := range w.labels.pins {
		if leaving(seq) {
			return false
		}
	}
	for _, p := range w.acked {
		if leaving(p.Sequence) && w.labels.marks[p.Sequence].Locked {
			return false
		}
	}
	return true
}

// letGo lets do drop what leaves, or sees it refused.
func (w *world) letGo(what string, leaving func(switchback.Sequence) bool, do func() error) error {
	w.t.Helper()
	if !w.mayGo(leaving) {
		if w.blind {
			r := w.r
			pins, marks := r.pins, r.marks
			r.pins, r.marks = map[string]Pin{}, map[switchback.Sequence]switchback.Mark{}
			do()
			r.pins, r.marks = pins, marks
			w.check(w.r, w.dir, what)
			return nil
		}
		if err := do(); switchback.CodeOf(err) != switchback.CodeRefused {
			w.t.Fatalf("%s: what is pinned or locked: %v", what, err)
		}
		w.check(w.r, w.dir, what+", refused")
		return nil
	}
	for seq := range w.coming.marks {
		if leaving(seq) {
			delete(w.coming.marks, seq)
		}
	}
	w.leaving = leaving
	err := do()
	points := w.r.Points()
	w.acked = slices.DeleteFunc(w.acked, func(p switchback.Point) bool {
		// After an error it may have come to pass or not.
		return leaving(p.Sequence) && (err == nil || !has(points, p))
	})
	w.leaving = nil
	if err == nil {
		w.labels = w.coming.clone()
	} else {
		w.coming = w.labels.clone()
	}
	return err
}

func (w *world) fold(upTo switchback.Sequence) error {
	w.t.Helper()
	w.ensureBase("vdc")
	return w.letGo(fmt.Sprintf("fold up to %d", upTo), func(seq switchback.Sequence) bool { return seq < upTo }, func() error {
		return w.r.Fold(context.Background(), upTo, w.openBase(w.dir, w.fs))
	})
}

func (w *world) merge(first, into switchback.Sequence) error {
	w.t.Helper()
	return w.letGo(fmt.Sprintf("merge %d to %d", first, into), func(seq switchback.Sequence) bool { return first <= seq && seq < into }, func() error {
		return w.r.Merge(context.Background(), first, into, 0)
	})
}

func (w *world) drop(seq switchback.Sequence) error {
	w.t.Helper()
	return w.letGo(fmt.Sprintf("drop after %d", seq), func(s switchback.Sequence) bool { return s > seq }, func() error {
		return w.r.DropAfter(seq)
	})
}

// relabel changes pins or marks.
func (w *world) relabel(change func(*labels), do func() error) error {
	change(&w.coming)
	err := do()
	if err == nil {
		w.labels = w.coming.clone()
	} else {
		w.coming = w.labels.clone()
	}
	return err
}

func (w *world) pin(name string, seq switchback.Sequence) error {
	return w.relabel(func(l *labels) { l.pins[name] = seq }, func() error { return w.r.Pin(name, seq, nil) })
}

func (w *world) unpin(name string) error {
	return w.relabel(func(l *labels) { delete(l.pins, name) }, func() error { return w.r.Unpin(name) })
}

// branch runs a VM from a point, or over another branch of it, and keeps what it wrote.
func (w *world) branch(name, over string, seq switchback.Sequence) error {
	w.t.Helper()
	if err := w.pin(name, seq); err != nil {
		return err
	}
	from := baseDigest
	for _, p := range w.acked {
		if p.Sequence == seq {
			from = p.Digest
		}
	}
	if over != "" {
		from = w.labels.branches[over]
	}
	next := w.states[from].clone()
	spec := BranchSpec{Name: name, Point: seq, Pin: name, Over: over, Epoch: w.epoch, Kind: switchback.CrashConsistent, Time: time.Unix(1, 0).UTC(), Disks: map[string]Written{}}
	for _, disk := range slices.Sorted(maps.Keys(next)) {
		b := next[disk]
		var set extent.Set
		for at := int64(w.rng.IntN(8)) * 4096; at < int64(len(b)); at += int64(2+w.rng.IntN(4)) * 4096 {
			n := min(4096, int64(len(b))-at)
			switch set.Add(at, n); w.rng.IntN(3) {
			case 0: // as it was
			case 1:
				clear(b[at : at+n])
			default:
				content(b[at:at+n], w.rng.Uint64())
			}
		}
		spec.Disks[disk] = Written{set, bytes.NewReader(b)}
	}
	key := fmt.Sprint("branch ", name, " ", len(w.states))
	w.states[key] = next
	return w.relabel(func(l *labels) { l.branches[name] = key }, func() error {
		_, err := w.r.WriteBranch(context.Background(), spec, nil)
		return err
	})
}

func (w *world) dropBranch(name string) error {
	w.t.Helper()
	if err := w.r.Unpin(name); switchback.CodeOf(err) != switchback.CodeRefused {
		w.t.Fatalf("the pin of branch %s was removed: %v", name, err)
	}
	if err := w.relabel(func(l *labels) { delete(l.branches, name) }, func() error { return w.r.DropBranch(name) }); err != nil {
		return err
	}
	return w.unpin(name)
}

func (w *world) mark(seq switchback.Sequence, m switchback.Mark) error {
	return w.relabel(func(l *labels) {
		if l.marks[seq] = m; m == (switchback.Mark{}) {
			delete(l.marks, seq)
		}
	}, func() error { return w.r.SetMark(seq, func(x *switchback.Mark) error { *x = m; return nil }) })
}

// retain carries out what a policy asks.
func (w *world) retain(policy switchback.Retention) error {
	w.t.Helper()
	for range 50 {
		plan := w.r.PlanRetention(policy, w.head().Time)
		if len(plan.Steps) == 0 {
			return nil
		}
		s := plan.Steps[0]
		do := func() error { return w.merge(s.First, s.Into) }
		if s.Fold() {
			do = func() error { return w.fold(s.Into) }
		}
		if err := do(); err != nil {
			return err
		}
	}
	w.t.Fatalf("retention by %+v does not end", policy)
	return nil
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

// act does something at random.
func (w *world) act() {
	w.t.Helper()
	must := func(err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	if len(w.acked) < 2 {
		must(w.receive())
		return
	}
	any := func() switchback.Sequence { return w.acked[w.rng.IntN(len(w.acked))].Sequence }
	switch n := w.rng.IntN(24); {
	case n < 9:
		must(w.receive())
	case n < 11:
		must(w.fold(any()))
	case n < 14:
		from, to := any(), any()
		if from > to {
			from, to = to, from
		}
		if from != to && from != w.r.Manifest().Base.Sequence {
			must(w.merge(from, to))
		}
	case n < 15:
		must(w.drop(w.acked[len(w.acked)/2+w.rng.IntN(len(w.acked)-len(w.acked)/2)].Sequence))
	case n < 16:
		name := fmt.Sprint("p", w.rng.IntN(2))
		if _, ok := w.labels.pins[name]; ok {
			must(w.unpin(name))
		} else {
			must(w.pin(name, any()))
		}
	case n < 17:
		seq := any()
		m := w.labels.marks[seq]
		if m.Locked = !m.Locked; w.rng.IntN(2) == 0 {
			m.Tag = fmt.Sprint("t", seq)
		}
		must(w.mark(seq, m))
	case n < 19:
		policy := switchback.Retention{MinPoints: w.rng.IntN(3), Newest: w.rng.IntN(6)}
		if w.rng.IntN(2) == 0 {
			policy.Tiers = []switchback.RetentionTier{{For: 2 * time.Second}, {Every: 3 * time.Second, For: 9 * time.Second}}
		}
		if w.rng.IntN(3) == 0 {
			policy.MaxBytes = int64(w.rng.IntN(200 << 10))
		}
		must(w.retain(policy))
	case n < 20:
		w.epoch++
		must(w.r.SetEpoch(w.epoch))
	case n < 22:
		name := fmt.Sprint("b", w.rng.IntN(2))
		other := map[string]string{"b0": "b1", "b1": "b0"}[name]
		switch _, there := w.labels.branches[other]; {
		case w.labels.branches[name] != "":
			must(w.dropBranch(name))
		case there && w.rng.IntN(2) == 0:
			must(w.branch(name, other, w.labels.pins[other]))
		default:
			must(w.branch(name, "", any()))
		}
	default:
		must(w.changeKeys())
	}
}

// changeKeys turns sealing on or off, makes a new data key, or wraps the keys anew.
func (w *world) changeKeys() error {
	now := w.r.Storage()
	if now.Keyring != nil && w.rng.IntN(2) == 0 {
		return w.r.RotateKey(context.Background())
	}
	key := filepath.Join(filepath.Dir(w.dir), fmt.Sprint("key", w.rng.IntN(2)))
	if err := seal.MakeKeyFile(key); err != nil && switchback.CodeOf(err) != switchback.CodeConflict {
		return err
	}
	return w.r.SetSealing(context.Background(), !now.Seal, &seal.Source{File: key})
}

// check compares all points of the replica in dir with the model.
func (w *world) check(r *Replica, dir, what string) {
	w.t.Helper()
	points := r.Points()
	kept, lost := 0, 0
	for _, p := range w.acked {
		switch there := has(points, p); {
		case w.leaving == nil || !w.leaving(p.Sequence):
			if !there {
				w.t.Fatalf("%s: point %d is lost; there are %v", what, p.Sequence, sequences(points))
			}
		case there:
			kept++
		default:
			lost++
		}
	}
	if kept > 0 && lost > 0 {
		w.t.Fatalf("%s: %d points are gone and %d are not; there are %v", what, lost, kept, sequences(points))
	}
	for _, p := range points {
		if !has(w.acked, p) && (w.maybe == nil || p != *w.maybe) {
			w.t.Fatalf("%s: point %d came from nowhere", what, p.Sequence)
		}
		w.comparePoint(dir, p, what)
	}
	if d := r.Damaged(); len(d) > 0 {
		w.t.Fatalf("%s: damaged: %v", what, d)
	}
	pins := map[string]switchback.Sequence{}
	for _, p := range r.Pins() {
		if pins[p.Name] = p.Sequence; p.Damaged {
			w.t.Fatalf("%s: pin %s is damaged", what, p.Name)
		}
	}
	if !maps.Equal(pins, w.labels.pins) && !maps.Equal(pins, w.coming.pins) {
		w.t.Fatalf("%s: pins are %v, want %v or %v", what, pins, w.labels.pins, w.coming.pins)
	}
	w.checkBranches(r, dir, what)
	if err := r.MarksDamage(); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
	for _, p := range r.MarkedPoints() {
		if p.Mark != w.labels.marks[p.Sequence] && p.Mark != w.coming.marks[p.Sequence] {
			w.t.Fatalf("%s: point %d has mark %+v, want %+v or %+v", what, p.Sequence, p.Mark, w.labels.marks[p.Sequence], w.coming.marks[p.Sequence])
		}
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*", "*.tmp"))
	if len(left) > 0 {
		w.t.Fatalf("%s: left behind: %v", what, left)
	}
}

// checkBranches compares all branches with the model.
func (w *world) checkBranches(r *Replica, dir, what string) {
	w.t.Helper()
	there := map[string]bool{}
	for _, b := range r.Branches() {
		there[b.Name] = true
		want := w.labels.branches[b.Name]
		if want == "" {
			want = w.coming.branches[b.Name]
		}
		if want == "" || b.Damaged {
			w.t.Fatalf("%s: branch %+v came from nowhere, or is damaged", what, b)
		}
		v, err := ViewOptions{CacheBytes: 1}.OpenBranch(dir, b.Name)
		if err != nil {
			w.t.Fatalf("%s: open branch %s: %v", what, b.Name, err)
		}
		w.compareView(v, w.states[want], fmt.Sprintf("%s: branch %s", what, b.Name))
	}
	for name := range w.labels.branches {
		if !there[name] && w.coming.branches[name] != "" {
			w.t.Fatalf("%s: branch %s is lost", what, name)
		}
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
	w.compareView(v, w.states[p.Digest], fmt.Sprintf("%s: point %d", what, p.Sequence))
}

// compareView reads all disks of a view and closes it.
func (w *world) compareView(v *View, want state, what string) {
	w.t.Helper()
	defer v.Close()
	if len(v.Disks()) != len(want) {
		w.t.Fatalf("%s has %d disks, want %d", what, len(v.Disks()), len(want))
	}
	for _, d := range v.Disks() {
		compareDisk(w.t, fmt.Sprintf("%s, disk %s", what, d.Name()), d, want[d.Name()], w.eyes)
	}
}

// compareDisk reads a disk as a whole and in pieces, and its extents.
func compareDisk(t testing.TB, what string, d *DiskView, want []byte, rng *rand.Rand) {
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
		var old *View // of a pinned point: it reads the same whatever is folded and merged
		look := func(what string) {
			for _, d := range old.Disks() {
				compareDisk(t, what+": view of "+d.Name(), d, w.states[old.Point().Digest][d.Name()], w.eyes)
			}
		}
		for i := range 40 {
			what := fmt.Sprintf("seed %d, action %d", seed, i)
			if i%10 == 5 && len(w.acked) > 0 {
				if old != nil {
					old.Close()
				}
				w.unpin("view")
				seq := w.acked[w.rng.IntN(len(w.acked))].Sequence
				if err := w.pin("view", seq); err != nil {
					t.Fatal(err)
				}
				var err error
				if old, err = OpenView(w.dir, seq); err != nil {
					t.Fatal(err)
				}
			}
			w.act()
			w.check(w.r, w.dir, what)
			if old != nil {
				look(what)
			}
		}
		old.Close()
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

// plainBase is a BaseWriter on a raw file.
type plainBase struct{ *os.File }

func (b plainBase) WriteZeroes(off, length int64) error {
	_, err := b.WriteAt(make([]byte, length), off)
	return err
}
func (b plainBase) Flush() error { return nil }

package replicator

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	switchback "github.com/switchback-dr/switchback"
)

const testKey = 42

// tempDir is a directory in memory where there is one: crashes are simulated,
// so real durability only costs time.
func tempDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "replicator-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// content is what a block holds in the model; 0 is a block of zeros.
type content int

const contents = 4

// blockOf returns n bytes of the content.
func blockOf(c content, n int) []byte {
	return bytes.Repeat([]byte{byte(c)}, n)
}

// model is what a target holds, per disk and block.
type model [][]content

func (m model) clone() model {
	out := make(model, len(m))
	for i := range m {
		out[i] = slices.Clone(m[i])
	}
	return out
}

// indexWorld is an index beside a model of its target.
type indexWorld struct {
	t     *testing.T
	rng   *rand.Rand
	dir   string
	disks []switchback.Disk
	x     *Index
	// head is the target's newest point; target what it holds.
	head   string
	target model
	points int
	// synced is the files at the last moment that all of them were durable.
	synced map[string][]byte
}

// testDisks are three disks whose last block is whole, nearly whole and one sector.
func testDisks() []switchback.Disk {
	return []switchback.Disk{
		{Name: "vda", SizeBytes: 100 * BlockSize},
		{Name: "vdb", SizeBytes: 70*BlockSize - 512},
		{Name: "vdc", SizeBytes: 40*BlockSize + 512},
	}
}

func newIndexWorld(t *testing.T, seed uint64) *indexWorld {
	w := &indexWorld{t: t, rng: rand.New(rand.NewPCG(seed, 1)), dir: tempDir(t), disks: testDisks(), head: "base"}
	w.x = w.open(w.dir)
	for _, d := range w.disks {
		w.target = append(w.target, make([]content, (d.SizeBytes+BlockSize-1)/BlockSize))
	}
	// The target begins as the seeded base of zeros.
	if err := w.x.Begin(w.head); err != nil {
		t.Fatal(err)
	}
	if err := w.x.SetStamp(w.head); err != nil {
		t.Fatal(err)
	}
	w.synced = w.files()
	return w
}

func (w *indexWorld) open(dir string) *Index {
	w.t.Helper()
	x, err := OpenIndex(dir, w.disks, testKey)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { x.Close() })
	return x
}

// files reads all files of the index.
func (w *indexWorld) files() map[string][]byte {
	w.t.Helper()
	out := map[string][]byte{}
	entries, err := os.ReadDir(w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(w.dir, e.Name()))
		if err != nil {
			w.t.Fatal(err)
		}
		out[e.Name()] = b
	}
	return out
}

// blockBytes is the length of a block: less than BlockSize for a last one.
func (w *indexWorld) blockBytes(disk, block int) int {
	return int(min(BlockSize, w.disks[disk].SizeBytes-int64(block)*BlockSize))
}

func (w *indexWorld) hash(x *Index, disk, block int, c content) Hash {
	return x.disks[disk].hash(blockOf(c, w.blockBytes(disk, block)))
}

// change makes a random pending change; the target's state after it is returned.
func (w *indexWorld) change() (*Pending, model) {
	p, next := &Pending{}, w.target.clone()
	for range 1 + w.rng.IntN(6) {
		d := w.rng.IntN(len(w.disks))
		first := w.rng.IntN(len(next[d]))
		for b := first; b < min(len(next[d]), first+1+w.rng.IntN(8)); b++ {
			c := content(w.rng.IntN(contents))
			next[d][b] = c
			p.add(d, int64(b), w.hash(w.x, d, b, c))
		}
	}
	return p, next
}

// check fails where the index says that the target holds what it does not.
func (w *indexWorld) check(what string, x *Index, target model) {
	w.t.Helper()
	for d := range w.disks {
		entries, err := x.disks[d].entries(0, int64(len(target[d])), nil)
		if err != nil {
			w.t.Fatal(err)
		}
		for b, held := range target[d] {
			for c := range content(contents) {
				if c != held && x.disks[d].holds(int64(b), Hash(entries[16*b:]), w.hash(x, d, b, c)) {
					w.t.Fatalf("%s: disk %d block %d: the index claims content %d, the target holds %d", what, d, b, c, held)
				}
			}
		}
	}
}

// crashImage writes to a new folder what a crash of the host may leave of the
// files between before and after one call of the index.
func (w *indexWorld) crashImage(before, after map[string][]byte) string {
	w.t.Helper()
	dir := tempDir(w.t)
	stamped := false
	for _, d := range w.disks {
		name := d.Name + ".index"
		stamped = stamped || !bytes.Equal(before[name][:indexHeaderSize], after[name][:indexHeaderSize])
	}
	done := 0 // how many disks' stamps are durable
	if stamped {
		done = w.rng.IntN(len(w.disks) + 1)
	}
	image := map[string][]byte{}
	for i, d := range w.disks {
		name := d.Name + ".index"
		old, now := before[name], after[name]
		if stamped && i < done {
			image[name] = now
			continue
		}
		f := slices.Clone(now)
		copy(f[:indexHeaderSize], old[:indexHeaderSize])
		// Entries that no fsync covers yet, sector by sector.
		for at := indexHeaderSize; at < len(f); at += 512 {
			end := min(at+512, len(f))
			switch w.rng.IntN(3) {
			case 0:
				copy(f[at:end], w.synced[name][at:end])
			case 1:
				copy(f[at:end], old[at:end])
			}
		}
		image[name] = f
	}
	log := after["index.log"]
	switch {
	case stamped && (done < len(w.disks) || w.rng.IntN(2) == 0):
		log = before["index.log"] // emptied last
	case len(log) > len(before["index.log"]):
		// An append that was cut short, and perhaps written in disorder.
		cut := len(before["index.log"]) + w.rng.IntN(len(log)-len(before["index.log"]))
		log = slices.Clone(log[:cut])
		if n := cut - len(before["index.log"]); n > 0 && w.rng.IntN(2) == 0 {
			log[len(log)-1-w.rng.IntN(n)] ^= 1 << w.rng.IntN(8)
		}
	}
	image["index.log"] = log
	for name, b := range image {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	return dir
}

// crashed opens a crash image, recovers and checks it.
func (w *indexWorld) crashed(what, dir, head string, target model) *Index {
	w.t.Helper()
	x := w.open(dir)
	valid, err := x.Recover(head)
	if err != nil {
		w.t.Fatalf("%s: recover: %v", what, err)
	}
	if !valid {
		w.t.Fatalf("%s: the index is void after a mere crash", what)
	}
	w.check(what, x, target)
	return x
}

// step calls the index once and looks at what crashes inside that call leave.
// heads are the states that the target may be in when the crash comes.
func (w *indexWorld) step(what string, call func() error, head string, target model) {
	w.t.Helper()
	before := w.files()
	if err := call(); err != nil {
		w.t.Fatalf("%s: %v", what, err)
	}
	after := w.files()
	for range 2 {
		dir := w.crashImage(before, after)
		x := w.crashed("crash in "+what, dir, head, target)
		if w.rng.IntN(20) == 0 { // go on from there
			w.x.Close()
			w.x, w.dir = x, dir
			w.synced = w.files()
			w.head, w.target = head, target
			return
		}
	}
	if len(after["index.log"]) == 0 { // emptied after everything was made durable
		w.synced = after
	}
}

// TestIndexModel: whatever crashes, and whether or not the target has what was
// sent last, the index never claims content that the target does not hold.
func TestIndexModel(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := newIndexWorld(t, seed)
			for range 25 {
				x := w.x
				pending, next := w.change()
				w.points++
				digest := fmt.Sprintf("point-%d", w.points)
				w.step("log", func() error { return w.x.Log(pending, digest) }, w.head, w.target)
				if w.x != x {
					continue // the crash was taken, nothing was sent
				}
				switch w.rng.IntN(4) {
				case 0: // the target never got it
					w.step("recover without", w.recover(w.head), w.head, w.target)
				case 1: // it has it, the answer was lost
					w.head, w.target = digest, next
					w.step("recover with", w.recover(w.head), w.head, w.target)
				default:
					w.head, w.target = digest, next
					w.step("commit", func() error { return w.x.Commit(pending, digest) }, w.head, w.target)
				}
				if w.x == x && w.rng.IntN(5) == 0 {
					w.step("stamp", func() error { return w.x.SetStamp(w.head) }, w.head, w.target)
				}
				w.check("alive", w.x, w.target)
			}
		})
	}
}

func (w *indexWorld) recover(head string) func() error {
	return func() error {
		valid, err := w.x.Recover(head)
		if err == nil && !valid {
			err = fmt.Errorf("the index does not know %s", head)
		}
		return err
	}
}

// TestIndexDamage: a log that is cut or flipped anywhere, or a damaged header,
// may make the index void but never wrong.
func TestIndexDamage(t *testing.T) {
	w := newIndexWorld(t, 99)
	type state struct {
		head   string
		target model
	}
	states := []state{{w.head, w.target}}
	for i := range 6 {
		pending, next := w.change()
		digest := fmt.Sprint("point-", i)
		if err := w.x.Log(pending, digest); err != nil {
			t.Fatal(err)
		}
		if i < 5 { // the last one was logged and perhaps sent
			if err := w.x.Commit(pending, digest); err != nil {
				t.Fatal(err)
			}
		}
		w.target = next
		states = append(states, state{digest, next})
	}
	files := w.files()
	log := files["index.log"]
	if len(log) < 500 {
		t.Fatalf("the log has only %d bytes", len(log))
	}
	void, valid := 0, 0
	for range 60 {
		image := maps.Clone(files)
		damaged := slices.Clone(log)
		switch w.rng.IntN(3) {
		case 0:
			damaged = damaged[:w.rng.IntN(len(damaged))]
		case 1:
			damaged[w.rng.IntN(len(damaged))] ^= 1 << w.rng.IntN(8)
		default:
			name := w.disks[w.rng.IntN(len(w.disks))].Name + ".index"
			f := slices.Clone(image[name])
			f[w.rng.IntN(indexHeaderUsed)] ^= 1 << w.rng.IntN(8)
			image[name] = f
		}
		image["index.log"] = damaged
		dir := tempDir(t)
		for name, b := range image {
			if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		// The last acknowledged point or the one that was under way.
		s := states[len(states)-1-w.rng.IntN(2)]
		x := w.open(dir)
		ok, err := x.Recover(s.head)
		if err != nil {
			t.Fatal(err)
		}
		w.check("damaged", x, s.target)
		if ok {
			valid++
		} else {
			void++
		}
		x.Close()
	}
	if void == 0 || valid == 0 {
		t.Errorf("%d void, %d valid: the damage does not reach what it should", void, valid)
	}
}

func TestRecover(t *testing.T) {
	one := func(c content) *Pending {
		p := &Pending{}
		p.add(0, 3, Hash{byte(c) + 1})
		return p
	}
	entry := func(t *testing.T, x *Index) Hash {
		t.Helper()
		b, err := x.disks[0].entries(3, 1, nil)
		if err != nil {
			t.Fatal(err)
		}
		return Hash(b)
	}
	for _, c := range []struct {
		name  string
		held  string
		valid bool
		want  Hash
	}{
		{"the target has all", "b", true, Hash{3}},
		{"the last was not stored", "a", true, invalid},
		{"nothing since the stamp was stored", "s", true, invalid},
		{"a point that nobody logged", "other", false, unknown},
		{"no digest: kept disks without a point", "", false, unknown},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := tempDir(t)
			x, err := OpenIndex(dir, testDisks(), testKey)
			if err != nil {
				t.Fatal(err)
			}
			for _, step := range []error{x.Reset(false), x.SetStamp("s"), x.Log(one(1), "a"), x.Commit(one(1), "a"), x.Log(one(2), "b"), x.Close()} {
				if step != nil {
					t.Fatal(step)
				}
			}
			if x, err = OpenIndex(dir, testDisks(), testKey); err != nil {
				t.Fatal(err)
			}
			defer x.Close()
			valid, err := x.Recover(c.held)
			if err != nil || valid != c.valid {
				t.Fatalf("Recover(%q) = %v, %v; want %v", c.held, valid, err, c.valid)
			}
			if got := entry(t, x); got != c.want {
				t.Errorf("entry is %x, want %x", got, c.want)
			}
			if c.valid && x.Stamp() != c.held {
				t.Errorf("stamp is %q, want %q", x.Stamp(), c.held)
			}
			if !c.valid && x.Stamp() != "" {
				t.Errorf("a void index has the stamp %q", x.Stamp())
			}
			// What was recovered is durable: the log is empty, the same again.
			if again, err := x.Recover(c.held); err != nil || again != c.valid || entry(t, x) != c.want {
				t.Errorf("a second Recover = %v, %v, entry %x", again, err, entry(t, x))
			}
		})
	}
}

// TestIndexOfAnotherDisk: an index of a disk with another size is not used.
func TestIndexOfAnotherDisk(t *testing.T) {
	dir := tempDir(t)
	disks := testDisks()
	x, err := OpenIndex(dir, disks, testKey)
	if err != nil {
		t.Fatal(err)
	}
	p := &Pending{}
	p.add(0, 0, Hash{7})
	for _, err := range []error{x.Reset(true), x.Apply(p), x.SetStamp("s"), x.Close()} {
		if err != nil {
			t.Fatal(err)
		}
	}
	disks[0].SizeBytes += BlockSize
	if x, err = OpenIndex(dir, disks, testKey); err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if valid, err := x.Recover("s"); err != nil || valid {
		t.Errorf("Recover = %v, %v: the index of the disk before it grew counts", valid, err)
	}
	if b, err := x.disks[0].entries(0, 1, nil); err != nil || Hash(b) != unknown || x.disks[0].unknownIsZero {
		t.Errorf("entry is %x, %v, unknown is zero: %v", b, err, x.disks[0].unknownIsZero)
	}
}

// TestSeedIndex: until the copy is complete nobody may take an unknown block
// for zero after an interruption.
func TestSeedIndex(t *testing.T) {
	zeros := make([]byte, BlockSize)
	claimsZero := func(x *Index) bool { return x.disks[0].holds(0, unknown, x.disks[0].hash(zeros)) }
	open := func(t *testing.T, dir string) *Index {
		t.Helper()
		x, err := OpenIndex(dir, testDisks(), testKey)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { x.Close() })
		return x
	}
	begun := func(t *testing.T) (string, *Index) {
		dir := tempDir(t)
		x := open(t, dir)
		if err := x.Begin("session"); err != nil {
			t.Fatal(err)
		}
		return dir, x
	}
	t.Run("begin", func(t *testing.T) {
		_, x := begun(t)
		if !claimsZero(x) || x.Stamp() != "session" {
			t.Errorf("zeros are sent into a base of zeros: %v, stamp %q", claimsZero(x), x.Stamp())
		}
	})
	t.Run("resume after a crash", func(t *testing.T) {
		dir, x := begun(t)
		p := &Pending{}
		p.add(1, 5, Hash{9})
		if err := x.Apply(p); err != nil {
			t.Fatal(err)
		}
		y := open(t, dir)
		if !y.Resume("session") {
			t.Fatal("the session is not known any more")
		}
		if claimsZero(y) {
			t.Error("an unknown block is taken for zero after an interruption")
		}
		if b, err := y.disks[1].entries(5, 1, nil); err != nil || Hash(b) != (Hash{9}) {
			t.Errorf("what was acknowledged is forgotten: %x, %v", b, err)
		}
	})
	t.Run("resume in the same process", func(t *testing.T) {
		_, x := begun(t)
		if !x.Resume("session") || claimsZero(x) {
			t.Error("an unknown block is taken for zero after an interruption")
		}
	})
	t.Run("another base", func(t *testing.T) {
		_, x := begun(t)
		if x.Resume("another") {
			t.Error("resumed onto a base that was made anew")
		}
	})
	t.Run("no session", func(t *testing.T) {
		dir := tempDir(t)
		if open(t, dir).Resume("") {
			t.Error("resumed without a session")
		}
	})
	t.Run("complete", func(t *testing.T) {
		dir, x := begun(t)
		if err := x.SetStamp("session"); err != nil {
			t.Fatal(err)
		}
		y := open(t, dir)
		if valid, err := y.Recover("session"); err != nil || !valid || !claimsZero(y) {
			t.Errorf("Recover = %v, %v; unknown is zero: %v", valid, err, claimsZero(y))
		}
	})
}

func TestHashIsNeverASentinel(t *testing.T) {
	x := &diskIndex{key: 1}
	for i := range 1000 {
		if h := x.hash([]byte{byte(i), byte(i >> 8)}); h == unknown || h == invalid {
			t.Fatalf("hash of %d is %x", i, h)
		}
	}
	other := &diskIndex{key: 2}
	if x.hash([]byte("a")) == other.hash([]byte("a")) {
		t.Error("the key does not count")
	}
}

func TestIndexKey(t *testing.T) {
	dir := tempDir(t)
	a, err := indexKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := indexKey(dir); err != nil || a != b {
		t.Errorf("the key changes: %d, then %d (%v)", a, b, err)
	}
	if c, err := indexKey(tempDir(t)); err != nil || c == a {
		t.Errorf("two indexes have the key %d (%v)", c, err)
	}
	// A key file that a crash left empty is made again.
	if err := os.WriteFile(filepath.Join(dir, "index.key"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := indexKey(dir); err != nil || c == a {
		t.Errorf("key of an empty file: %d, %v", c, err)
	}
}

func TestPendingRuns(t *testing.T) {
	p := &Pending{}
	for _, b := range []struct {
		disk  int
		block int64
	}{{0, 1}, {0, 2}, {0, 4}, {1, 5}, {1, 6}, {0, 7}} {
		p.add(b.disk, b.block, Hash{byte(b.block)})
	}
	var got []string
	for _, r := range p.runs {
		got = append(got, fmt.Sprintf("%d:%d+%d", r.disk, r.first, len(r.hashes)/16))
	}
	if want := []string{"0:1+2", "0:4+1", "1:5+2", "0:7+1"}; !slices.Equal(got, want) {
		t.Errorf("runs are %v, want %v", got, want)
	}
}

func sampleRecord() record {
	return record{parent: "before", digest: "after", runs: []run{
		{disk: 0, first: 0, hashes: bytes.Repeat([]byte{1}, 32)},
		{disk: 2, first: 1 << 40, hashes: bytes.Repeat([]byte{2}, 16)},
	}}
}

func TestLogRoundTrip(t *testing.T) {
	path := filepath.Join(tempDir(t), "log")
	w, err := openWAL(path)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	want := []record{sampleRecord(), {parent: "after", digest: "last"}, {digest: "x"}}
	for _, r := range want {
		if err := w.append(r); err != nil {
			t.Fatal(err)
		}
	}
	got, err := w.read(3)
	if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("read %v, %v; want %v", got, err, want)
	}
	// A record that names a disk which the VM has no more ends the log.
	if got, err := w.read(2); err != nil || len(got) != 0 {
		t.Errorf("read with two disks %v, %v", got, err)
	}
	if err := w.truncate(); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Size() != 0 {
		t.Errorf("the log is not empty: %v, %v", st.Size(), err)
	}
}

// TestLogDamage: a record with any flipped bit or a missing end does not count,
// nor does anything behind it.
func TestLogDamage(t *testing.T) {
	path := filepath.Join(tempDir(t), "log")
	w, err := openWAL(path)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	for range 3 {
		if err := w.append(sampleRecord()); err != nil {
			t.Fatal(err)
		}
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	one := len(whole) / 3
	for at := one; at < 2*one; at++ {
		damaged := slices.Clone(whole)
		damaged[at] ^= 1 << (at % 8)
		for what, b := range map[string][]byte{"flipped": damaged, "cut": whole[:at]} {
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			r, err := openWAL(path)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := r.read(3); err != nil || len(got) != 1 {
				t.Errorf("%s at %d: %d records, %v", what, at, len(got), err)
			}
			r.close()
		}
	}
}

// TestRecoverForeignLog: a log that does not continue the stamp is of another
// life of the index, and its points count for nothing.
func TestRecoverForeignLog(t *testing.T) {
	dir := tempDir(t)
	x, err := OpenIndex(dir, testDisks(), testKey)
	if err != nil {
		t.Fatal(err)
	}
	p := &Pending{}
	p.add(0, 3, Hash{1})
	for _, err := range []error{x.Reset(false), x.SetStamp("s"), x.Log(p, "a")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	log, err := os.ReadFile(filepath.Join(dir, "index.log"))
	if err != nil {
		t.Fatal(err)
	}
	// A new base of zeros; a crash brings the old log back.
	for _, err := range []error{x.Begin("session"), x.SetStamp("session"), x.Close(), os.WriteFile(filepath.Join(dir, "index.log"), log, 0o600)} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if x, err = OpenIndex(dir, testDisks(), testKey); err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	if valid, err := x.Recover("a"); err != nil || valid || x.disks[0].unknownIsZero {
		t.Errorf("Recover = %v, %v; unknown is zero: %v", valid, err, x.disks[0].unknownIsZero)
	}
}

func FuzzDecodeRecord(f *testing.F) {
	w, err := openWAL(filepath.Join(tempDir(f), "log"))
	if err != nil {
		f.Fatal(err)
	}
	defer w.close()
	if err := w.append(sampleRecord()); err != nil {
		f.Fatal(err)
	}
	b := make([]byte, w.size)
	if _, err := w.f.ReadAt(b, 0); err != nil {
		f.Fatal(err)
	}
	f.Add(b[8:], 3)
	f.Add(b[8:len(b)-1], 3)
	f.Add([]byte{}, 1)
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff}, 1)
	f.Fuzz(func(t *testing.T, b []byte, disks int) {
		r, ok := decodeRecord(b, disks)
		if !ok {
			return
		}
		n := 2 + len(r.parent) + len(r.digest)
		for _, run := range r.runs {
			if run.disk >= disks || run.first < 0 || len(run.hashes)%16 != 0 {
				t.Fatalf("run of disk %d of %d at %d with %d bytes", run.disk, disks, run.first, len(run.hashes))
			}
			n += 14 + len(run.hashes)
		}
		if n != len(b) {
			t.Fatalf("a record of %d bytes was read from %d", n, len(b))
		}
	})
}

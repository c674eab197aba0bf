package journal

import (
	"bytes"
	"encoding/json"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
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
	// skipSync and skipSyncDir name what is reported durable and is not: bugs that
	// the crash test must find.
	skipSync    func(path string) bool
	skipSyncDir func(dir string) bool
	// early is called before a rename is tried, skipRename says that it is left out.
	early      func(to string)
	skipRename func(from, to string) bool
	// late says that a file takes the place of path only once a segment written
	// later is durable; held is where it waits.
	late func(path string) bool
	held map[string]*inode
	// renamed, if it gives a name, is where a file stands before it is synced.
	renamed func(path string) string
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
	if w.fs.renamed != nil {
		if to := w.fs.renamed(w.path); to != "" {
			old := w.fs.live[to]
			w.fs.live[to] = w.node
			delete(w.fs.live, w.path)
			w.fs.before("sync " + strings.TrimPrefix(to, w.fs.root) + " after its rename")
			w.fs.live[w.path] = w.node
			if w.fs.live[to] = old; old == nil {
				delete(w.fs.live, to)
			}
		}
	}
	if err := w.fs.step("sync", w.path); err != nil {
		return err
	}
	if w.fs.skipSync != nil && w.fs.skipSync(w.path) {
		return nil
	}
	w.node.durable = bytes.Clone(w.node.live)
	return nil
}

func (f *recorder) rename(from, to string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.early != nil {
		f.early(to)
	}
	if err := f.step("rename", to); err != nil {
		return err
	}
	if f.skipRename != nil && f.skipRename(from, to) {
		delete(f.live, from)
		return f.osFileSystem.remove(from)
	}
	if f.late != nil && f.late(to) {
		f.held = map[string]*inode{to: f.live[from]}
	} else {
		f.live[to] = f.live[from]
	}
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
	if f.skipSyncDir != nil && f.skipSyncDir(dir) {
		return nil
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
	if filepath.Base(dir) == segmentDir && f.held != nil {
		for path, node := range f.held {
			f.before("rename " + strings.TrimPrefix(path, f.root) + " after what needs it")
			f.live[path], f.durable[path] = node, node
		}
		f.held = nil
	}
	return nil
}

func (f *recorder) free(string) (int64, error) { return f.room, nil }

// vanish removes a file at once and for good. The caller holds f.mu.
func (f *recorder) vanish(path string) {
	delete(f.live, path)
	delete(f.durable, path)
	f.osFileSystem.remove(path)
}

// crashes are the ways in which crash can leave a directory.
const crashes = 4

// crash writes to dir what a crash may leave of root, and returns the file
// system that the next process finds: variant 0 is a process that was killed,
// the others a machine that lost its power. The caller holds f.mu.
func (f *recorder) crash(t testing.TB, dir string, variant int, rng *rand.Rand) *recorder {
	t.Helper()
	for _, d := range []string{segmentDir, pinDir, branchDir} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	moved := func(path string) string { return filepath.Join(dir, strings.TrimPrefix(path, f.root)) }
	next := newRecorder(dir)
	if variant == 0 {
		nodes := map[*inode]*inode{}
		move := func(names map[string]*inode) map[string]*inode {
			out := map[string]*inode{}
			for path, node := range names {
				if nodes[node] == nil {
					n := &inode{live: bytes.Clone(node.live), durable: bytes.Clone(node.durable)}
					if strings.HasSuffix(path, "manifest.json") || strings.HasSuffix(path, "manifest.json.tmp") {
						n.live, n.durable = repoint(n.live, dir), repoint(n.durable, dir)
					}
					nodes[node] = n
				}
				out[moved(path)] = nodes[node]
			}
			return out
		}
		next.live, next.durable = move(f.live), move(f.durable)
	} else {
		for path, node := range f.names(variant, rng) {
			content := bytes.Clone(node.durable)
			switch {
			case strings.HasSuffix(path, ".raw"): // bases: any sector may be old or new
				content = bytes.Clone(node.live)
				for at := 0; at < len(content); at += sector {
					if variant == 1 || rng.IntN(2) == 0 {
						clear(content[at : at+sector])
						if at < len(node.durable) {
							copy(content[at:at+sector], node.durable[at:])
						}
					}
				}
			case strings.HasSuffix(path, "manifest.json"):
				content = repoint(content, dir)
			}
			n := &inode{live: content, durable: bytes.Clone(content)}
			next.live[moved(path)], next.durable[moved(path)] = n, n
		}
	}
	for path, node := range next.live {
		if err := os.WriteFile(path, node.live, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return next
}

// names returns which names a loss of power may leave.
func (f *recorder) names(variant int, rng *rand.Rand) map[string]*inode {
	switch variant {
	case 1:
		return f.durable
	case 2:
		return f.live
	}
	names := map[string]*inode{} // any of the renames and removals since the last sync
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
	return names
}

// repoint makes a manifest speak of the bases in dir. One that is damaged stays so.
func repoint(content []byte, dir string) []byte {
	var e envelope
	var m Manifest
	if json.Unmarshal(content, &e) != nil || json.Unmarshal(e.Content, &m) != nil {
		return content
	}
	for i := range m.Disks {
		m.Disks[i].BasePath = filepath.Join(dir, m.Disks[i].Name+".raw")
	}
	e.Content, _ = json.Marshal(m)
	e.Checksum, _ = documentSum(e.Content)
	out, _ := json.Marshal(e)
	return out
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
	if b.fs.skipSync != nil && b.fs.skipSync("base") {
		return nil
	}
	b.node.durable = bytes.Clone(b.node.live)
	return nil
}

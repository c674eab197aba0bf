package journal

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/switchback-dr/switchback"
)

// TestMerge compares the sweep with painting the disk byte by byte.
func TestMerge(t *testing.T) {
	rng := rand.New(rand.NewPCG(4, 4))
	const sectors = 60
	for range 3000 {
		type origin struct{ segment, pos int64 }
		var want [sectors]origin
		for i := range want {
			want[i] = origin{-2, 0}
		}
		var all []candidate
		for segment := range int32(rng.IntN(6)) {
			var pos int64
			for at := rng.Int64N(20); at < sectors; {
				n := min(1+rng.Int64N(12), sectors-at)
				c := candidate{at * sector, (at + n) * sector, -1, segment}
				if rng.IntN(3) > 0 {
					c.pos = pos
					pos += n * sector
				}
				for i := at; i < at+n; i++ {
					want[i] = origin{int64(segment), -1}
					if c.pos >= 0 {
						want[i].pos = c.pos + (i-at)*sector
					}
				}
				all = append(all, c)
				at += n + rng.Int64N(20)
			}
		}
		rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		var got [sectors]origin
		for i := range got {
			got[i] = origin{-2, 0}
		}
		end := int64(-1)
		for _, e := range merge(all, sectors*sector) {
			if e.offset() < end || e.sectors() == 0 {
				t.Fatal("extents overlap")
			}
			end = e.end()
			for i := e.offset() / sector; i < e.end()/sector; i++ {
				got[i] = origin{int64(e.segment()), e.pos()}
				if e.pos() >= 0 {
					got[i].pos += i*sector - e.offset()
				}
			}
		}
		if got != want {
			t.Fatalf("got %v\nwant %v", got, want)
		}
	}
}

// qemuBase writes a qcow2 image through a running qemu-io.
type qemuBase struct {
	mu  sync.Mutex // qemu-io takes one command at a time
	in  io.WriteCloser
	out *bufio.Reader
	cmd *exec.Cmd
	dir string
}

func openQEMUBase(t *testing.T, path string) *qemuBase {
	cmd := exec.Command("qemu-io", "-f", "qcow2", "-d", "unmap", "-t", "writeback", path)
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	b := &qemuBase{in: in, out: bufio.NewReader(out), cmd: cmd, dir: t.TempDir()}
	if err := b.prompt(); err != nil {
		t.Fatal(err)
	}
	return b
}

// do runs a command and waits for the prompt after it.
func (b *qemuBase) do(format string, args ...any) error {
	fmt.Fprintf(b.in, format+"\n", args...)
	return b.prompt()
}

func (b *qemuBase) prompt() error {
	var said []byte
	for !bytes.HasSuffix(said, []byte("qemu-io> ")) {
		c, err := b.out.ReadByte()
		if err != nil {
			return fmt.Errorf("qemu-io: %w: %s", err, said)
		}
		said = append(said, c)
	}
	if len(said) > len("qemu-io> ") { // with -q only trouble is reported
		return fmt.Errorf("qemu-io: %s", said)
	}
	return nil
}

func (b *qemuBase) WriteAt(p []byte, off int64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	name := filepath.Join(b.dir, "pattern")
	if err := os.WriteFile(name, p, 0o600); err != nil {
		return 0, err
	}
	return len(p), b.do("write -q -s %s %d %d", name, off, len(p))
}

func (b *qemuBase) WriteZeroes(off, length int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.do("write -q -z -u %d %d", off, length)
}

func (b *qemuBase) Flush() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.do("flush")
}

func (b *qemuBase) Close() error {
	fmt.Fprintln(b.in, "quit")
	io.Copy(io.Discard, b.out)
	return b.cmd.Wait()
}

// TestQCOW2Base folds into qcow2 bases with QEMU's own writer while views are
// open and read all the time, and compares every byte.
func TestQCOW2Base(t *testing.T) {
	for _, tool := range []string{"qemu-img", "qemu-io"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatal(tool + " is not installed: scripts/install-packages.sh test")
		}
	}
	const size = 8 << 20
	ctx, rng := context.Background(), rand.New(rand.NewPCG(3, 8))
	dir, images := tempDir(t), t.TempDir()
	raw, path := filepath.Join(images, "raw"), filepath.Join(images, "vda.qcow2")
	state := make([]byte, size)
	content(state[1<<20:2<<20], 1)
	content(state[5<<20:6<<20], 2)
	os.WriteFile(raw, state, 0o600)
	if out, err := exec.Command("qemu-img", "convert", "-O", "qcow2", "-o", "cluster_size=16k", raw, path).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	r, err := Create(dir, Spec{Protection: "p-0123456789ab", Epoch: 3, BaseIsOriginal: true,
		Disks: []ReplicaDisk{{Name: "vda", SizeBytes: size, BasePath: path}}})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	states := [][]byte{bytes.Clone(state)}
	parent := ""
	for seq := switchback.Sequence(1); seq <= 6; seq++ {
		seg, sum := buildSegment(t, testHeader(seq, parent, size), CodecZstd, func(w *SegmentWriter) error {
			for at := rng.Int64N(50) * 4096; at < size; at += (1 + rng.Int64N(100)) * 4096 {
				n := min((1+rng.Int64N(40))*512, size-at)
				if rng.IntN(3) == 0 {
					clear(state[at : at+n])
					w.Zero(0, at, n)
				} else {
					content(state[at:at+n], rng.Uint64())
					w.Data(0, at, state[at:at+n])
				}
				at += n / 4096 * 4096
			}
			return nil
		})
		if _, err := r.Receive(ctx, 3, bytes.NewReader(seg)); err != nil {
			t.Fatal(err)
		}
		parent = sum.Digest
		states = append(states, bytes.Clone(state))
	}
	// Views of points 4 and 6, one of which has looked at the base already.
	var readers sync.WaitGroup
	stop := make(chan struct{})
	for i, seq := range []switchback.Sequence{4, 6} {
		v, err := OpenView(dir, seq)
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		if i == 0 {
			v.Disk("vda").ReadAt(make([]byte, size), 0)
		}
		readers.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(seq), 1))
			for n := 0; ; n++ {
				compareDisk(t, fmt.Sprintf("view of %d during folds, round %d", seq, n), v.Disk("vda"), states[seq], rng)
				select {
				case <-stop:
					return
				default:
				}
			}
		})
	}
	for upTo := switchback.Sequence(2); upTo <= 4; upTo++ {
		err := r.Fold(ctx, upTo, func(d DiskGeometry) (BaseWriter, func() error, error) {
			b := openQEMUBase(t, path)
			return b, b.Close, nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for seq := upTo; seq <= 6; seq++ {
			v, err := OpenView(dir, seq)
			if err != nil {
				t.Fatal(err)
			}
			compareDisk(t, fmt.Sprintf("point %d after fold up to %d", seq, upTo), v.Disk("vda"), states[seq], rng)
			v.Close()
		}
	}
	close(stop)
	readers.Wait()
	if out, err := exec.Command("qemu-img", "check", path).CombinedOutput(); err != nil {
		t.Errorf("qemu-img check: %v: %s", err, out)
	}
	out := filepath.Join(images, "out")
	exec.Command("qemu-img", "convert", "-O", "raw", path, out).Run()
	if got, _ := os.ReadFile(out); !bytes.Equal(got, states[4]) {
		t.Error("qemu-img reads something else from the base than point 4")
	}
}

func TestViewRefuses(t *testing.T) {
	w := newWorld(t, 20)
	for range 3 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	w.fold(2)
	for seq, code := range map[switchback.Sequence]switchback.Code{0: switchback.CodeNotFound, 1: switchback.CodeNotFound, 2: "", 3: "", 4: switchback.CodeNotFound} {
		v, err := OpenView(w.dir, seq)
		wantCode(t, fmt.Sprint("point ", seq), err, code)
		if err == nil {
			if diff := cmp.Diff(seq, v.Point().Sequence); diff != "" {
				t.Error(diff)
			}
			if v.Disk("nope") != nil {
				t.Error("a disk that is not there")
			}
			_, err := v.Disks()[0].ReadAt(make([]byte, 1), -1)
			wantCode(t, "negative offset", err, switchback.CodeInvalid)
			v.Close()
		}
	}
	_, err := OpenView(t.TempDir(), 1)
	wantCode(t, "no replica", err, switchback.CodeNotFound)
	os.Remove(segmentPath(w.dir, 3))
	w.receive()
	_, err = OpenView(w.dir, 4)
	wantCode(t, "a segment lost", err, switchback.CodeCorrupt)
}

// TestConcurrentReaders is for the race detector and the cache's buffers.
func TestConcurrentReaders(t *testing.T) {
	w := newWorld(t, 30)
	for range 8 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	v, err := ViewOptions{CacheBytes: 8 * maxFrame}.Open(w.dir, 8)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	want := w.states[w.head().Digest]
	var g sync.WaitGroup
	for i := range 8 {
		g.Go(func() {
			rng := rand.New(rand.NewPCG(uint64(i), 5))
			for range 200 {
				d := v.Disks()[rng.IntN(len(v.Disks()))]
				off := rng.Int64N(d.Size())
				p := make([]byte, 1+rng.Int64N(min(20000, d.Size()-off)))
				if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, want[d.Name()][off:off+int64(len(p))]) {
					t.Errorf("[%d, +%d): %v", off, len(p), err)
					return
				}
			}
		})
	}
	g.Wait()
}

// benchReplica has 120 points over a raw base, each with 256 scattered blocks.
func benchReplica(b *testing.B, c Codec) string {
	const size = 256 << 20
	dir := tempDir(b)
	path := filepath.Join(filepath.Dir(dir), "vda.raw")
	os.WriteFile(path, nil, 0o600)
	os.Truncate(path, size)
	r, err := Create(dir, Spec{Protection: "p-0123456789ab", Epoch: 3, BaseIsOriginal: true,
		Disks: []ReplicaDisk{{Name: "vda", SizeBytes: size, BasePath: path, BaseFormat: "raw"}}})
	if err != nil {
		b.Fatal(err)
	}
	defer r.Close()
	rng := rand.New(rand.NewPCG(1, 1))
	block := make([]byte, 64<<20)
	parent := ""
	for seq := switchback.Sequence(1); seq <= 120; seq++ {
		seg, sum := buildSegment(b, testHeader(seq, parent, size), c, func(w *SegmentWriter) error {
			if seq == 1 {
				for at := int64(0); at < size; at += 64 << 20 {
					content(block, uint64(at))
					w.Data(0, at, block)
				}
				return nil
			}
			for at := int64(0); at < size; at += 1 << 20 {
				content(block[:4096], rng.Uint64())
				w.Data(0, at+rng.Int64N(256)*4096, block[:4096])
			}
			return nil
		})
		if _, err := r.Receive(context.Background(), 3, bytes.NewReader(seg)); err != nil {
			b.Fatal(err)
		}
		parent = sum.Digest
	}
	return dir
}

func BenchmarkView(b *testing.B) {
	for _, c := range []Codec{CodecS2, CodecZstd} {
		dir := benchReplica(b, c)
		b.Run(c.String()+"/open 120 points", func(b *testing.B) {
			for b.Loop() {
				v, err := OpenView(dir, 120)
				if err != nil {
					b.Fatal(err)
				}
				v.Close()
			}
		})
		v, err := OpenView(dir, 120)
		if err != nil {
			b.Fatal(err)
		}
		d := v.Disk("vda")
		b.ReportMetric(float64(len(d.live)), "extents")
		read := func(size int64, offset func() int64) func(*testing.B) {
			return func(b *testing.B) {
				b.SetBytes(size)
				p := make([]byte, size)
				for b.Loop() {
					if _, err := d.ReadAt(p, offset()); err != nil {
						b.Fatal(err)
					}
				}
			}
		}
		var at int64
		next := func(size int64) func() int64 {
			return func() int64 {
				at = (at + size) % (256 << 20)
				return at / size * size
			}
		}
		b.Run(c.String()+"/sequential 1M", read(1<<20, next(1<<20)))
		b.Run(c.String()+"/sequential 4K", read(4<<10, next(4<<10)))
		b.Run(c.String()+"/random 4K", read(4<<10, func() int64 { return rand.Int64N(65536) * 4096 }))
		b.Run(c.String()+"/cached 4K", read(4<<10, func() int64 { return 100<<20 + rand.Int64N(512)*4096 }))
		v.Close()
	}
}

// BenchmarkReceive verifies and stores a stream of 64 MiB.
func BenchmarkReceive(b *testing.B) {
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		b.Run(c.String(), func(b *testing.B) {
			block := make([]byte, 64<<20)
			content(block, 1)
			seg, _ := buildSegment(b, testHeader(1, "", 64<<20), c, func(w *SegmentWriter) error { return w.Data(0, 0, block) })
			b.SetBytes(64 << 20)
			for b.Loop() {
				s, err := openStream(bytes.NewReader(seg))
				if err == nil {
					_, _, _, err = s.copyTo(context.Background(), io.Discard)
				}
				if err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

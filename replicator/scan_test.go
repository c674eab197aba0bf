package replicator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/nbd"
)

// memoryDisk is a DiskReader over bytes. Its allocation map names zero what is
// zero in whole grains.
type memoryDisk struct {
	b     []byte
	grain int64

	mu      sync.Mutex
	reads   int
	failAt  int // this read fails; 0 = none
	reading int
	asked   int
}

func (d *memoryDisk) Size() int64 { return int64(len(d.b)) }

func (d *memoryDisk) ReadPieces(_ context.Context, pieces []nbd.Piece) error {
	for _, p := range pieces {
		if err := d.read(p); err != nil {
			return err
		}
	}
	return nil
}

func (d *memoryDisk) read(p nbd.Piece) error {
	d.mu.Lock()
	d.reads++
	fail := d.reads == d.failAt
	d.reading++
	d.mu.Unlock()
	defer func() { d.mu.Lock(); d.reading--; d.mu.Unlock() }()
	if fail {
		return switchback.Errorf(switchback.CodeUnavailable, "read %d failed", d.failAt)
	}
	copy(p.P, d.b[p.Offset:])
	return nil
}

func (d *memoryDisk) BlockStatus(_ context.Context, what string, off, length int64) ([]nbd.Extent, error) {
	if what != nbd.ContextAllocation {
		return nil, fmt.Errorf("asked about %s", what)
	}
	d.asked++
	var out []nbd.Extent
	for end := off + length; off < end; {
		n := min(d.grain-off%d.grain, end-off)
		x := nbd.Extent{Offset: off, Length: n}
		if len(bytes.Trim(d.b[off:off+n], "\x00")) == 0 {
			x.Flags = nbd.StateHole | nbd.StateZero
		}
		if k := len(out); k > 0 && out[k-1].Flags == x.Flags { // neighbours are told as one
			out[k-1].Length += n
		} else {
			out = append(out, x)
		}
		off += n
	}
	return out, nil
}

func (d *memoryDisk) Close() error { return nil }

// recordingSink applies what a scan hands on to a copy of the disk.
type recordingSink struct {
	t       *testing.T
	b       []byte
	x       *Index
	pending Pending
	data    extent.Set
	zero    extent.Set
	known   map[int64]bool
	fail    error
}

func (s *recordingSink) put(set *extent.Set, off, n int64) {
	s.t.Helper()
	if n <= 0 || off%BlockSize != 0 || (off+n)%BlockSize != 0 && off+n != int64(len(s.b)) {
		s.t.Errorf("handed on [%d, %d): not whole blocks", off, off+n)
	}
	if !s.data.Union(s.zero).Intersect(extent.NewSet(extent.Range{Offset: off, Length: n})).IsEmpty() {
		s.t.Errorf("[%d, %d) is handed on twice", off, off+n)
	}
	set.Add(off, n)
}

func (s *recordingSink) Data(_ int, off int64, p []byte) error {
	if s.fail != nil {
		return s.fail
	}
	s.put(&s.data, off, int64(len(p)))
	copy(s.b[off:], p)
	return nil
}

func (s *recordingSink) Zero(_ int, off, n int64) error {
	s.put(&s.zero, off, n)
	clear(s.b[off : off+n])
	return nil
}

func (s *recordingSink) Known(disk int, block int64, h Hash) error {
	if off := block * BlockSize; !s.data.Union(s.zero).Contains(off, min(BlockSize, int64(len(s.b))-off)) {
		s.t.Errorf("block %d is made known before it is handed on", block)
	}
	if s.known[block] {
		s.t.Errorf("block %d is made known twice", block)
	}
	s.known[block] = true
	s.pending.add(disk, block, h)
	return nil
}

func scanIndex(t *testing.T, size int64, unknownIsZero bool) *Index {
	t.Helper()
	x, err := OpenIndex(tempDir(t), []switchback.Disk{{Name: "vda", SizeBytes: size}}, testKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { x.Close() })
	if err := x.Reset(unknownIsZero); err != nil {
		t.Fatal(err)
	}
	return x
}

// TestScan: under random writes, scanning random supersets of what changed
// makes the copy equal, hands on nothing that is equal, and makes each block known.
func TestScan(t *testing.T) {
	for _, size := range []int64{3<<20 + 512, 5 << 20, 2<<20 + 4096 - 512, 512} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(uint64(size), 2))
			x := scanIndex(t, size, true)
			source, copied := make([]byte, size), make([]byte, size)
			for round := range 12 {
				var dirty extent.Set
				for range rng.IntN(8) {
					off := rng.Int64N(size)
					n := 1 + rng.Int64N(min(size-off, 200<<10))
					fill := byte(rng.IntN(3)) // zero, too; often what is there already
					copy(source[off:], bytes.Repeat([]byte{fill}, int(n)))
					dirty.Add(off, n)
				}
				dirty = dirty.Align(64<<10).Clip(0, size) // bitmaps are coarse
				disk := &memoryDisk{b: source, grain: 512 * (1 + rng.Int64N(40))}
				data, zero := dirty, extent.Set{}
				if rng.IntN(2) == 0 { // with an allocation map, whatever the volume
					for _, e := range mustStatus(t, disk) {
						if e.Zero() {
							zero.AddRange(innerAlign(extent.Range{Offset: e.Offset, Length: e.Length}, size))
						}
					}
					zero = zero.Intersect(dirty)
					data = dirty.Subtract(zero)
				}
				out := &recordingSink{t: t, b: bytes.Clone(copied), x: x, known: map[int64]bool{}}
				var progress int64
				sc := &scanner{index: x, progress: func(n int64) { progress += n }}
				if err := sc.scan(context.Background(), 0, disk, data, zero, out); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(out.b, source) {
					t.Fatalf("round %d: the copy differs", round)
				}
				if progress != dirty.Bytes() || sc.readBytes != data.Bytes() {
					t.Errorf("progress %d of %d, read %d of %d", progress, dirty.Bytes(), sc.readBytes, data.Bytes())
				}
				sent := out.data.Union(out.zero)
				if sc.changedBytes != sent.Bytes() {
					t.Errorf("%d bytes are said to have changed, %d were handed on", sc.changedBytes, sent.Bytes())
				}
				for _, r := range sent.Split(BlockSize) {
					// A short last block of zeros is not recognised as zero, and sent again.
					if r.Length == BlockSize && bytes.Equal(copied[r.Offset:r.End()], source[r.Offset:r.End()]) {
						t.Errorf("round %d: block at %d is equal and was handed on", round, r.Offset)
					}
					if !out.known[r.Offset/BlockSize] {
						t.Errorf("round %d: block at %d was handed on and not made known", round, r.Offset)
					}
				}
				for _, r := range out.data.Split(BlockSize) {
					if r.Length == BlockSize && len(bytes.Trim(source[r.Offset:r.End()], "\x00")) == 0 {
						t.Errorf("round %d: the zeros at %d were sent as data", round, r.Offset)
					}
				}
				if err := x.Apply(&out.pending); err != nil {
					t.Fatal(err)
				}
				copied = out.b
			}
		})
	}
}

func mustStatus(t *testing.T, d *memoryDisk) []nbd.Extent {
	t.Helper()
	list, err := d.BlockStatus(context.Background(), nbd.ContextAllocation, 0, d.Size())
	if err != nil {
		t.Fatal(err)
	}
	return list
}

// TestScanFails: an error ends the scan with that error, and no read is under
// way any more when it returns.
func TestScanFails(t *testing.T) {
	const size = 40 << 20
	all := extent.NewSet(extent.Range{Length: size})
	broken := errors.New("the sink is broken")
	for _, c := range []struct {
		name  string
		disk  *memoryDisk
		sink  error
		ctx   func() context.Context
		wants error
		code  switchback.Code
	}{
		{name: "a read", disk: &memoryDisk{failAt: 7}, code: switchback.CodeUnavailable},
		{name: "the last read", disk: &memoryDisk{failAt: 40}, code: switchback.CodeUnavailable},
		{name: "the sink", disk: &memoryDisk{}, sink: broken, wants: broken},
		{name: "cancelled with a cause", disk: &memoryDisk{}, wants: broken, ctx: func() context.Context {
			ctx, cancel := context.WithCancelCause(context.Background())
			cancel(broken)
			return ctx
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.disk.b = bytes.Repeat([]byte{1}, size)
			ctx := context.Background()
			if c.ctx != nil {
				ctx = c.ctx()
			}
			out := &recordingSink{t: t, b: make([]byte, size), known: map[int64]bool{}, fail: c.sink}
			sc := &scanner{index: scanIndex(t, size, true), progress: func(int64) {}}
			err := sc.scan(ctx, 0, c.disk, all, extent.Set{}, out)
			if c.wants != nil && !errors.Is(err, c.wants) || c.code != "" && switchback.CodeOf(err) != c.code {
				t.Errorf("error %v", err)
			}
			if c.disk.reading != 0 {
				t.Errorf("%d reads are under way after the scan", c.disk.reading)
			}
		})
	}
}

func TestInnerAlign(t *testing.T) {
	const size = 10*BlockSize + 512
	for _, c := range []struct{ off, length, wantOff, wantLength int64 }{
		{0, BlockSize, 0, BlockSize},
		{1, BlockSize, 0, 0},
		{1, 2 * BlockSize, BlockSize, BlockSize},
		{BlockSize - 1, BlockSize + 1, BlockSize, BlockSize},
		{0, BlockSize - 1, 0, 0},
		{9*BlockSize + 1, BlockSize + 511, 10 * BlockSize, 512}, // the end counts as aligned
		{10*BlockSize + 1, 511, 0, 0},
		{10 * BlockSize, 512, 10 * BlockSize, 512},
		{5 * BlockSize, 0, 0, 0},
	} {
		got := innerAlign(extent.Range{Offset: c.off, Length: c.length}, size)
		if want := (extent.Range{Offset: c.wantOff, Length: c.wantLength}); got != want {
			t.Errorf("innerAlign([%d, %d)) = %v, want %v", c.off, c.off+c.length, got, want)
		}
	}
}

func TestSplitZero(t *testing.T) {
	const size = 8<<20 + 512
	b := make([]byte, size)
	// Data in the middle of a block, and all along from 6 MiB.
	b[1<<20+100] = 1
	for i := 6 << 20; i < size-512; i += 512 {
		b[i] = 1
	}
	disk := &memoryDisk{b: b, grain: 512}
	open := func() (DiskReader, error) { return disk, nil }
	ranges := func(s extent.Set) string { return fmt.Sprint(s.Ranges()) }
	for _, c := range []struct {
		name       string
		want       extent.Set
		data, zero extent.Set
		asked      int
	}{
		{"little is read", extent.NewSet(extent.Range{Offset: 100, Length: 4<<20 - BlockSize}),
			extent.NewSet(extent.Range{Length: 4 << 20}), extent.Set{}, 0},
		{"much is asked about", extent.NewSet(extent.Range{Length: size}),
			extent.NewSet(extent.Range{Offset: 1 << 20, Length: BlockSize}, extent.Range{Offset: 6 << 20, Length: 2 << 20}),
			extent.NewSet(extent.Range{Length: 1 << 20}, extent.Range{Offset: 1<<20 + BlockSize, Length: 5<<20 - BlockSize}, extent.Range{Offset: 8 << 20, Length: 512}), 1},
		{"only what is wanted", extent.NewSet(extent.Range{Offset: 2 << 20, Length: 5 << 20}),
			extent.NewSet(extent.Range{Offset: 6 << 20, Length: 1 << 20}), extent.NewSet(extent.Range{Offset: 2 << 20, Length: 4 << 20}), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk.asked = 0
			data, zero, err := splitZero(context.Background(), open, c.want, size)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff([]string{ranges(c.data), ranges(c.zero)}, []string{ranges(data), ranges(zero)}); d != "" || disk.asked != c.asked {
				t.Errorf("asked %d times: %s", disk.asked, d)
			}
		})
	}
	failing := errors.New("no connection")
	if _, _, err := splitZero(context.Background(), func() (DiskReader, error) { return nil, failing }, extent.NewSet(extent.Range{Length: size}), size); !errors.Is(err, failing) {
		t.Errorf("error %v, want %v", err, failing)
	}
}

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/journal"
)

// journalSizes are how much the measures of the journal alone work on.
type journalSizes struct {
	points  int   // segments
	change  int64 // bytes in each
	area    int64 // of the disk, which they change
	extents int   // of the view that is weighed
}

func journalSizesOf(quick bool) journalSizes {
	if quick {
		return journalSizes{points: 4, change: 4 << 20, area: 32 << 20, extents: 100_000}
	}
	return journalSizes{points: 16, change: 32 << 20, area: 2 << 30, extents: 5_200_000}
}

func measureJournal(ctx context.Context, b *bed) ([]entry, error) {
	dir := filepath.Join(b.cfg.dir, "journals")
	defer os.RemoveAll(dir)
	space, fold, merge, err := journalWork(ctx, dir, journalSizesOf(b.cfg.quick), b.cfg.runs)
	return []entry{space, fold, merge}, err
}

func measureViewMemory(ctx context.Context, b *bed) ([]entry, error) {
	dir := filepath.Join(b.cfg.dir, "journals")
	defer os.RemoveAll(dir)
	e, err := viewMemory(ctx, dir, journalSizesOf(b.cfg.quick), b.cfg.runs)
	return []entry{e}, err
}

// journalWork fills a journal anew for each sample, with changes of 4 KiB to
// 64 KiB, then merges all points but the newest into it, or folds all.
func journalWork(ctx context.Context, dir string, sizes journalSizes, runs int) (space, fold, merge entry, err error) {
	var s, f, m samples
	var kept int64
	for run := range runs {
		for _, what := range []string{"merge", "fold"} {
			if err := ctx.Err(); err != nil {
				return space, fold, merge, context.Cause(ctx)
			}
			j, err := makeJournal(ctx, filepath.Join(dir, fmt.Sprint(what, run)), sizes, uint64(run+1))
			if err != nil {
				return space, fold, merge, err
			}
			stored := j.JournalBytes()
			moved, ours := stored, func() error { return j.Merge(ctx, 1, j.Head().Sequence, 0) }
			if what == "fold" {
				if moved, err = j.live(); err != nil {
					return space, fold, merge, errors.Join(err, j.remove())
				}
				ours = func() error { return j.Fold(ctx, j.Head().Sequence, j.openBase) }
			}
			into := &f
			if what == "merge" {
				into = &m
				s.Ours, s.Peer = append(s.Ours, mebibytes(stored)), append(s.Peer, mebibytes(j.plain))
			}
			// The peer copies as many bytes; whose turn is first alternates.
			source := filepath.Join(j.dir, "source")
			if err := makeSource(source, moved); err != nil {
				return space, fold, merge, errors.Join(err, j.remove())
			}
			peer := func() error { return copyPlain(source, source+".copy") }
			for i := range 2 {
				mine := i == run%2
				work := peer
				if mine {
					work = ours
				}
				unix.Sync()
				begin := time.Now()
				if err := work(); err != nil {
					return space, fold, merge, errors.Join(err, j.remove())
				}
				if rate := mebibytes(moved) / time.Since(begin).Seconds(); mine {
					into.Ours = append(into.Ours, rate)
				} else {
					into.Peer = append(into.Peer, rate)
				}
			}
			if what == "merge" {
				kept = j.JournalBytes()
			}
			if err := j.remove(); err != nil {
				return space, fold, merge, err
			}
		}
	}
	work := fmt.Sprintf("%d points of %d MiB", sizes.points, sizes.change>>20)
	space = newEntry("journal_space", "MiB", "zstd of the changed 4 KiB blocks in 64 KiB pieces", oursByPeer, s,
		fmt.Sprintf("%s; %.0f MiB when merged into one", work, mebibytes(kept)))
	fold = newEntry("fold_throughput", "MiB/s", "sequential copy of as many bytes, synced", oursByPeer, f, "live bytes of "+work+" to a raw file")
	merge = newEntry("merge_throughput", "MiB/s", "sequential copy of as many bytes, synced", oursByPeer, m, "stored bytes of "+work+" into one")
	return space, fold, merge, nil
}

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

// filledJournal is a replica over a raw file, in a directory of its own.
type filledJournal struct {
	*journal.Replica
	dir  string
	base string
	// plain is what a bare compressor makes of the same changes.
	plain int64
}

func (j *filledJournal) remove() error { return errors.Join(j.Close(), os.RemoveAll(j.dir)) }

// newJournal makes a replica of one empty disk.
func newJournal(dir string, size int64) (*filledJournal, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	j := &filledJournal{dir: dir, base: filepath.Join(dir, "base.raw")}
	if err := os.WriteFile(j.base, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(j.base, size); err != nil {
		return nil, err
	}
	var err error
	j.Replica, err = journal.Create(filepath.Join(dir, "replica"), journal.Spec{Protection: benchProtection, Epoch: 1, BaseIsOriginal: true, Name: "bench",
		Disks: []journal.ReplicaDisk{{Name: diskName, SizeBytes: size, BasePath: j.base, BaseFormat: "raw"}}})
	return j, err
}

const benchProtection = "p-benchbench00"

// point adds the next one; fill gives its content.
func (j *filledJournal) point(ctx context.Context, size int64, codec journal.Codec, fill func(*journal.SegmentWriter) error) error {
	head := j.Head()
	h := journal.Header{Protection: benchProtection, Epoch: 1, Sequence: head.Sequence + 1, Kind: switchback.CrashConsistent, Time: time.Now(),
		Parent: head.Digest, Disks: []journal.DiskGeometry{{Name: diskName, SizeBytes: size}}}
	r, w := io.Pipe()
	go func() {
		sw, err := journal.NewSegmentWriter(w, h, codec)
		if err == nil {
			if err = fill(sw); err == nil {
				_, err = sw.Finish()
			} else {
				sw.Abort()
			}
		}
		w.CloseWithError(err)
	}()
	_, err := j.Receive(ctx, 1, r)
	r.CloseWithError(err)
	return err
}

func makeJournal(ctx context.Context, dir string, sizes journalSizes, seed uint64) (*filledJournal, error) {
	j, err := newJournal(dir, sizes.area)
	if err != nil {
		return nil, err
	}
	// As the journal sets its own: what differs is only what the journal adds.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false), zstd.WithWindowSize(64<<10))
	if err != nil {
		return nil, errors.Join(err, j.remove())
	}
	defer enc.Close()
	rng := rand.New(rand.NewPCG(seed, 1))
	for range sizes.points {
		var piece, packed []byte
		flush := func() {
			packed = enc.EncodeAll(piece, packed[:0])
			j.plain += int64(min(len(packed), len(piece)))
			piece = piece[:0]
		}
		err := j.point(ctx, sizes.area, journal.CodecZstd, func(w *journal.SegmentWriter) error {
			block := make([]byte, 64<<10)
			// Ascending, as a cycle finds them, without meeting one twice.
			gap := (sizes.area - sizes.change) / (sizes.change / (34 << 10))
			for at, left := rng.Int64N(gap/blockSize)*blockSize, sizes.change; left > 0; {
				n := min(left, (1+rng.Int64N(16))*blockSize)
				if at+n > sizes.area {
					return nil
				}
				fillBlock(block[:n], rng)
				if err := w.Data(0, at, block[:n]); err != nil {
					return err
				}
				for p := block[:n]; len(p) > 0; {
					k := min(len(p), 64<<10-len(piece))
					piece, p = append(piece, p[:k]...), p[k:]
					if len(piece) == 64<<10 {
						flush()
					}
				}
				left -= n
				at += n + rng.Int64N(2*gap/blockSize)*blockSize
			}
			return nil
		})
		if err != nil {
			return nil, errors.Join(err, j.remove())
		}
		if len(piece) > 0 {
			flush()
		}
	}
	return j, nil
}

// fillBlock makes content that compresses about 2:1.
func fillBlock(p []byte, rng *rand.Rand) {
	clear(p)
	for i := 0; i+16 <= len(p); i += 16 {
		v := rng.Uint64()
		for k := range 8 {
			p[i+k] = byte(v >> (8 * k))
		}
	}
}

// live returns the bytes that a fold of all points writes.
func (j *filledJournal) live() (int64, error) {
	changed, err := j.ChangedAfter(0)
	set := changed[diskName]
	return set.Bytes(), err
}

// rawBase writes a base that is a raw file.
type rawBase struct{ *os.File }

func (b rawBase) WriteZeroes(off, length int64) error {
	return unix.Fallocate(int(b.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
}
func (b rawBase) Flush() error { return unix.Fdatasync(int(b.Fd())) }

func (j *filledJournal) openBase(journal.DiskGeometry) (journal.BaseWriter, func() error, error) {
	f, err := os.OpenFile(j.base, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	return rawBase{f}, f.Close, nil
}

// makeSource writes a file of n bytes, which the peer copies.
func makeSource(path string, n int64) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	rng, piece := rand.New(rand.NewPCG(uint64(n), 2)), make([]byte, 1<<20)
	for left := n; left > 0 && err == nil; left -= int64(len(piece)) {
		fillBlock(piece, rng)
		_, err = f.Write(piece[:min(left, int64(len(piece)))])
	}
	return errors.Join(err, f.Close())
}

// copyPlain copies a file by reading and writing 1 MiB at a time, durably.
func copyPlain(from, to string) (err error) {
	r, err := os.Open(from)
	if err != nil {
		return err
	}
	defer r.Close()
	w, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.Close()) }()
	piece := make([]byte, 1<<20)
	for {
		n, err := r.Read(piece)
		if err == io.EOF {
			return unix.Fdatasync(int(w.Fd()))
		}
		if err == nil {
			_, err = w.Write(piece[:n])
		}
		if err != nil {
			return err
		}
	}
}

// plainExtent is what a straightforward table of a view holds of an extent.
type plainExtent struct {
	offset, position int64
	length, segment  uint32
}

// viewMemory weighs a view whose extents are single sectors that touch nothing.
func viewMemory(ctx context.Context, dir string, sizes journalSizes, runs int) (entry, error) {
	const each = 1024 // a sector of data and one of the base
	size := int64(sizes.extents) * each
	j, err := newJournal(filepath.Join(dir, "memory"), size)
	if err != nil {
		return entry{}, err
	}
	const points = 4
	block := bytes.Repeat([]byte("switchback sector data "), 23)[:512]
	for p := range points {
		err := j.point(ctx, size, journal.CodecS2, func(w *journal.SegmentWriter) error {
			for i := p; i < sizes.extents; i += points {
				if err := w.Data(0, int64(i)*each, block); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return entry{}, errors.Join(err, j.remove())
		}
	}
	var s samples
	for range runs {
		before := heap()
		v, err := journal.OpenView(j.Dir(), points)
		if err != nil {
			return entry{}, errors.Join(err, j.remove())
		}
		s.Ours = append(s.Ours, float64(heap()-before)/float64(sizes.extents))
		if err := v.Close(); err != nil {
			return entry{}, errors.Join(err, j.remove())
		}
		runtime.KeepAlive(v)
		v = nil
		before = heap()
		table := make([]plainExtent, sizes.extents)
		s.Peer = append(s.Peer, float64(heap()-before)/float64(sizes.extents))
		runtime.KeepAlive(table)
	}
	return newEntry("view_bytes_per_extent", "B", "table of offset, position, length, segment", oursAlone, s,
		fmt.Sprintf("%d extents of one sector over %d points; all that the open view holds", sizes.extents, points)), j.remove()
}

// heap is what is in use after a collection.
func heap() int64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

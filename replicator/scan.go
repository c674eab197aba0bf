package replicator

import (
	"bytes"
	"context"
	"sync"

	"golang.org/x/sync/semaphore"

	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/nbd"
)

// DiskReader is one disk at the frozen instant of a cycle.
type DiskReader interface {
	Size() int64
	ReadAt(p []byte, off int64) (int, error)
	// BlockStatus returns the extents of a meta context that was asked for at dial.
	BlockStatus(ctx context.Context, metaContext string, off, length int64) ([]nbd.Extent, error)
	Close() error
}

// sink takes what differs from what the target holds.
type sink interface {
	Data(disk int, offset int64, p []byte) error
	Zero(disk int, offset, length int64) error
	// Known is called after Data or Zero for each block they cover.
	Known(disk int, block int64, h Hash) error
}

const (
	pieceSize = 1 << 20 // one read; a multiple of BlockSize
	// Reads in flight: by bytes, which bounds memory, and by number, since
	// scattered pieces of one bitmap unit wait for QEMU's latency, not its rate.
	// It stays below the 16 requests of a connection at which QEMU stops reading.
	inFlightBytes = 4 << 20
	inFlightReads = 12
	zeroChunk     = 1 << 14 // index entries looked at together for zero ranges
)

// scanner compares what is on a disk with the index and hands on the difference.
type scanner struct {
	index    *Index
	progress func(done int64)
	// readBytes and changedBytes count what scan did.
	readBytes, changedBytes int64

	entries []byte
	zeros   [BlockSize]byte
}

type piece struct {
	off  int64
	buf  []byte
	done chan error
}

// smallPiece is one unit of a dirty bitmap.
const smallPiece = 64 << 10

var (
	smallBuffers = sync.Pool{New: func() any { return new([smallPiece]byte) }}
	largeBuffers = sync.Pool{New: func() any { return new([pieceSize]byte) }}
)

func takeBuffer(n int64) []byte {
	if n <= smallPiece {
		return smallBuffers.Get().(*[smallPiece]byte)[:n]
	}
	return largeBuffers.Get().(*[pieceSize]byte)[:n]
}

func returnBuffer(b []byte) {
	if b = b[:cap(b)]; len(b) == smallPiece {
		smallBuffers.Put((*[smallPiece]byte)(b))
	} else {
		largeBuffers.Put((*[pieceSize]byte)(b))
	}
}

// scan reads the data ranges of a disk and compares; the zero ranges it only
// compares. Both must be aligned to BlockSize, but for the end of the disk.
func (s *scanner) scan(ctx context.Context, disk int, r DiskReader, data, zero extent.Set, out sink) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	queue := make(chan *piece, inFlightReads)
	room := semaphore.NewWeighted(inFlightBytes)
	go func() {
		defer close(queue)
		for _, rg := range data.Ranges() {
			for off := rg.Offset; off < rg.Offset+rg.Length; off += pieceSize {
				n := min(pieceSize, rg.Offset+rg.Length-off)
				if room.Acquire(ctx, n) != nil {
					return
				}
				p := &piece{off: off, buf: takeBuffer(n), done: make(chan error, 1)}
				go func() {
					_, err := r.ReadAt(p.buf, p.off)
					p.done <- err
				}()
				select {
				case queue <- p:
				case <-ctx.Done():
					<-p.done
					return
				}
			}
		}
	}()
	// Every read that was begun is waited for before the reader may be closed.
	defer func() {
		cancel()
		for p := range queue {
			<-p.done
		}
	}()
	for p := range queue {
		if err := <-p.done; err != nil {
			return err
		}
		s.readBytes += int64(len(p.buf))
		if err := s.compare(disk, p.off, p.buf, out); err != nil {
			return err
		}
		s.progress(int64(len(p.buf)))
		room.Release(int64(len(p.buf)))
		returnBuffer(p.buf)
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
	}
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	for _, rg := range zero.Ranges() {
		if err := s.compareZero(ctx, disk, rg, out); err != nil {
			return err
		}
	}
	return nil
}

// compare hands on the blocks of buf, read at off, that the target does not hold.
func (s *scanner) compare(disk int, off int64, buf []byte, out sink) error {
	x := s.index.disks[disk]
	first := off / BlockSize
	blocks := (int64(len(buf)) + BlockSize - 1) / BlockSize
	entries, err := x.entries(first, blocks, s.entries)
	if err != nil {
		return err
	}
	s.entries = entries
	type state int
	const (
		same state = iota
		differs
		differsZero
	)
	hashes := make([]Hash, blocks)
	begin, kind := int64(0), same
	flush := func(end int64) error {
		if kind == same || begin == end {
			return nil
		}
		from, to := begin*BlockSize, min(end*BlockSize, int64(len(buf)))
		s.changedBytes += to - from
		if kind == differsZero {
			if err := out.Zero(disk, off+from, to-from); err != nil {
				return err
			}
		} else if err := out.Data(disk, off+from, buf[from:to]); err != nil {
			return err
		}
		for b := begin; b < end; b++ {
			if err := out.Known(disk, first+b, hashes[b]); err != nil {
				return err
			}
		}
		return nil
	}
	for b := int64(0); b < blocks; b++ {
		block := buf[b*BlockSize : min((b+1)*BlockSize, int64(len(buf)))]
		hashes[b] = x.hash(block)
		k := same
		if !x.holds(first+b, Hash(entries[16*b:]), hashes[b]) {
			k = differs
			if hashes[b] == x.zeroOf(first+b) && bytes.Equal(block, s.zeros[:len(block)]) {
				k = differsZero
			}
		}
		if k != kind {
			if err := flush(b); err != nil {
				return err
			}
			begin, kind = b, k
		}
	}
	return flush(blocks)
}

// compareZero hands on the parts of a zero range that the target is not known to hold as zero.
func (s *scanner) compareZero(ctx context.Context, disk int, rg extent.Range, out sink) error {
	x := s.index.disks[disk]
	for off := rg.Offset; off < rg.Offset+rg.Length; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		length := min(zeroChunk*BlockSize, rg.Offset+rg.Length-off)
		first := off / BlockSize
		blocks := (length + BlockSize - 1) / BlockSize
		entries, err := x.entries(first, blocks, s.entries)
		if err != nil {
			return err
		}
		s.entries = entries
		begin := int64(-1)
		flush := func(end int64) error {
			if begin < 0 {
				return nil
			}
			from, to := off+begin*BlockSize, min(off+end*BlockSize, off+length)
			if err := out.Zero(disk, from, to-from); err != nil {
				return err
			}
			s.changedBytes += to - from
			for b := begin; b < end; b++ {
				if err := out.Known(disk, first+b, x.zeroOf(first+b)); err != nil {
					return err
				}
			}
			begin = -1
			return nil
		}
		for b := int64(0); b < blocks; b++ {
			if x.holds(first+b, Hash(entries[16*b:]), x.zeroOf(first+b)) {
				if err := flush(b); err != nil {
					return err
				}
			} else if begin < 0 {
				begin = b
			}
		}
		if err := flush(blocks); err != nil {
			return err
		}
		off += length
		s.progress(length)
	}
	return nil
}

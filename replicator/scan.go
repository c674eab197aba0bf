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
	// ReadPieces fills all pieces, none of which reaches past the end.
	ReadPieces(ctx context.Context, pieces []nbd.Piece) error
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
	pieceSize = 1 << 20 // at most read by one request; a multiple of BlockSize
	// smallPiece is one unit of a dirty bitmap. Pieces up to it are asked for in
	// groups: their cost is that of a request, not of its bytes.
	smallPiece = 64 << 10
	groupSize  = 4
	// Reads in flight: by bytes, which bounds memory, and by number of groups, of
	// which two more than wait are on their way. With all of them small they are
	// the 16 requests that QEMU works on for a connection.
	inFlightBytes = 4 << 20
	waitingGroups = 2
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

// group is some pieces read together.
type group struct {
	pieces []nbd.Piece
	done   chan error
}

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
	queue := make(chan *group, waitingGroups)
	room := semaphore.NewWeighted(inFlightBytes)
	go func() {
		defer close(queue)
		readGroups(ctx, r, data, room, queue)
	}()
	// Every read that was begun is waited for before the reader may be closed.
	defer func() {
		cancel()
		for g := range queue {
			<-g.done
		}
	}()
	for g := range queue {
		if err := <-g.done; err != nil {
			return err
		}
		for _, p := range g.pieces {
			n := int64(len(p.P))
			s.readBytes += n
			if err := s.compare(disk, p.Offset, p.P, out); err != nil {
				return err
			}
			s.progress(n)
			room.Release(n)
			returnBuffer(p.P)
		}
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

// readGroups begins to read the ranges and puts what it has begun into the
// queue, in order, until all is begun or ctx ends.
func readGroups(ctx context.Context, r DiskReader, data extent.Set, room *semaphore.Weighted, queue chan<- *group) {
	var next []nbd.Piece
	begin := func() bool {
		if len(next) == 0 {
			return true
		}
		g := &group{next, make(chan error, 1)}
		next = nil
		go func() { g.done <- r.ReadPieces(ctx, g.pieces) }()
		select {
		case queue <- g:
			return true
		case <-ctx.Done():
			<-g.done
			return false
		}
	}
	for _, rg := range data.Split(pieceSize) {
		small := rg.Length <= smallPiece
		if !small && !begin() {
			return
		}
		if !room.TryAcquire(rg.Length) { // what is gathered may hold the room
			if !begin() || room.Acquire(ctx, rg.Length) != nil {
				return
			}
		}
		next = append(next, nbd.Piece{Offset: rg.Offset, P: takeBuffer(rg.Length)})
		if (!small || len(next) == groupSize) && !begin() {
			return
		}
	}
	begin()
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

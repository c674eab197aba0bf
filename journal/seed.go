package journal

import (
	"context"
	"io"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// BaseWriter writes one base image. The caller provides it, because only QEMU
// tools write bases: it is an NBD client of a qemu-nbd, say. WriteAt and
// WriteZeroes are called concurrently, for disjoint ranges in multiples of 512.
type BaseWriter interface {
	io.WriterAt
	// WriteZeroes makes a range read as zeros; it may deallocate it.
	WriteZeroes(off, length int64) error
	// Flush makes all writes that have returned durable.
	Flush() error
}

const (
	// MaxSeedBatch is the content that one seed batch may hold.
	MaxSeedBatch = 64 << 20

	maxZeroes  = 1 << 30 // one WriteZeroes
	writeDepth = 8       // writes in flight
)

// seedBuffers hold the content of batches. Making them anew for each, growing as
// they fill, took more time than everything else that is done to a batch.
var seedBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 10<<20); return &b }}

// ApplySeed reads one batch of the first full copy, a segment with Header.Seed,
// of at most MaxSeedBatch bytes of content. When all of it is verified it is
// written to the bases through writers, which are by disk name. Batches may come
// at the same time, for disjoint ranges. It is not durable until the caller
// flushes the writers; which batches are is for the source to remember (its
// block index). Applying a batch again does no harm.
func (r *Replica) ApplySeed(ctx context.Context, stream io.Reader, writers map[string]BaseWriter) error {
	s, err := openStream(stream)
	if err != nil {
		return err
	}
	r.mu.Lock()
	err = r.admitSeed(s.header, writers)
	r.mu.Unlock()
	if err != nil {
		return err
	}
	if writers, err = r.summedSeed(writers); err != nil {
		return err
	}
	streams := make([][]byte, len(s.header.Disks))
	defer func() {
		for _, b := range streams {
			if b != nil {
				seedBuffers.Put(&b)
			}
		}
	}()
	var total int
	s.keep = func(disk int, raw []byte) error {
		if total += len(raw); total > MaxSeedBatch {
			return switchback.Errorf(switchback.CodeInvalid, "seed batch is larger than %d MiB", MaxSeedBatch>>20)
		}
		if streams[disk] == nil {
			streams[disk] = (*seedBuffers.Get().(*[]byte))[:0]
		}
		streams[disk] = append(streams[disk], raw...)
		return nil
	}
	ix, _, _, err := s.copyTo(ctx, io.Discard)
	if err != nil {
		return err
	}

	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(writeDepth)
	for i, d := range s.header.Disks {
		w, data := writers[d.Name], streams[i]
		for _, e := range ix.disks[i].data {
			for _, part := range extent.NewSet(e).Split(1 << 20) {
				p := data[:part.Length]
				data = data[part.Length:]
				g.Go(func() error { return writeBase(gctx, w, d.Name, p, part) })
			}
		}
		for _, e := range ix.disks[i].zero {
			for _, part := range extent.NewSet(e).Split(maxZeroes) {
				g.Go(func() error { return writeBase(gctx, w, d.Name, nil, part) })
			}
		}
	}
	return g.Wait()
}

// writeBase writes p, or zeros when p is nil, to the base of a disk.
func writeBase(ctx context.Context, w BaseWriter, disk string, p []byte, at extent.Range) error {
	err := ctx.Err()
	if err == nil && p == nil {
		err = w.WriteZeroes(at.Offset, at.Length)
	} else if err == nil {
		_, err = w.WriteAt(p, at.Offset)
	}
	return fault(err, "write base of disk %s at %d", disk, at.Offset)
}

func (r *Replica) admitSeed(h Header, writers map[string]BaseWriter) error {
	m := &r.manifest
	switch {
	case h.Protection != m.Protection:
		return switchback.Errorf(switchback.CodeInvalid, "seed of %s for the replica of %s", h.Protection, m.Protection)
	case !h.Seed:
		return switchback.Errorf(switchback.CodeInvalid, "segment %d is no seed batch", h.Sequence)
	case !m.Seeding:
		return switchback.Errorf(switchback.CodeConflict, "replica %s is seeded already: its head is point %d", m.Protection, r.head().point.Sequence)
	}
	if err := r.checkEpoch(h.Epoch); err != nil {
		return err
	}
	for _, d := range h.Disks {
		mine := m.disk(d.Name)
		if mine == nil || mine.SizeBytes != d.SizeBytes {
			return switchback.Errorf(switchback.CodeConflict, "seed has disk %s of %d bytes, which the replica has not", d.Name, d.SizeBytes).
				WithHint("the VM's disks changed during the first copy; protect it anew")
		}
		if writers[d.Name] == nil {
			return switchback.Errorf(switchback.CodeInternal, "no writer for the base of disk %s", d.Name)
		}
	}
	return nil
}

// FinishSeed durably declares that the bases, which the caller has filled and
// flushed, stand for point: the first recovery point. The next segment names
// its digest as parent, so it must have one. Doing it again is no error.
func (r *Replica) FinishSeed(point switchback.Point) error {
	r.maintenance.Lock()
	defer r.maintenance.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	m := &r.manifest
	if !m.Seeding {
		if m.Base.Digest == point.Digest && m.Base.Sequence == point.Sequence {
			return r.settle()
		}
		return switchback.Errorf(switchback.CodeConflict, "replica %s is seeded already: its head is point %d", m.Protection, r.head().point.Sequence)
	}
	if point.Sequence == 0 || point.Digest == "" || point.Protection != m.Protection {
		return switchback.Errorf(switchback.CodeInvalid, "point %d of %s with digest %q cannot end the seeding of %s",
			point.Sequence, point.Protection, point.Digest, m.Protection)
	}
	if err := r.checkEpoch(point.Epoch); err != nil {
		return err
	}
	if err := r.SyncSums(); err != nil {
		return err
	}
	r.closeSums()
	return r.update(func(m *Manifest) {
		m.Base, m.Seeding = point, false
		m.Epoch = max(m.Epoch, point.Epoch)
	})
}

package journal

import (
	"errors"
	"io"
	"sync"
	"time"

	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/qcow2"
)

// provenBase is a base whose content is compared with its checksums at each read.
type provenBase struct {
	baseReader
	sums *baseSums
	disk ReplicaDisk
}

// openProven opens a base with its checksums, if there are any.
func openProven(dir string, d ReplicaDisk) (baseReader, error) {
	b, err := openBase(d)
	if err != nil {
		return nil, err
	}
	s, err := openSums(dir, d.Name, d.SizeBytes, false)
	if err != nil {
		b.Close()
		return nil, err
	}
	if s == nil {
		return b, nil
	}
	return &provenBase{b, s, d}, nil
}

func (b *provenBase) Close() error { return errors.Join(b.baseReader.Close(), b.sums.close()) }

// limit is where content that has checksums ends.
func (b *provenBase) limit() int64 { return min(b.Size(), b.disk.SizeBytes) }

// ReadAt implements io.ReaderAt. Whole blocks are checked where they were read
// to; the rest of those that p cuts are read beside.
func (b *provenBase) ReadAt(p []byte, off int64) (int, error) {
	n, err := b.baseReader.ReadAt(p, off)
	if err != nil && err != io.EOF || n == 0 {
		return n, err
	}
	got := p[:n]
	end, limit := off+int64(n), b.limit()
	if end > limit { // what a larger file holds there has never been written by us
		end = max(off, limit)
	}
	for at := off; at < end; {
		start := at - at%sumBlock
		whole := end - end%sumBlock
		if end == limit {
			whole = end
		}
		if start == at && whole > at {
			if err := b.prove(got[at-off:whole-off], at); err != nil {
				return 0, err
			}
			at = whole
			continue
		}
		block := sumPool.Get().(*[sumBlock]byte)
		part := block[:min(sumBlock, limit-start)]
		m, err := b.baseReader.ReadAt(part, start)
		if m == len(part) {
			if err = b.prove(part, start); err == nil {
				next := min(end, start+sumBlock)
				copy(got[at-off:next-off], part[at-start:])
				at = next
			}
		} else if err == nil {
			err = io.ErrUnexpectedEOF
		}
		sumPool.Put(block)
		if err != nil && m < len(part) || err != nil && err != io.EOF {
			return 0, err
		}
	}
	return n, err
}

// prove compares p with the checksums; p is read again before it counts as
// damaged, since a fold may just be writing the other part of a block.
func (b *provenBase) prove(p []byte, off int64) error {
	var bad []extent.Range
	for try := range sumReadTries {
		if try > 0 {
			time.Sleep(time.Millisecond << try)
			if n, err := b.baseReader.ReadAt(p, off); n < len(p) {
				return err
			}
		}
		var err error
		if bad, _, err = b.sums.compare(p, off); err != nil || len(bad) == 0 {
			return err
		}
	}
	return Damage{File: b.disk.BasePath, Disk: b.disk.Name, Ranges: bad, Reason: baseReason, To: NewestPoint}.corrupt()
}

const baseReason = "the content of the base does not match its checksum"

// Extents calls zero only what the checksums do not contradict, so that a
// damaged map of the image is met by whoever reads there.
func (b *provenBase) Extents(off, length int64) ([]qcow2.Extent, error) {
	list, err := b.baseReader.Extents(off, length)
	for i := range list {
		if e := &list[i]; e.Zero && e.Offset < b.limit() {
			ok, err := b.sums.zero(e.Offset, min(e.Length, b.limit()-e.Offset))
			if err != nil {
				return nil, err
			}
			e.Zero = ok
		}
	}
	return list, err
}

// summedWriter records checksums of what it writes to a base.
type summedWriter struct {
	BaseWriter
	sums *baseSums
	size int64
}

func (w summedWriter) WriteAt(p []byte, off int64) (int, error) {
	if err := w.sums.record(p, off, w.size); err != nil {
		return 0, err
	}
	return w.BaseWriter.WriteAt(p, off)
}

func (w summedWriter) WriteZeroes(off, length int64) error {
	if err := w.sums.recordZeroes(off, length, w.size); err != nil {
		return err
	}
	return w.BaseWriter.WriteZeroes(off, length)
}

func (w summedWriter) Flush() error {
	if err := w.sums.f.Sync(); err != nil {
		return fault(err, "sync %s", w.sums.f.Name())
	}
	return w.BaseWriter.Flush()
}

// summedBases makes a fold record the checksums of what it writes.
func (r *Replica) summedBases(open OpenBaseFunc) OpenBaseFunc {
	return func(g DiskGeometry) (BaseWriter, func() error, error) {
		if err := createSums(r.dir, g.Name, g.SizeBytes, false); err != nil {
			return nil, nil, err
		}
		s, err := openSums(r.dir, g.Name, g.SizeBytes, true)
		if err != nil {
			return nil, nil, err
		}
		w, done, err := open(g)
		if err != nil {
			s.close()
			return nil, nil, err
		}
		return summedWriter{w, s, g.SizeBytes}, func() error { return errors.Join(done(), s.close()) }, nil
	}
}

// seedSums are the checksums of bases that are being filled.
type seedSums struct {
	mu   sync.Mutex
	open map[string]*baseSums
}

// summedSeed makes seeding record checksums.
func (r *Replica) summedSeed(writers map[string]BaseWriter) (map[string]BaseWriter, error) {
	m := r.Manifest()
	r.seeding.mu.Lock()
	defer r.seeding.mu.Unlock()
	out := map[string]BaseWriter{}
	for name, w := range writers {
		d := m.disk(name)
		if d == nil {
			out[name] = w
			continue
		}
		s := r.seeding.open[name]
		if s == nil {
			var err error
			if s, err = openSums(r.dir, name, d.SizeBytes, true); err != nil {
				return nil, err
			}
			if s == nil { // a replica of an older build: its base stays unproven
				out[name] = w
				continue
			}
			if r.seeding.open == nil {
				r.seeding.open = map[string]*baseSums{}
			}
			r.seeding.open[name] = s
		}
		out[name] = summedWriter{w, s, d.SizeBytes}
	}
	return out, nil
}

// SyncSums makes the checksums of what ApplySeed has written durable. It belongs
// to each flush of the bases while seeding.
func (r *Replica) SyncSums() error {
	r.seeding.mu.Lock()
	defer r.seeding.mu.Unlock()
	for _, s := range r.seeding.open {
		if err := s.f.Sync(); err != nil {
			return fault(err, "sync %s", s.f.Name())
		}
	}
	return nil
}

func (r *Replica) closeSums() {
	r.seeding.mu.Lock()
	defer r.seeding.mu.Unlock()
	for _, s := range r.seeding.open {
		s.close()
	}
	r.seeding.open = nil
}

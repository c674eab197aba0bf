package journal

import (
	"context"
	"encoding/binary"
	"path/filepath"
	"time"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// checkFile is where the owner of a replica may keep the state of its check.
const checkFile = "check.json"

// SaveCheck durably keeps what is known of a check, a JSON document of the
// caller's. LoadCheck gives it back; CodeNotFound when there is none.
func (r *Replica) SaveCheck(content any) error {
	return writeDocument(r.fs, filepath.Join(r.dir, checkFile), content)
}

// LoadCheck is the inverse of SaveCheck.
func (r *Replica) LoadCheck(content any) error {
	return readDocument(filepath.Join(r.dir, checkFile), content)
}

const checkChunk = 4 << 20

// bases checks the bases from where the state stands.
func (c *checker) bases(ctx context.Context) error {
	if c.manifest.FoldedBranch != "" { // they stand for nothing until that is complete
		return nil
	}
	skip := c.st.Disk != ""
	for _, d := range c.manifest.Disks {
		if skip && d.Name != c.st.Disk {
			continue
		}
		from := int64(0)
		if skip {
			from = c.st.Offset
		}
		skip = false
		if d.Absent {
			continue
		}
		if err := c.base(ctx, d, from); err != nil {
			return err
		}
	}
	return nil
}

// openedBase is a base as a check reads it, with what it stood for when it was opened.
type openedBase struct {
	baseReader
	base, folding switchback.Sequence
	sums          *baseSums
	busy          extent.Set // what a fold that is not complete writes
}

func (c *checker) base(ctx context.Context, d ReplicaDisk, off int64) error {
	var b *openedBase
	shut := func() {
		if b != nil {
			b.Close()
			if b.sums != nil {
				b.sums.close()
			}
			b = nil
		}
	}
	defer shut()
	report := func(err error) error {
		if code := switchback.CodeOf(err); code != switchback.CodeCorrupt && code != switchback.CodeNotFound {
			return err
		}
		c.found(Damage{File: d.BasePath, Disk: d.Name, Reason: err.Error(), From: c.manifest.oldest(), To: NewestPoint})
		c.st.DoneBytes = min(c.st.DoneBytes+d.SizeBytes-off, c.st.TotalBytes)
		return nil
	}
	buf := make([]byte, checkChunk)
	for off < d.SizeBytes {
		release, err := c.hold(ctx)
		if err != nil {
			return err
		}
		var read int64
		err = func() error {
			defer release()
			m, err := readManifest(c.dir)
			if err != nil {
				return err
			}
			if b == nil || b.base != m.Base.Sequence || b.folding != m.Folding {
				shut()
				if b, err = c.openForCheck(d, m); err != nil {
					return err
				}
			}
			read, err = c.chunk(b, d, buf[:min(checkChunk, d.SizeBytes-off)], off)
			return err
		}()
		if err != nil {
			return report(err)
		}
		n := min(checkChunk, d.SizeBytes-off)
		off += n
		c.st.Disk, c.st.Offset = d.Name, off
		c.st.BaseBytes += read
		c.st.DoneBytes = min(c.st.DoneBytes+n-read, c.st.TotalBytes)
		if err := c.spend(ctx, read); err != nil {
			return err
		}
		c.tell()
	}
	if b != nil && b.sums != nil && c.replica != nil {
		return fault(b.sums.f.Sync(), "sync checksums of disk %s", d.Name)
	}
	return nil
}

// hold keeps folds away while a chunk is read; without the replica nothing does.
func (c *checker) hold(ctx context.Context) (release func(), err error) {
	if c.replica == nil {
		return func() {}, nil
	}
	for !c.replica.maintenance.TryLock() {
		t := time.NewTimer(20 * time.Millisecond)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return nil, switchback.Errorf(switchback.CodeCancelled, "check: %w", ctx.Err())
		}
	}
	return c.replica.maintenance.Unlock, nil
}

func (c *checker) openForCheck(d ReplicaDisk, m Manifest) (*openedBase, error) {
	r, err := openBase(d)
	if err != nil {
		return nil, err
	}
	b := &openedBase{baseReader: r, base: m.Base.Sequence, folding: m.Folding}
	if c.replica != nil {
		if err := createSums(c.dir, d.Name, d.SizeBytes, false); err != nil {
			r.Close()
			return nil, err
		}
	}
	if b.sums, err = openSums(c.dir, d.Name, d.SizeBytes, c.replica != nil); err != nil {
		r.Close()
		return nil, err
	}
	if m.Folding > 0 {
		for _, s := range c.segments {
			if i := s.disk(d.Name); i >= 0 && s.header.Sequence <= m.Folding && s.header.Sequence > m.Base.Sequence {
				b.busy = b.busy.Union(s.index.changed(i))
			}
		}
	}
	return b, nil
}

// chunk compares one piece of a base, and returns how many bytes had to be read.
func (c *checker) chunk(b *openedBase, d ReplicaDisk, p []byte, off int64) (read int64, err error) {
	for try := 0; ; try++ {
		if read, err = fillChunk(b, p, off); err != nil {
			return read, err
		}
		if b.sums == nil {
			c.st.UnprovenBytes += int64(len(p))
			return read, nil
		}
		compare := b.sums.compare
		if read == 0 {
			compare = b.sums.compareZeros
		}
		bad, unproven, err := compare(p, off)
		if err != nil {
			return read, err
		}
		left := extent.NewSet(bad...).Subtract(b.busy.Align(sumBlock))
		if left.IsEmpty() {
			c.st.UnprovenBytes += unproven
			if unproven > 0 && c.replica != nil {
				return read, b.learn(p, off)
			}
			return read, nil
		}
		if c.replica == nil && try < sumReadTries {
			// A fold may have begun since. Look at all of it again.
			time.Sleep(10 * time.Millisecond << try)
			m, err := readManifest(c.dir)
			if err != nil {
				return read, err
			}
			again, err := c.openForCheck(d, m)
			if err != nil {
				return read, err
			}
			b.Close()
			b.sums.close()
			*b = *again
			continue
		}
		c.found(Damage{File: d.BasePath, Disk: d.Name, Ranges: left.Ranges(), Reason: baseReason,
			From: c.manifest.oldest(), To: c.hidden(d.Name, left.Ranges(), b.base)})
		return read, nil
	}
}

// fillChunk reads what of a base is stored; the rest is zeros.
func fillChunk(b *openedBase, p []byte, off int64) (read int64, err error) {
	clear(p)
	list, err := b.Extents(off, min(int64(len(p)), max(0, b.Size()-off)))
	if err != nil {
		return 0, err
	}
	for _, e := range list {
		if e.Zero {
			continue
		}
		part := p[e.Offset-off : e.Offset-off+e.Length]
		if n, err := b.ReadAt(part, e.Offset); n < len(part) {
			return read, err
		}
		read += e.Length
	}
	return read, nil
}

// learn records the checksums of blocks of which nothing was known: whatever
// changes them from here on is found.
func (b *openedBase) learn(p []byte, off int64) error {
	first := off / sumBlock
	entries, err := b.sums.entries(first, blocksOf(int64(len(p))))
	if err != nil {
		return err
	}
	for i := 0; i < len(entries); i += 8 {
		at := i / 8 * sumBlock
		block := p[at:min(at+sumBlock, len(p))]
		e := binary.LittleEndian.Uint64(entries[i:])
		if (e == sumUnproven || e == sumUnknown && !b.sums.zeros) && b.busy.Intersect(extent.NewSet(extent.Range{Offset: off + int64(at), Length: int64(len(block))})).IsEmpty() {
			binary.LittleEndian.PutUint64(entries[i:], paddedSum(block))
		}
	}
	return b.sums.put(first, entries)
}

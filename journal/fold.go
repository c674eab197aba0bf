package journal

import (
	"context"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

const (
	foldChunk = 1 << 20
	foldCache = 64 << 20
)

var chunkPool = sync.Pool{New: func() any { return new([foldChunk]byte) }}

// OpenBaseFunc opens the base of a disk for writing; the image must be at
// least disk.SizeBytes large, so a disk that has grown is grown first. The
// second result closes it.
type OpenBaseFunc func(disk DiskGeometry) (BaseWriter, func() error, error)

// Fold writes the merged content of all segments up to upTo to the bases, lets
// the bases stand for that point and deletes the segments. It changes nothing
// that upTo or a newer point reads, and points can be received meanwhile.
//
// Everything is read and verified before anything is written. From the first
// write on the points before upTo are gone, also when Fold then fails or
// crashes; it is repeated, up to the same or a newer point, until it succeeds.
// A pin or lock on an older point refuses it (CodeRefused); one on upTo does not,
// because open views of upTo read these ranges from the segment files, which
// stay readable while open.
func (r *Replica) Fold(ctx context.Context, upTo switchback.Sequence, open OpenBaseFunc) error {
	return r.FoldPaced(ctx, upTo, open, 0)
}

// FoldPaced is Fold that reads and writes at most bytesPerSecond; 0 means as
// fast as it can.
func (r *Replica) FoldPaced(ctx context.Context, upTo switchback.Sequence, open OpenBaseFunc, bytesPerSecond int64) error {
	ctx = withPace(ctx, bytesPerSecond)
	r.maintenance.Lock()
	defer r.maintenance.Unlock()

	r.mu.Lock()
	err := r.mayFold(upTo)
	m := r.manifest.clone()
	st := r.storage
	done := err == nil && upTo == m.Base.Sequence
	if done {
		err = r.removeFolded() // what a failed attempt left
	}
	r.mu.Unlock()
	if err != nil || done {
		return err
	}

	segments, err := st.openSegments(m.Base, upTo)
	if err != nil {
		return fault(err, "fold up to %d", upTo)
	}
	defer func() {
		for _, s := range segments {
			s.close()
		}
	}()
	last := segments[len(segments)-1]
	cache := newFrameCache(foldCache)
	var disks []*overlay
	for _, g := range last.header.Disks {
		b := m.disk(g.Name)
		if b == nil {
			return switchback.Errorf(switchback.CodeRefused, "disk %s has no base image", g.Name).WithHint("create one and name it with SetDisk")
		}
		o := newOverlay(g.Name, g.SizeBytes, segments, !b.Absent)
		if err := o.verify(ctx); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return switchback.Errorf(switchback.CodeCancelled, "fold: %w", err)
		}
		disks = append(disks, o)
	}

	r.mu.Lock()
	if err = r.mayFold(upTo); err == nil && r.manifest.Folding == upTo {
		err = r.settle()
	} else if err == nil {
		err = r.update(func(m *Manifest) { m.Folding = upTo })
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	for i, o := range disks {
		if err := foldDisk(ctx, last.header.Disks[i], o, cache, r.summedBases(open)); err != nil {
			return err
		}
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	err = r.update(func(m *Manifest) {
		m.Base, m.Folding = last.point, 0
		for i := range m.Disks {
			m.Disks[i].Absent = true
		}
		for _, g := range last.header.Disks {
			d := m.disk(g.Name)
			d.SizeBytes, d.Absent = g.SizeBytes, false
		}
	})
	if err != nil {
		return err
	}
	return r.removeFolded()
}

// mayFold is called with r.mu held.
func (r *Replica) mayFold(upTo switchback.Sequence) error {
	if err := r.checkReadable(upTo); err != nil {
		return err
	}
	return r.mayDrop(func(s switchback.Sequence) bool { return s < upTo }, fmt.Sprintf("folding up to %d", upTo))
}

// CheckFold reports what would refuse Fold now: a pin, a lock, or a point that
// does not exist.
func (r *Replica) CheckFold(upTo switchback.Sequence) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mayFold(upTo)
}

// foldDisk writes what the overlay holds to the base.
func foldDisk(ctx context.Context, g DiskGeometry, o *overlay, cache *frameCache, open OpenBaseFunc) (err error) {
	if len(o.live) == 0 {
		return nil
	}
	w, closeBase, err := open(g)
	if err != nil {
		return fault(err, "open base of disk %s", g.Name)
	}
	defer func() {
		if e := closeBase(); err == nil {
			err = fault(e, "close base of disk %s", g.Name)
		}
	}()
	group, gctx := errgroup.WithContext(ctx)
	group.SetLimit(writeDepth)
	o.chunks(func(at extent.Range, parts []liveExtent) bool {
		group.Go(func() error {
			if parts[0].zero() {
				return writeBase(gctx, w, g.Name, nil, at)
			}
			if err := pace(gctx, at.Length); err != nil {
				return err
			}
			buffer := chunkPool.Get().(*[foldChunk]byte)
			defer chunkPool.Put(buffer)
			p := buffer[:at.Length]
			for i := range parts {
				e := parts[i]
				from, to := max(e.offset(), at.Offset), min(e.end(), at.End())
				if err := o.read(cache, e, p[from-at.Offset:to-at.Offset], from); err != nil {
					return err
				}
			}
			return writeBase(gctx, w, g.Name, p, at)
		})
		return gctx.Err() == nil
	})
	if err := group.Wait(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return switchback.Errorf(switchback.CodeCancelled, "fold: %w", err)
	}
	return fault(w.Flush(), "flush base of disk %s", g.Name)
}

// chunks calls yield with ranges that are all data or all zero, and the live
// extents they touch. Data is cut at multiples of foldChunk.
func (o *overlay) chunks(yield func(at extent.Range, parts []liveExtent) bool) {
	for i := 0; i < len(o.live); {
		// [i, j) is contiguous and of one sort
		j := i + 1
		for j < len(o.live) && o.live[j].offset() == o.live[j-1].end() && o.live[j].zero() == o.live[i].zero() {
			j++
		}
		size := int64(foldChunk)
		if o.live[i].zero() {
			size = maxZeroes
		}
		end := o.live[j-1].end()
		first := i
		for at := o.live[i].offset(); at < end; {
			stop := min(end, at-at%size+size)
			for o.live[first].end() <= at {
				first++
			}
			last := first + 1
			for last < j && o.live[last].offset() < stop {
				last++
			}
			if !yield(extent.Range{Offset: at, Length: stop - at}, o.live[first:last]) {
				return
			}
			at = stop
		}
		i = j
	}
}

// verify reads every frame that the overlay needs once.
func (o *overlay) verify(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.GOMAXPROCS(0))
	seen := map[frameKey]bool{}
	for i := range o.live {
		e := o.live[i]
		if e.zero() {
			continue
		}
		s := o.segments[e.segment()]
		d := &s.index.disks[o.disk[e.segment()]]
		end := e.pos() + e.length()
		for k := d.frameAt(e.pos()); k < len(d.frames) && d.starts[k] < end; k++ {
			key := frameKey{s, d.frames[k]}
			if seen[key] {
				continue
			}
			seen[key] = true
			if pace(ctx, int64(s.index.frames[key.frame].stored)) != nil {
				break // the group says why
			}
			group.Go(func() error {
				stored := storedPool.Get().(*[maxFrame]byte)
				defer storedPool.Put(stored)
				return s.verify(key.frame, stored[:s.index.frames[key.frame].stored])
			})
		}
		if ctx.Err() != nil {
			break
		}
	}
	return group.Wait()
}

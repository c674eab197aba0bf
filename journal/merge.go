package journal

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"

	"github.com/zeebo/xxh3"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// Merge drops the points from first up to the one before into, all of them
// neighbours, by taking what into still needs of them into its segment. The
// point into stays what it is, and nothing that it or another remaining point
// reads changes. Points can be received and read meanwhile; views that are open
// keep their files.
//
// What is read is verified, and a frame that survives as a whole is copied as it
// is stored. It moves at most bytesPerSecond; 0 means as fast as it can. The
// work is proportional to what the segments hold, however many points go at once.
//
// A crash or the end of ctx leaves all points or only the remaining ones. It is
// refused (CodeRefused) while one of the dropped is pinned, locked, or being
// folded up to. The oldest point can go only where it is a segment; the one that
// the base stands for goes with Fold.
func (r *Replica) Merge(ctx context.Context, first, into switchback.Sequence, bytesPerSecond int64) error {
	r.maintenance.Lock()
	defer r.maintenance.Unlock()
	ctx = withPace(ctx, bytesPerSecond)

	r.mu.Lock()
	err := r.mayMerge(first, into)
	before := r.manifest.Base
	if i, ok := r.findSegment(first); ok && i > 0 {
		before = r.segments[i-1].point
	}
	r.temps++
	temp := filepath.Join(r.dir, segmentDir, fmt.Sprintf("%016d-%d%s", into, r.temps, tempSuffix))
	r.mu.Unlock()
	if err != nil {
		return err
	}

	segments, err := openSegments(r.dir, before, into)
	if err != nil {
		return fault(err, "merge points %d to %d", first, into)
	}
	defer func() {
		for _, s := range segments {
			s.close()
		}
	}()
	point, err := r.writeMerged(ctx, temp, segments)
	if err != nil {
		r.fs.remove(temp)
		return err
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.mayMerge(first, into); err != nil {
		r.fs.remove(temp)
		return err
	}
	path := segmentPath(r.dir, into)
	if err := r.fs.rename(temp, path); err != nil {
		r.fs.remove(temp)
		return fault(err, "merge points %d to %d", first, into)
	}
	// Views go by the file from here on. Until it is durable the segments that it
	// took in stay, so that either file is the end of a chain.
	from, _ := r.findSegment(first)
	to, _ := r.findSegment(into)
	r.segments[to].point = point
	r.segments = slices.Delete(r.segments, from, to)
	if err := r.fs.syncDir(filepath.Dir(path)); err != nil {
		return fault(err, "merge points %d to %d", first, into)
	}
	gone := func(seq switchback.Sequence) bool { return before.Sequence < seq && seq < into }
	if err := r.removeSegments(gone); err != nil {
		return err
	}
	return r.forgetMarks(gone)
}

// mayMerge is called with r.mu held.
func (r *Replica) mayMerge(first, into switchback.Sequence) error {
	for _, seq := range []switchback.Sequence{first, into} {
		if err := r.checkReadable(seq); err != nil {
			return err
		}
	}
	switch _, ok := r.findSegment(first); {
	case first >= into:
		return switchback.Errorf(switchback.CodeInvalid, "point %d is not older than %d", first, into)
	case !ok || first == r.manifest.Folding:
		return switchback.Errorf(switchback.CodeRefused, "the base stands for point %d: it cannot be merged", first).WithHint("fold up to a newer one")
	}
	return r.mayDrop(func(seq switchback.Sequence) bool { return first <= seq && seq < into }, fmt.Sprintf("merging points %d to %d", first, into))
}

// writeMerged writes the segment that the last of segments becomes when it takes
// in those before it to the file temp, durably, and returns its point.
func (r *Replica) writeMerged(ctx context.Context, temp string, segments []*segment) (switchback.Point, error) {
	none := switchback.Point{}
	last := segments[len(segments)-1]
	h := last.header
	merged := Merged{Digest: last.point.Digest}
	merged.Continues, merged.ContinuesDigest = segments[0].header.continues()
	var overlays []*overlay
	for _, g := range h.Disks {
		o := newOverlay(g.Name, g.SizeBytes, segments, true)
		if !o.onBase {
			merged.Fresh = append(merged.Fresh, g.Name)
		}
		overlays = append(overlays, o)
	}
	h.Merged = &merged
	head, err := encodeHeader(h)
	if err != nil {
		return none, err
	}
	f, err := r.fs.create(temp)
	if err != nil {
		return none, fault(err, "merge into point %d", h.Sequence)
	}
	out := bufio.NewWriterSize(&reserveWriter{r: r, f: f}, 512<<10)
	w := &mergeWriter{ctx: ctx, out: out, offset: int64(len(head)), ix: index{disks: make([]diskIndex, len(h.Disks))}}
	foot, err := w.write(head, h.Disks, overlays)
	if err == nil {
		err = out.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err != nil {
		return none, fault(err, "merge into point %d", h.Sequence)
	}
	return h.Point(foot.summary(foot.indexOffset + foot.indexLength + footerSize)), nil
}

// mergeWriter writes a segment from frames of others.
type mergeWriter struct {
	ctx    context.Context
	out    io.Writer
	offset int64 // in the file
	ix     index
	record [frameHeadSize + maxFrame]byte
	raw    [maxFrame]byte
	// pieces of frames that did not survive whole, to be a frame of their own
	gathered []byte
	places   []extent.Range
	codec    Codec
}

func (w *mergeWriter) write(head []byte, disks []DiskGeometry, overlays []*overlay) (footer, error) {
	if _, err := w.out.Write(head); err != nil {
		return footer{}, err
	}
	for i, o := range overlays {
		if err := w.disk(uint16(i), o); err != nil {
			return footer{}, err
		}
	}
	if err := w.ix.check(disks); err != nil {
		return footer{}, err
	}
	b, err := w.ix.encode()
	if err != nil {
		return footer{}, err
	}
	data, zero := w.ix.totals()
	foot := footer{indexOffset: w.offset, indexLength: int64(len(b)), dataBytes: data, zeroBytes: zero, digest: digest(head, b)}
	if _, err = w.out.Write(b); err == nil {
		_, err = w.out.Write(foot.encode())
	}
	return foot, err
}

// disk writes the frames of one disk, in the order in which the segments hold them.
func (w *mergeWriter) disk(disk uint16, o *overlay) error {
	d := &w.ix.disks[disk]
	var live []liveExtent
	for _, e := range o.live {
		switch {
		case !e.zero():
			live = append(live, e)
		case e.segment() >= 0: // the rest is zero since the disk is fresh
			d.zero = appendExtent(d.zero, extent.Range{Offset: e.offset(), Length: e.length()})
		}
	}
	slices.SortFunc(live, func(a, b liveExtent) int {
		return cmp.Or(cmp.Compare(a.segment(), b.segment()), cmp.Compare(a.pos(), b.pos()))
	})
	for len(live) > 0 {
		// The extents that begin in one frame; one that goes on is cut at its end.
		e := live[0]
		s := o.segments[e.segment()]
		from := &s.index.disks[o.disk[e.segment()]]
		k := from.frameAt(e.pos())
		if k < 0 {
			return switchback.Errorf(switchback.CodeInternal, "position %d is in no frame", e.pos())
		}
		n := from.frames[k]
		start, length := from.starts[k], int64(s.index.frames[n].rawLength())
		var parts []liveExtent
		var sum int64
		for len(live) > 0 && live[0].segment() == e.segment() && live[0].pos() < start+length {
			part := live[0]
			if rest := part.pos() + part.length() - (start + length); rest > 0 {
				part = newLive(part.offset(), part.pos(), part.sectors()-rest/sector, part.segment())
				live[0] = newLive(part.end(), start+length, rest/sector, part.segment())
			} else {
				live = live[1:]
			}
			parts, sum = append(parts, part), sum+part.length()
		}
		if err := w.frame(disk, s, n, start, parts, sum == length); err != nil {
			return err
		}
	}
	return w.flush(disk)
}

// frame takes over what parts say of frame n, which begins at start in the
// stream of its disk.
func (w *mergeWriter) frame(disk uint16, s *segment, n uint32, start int64, parts []liveExtent, whole bool) error {
	f := s.index.frames[n]
	if err := pace(w.ctx, int64(f.stored)); err != nil {
		return switchback.Errorf(switchback.CodeCancelled, "merge: %w", err)
	}
	raw, record := w.raw[:f.rawLength()], w.record[:frameHeadSize+int(f.stored)]
	if err := s.loadStored(n, raw, record[frameHeadSize:]); err != nil {
		return err
	}
	if !whole {
		for _, e := range parts {
			at := e.pos() - start
			if err := w.gather(disk, raw[at:at+e.length()], e.offset(), f.codec); err != nil {
				return err
			}
		}
		return nil
	}
	f.disk = disk
	places := make([]extent.Range, len(parts))
	for i, e := range parts {
		places[i] = extent.Range{Offset: e.offset(), Length: e.length()}
	}
	return w.emit(f, record, places)
}

// gather adds a piece to the frame of pieces.
func (w *mergeWriter) gather(disk uint16, p []byte, offset int64, c Codec) error {
	for len(p) > 0 {
		n := min(len(p), maxFrame-len(w.gathered))
		w.gathered = append(w.gathered, p[:n]...)
		w.places = append(w.places, extent.Range{Offset: offset, Length: int64(n)})
		w.codec = max(w.codec, c)
		p, offset = p[n:], offset+int64(n)
		if len(w.gathered) == maxFrame {
			if err := w.flush(disk); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *mergeWriter) flush(disk uint16) error {
	if len(w.gathered) == 0 {
		return nil
	}
	record, codec := compress(w.record[:frameHeadSize], w.gathered, w.codec)
	f := frame{stored: uint32(len(record) - frameHeadSize), disk: disk, sectors: uint8(len(w.gathered)/sector - 1),
		codec: codec, sum: xxh3.Hash128(w.gathered).Bytes()}
	err := w.emit(f, record, w.places)
	w.gathered, w.places, w.codec = w.gathered[:0], w.places[:0], CodecNone
	return err
}

// emit writes a frame, whose stored bytes are in record after room for its head.
func (w *mergeWriter) emit(f frame, record []byte, places []extent.Range) error {
	f.putHead(record)
	f.offset = w.offset + frameHeadSize
	w.offset += int64(len(record))
	w.ix.frames = append(w.ix.frames, f)
	d := &w.ix.disks[f.disk]
	for _, p := range places {
		d.data = appendExtent(d.data, p)
	}
	_, err := w.out.Write(record)
	return err
}

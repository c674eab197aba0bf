package journal

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"slices"
	"sync"

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
	st := r.storage
	r.mu.Unlock()
	if err != nil {
		return err
	}

	segments, err := st.openSegments(before, into)
	if err != nil {
		return fault(err, "merge points %d to %d", first, into)
	}
	defer func() {
		for _, s := range segments {
			s.close()
		}
	}()
	point, err := r.writeMerged(ctx, temp, segments, nil)
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
	if err := r.discardReference(into); err != nil { // of what it was before
		return err
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
// in those before it to the file temp, durably, and returns its point. mended are
// frames of the only segment that are not to be read.
func (r *Replica) writeMerged(ctx context.Context, temp string, segments []*segment, mended map[uint32]badFrame) (switchback.Point, error) {
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
	var foot footer
	err = r.writeSegment(f, sealName(h.Sequence), func(out io.Writer) error {
		w := &mergeWriter{ctx: ctx, out: out, mended: mended, offset: int64(len(head)), ix: index{disks: make([]diskIndex, len(h.Disks))}}
		foot, err = w.write(head, h.Disks, overlays)
		return err
	})
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
	// pieces of frames that did not survive whole, to be a frame of their own
	pieces *gathered
	// mended are damaged frames; see Mend
	mended map[uint32]badFrame
	// queue holds what is to be written, in its order
	queue chan outgoing
}

// outgoing is a frame on its way to the file: one that survived, or pieces.
type outgoing struct {
	survivor *survivor
	pieces   *gathered
}

// gathered are pieces of frames, and the frame that they become.
type gathered struct {
	raw    [maxFrame]byte
	length int
	places []extent.Range
	codec  Codec
	ready  chan struct{} // closed when what follows is set
	frame  frame
	record []byte
}

var gatherings = sync.Pool{New: func() any { return &gathered{record: make([]byte, frameHeadSize, frameHeadSize+maxFrame)} }}

// pack compresses the pieces.
func (g *gathered) pack(disk uint16) {
	defer close(g.ready)
	raw := g.raw[:g.length]
	record, codec := compress(g.record[:frameHeadSize], raw, g.codec)
	g.record = record
	g.frame = frame{stored: uint32(len(record) - frameHeadSize), disk: disk, sectors: uint8(len(raw)/sector - 1),
		codec: codec, sum: xxh3.Hash128(raw).Bytes()}
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
	// Frames are read and verified ahead, and pieces compressed behind; all are
	// written in their order.
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	ahead := make(chan *survivor, 2*runtime.GOMAXPROCS(0))
	go func() {
		defer close(ahead)
		for len(live) > 0 {
			var f *survivor
			f, live = nextSurvivor(o, live)
			if f.err == nil {
				f.err = pace(ctx, int64(f.segment.index.frames[f.number].stored))
			}
			ahead <- f
			if f.err != nil {
				close(f.ready)
				return
			}
			if b, ok := w.mended[f.number]; ok {
				go f.loadMended(b)
			} else {
				go f.load()
			}
		}
	}()
	w.queue = make(chan outgoing, 2*runtime.GOMAXPROCS(0))
	written := make(chan error)
	go func() {
		var failed error
		for x := range w.queue {
			if failed == nil {
				if failed = w.emit(disk, x); failed != nil {
					cancel()
				}
			}
			x.recycle()
		}
		written <- failed
	}()
	var failed error
	for f := range ahead {
		<-f.ready
		if failed == nil {
			failed = f.err
		}
		switch {
		case failed != nil:
			cancel() // the rest is waited for: it reads files that are closed soon
			survivors.Put(f)
		case f.whole:
			w.queue <- outgoing{survivor: f}
		default:
			w.gather(disk, f)
			survivors.Put(f)
		}
	}
	w.flush(disk)
	close(w.queue)
	if err := <-written; err != nil {
		failed = err // what came after is only its consequence
	}
	if err := w.ctx.Err(); err != nil {
		return switchback.Errorf(switchback.CodeCancelled, "merge: %w", err)
	}
	return failed
}

// survivor is a frame of which something is live.
type survivor struct {
	segment *segment
	number  uint32
	start   int64 // in the stream of the disk
	parts   []liveExtent
	whole   bool
	ready   chan struct{} // closed when what follows is set
	err     error
	frame   frame                          // as it will be written
	record  [frameHeadSize + maxFrame]byte // room for the head, and the stored bytes
	raw     [maxFrame]byte
}

var survivors = sync.Pool{New: func() any { return new(survivor) }}

// nextSurvivor takes the extents that lie in one frame from the front of live; one
// that goes on is cut at the frame's end.
func nextSurvivor(o *overlay, live []liveExtent) (*survivor, []liveExtent) {
	f := survivors.Get().(*survivor)
	e := live[0]
	f.segment, f.parts, f.err, f.ready = o.segments[e.segment()], f.parts[:0], nil, make(chan struct{})
	from := &f.segment.index.disks[o.disk[e.segment()]]
	k := from.frameAt(e.pos())
	if k < 0 { // the index was checked: cannot be
		f.err = switchback.Errorf(switchback.CodeInternal, "position %d is in no frame", e.pos())
		return f, nil
	}
	f.number, f.start = from.frames[k], from.starts[k]
	f.frame = f.segment.index.frames[f.number]
	length := int64(f.segment.index.frames[f.number].rawLength())
	var sum int64
	for len(live) > 0 && live[0].segment() == e.segment() && live[0].pos() < f.start+length {
		part := live[0]
		if rest := part.pos() + part.length() - (f.start + length); rest > 0 {
			part = newLive(part.offset(), part.pos(), part.sectors()-rest/sector, part.segment())
			live[0] = newLive(part.end(), f.start+length, rest/sector, part.segment())
		} else {
			live = live[1:]
		}
		f.parts, sum = append(f.parts, part), sum+part.length()
	}
	f.whole = sum == length
	return f, live
}

// load reads and verifies the frame.
func (f *survivor) load() {
	defer close(f.ready)
	x := &f.segment.index.frames[f.number]
	stored := f.record[frameHeadSize:][:x.stored]
	if f.whole {
		f.err = f.segment.verify(f.number, stored)
	} else {
		f.err = f.segment.loadStored(f.number, f.raw[:x.rawLength()], stored)
	}
}

// gather adds what is live of a frame to the pieces.
func (w *mergeWriter) gather(disk uint16, f *survivor) {
	codec := f.segment.index.frames[f.number].codec
	for _, e := range f.parts {
		at, offset := e.pos()-f.start, e.offset()
		for p := f.raw[at : at+e.length()]; len(p) > 0; {
			if w.pieces == nil {
				w.pieces = gatherings.Get().(*gathered)
			}
			g := w.pieces
			n := copy(g.raw[g.length:], p)
			g.length += n
			g.places = append(g.places, extent.Range{Offset: offset, Length: int64(n)})
			g.codec = max(g.codec, codec)
			p, offset = p[n:], offset+int64(n)
			if g.length == maxFrame {
				w.flush(disk)
			}
		}
	}
}

// flush makes a frame of the pieces gathered so far.
func (w *mergeWriter) flush(disk uint16) {
	g := w.pieces
	if g == nil {
		return
	}
	w.pieces = nil
	g.ready = make(chan struct{})
	go g.pack(disk)
	w.queue <- outgoing{pieces: g}
}

func (x outgoing) recycle() {
	if x.survivor != nil {
		survivors.Put(x.survivor)
		return
	}
	g := x.pieces
	<-g.ready
	g.length, g.places, g.codec = 0, g.places[:0], CodecNone
	gatherings.Put(g)
}

// emit writes a frame.
func (w *mergeWriter) emit(disk uint16, x outgoing) error {
	var f frame
	var record []byte // the stored bytes after room for the head
	d := &w.ix.disks[disk]
	if s := x.survivor; s != nil {
		f = s.frame
		f.disk = disk
		record = s.record[:frameHeadSize+int(f.stored)]
		for _, e := range s.parts {
			d.data = appendExtent(d.data, extent.Range{Offset: e.offset(), Length: e.length()})
		}
	} else {
		<-x.pieces.ready
		f, record = x.pieces.frame, x.pieces.record
		for _, p := range x.pieces.places {
			d.data = appendExtent(d.data, p)
		}
	}
	f.putHead(record)
	f.offset = w.offset + frameHeadSize
	w.offset += int64(len(record))
	w.ix.frames = append(w.ix.frames, f)
	_, err := w.out.Write(record)
	return err
}

package replicator

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/nbd"
)

// segmentSink writes what differs into a segment.
type segmentSink struct {
	w       *journal.SegmentWriter
	pending Pending
}

func (s *segmentSink) Data(disk int, off int64, p []byte) error { return s.w.Data(disk, off, p) }
func (s *segmentSink) Zero(disk int, off, n int64) error        { return s.w.Zero(disk, off, n) }
func (s *segmentSink) Known(disk int, block int64, h Hash) error {
	s.pending.add(disk, block, h)
	return nil
}

// send streams the segment. The job is released as soon as everything is read;
// the index is logged before the segment's last bytes leave and moved after the answer.
func (e *Engine) send(ctx context.Context, report *CycleReport, p switchback.Point, f *frozen, release func() error, unsure *bool) (switchback.Point, error) {
	var dirty int64
	for i := range f.data {
		dirty += f.data[i].Bytes() + f.zero[i].Bytes()
	}
	report.DirtyBytes = dirty
	e.history.begin(string(report.Mode), e.now())
	e.history.advance(dirty, 0, 0)
	codec := e.codec(dirty)
	report.Codec = codec.String()

	pr, pw := io.Pipe()
	type answer struct {
		point switchback.Point
		err   error
	}
	answered := make(chan answer, 1)
	go func() {
		point, err := e.cfg.Target.SendPoint(ctx, e.cfg.Epoch, pr)
		pr.CloseWithError(errors.Join(err, io.ErrClosedPipe)) // a writer still at work must not hang
		answered <- answer{point, err}
	}()

	begin := time.Now()
	counted := &countingWriter{w: pw}
	buffered := bufio.NewWriterSize(counted, 256<<10)
	digest, pending, err := e.produce(ctx, report, p, f, buffered, codec, release)
	if err == nil {
		*unsure = true
		err = buffered.Flush()
	}
	if err != nil {
		pw.CloseWithError(err)
		a := <-answered
		if a.err != nil && ctx.Err() == nil && (errors.Is(err, io.ErrClosedPipe) || errors.Is(err, a.err)) {
			return switchback.Point{}, a.err // the target's refusal is the cause
		}
		return switchback.Point{}, err
	}
	pw.Close()
	a := <-answered
	report.SentBytes = counted.n
	if dirty > smallPoint {
		e.tuner.observe(codec, report.ReadBytes, time.Since(begin))
	}
	if a.err != nil {
		return switchback.Point{}, a.err
	}
	if a.point.Digest != digest {
		return switchback.Point{}, switchback.Errorf(switchback.CodeCorrupt, "the target stored point %d as %s, sent was %s", p.Sequence, a.point.Digest, digest)
	}
	return a.point, e.index.Commit(pending, digest)
}

func (e *Engine) produce(ctx context.Context, report *CycleReport, p switchback.Point, f *frozen, w io.Writer, codec journal.Codec, release func() error) (string, *Pending, error) {
	sw, err := journal.NewSegmentWriter(w, segmentHeader(p, e.cfg.Disks, false), codec)
	if err != nil {
		return "", nil, err
	}
	defer sw.Abort()
	out := &segmentSink{w: sw}
	sc := &scanner{index: e.index, progress: func(n int64) { e.history.advance(0, n, 0) }}
	for i := range e.cfg.Disks {
		if err := sc.scan(ctx, i, f.readers[i], f.data[i], f.zero[i], out); err != nil {
			return "", nil, fmt.Errorf("disk %s: %w", e.cfg.Disks[i].Name, err)
		}
	}
	report.ReadBytes, report.ChangedBytes = sc.readBytes, sc.changedBytes
	// Everything is read: let go of the instant while the tail is on its way.
	go release()
	digest, err := sw.Seal()
	if err == nil {
		err = e.index.Log(&out.pending, digest)
	}
	if err == nil {
		_, err = sw.Finish()
	}
	return digest, &out.pending, err
}

func segmentHeader(p switchback.Point, disks []switchback.Disk, seed bool) journal.Header {
	h := journal.Header{Protection: p.Protection, Epoch: p.Epoch, Sequence: p.Sequence, Kind: p.Kind, Time: p.Time,
		Checkpoint: p.Checkpoint, Parent: p.Parent, Resync: p.Resync, ResyncReason: p.ResyncReason, Seed: seed}
	for _, d := range disks {
		h.Disks = append(h.Disks, journal.DiskGeometry{Name: d.Name, SizeBytes: d.SizeBytes})
	}
	return h
}

var _ DiskReader = (*nbd.Client)(nil)

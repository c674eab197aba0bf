package replicator

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/journal"
)

const (
	seedBatch      = 8 << 20   // raw bytes per segment of a seed
	seedInFlight   = 6         // segments under way to the target
	seedFlushBytes = 512 << 20 // raw bytes between two durable marks
	seedFlushEvery = 10 * time.Second
)

// seed makes the first full copy. What the target has flushed is in the block
// index under the session's name, so an interrupted copy reads the disks again
// but sends only what is missing or has changed since.
func (e *Engine) seed(ctx context.Context, report CycleReport, state TargetState, d Decision) (_ CycleReport, err error) {
	report.Mode, report.Reason = ModeSeed, d.Reason
	hv := e.cfg.Hypervisor
	if e.index.Resume(state.Session) {
		report.Reason = "the first full copy goes on"
	} else if err := e.index.Begin(state.Session); err != nil {
		return report, err
	}
	for _, name := range d.Drop {
		if err := hv.DeleteCheckpoint(ctx, e.cfg.VM, name); err != nil {
			return report, fmt.Errorf("delete checkpoint %s: %w", name, err)
		}
	}
	p := switchback.Point{Protection: e.cfg.Protection, Sequence: 1, Epoch: e.cfg.Epoch, Kind: switchback.CrashConsistent,
		Checkpoint: CheckpointName(e.cfg.Epoch, 1), Digest: state.Session}
	f, err := e.freeze(ctx, "", p.Checkpoint, crashWillDo)
	err = atSource(err)
	defer func() {
		if f == nil {
			return
		}
		c, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if rerr := f.release(c); err == nil {
			err = rerr
		}
	}()
	if err != nil {
		return report, err
	}
	p.Time = f.time
	report.Begin = e.now().Sub(report.StartedAt)
	guarded, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go e.guardScratch(guarded, cancel)
	if err := f.mapRanges(guarded, e.cfg.Disks, false, nil); err != nil {
		return report, causeOf(guarded, err)
	}
	begin := e.now()
	if err := e.sendSeed(guarded, &report, p, state.Session, f); err != nil {
		return report, causeOf(guarded, err)
	}
	if err := e.index.SetStamp(p.Digest); err != nil {
		return report, err
	}
	e.indexReady = true
	report.Point = p
	report.Transfer = e.now().Sub(begin)
	report.Total = e.now().Sub(report.StartedAt)
	return report, nil
}

func (e *Engine) sendSeed(ctx context.Context, report *CycleReport, p switchback.Point, session string, f *frozen) error {
	var total, data int64
	for i := range f.data {
		total += f.data[i].Bytes() + f.zero[i].Bytes()
		data += f.data[i].Bytes()
	}
	report.DirtyBytes = data
	e.history.begin(string(ModeSeed), e.now())
	e.history.advance(total, 0, 0)
	b := &batcher{engine: e, ctx: ctx, point: p, session: session, report: report, flushed: e.now()}
	b.group, b.groupCtx = errgroup.WithContext(ctx)
	b.group.SetLimit(seedInFlight)
	sc := &scanner{index: e.index, progress: func(n int64) { e.history.advance(0, n, 0) }}
	for i, disk := range e.cfg.Disks {
		if err := sc.scan(ctx, i, f.readers[i], f.data[i], f.zero[i], b); err != nil {
			b.abandon()
			return fmt.Errorf("disk %s: %w", disk.Name, err)
		}
	}
	report.ReadBytes, report.ChangedBytes = sc.readBytes, sc.changedBytes
	if err := b.flush(); err != nil {
		return err
	}
	p.ChangedBytes, p.StoredBytes = sc.changedBytes, 0
	return e.cfg.Target.FinishSeed(ctx, e.cfg.Epoch, session, p)
}

// batcher is the sink of a seed: it cuts the stream into segments, sends
// several at a time, and moves the index when the target has flushed them.
type batcher struct {
	engine  *Engine
	ctx     context.Context
	point   switchback.Point
	session string
	report  *CycleReport

	group    *errgroup.Group
	groupCtx context.Context

	buf     *bytes.Buffer
	w       *journal.SegmentWriter
	raw     int64 // bytes in w
	zeros   int   // zero extents in w
	pending Pending

	// the run of segments with one codec that is being measured
	tuneCodec journal.Codec
	tuneBegin time.Time
	tuneRaw   int64
	tuneLeft  int

	unflushed []Pending // of segments handed to group
	since     int64
	flushed   time.Time
}

// open makes room for the next run. A full segment is cut here, between two
// runs, when all blocks of the last one are known.
func (b *batcher) open() error {
	if b.w != nil && (b.raw >= seedBatch || b.zeros >= 4096) {
		if err := b.cut(); err != nil {
			return err
		}
	}
	if b.w != nil {
		return nil
	}
	b.buf = batchBuffers.Get().(*bytes.Buffer)
	b.buf.Reset()
	codec := b.codec()
	b.report.Codec = codec.String()
	w, err := journal.NewSegmentWriter(b.buf, segmentHeader(b.point, b.engine.cfg.Disks, true), codec)
	b.w, b.raw, b.zeros = w, 0, 0
	return err
}

func (b *batcher) Data(disk int, off int64, p []byte) error {
	if err := b.open(); err != nil {
		return err
	}
	b.raw += int64(len(p))
	if err := b.engine.index.Distrust(disk, off, int64(len(p))); err != nil {
		return err
	}
	return b.w.Data(disk, off, p)
}

func (b *batcher) Zero(disk int, off, n int64) error {
	if err := b.open(); err != nil {
		return err
	}
	b.zeros++
	if err := b.engine.index.Distrust(disk, off, n); err != nil {
		return err
	}
	return b.w.Zero(disk, off, n)
}

func (b *batcher) Known(disk int, block int64, h Hash) error {
	b.pending.add(disk, block, h)
	return nil
}

// batchBuffers hold finished segments on their way.
var batchBuffers = sync.Pool{New: func() any { return bytes.NewBuffer(make([]byte, 0, seedBatch+2<<20)) }}

// tuneBatches is how many segments in a row have one codec, so that the rate of
// the whole pipeline with it can be told.
const tuneBatches = 8

// codec chooses the compression of the next segment.
func (b *batcher) codec() journal.Codec {
	if fixed, ok := fixedCodec(b.engine.cfg.Policy.Compression); ok {
		return fixed
	}
	if b.tuneLeft == 0 {
		now := time.Now()
		if !b.tuneBegin.IsZero() {
			b.engine.tuner.observe(b.tuneCodec, b.tuneRaw, now.Sub(b.tuneBegin))
		}
		b.tuneCodec, b.tuneBegin, b.tuneRaw, b.tuneLeft = b.engine.tuner.choose(journal.CodecNone), now, 0, tuneBatches
	}
	b.tuneLeft--
	return b.tuneCodec
}

// cut hands the segment gathered so far to the senders.
func (b *batcher) cut() error {
	if b.w == nil {
		return nil
	}
	w, buf := b.w, b.buf
	b.w = nil
	b.unflushed = append(b.unflushed, b.pending)
	b.pending = Pending{}
	b.since += b.raw
	b.tuneRaw += b.raw
	if _, err := w.Seal(); err != nil {
		return err
	}
	if _, err := w.Finish(); err != nil {
		return err
	}
	if err := b.groupCtx.Err(); err != nil {
		return b.group.Wait()
	}
	if err := b.engine.index.SyncDistrust(); err != nil {
		return err
	}
	b.group.Go(func() error {
		n := int64(buf.Len())
		if err := b.engine.cfg.Target.SendSeed(b.groupCtx, b.engine.cfg.Epoch, b.session, bytes.NewReader(buf.Bytes())); err != nil {
			return err // the buffer may still be read from: it is not used again
		}
		batchBuffers.Put(buf)
		b.engine.history.advance(0, 0, n)
		return nil
	})
	b.report.SentBytes += int64(buf.Len())
	if b.since >= seedFlushBytes || b.engine.now().Sub(b.flushed) >= seedFlushEvery {
		return b.flush()
	}
	return nil
}

// flush waits for the senders, makes the target durable and moves the index.
func (b *batcher) flush() error {
	if b.w != nil {
		if err := b.cut(); err != nil {
			return err
		}
	}
	if err := b.group.Wait(); err != nil {
		return err
	}
	b.group, b.groupCtx = errgroup.WithContext(b.ctx)
	b.group.SetLimit(seedInFlight)
	if err := b.engine.cfg.Target.FlushSeed(b.ctx, b.engine.cfg.Epoch, b.session); err != nil {
		return err
	}
	for i := range b.unflushed {
		if err := b.engine.index.Apply(&b.unflushed[i]); err != nil {
			return err
		}
	}
	b.unflushed, b.since, b.flushed = nil, 0, b.engine.now()
	return nil
}

func (b *batcher) abandon() {
	if b.w != nil {
		b.w.Abort()
	}
	b.group.Wait() // its error is a consequence of the one that made us stop
}

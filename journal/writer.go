package journal

import (
	"encoding/binary"
	"encoding/hex"
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/zeebo/xxh3"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// Summary is what a finished segment amounts to.
type Summary struct {
	// Digest identifies the segment (BLAKE3-256, hexadecimal).
	Digest string `json:"digest"`
	// StoredBytes is the length of the segment.
	StoredBytes int64 `json:"stored_bytes"`
	// ChangedBytes is DataBytes + ZeroBytes.
	ChangedBytes int64 `json:"changed_bytes"`
	DataBytes    int64 `json:"data_bytes"`
	ZeroBytes    int64 `json:"zero_bytes"`
	// PayloadBytes is the compressed content alone; Frames counts its frames.
	// Both are 0 in the summary of a received segment.
	PayloadBytes int64 `json:"payload_bytes,omitempty"`
	Frames       int   `json:"frames,omitempty"`
}

// SegmentWriter produces a segment as a stream. Its methods are for one
// goroutine, except Progress. Compression runs on goroutines of its own, which
// end with Seal, Finish or Abort: one of Finish and Abort must be called. The
// first error sticks.
//
// At most about 64 KiB for each disk and 400 KiB for each processor are
// buffered, besides 32 bytes per frame and 16 per extent for the index.
type SegmentWriter struct {
	w      io.Writer
	disks  []DiskGeometry
	head   []byte // the header's bytes
	codec  Codec
	gather []*frameJob // the frame being filled, per disk; nil if none
	ix     index       // extents are added by the caller's goroutine, frames by that of emit

	work    chan *frameJob // to the compressors
	ordered chan *frameJob // to emit, in the order of the file
	slots   chan struct{}  // bounds the jobs in flight
	running sync.WaitGroup
	started bool
	drained bool // no goroutine runs any more

	fault   atomic.Pointer[error]
	rawIn   atomic.Int64
	written atomic.Int64

	sealed []byte // the index's bytes, after Seal
	foot   footer
	done   bool
}

// frameJob is one frame on its way. Jobs are recycled across segments.
type frameJob struct {
	disk  uint16
	codec Codec
	raw   []byte // at most maxFrame
	out   []byte // frame head and stored bytes
	frame frame
	ready chan struct{} // capacity 1
}

var jobPool = sync.Pool{New: func() any {
	return &frameJob{
		raw:   make([]byte, 0, maxFrame),
		out:   make([]byte, 0, frameHeadSize+maxFrame+maxFrame/4),
		ready: make(chan struct{}, 1),
	}
}}

// NewSegmentWriter returns a writer of the segment with header h to w. Nothing
// is written and no goroutine runs before the first full frame or Seal.
func NewSegmentWriter(w io.Writer, h Header, c Codec) (*SegmentWriter, error) {
	head, err := encodeHeader(h)
	if err != nil {
		return nil, err
	}
	if c > CodecZstd {
		return nil, switchback.Errorf(switchback.CodeInvalid, "unknown %v", c)
	}
	return &SegmentWriter{
		w: w, disks: h.Disks, head: head, codec: c,
		gather: make([]*frameJob, len(h.Disks)),
		ix:     index{disks: make([]diskIndex, len(h.Disks))},
	}, nil
}

// SetCodec changes the compression of the frames that begin after this call.
func (s *SegmentWriter) SetCodec(c Codec) {
	if c <= CodecZstd {
		s.codec = c
	}
}

// Progress returns how many bytes Data has taken and how many bytes have been
// written. Safe to call from any goroutine.
func (s *SegmentWriter) Progress() (raw, written int64) {
	return s.rawIn.Load(), s.written.Load()
}

// Data adds the content p of a disk at offset; it copies p. Offset and length
// are multiples of 512 and no byte of a disk may be given twice, by Data or
// Zero (Seal refuses it). It blocks while w is slow.
func (s *SegmentWriter) Data(disk int, offset int64, p []byte) error {
	if err := s.accept(disk, offset, int64(len(p))); err != nil || len(p) == 0 {
		return err
	}
	d := &s.ix.disks[disk]
	d.data = appendExtent(d.data, extent.Range{Offset: offset, Length: int64(len(p))})
	s.rawIn.Add(int64(len(p)))
	for len(p) > 0 {
		job := s.gather[disk]
		if job == nil {
			job = jobPool.Get().(*frameJob)
			job.disk, job.codec, job.raw = uint16(disk), s.codec, job.raw[:0]
			s.gather[disk] = job
		}
		n := min(len(p), maxFrame-len(job.raw))
		job.raw = append(job.raw, p[:n]...)
		p = p[n:]
		if len(job.raw) == maxFrame {
			s.dispatch(disk)
		}
	}
	return s.err()
}

// Zero records that the bytes [offset, offset+length) of a disk are zero.
func (s *SegmentWriter) Zero(disk int, offset, length int64) error {
	if err := s.accept(disk, offset, length); err != nil || length == 0 {
		return err
	}
	d := &s.ix.disks[disk]
	d.zero = appendExtent(d.zero, extent.Range{Offset: offset, Length: length})
	return nil
}

func (s *SegmentWriter) accept(disk int, offset, length int64) error {
	if err := s.err(); err != nil {
		return err
	}
	if s.sealed != nil {
		return switchback.Errorf(switchback.CodeInternal, "segment is sealed")
	}
	if disk < 0 || disk >= len(s.disks) {
		return switchback.Errorf(switchback.CodeInvalid, "disk %d of %d", disk, len(s.disks))
	}
	size := s.disks[disk].SizeBytes
	if offset < 0 || length < 0 || offset%sector != 0 || length%sector != 0 || length > size || offset > size-length {
		return switchback.Errorf(switchback.CodeInvalid, "disk %s: offset %d, length %d: not sectors of a disk of %d bytes",
			s.disks[disk].Name, offset, length, size)
	}
	return nil
}

// dispatch sends the frame being gathered for disk on its way.
func (s *SegmentWriter) dispatch(disk int) {
	job := s.gather[disk]
	if job == nil {
		return
	}
	s.gather[disk] = nil
	s.start()
	s.slots <- struct{}{}
	s.ordered <- job
	s.work <- job
}

func (s *SegmentWriter) start() {
	if s.started {
		return
	}
	s.started = true
	workers := min(runtime.GOMAXPROCS(0), 8)
	inFlight := 2*workers + 1
	s.work = make(chan *frameJob, inFlight)
	s.ordered = make(chan *frameJob, inFlight)
	s.slots = make(chan struct{}, inFlight)
	s.running.Go(s.emit)
	for range workers {
		s.running.Go(func() {
			for job := range s.work {
				job.pack()
				job.ready <- struct{}{}
			}
		})
	}
}

// pack compresses and checksums the job's raw bytes.
func (j *frameJob) pack() {
	out, codec := compress(j.out[:frameHeadSize], j.raw, j.codec)
	j.out = out
	j.frame = frame{
		stored: uint32(len(out) - frameHeadSize), disk: j.disk,
		sectors: uint8(len(j.raw)/sector - 1), codec: codec, sum: xxh3.Hash128(j.raw).Bytes(),
	}
	j.frame.putHead(out)
}

// putHead writes the frame head to the first frameHeadSize bytes of b.
func (f *frame) putHead(b []byte) {
	b[0], b[1] = frameTag, byte(f.codec)
	binary.LittleEndian.PutUint16(b[2:], f.disk)
	b[4] = f.sectors
	b[5], b[6], b[7] = byte(f.stored), byte(f.stored>>8), byte(f.stored>>16)
	copy(b[8:16], f.sum[8:])
}

// emit writes header and frames in order. After an error it only drains.
func (s *SegmentWriter) emit() {
	s.write(s.head)
	for job := range s.ordered {
		<-job.ready
		job.frame.offset = int64(len(s.head)) + frameHeadSize
		if n := len(s.ix.frames); n > 0 {
			last := &s.ix.frames[n-1]
			job.frame.offset = last.offset + int64(last.stored) + frameHeadSize
		}
		s.ix.frames = append(s.ix.frames, job.frame)
		s.write(job.out)
		jobPool.Put(job)
		<-s.slots
	}
}

func (s *SegmentWriter) write(b []byte) {
	if s.err() != nil {
		return
	}
	n, err := s.w.Write(b)
	s.written.Add(int64(n))
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	if err != nil {
		s.fail(err)
	}
}

func (s *SegmentWriter) err() error {
	if p := s.fault.Load(); p != nil {
		return *p
	}
	return nil
}

func (s *SegmentWriter) fail(err error) { s.fault.CompareAndSwap(nil, &err) }

// drain waits until all frames that were dispatched are written.
func (s *SegmentWriter) drain() {
	if s.drained {
		return
	}
	s.drained = true
	if s.started {
		close(s.work)
		close(s.ordered)
		s.running.Wait()
	}
}

// Seal ends the content: it writes what is still gathered and returns the
// digest, before index and footer are written. A source logs the digest
// durably at this moment, so that it knows after a crash what it may have
// sent. Calling it again returns the same.
func (s *SegmentWriter) Seal() (string, error) {
	if s.sealed == nil && s.err() == nil {
		for disk := range s.gather {
			s.dispatch(disk)
		}
		s.start()
		s.drain()
		if s.err() == nil {
			if err := s.seal(); err != nil {
				s.fail(err)
			}
		}
	}
	if err := s.err(); err != nil {
		return "", err
	}
	return hex.EncodeToString(s.foot.digest[:]), nil
}

func (s *SegmentWriter) seal() error {
	if err := s.ix.check(s.disks); err != nil {
		return err
	}
	b, err := s.ix.encode()
	if err != nil {
		return err
	}
	data, zero := s.ix.totals()
	s.foot = footer{
		indexOffset: s.written.Load(), indexLength: int64(len(b)),
		dataBytes: data, zeroBytes: zero, digest: digest(s.head, b),
	}
	s.sealed = b
	return nil
}

// Finish seals if that was not done, writes index and footer and returns what
// the segment amounts to. It does not close w.
func (s *SegmentWriter) Finish() (Summary, error) {
	if _, err := s.Seal(); err != nil {
		s.Abort()
		return Summary{}, err
	}
	if !s.done {
		s.done = true
		s.write(s.sealed)
		s.write(s.foot.encode())
	}
	if err := s.err(); err != nil {
		return Summary{}, err
	}
	sum := s.foot.summary(s.foot.indexOffset + s.foot.indexLength + footerSize)
	sum.Frames = len(s.ix.frames)
	for i := range s.ix.frames {
		sum.PayloadBytes += int64(s.ix.frames[i].stored)
	}
	return sum, nil
}

// Abort gives the segment up. What was written so far has no footer and is
// refused by every reader. Abort waits for a Write in progress: a caller whose w may
// hang closes it first. After Finish it does nothing.
func (s *SegmentWriter) Abort() {
	if s.done {
		return
	}
	s.fail(switchback.Errorf(switchback.CodeCancelled, "segment was aborted"))
	s.drain()
	for i, job := range s.gather {
		if job != nil {
			jobPool.Put(job)
			s.gather[i] = nil
		}
	}
}

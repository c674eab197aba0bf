package nbd

import (
	"bufio"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// session is a server's connection to one client after the handshake.
type session struct {
	log        *slog.Logger
	conn       net.Conn
	br         *bufio.Reader
	backend    Backend
	cheap      CheapReader // the backend, if it is one
	size       int64
	structured bool
	status     bool // base:allocation was negotiated

	wmu      sync.Mutex // held while a reply is written
	workers  sync.WaitGroup
	running  chan struct{} // holds a token for each worker
	buffered *semaphore.Weighted
	meanRead atomic.Int64 // nanoseconds; of reads up to maxInline
}

func newSession(log *slog.Logger, conn net.Conn, backend Backend, structured, status bool) *session {
	s := &session{log: log, conn: conn, br: bufio.NewReaderSize(conn, 4096), backend: backend, size: backend.Size(),
		structured: structured, status: status && structured,
		running: make(chan struct{}, maxWorkers), buffered: semaphore.NewWeighted(maxBuffered)}
	s.cheap, _ = backend.(CheapReader)
	return s
}

// serve handles requests until the client leaves or ctx ends, and returns when
// none is being handled any more.
func (s *session) serve(ctx context.Context) {
	defer s.workers.Wait()
	for {
		h, err := s.br.Peek(requestSize)
		if err != nil {
			if !errors.Is(err, io.EOF) && ctx.Err() == nil {
				s.log.Debug("nbd client lost", "err", err)
			}
			return
		}
		r, err := parseRequest(h)
		if err != nil {
			s.log.Warn("nbd client broke the protocol", "err", err)
			return
		}
		s.br.Discard(requestSize)
		if r.command == cmdDisc {
			return
		}
		if r.command == cmdWrite {
			// Its payload follows, however it is answered.
			if r.length > maxPayload {
				s.log.Warn("nbd client broke the protocol", "err", protocolErrorf("write of %d bytes", r.length))
				return
			}
			if _, err := s.br.Discard(int(r.length)); err != nil {
				return
			}
		}
		if err := s.dispatch(ctx, r); err != nil {
			s.conn.Close()
			return
		}
	}
}

// dispatch handles r, here or by a worker. An error is one of the connection.
func (s *session) dispatch(ctx context.Context, r request) error {
	if errno, msg := s.check(r); errno != 0 {
		return s.fail(r, errno, msg)
	}
	switch {
	case r.command == cmdFlush || r.length == 0:
		return s.ack(r)
	case r.command == cmdRead && s.inline(r):
		return s.read(r)
	}
	weight := int64(headRoom)
	if r.command == cmdRead {
		weight += int64(r.length)
	}
	if err := s.buffered.Acquire(ctx, weight); err != nil {
		return err
	}
	s.running <- struct{}{}
	s.workers.Go(func() {
		defer func() {
			s.buffered.Release(weight)
			<-s.running
		}()
		var err error
		if r.command == cmdRead {
			err = s.read(r)
		} else {
			err = s.blockStatus(r)
		}
		if err != nil {
			s.conn.Close() // which ends serve
		}
	})
	return nil
}

// check refuses what cannot be done at all.
func (s *session) check(r request) (errno uint32, message string) {
	switch r.command {
	case cmdWrite, cmdTrim, cmdWriteZeroes:
		return errnoPerm, "the export is read-only"
	case cmdFlush:
		return 0, ""
	case cmdRead:
		if r.length > maxPayload {
			return errnoInval, "the read is too large"
		}
	case cmdBlockStatus:
		if !s.status {
			return errnoInval, "no metadata context was negotiated"
		}
		if r.length == 0 {
			return errnoInval, "the range is empty"
		}
	default:
		return errnoInval, "unknown command"
	}
	if r.offset > uint64(s.size) || uint64(r.length) > uint64(s.size)-r.offset {
		return errnoInval, "the range is outside of the export"
	}
	return 0, ""
}

// inline decides whether a read is done by the goroutine that receives
// requests. For small reads from memory handing over costs more than reading;
// a slow one here would hold up all that come behind it.
func (s *session) inline(r request) bool {
	switch {
	case r.length > maxInline:
		return false
	case s.cheap != nil:
		return s.cheap.ReadCheap(int64(r.offset), int64(r.length))
	}
	return s.meanRead.Load() < int64(slowRead)
}

// observe keeps a moving mean of the time that small reads take.
func (s *session) observe(d time.Duration) {
	old := s.meanRead.Load()
	s.meanRead.Store(old + (int64(d)-old)/8)
}

func (s *session) read(r request) error {
	n := int(r.length)
	if s.structured && n >= holeCheck && s.allZero(int64(r.offset), int64(n)) {
		return s.hole(r)
	}
	buf := getBuffer(n)
	defer buf.put()
	p := buf.payload(n)
	start := time.Now()
	m, err := s.backend.ReadAt(p, int64(r.offset))
	if n <= maxInline {
		s.observe(time.Since(start))
	}
	if m != n {
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		s.log.Error("read for nbd client", "offset", r.offset, "length", n, "err", err)
		return s.fail(r, errnoIO, "read error")
	}
	var head []byte
	if s.structured {
		head = buf.b[headRoom-chunkSize-8 : headRoom]
		putChunkHeader(head, chunkHeader{chunkDone, chunkOffsetData, r.handle, r.length + 8})
		be.PutUint64(head[chunkSize:], r.offset)
	} else {
		head = buf.b[headRoom-simpleSize : headRoom]
		putSimple(head, 0, r.handle)
	}
	return s.write(buf.b[headRoom-len(head) : headRoom+n])
}

func putSimple(b []byte, errno uint32, handle uint64) {
	be.PutUint32(b, magicSimple)
	be.PutUint32(b[4:], errno)
	be.PutUint64(b[8:], handle)
}

// allZero reports that the backend knows the range to be zero. Its error is
// left for the read to find.
func (s *session) allZero(off, n int64) bool {
	list, err := s.backend.Extents(off, n)
	if err != nil {
		return false
	}
	for _, e := range list {
		switch {
		case e.End() <= off:
		case e.Offset > off || !e.Zero():
			return false
		case e.End() >= off+n:
			return true
		default:
			n -= e.End() - off
			off = e.End()
		}
	}
	return false
}

func (s *session) hole(r request) error {
	var b [chunkSize + 12]byte
	putChunkHeader(b[:], chunkHeader{chunkDone, chunkOffsetHole, r.handle, 12})
	be.PutUint64(b[chunkSize:], r.offset)
	be.PutUint32(b[chunkSize+8:], r.length)
	return s.write(b[:])
}

// ack answers a request that has no data.
func (s *session) ack(r request) error {
	if !s.structured {
		var b [simpleSize]byte
		putSimple(b[:], 0, r.handle)
		return s.write(b[:])
	}
	var b [chunkSize]byte
	putChunkHeader(b[:], chunkHeader{chunkDone, chunkNone, r.handle, 0})
	return s.write(b[:])
}

// fail answers a request with an error.
func (s *session) fail(r request, errno uint32, message string) error {
	if !s.structured {
		var b [simpleSize]byte
		putSimple(b[:], errno, r.handle)
		return s.write(b[:])
	}
	b := make([]byte, chunkSize, chunkSize+6+len(message))
	putChunkHeader(b, chunkHeader{chunkDone, chunkError, r.handle, uint32(6 + len(message))})
	b = be.AppendUint32(b, errno)
	b = be.AppendUint16(b, uint16(len(message)))
	return s.write(append(b, message...))
}

func (s *session) write(b []byte) error {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	_, err := s.conn.Write(b)
	return err
}

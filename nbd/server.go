package nbd

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"sync"
	"syscall"
	"time"
)

// Backend is what a Server serves under one name. Its methods are called by
// many goroutines at once. Its size must not change.
type Backend interface {
	// Size in bytes.
	Size() int64
	// ReadAt fills p from off; the server only asks for ranges inside of Size.
	ReadAt(p []byte, off int64) (int, error)
	// Extents describes [off, off+length) with the flags of base:allocation, in
	// order. What it leaves out is taken as data; it may tell more or less than
	// was asked.
	Extents(off, length int64) ([]Extent, error)
}

// CheapReader may be implemented by a Backend that knows which reads do not
// block for long. Those are done without handing them to another goroutine.
// Without it the server goes by the time that recent reads took.
type CheapReader interface {
	ReadCheap(off, length int64) bool
}

const (
	// maxWorkers bounds the requests of a connection that are worked on.
	maxWorkers = 16
	// maxBuffered bounds the bytes that a connection holds in buffers.
	maxBuffered = 2 * maxPayload
	// holeCheck is the size from which on a read asks the backend for extents
	// first, to answer with a hole. Below it that costs more than it saves.
	holeCheck = 64 << 10
	// maxInline is the size up to which reads may be done by the receiver.
	maxInline = 64 << 10
	// slowRead is the mean time above which reads are not done by the receiver.
	slowRead = 200 * time.Microsecond
	// drainTime is how long replies may take to go out when the server stops.
	drainTime = 2 * time.Second
)

// Server serves exports read-only to any number of clients.
type Server struct {
	lookup func(export string) (Backend, error)
	list   func() []string
	log    *slog.Logger
}

// NewServer makes a server. lookup returns the backend of an export, which
// must stay usable while clients are connected, or an error, of which
// CodeNotFound and CodeRefused are told apart towards the client; it is called
// at least once for each connection and may be called by several at once. list
// names the exports to those who ask; nil answers that the server does not
// tell. log gets backend errors; nil is slog.Default.
func NewServer(lookup func(export string) (Backend, error), list func() []string, log *slog.Logger) *Server {
	if log == nil {
		log = slog.Default()
	}
	return &Server{lookup: lookup, list: list, log: log}
}

// Serve takes clients from l until ctx ends, then closes l, gives replies in
// the making a short time to go out and returns nil when all connections are
// closed. An error of the listener is returned likewise. Several Serve on
// several listeners may run at once.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return nil
		case temporary(err):
			// Out of descriptors: clients that leave give some back.
			s.log.Warn("accept nbd client", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		case err != nil:
			l.Close()
			return err
		}
		conns.Go(func() { s.ServeConn(ctx, conn) })
	}
}

// temporary reports an error of accept that says nothing about the listener.
func temporary(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ServeConn serves one client and returns when it is gone or ctx ended. It
// closes conn.
func (s *Server) ServeConn(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	tuneSocket(conn)
	var backend Backend
	var export string
	var structured, status bool
	err := boundHandshake(ctx, conn, func() error {
		h := serverHandshake{server: s, rw: conn}
		var err error
		backend, err = h.run()
		export, structured, status = h.export, h.structured, h.contextSet
		return err
	})
	if err != nil || backend == nil {
		if err != nil && ctx.Err() == nil {
			s.log.Debug("nbd handshake", "err", err)
		}
		return
	}
	stop := context.AfterFunc(ctx, func() {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
		_ = conn.SetWriteDeadline(time.Now().Add(drainTime))
	})
	defer stop()
	newSession(s.log.With("export", export), conn, backend, structured, status).serve(ctx)
}

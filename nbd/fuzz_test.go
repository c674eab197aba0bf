package nbd

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// scripted is a peer that says what it was given and listens to nothing.
type scripted struct {
	net.Conn
	in io.Reader
}

func newScripted(b []byte) *scripted {
	return &scripted{in: bytes.NewReader(b)}
}

func (s *scripted) Read(p []byte) (int, error)       { return s.in.Read(p) }
func (s *scripted) Write(p []byte) (int, error)      { return len(p), nil }
func (s *scripted) Close() error                     { return nil }
func (s *scripted) SetDeadline(time.Time) error      { return nil }
func (s *scripted) SetReadDeadline(time.Time) error  { return nil }
func (s *scripted) SetWriteDeadline(time.Time) error { return nil }

// goodHandshake is what a server says until transmission.
func goodHandshake() []byte {
	b := be.AppendUint64(nil, magicInit)
	b = be.AppendUint64(b, magicOption)
	b = be.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	b = appendOptionReply(b, optionReply{optStructuredReply, repAck, nil})
	b = appendOptionReply(b, optionReply{optSetMetaContext, repMetaContext, append(be.AppendUint32(nil, 5), ContextAllocation...)})
	b = appendOptionReply(b, optionReply{optSetMetaContext, repAck, nil})
	info := be.AppendUint64(be.AppendUint16(nil, infoExport), 1<<20)
	b = appendOptionReply(b, optionReply{optGo, repInfo, be.AppendUint16(info, uint16(FlagHasFlags))})
	return appendOptionReply(b, optionReply{optGo, repAck, nil})
}

func FuzzClientHandshake(f *testing.F) {
	good := goodHandshake()
	f.Add(good)
	f.Add(good[:40])
	f.Add(appendOptionReply(good[:18:18], optionReply{optStructuredReply, repErrUnsup, []byte("no")}))
	f.Add(appendOptionReply(good[:18:18], optionReply{optGo, repInfo, nil}))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Open(context.Background(), newScripted(b), Options{Export: "x", MetaContexts: []string{ContextAllocation}})
		if err == nil {
			if c.Size() < 0 {
				t.Errorf("size %d", c.Size())
			}
			c.Close()
		}
	})
}

func chunkBytes(flags, kind uint16, handle uint64, payload []byte) []byte {
	b := make([]byte, chunkSize)
	putChunkHeader(b, chunkHeader{flags, kind, handle, uint32(len(payload))})
	return append(b, payload...)
}

// askScripted makes r the first request of a client whose server answers it
// with the bytes and then ends.
func askScripted(t *testing.T, r request, answer []byte) ([]byte, []Extent, error) {
	asked, gate := io.Pipe()
	peer := newScripted(nil)
	peer.in = io.MultiReader(bytes.NewReader(goodHandshake()), asked, bytes.NewReader(answer))
	c, err := Open(context.Background(), peer, Options{MetaContexts: []string{ContextAllocation}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	o := newOp()
	s, err := c.acquire(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	p := bytes.Repeat([]byte{0xee}, int(r.length))
	s.buf, s.context = p, 5
	c.start(o, s, r)
	err = c.send(context.Background(), o, nil)
	gate.Close()
	extents, err := c.wait(context.Background(), o, err)
	return p, extents, err
}

// FuzzClientReplies lets a server answer one read or block status anything.
// Whatever it says, the call ends, and extents are in order and in the range.
func FuzzClientReplies(f *testing.F) {
	const handle = 1<<32 | 1<<31 // the first request
	data := append(be.AppendUint64(nil, 512), bytes.Repeat([]byte{7}, 100)...)
	half := append(be.AppendUint64(nil, 562), bytes.Repeat([]byte{7}, 50)...)
	hole := be.AppendUint32(be.AppendUint64(nil, 512), 50)
	simple := make([]byte, simpleSize)
	putSimple(simple, errnoIO, handle)
	f.Add(false, chunkBytes(chunkDone, chunkOffsetData, handle, data))
	f.Add(false, append(chunkBytes(0, chunkOffsetHole, handle, hole), chunkBytes(chunkDone, chunkOffsetData, handle, half)...))
	f.Add(false, append(chunkBytes(0, chunkOffsetData, handle, half), chunkBytes(chunkDone, chunkOffsetHole, handle, hole)...))
	f.Add(false, append(chunkBytes(0, chunkOffsetData, handle, half), chunkBytes(chunkDone, chunkOffsetData, handle, half)...))
	f.Add(false, chunkBytes(chunkDone, chunkNone, handle, nil))
	f.Add(false, chunkBytes(chunkDone, chunkError, handle, append([]byte{0, 0, 0, 5, 0, 2}, "no"...)))
	f.Add(false, chunkBytes(chunkDone, chunkErrorOffset, handle, append([]byte{0, 0, 0, 5, 0, 0}, data[:8]...)))
	f.Add(false, simple)
	f.Add(true, chunkBytes(chunkDone, chunkBlockStatus, handle, []byte{0, 0, 0, 5, 0, 0, 0, 50, 0, 0, 0, 3}))
	f.Add(true, chunkBytes(chunkDone, chunkBlockStatus, handle, []byte{0, 0, 0, 9, 0, 0, 0, 50, 0, 0, 0, 3}))
	f.Fuzz(func(t *testing.T, status bool, b []byte) {
		r := request{command: cmdRead, offset: 512, length: 100}
		if status {
			r.command = cmdBlockStatus
		}
		_, extents, err := askScripted(t, r, b)
		if err == nil && status {
			if len(extents) == 0 || extents[0].Offset != 512 || extents[len(extents)-1].End() > 612 {
				t.Errorf("extents %v", extents)
			}
		}
		if err != nil && switchback.CodeOf(err) == "" {
			t.Errorf("error without a code: %v", err)
		}
	})
}

// FuzzServer lets a client say anything.
func FuzzServer(f *testing.F) {
	hello := be.AppendUint32(nil, flagFixedNewstyle|flagNoZeroes)
	open := appendOption(bytes.Clone(hello), optStructuredReply, nil)
	open = appendOption(open, optList, nil)
	open = appendOption(open, optListMetaContext, appendMetaQuery(nil, "x", nil))
	open = appendOption(open, optSetMetaContext, appendMetaQuery(nil, "x", []string{ContextAllocation}))
	open = appendOption(open, optInfo, be.AppendUint16(be.AppendUint16(appendString(nil, "x"), 1), infoBlockSize))
	open = appendOption(open, optGo, be.AppendUint16(appendString(nil, "x"), 0))
	f.Add(hello)
	f.Add(appendOption(bytes.Clone(hello), optAbort, nil))
	f.Add(appendRequest(appendOption(bytes.Clone(hello), optExportName, []byte("x")), request{command: cmdRead, length: 9}))
	for _, r := range []request{
		{command: cmdRead, length: 512}, {command: cmdRead, length: 64 << 10}, {command: cmdRead, offset: 1<<64 - 1, length: 2},
		{command: cmdBlockStatus, length: 1 << 20}, {command: cmdBlockStatus, flags: cmdFlagReqOne, offset: 5, length: 6},
		{command: cmdWrite, length: 5}, {command: cmdFlush}, {command: cmdDisc}, {command: 99},
	} {
		f.Add(appendRequest(bytes.Clone(open), r))
	}
	backend := newMemory(sparseContent()[:1<<20+100])
	server := NewServer(func(string) (Backend, error) { return backend, nil }, func() []string { return []string{"x"} },
		slog.New(slog.DiscardHandler))
	f.Fuzz(func(t *testing.T, b []byte) {
		server.ServeConn(context.Background(), newScripted(b))
	})
}

// FuzzDecoders gives bytes to all decoders of single messages.
func FuzzDecoders(f *testing.F) {
	f.Add(appendRequest(nil, request{command: cmdRead, length: 9}))
	f.Add(appendMetaQuery(nil, "x", []string{"a", "b"}))
	f.Add(be.AppendUint16(appendString(nil, "x"), 0))
	f.Add([]byte{0, 0, 0, 5, 0, 0, 0, 50, 0, 0, 0, 3})
	f.Add(appendOption(nil, optGo, []byte("data")))
	f.Add(appendOptionReply(nil, optionReply{optGo, repInfo, []byte("data")}))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRequest(b); err == nil && !bytes.Equal(appendRequest(nil, r), b[:requestSize]) {
			t.Error("request does not survive a round trip")
		}
		if name, infos, ok := parseGo(b); ok {
			back := be.AppendUint16(appendString(nil, name), uint16(len(infos)))
			for _, i := range infos {
				back = be.AppendUint16(back, i)
			}
			if !bytes.Equal(back, b) {
				t.Error("go option does not survive a round trip")
			}
		}
		if name, queries, ok := parseMetaQuery(b); ok && !bytes.Equal(appendMetaQuery(nil, name, queries), b) {
			t.Error("metadata query does not survive a round trip")
		}
		if list, _, err := appendStatus(nil, b, 1000, 2000); err == nil {
			at := int64(1000)
			for _, e := range list {
				if e.Offset != at || e.Length <= 0 || e.End() > 2000 {
					t.Fatalf("extents %v", list)
				}
				at = e.End()
			}
		}
		if h, err := parseChunkHeader(b); err == nil && h.length > 8+maxPayload {
			t.Errorf("chunk of %d bytes", h.length)
		}
		if r, err := readOptionReply(bytes.NewReader(b)); err == nil && len(r.data) > len(b) {
			t.Error("option reply longer than its bytes")
		}
		parseErrorChunk(b)
		parseOptionHeader(b)
	})
}

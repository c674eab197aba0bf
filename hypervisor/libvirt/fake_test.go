package libvirt

import (
	"context"
	"io"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// fake is a libvirtd that a test scripts: it opens connections by itself and
// hands every other call to handle.
type fake struct {
	t        *testing.T
	socket   string
	auth     uint32
	mute     atomic.Bool // reads and answers nothing
	handle   func(c *fakeConn, h header, payload []byte)
	listener net.Listener
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns []*fakeConn
}

type fakeConn struct {
	net.Conn
	mu sync.Mutex
}

func (c *fakeConn) send(h header, payload []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Write(frame(h, payload))
}

func (c *fakeConn) reply(to header, payload []byte) {
	to.kind, to.status = typeReply, statusOK
	c.send(to, payload)
}

func (c *fakeConn) refuse(to header, number int32, message string) {
	to.kind, to.status = typeReply, statusError
	c.send(to, errorPayload(number, message))
}

func errorPayload(number int32, message string) []byte {
	a := newArgs().i32(number).i32(10).optional(message).i32(2)
	return a.u32(0).optional("").optional("").optional("").i32(0).i32(0).u32(0).b
}

func startFake(t *testing.T, f *fake) *fake {
	t.Helper()
	f.t = t
	if f.socket == "" {
		f.socket = filepath.Join(t.TempDir(), "s")
	}
	l, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	f.listener = l
	f.wg.Go(func() {
		for {
			nc, err := l.Accept()
			if err != nil {
				return
			}
			c := &fakeConn{Conn: nc}
			f.mu.Lock()
			f.conns = append(f.conns, c)
			f.mu.Unlock()
			f.wg.Go(func() { f.serve(c) })
		}
	})
	t.Cleanup(f.stop)
	return f
}

func (f *fake) stop() {
	f.listener.Close()
	f.mu.Lock()
	for _, c := range f.conns {
		c.Close()
	}
	f.conns = nil
	f.mu.Unlock()
	f.wg.Wait()
}

func (f *fake) serve(c *fakeConn) {
	for {
		h, payload, err := readFrame(c)
		if err != nil {
			return
		}
		if f.mute.Load() {
			continue
		}
		switch {
		case h.program == programKeepAlive && h.procedure == procPing:
			h.procedure = procPong
			c.send(h, nil)
		case h.program == programKeepAlive:
		case h.procedure == procAuthList.number:
			c.reply(h, newArgs().u32(1).u32(f.auth).b)
		case h.procedure == procConnectSupportsFeature.number:
			c.reply(h, newArgs().u32(1).b)
		case h.procedure == procConnectOpen.number:
			c.reply(h, nil)
		case h.procedure == procEventRegisterAny.number:
			c.reply(h, newArgs().u32(1).b)
		case f.handle != nil:
			f.handle(c, h, payload)
		}
	}
}

func newFakeDriver(t *testing.T, f *fake, ka time.Duration) *Driver {
	t.Helper()
	d, err := New(Config{Socket: f.socket, KeepAliveInterval: ka, KeepAliveCount: 2, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

const someVM switchback.VMUUID = "01020304-0506-0708-090a-0b0c0d0e0f10"

func wantCode(t *testing.T, what string, err error, want switchback.Code) {
	t.Helper()
	if got := switchback.CodeOf(err); got != want {
		t.Errorf("%s: got error %v (code %q), want code %q", what, err, got, want)
	}
}

func TestCallsAreGated(t *testing.T) {
	var mu sync.Mutex
	var waiting []header
	var most int
	arrived := make(chan *fakeConn, 64)
	f := startFake(t, &fake{handle: func(c *fakeConn, h header, _ []byte) {
		mu.Lock()
		waiting = append(waiting, h)
		most = max(most, len(waiting))
		mu.Unlock()
		arrived <- c
	}})
	d := newFakeDriver(t, f, time.Minute)
	const calls = 12
	var wg sync.WaitGroup
	for range calls {
		wg.Go(func() {
			if err := d.Suspend(t.Context(), someVM); err != nil {
				t.Error(err)
			}
		})
	}
	for range calls {
		c := <-arrived
		// The last of the calls under way is answered first.
		time.Sleep(5 * time.Millisecond)
		mu.Lock()
		h := waiting[len(waiting)-1]
		waiting = waiting[:len(waiting)-1]
		mu.Unlock()
		c.reply(h, nil)
	}
	wg.Wait()
	if most > callsPerConn {
		t.Errorf("%d calls were under way at once on one connection, more than %d", most, callsPerConn)
	}
}

func TestLateReplyIsDropped(t *testing.T) {
	first := make(chan func(), 1)
	f := startFake(t, &fake{handle: func(c *fakeConn, h header, _ []byte) {
		if h.procedure == procDomainSuspend.number {
			first <- func() { c.refuse(h, errNoDomain, "late") }
			return
		}
		c.reply(h, nil)
	}})
	d := newFakeDriver(t, f, time.Minute)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- d.Suspend(ctx, someVM) }()
	late := <-first
	cancel()
	wantCode(t, "the call that was given up", <-ended, switchback.CodeCancelled)
	late()
	if err := d.Resume(t.Context(), someVM); err != nil {
		t.Errorf("the next call got the late reply: %v", err)
	}
	r, _ := ref(someVM)
	lane := d.work[int(r.uuid[15])%lanes]
	for len(lane.current.slots) > 0 { // the late reply freed its slot, or the test hangs
		time.Sleep(time.Millisecond)
	}
}

func TestReconnect(t *testing.T) {
	called := make(chan struct{}, 1)
	f := startFake(t, &fake{handle: func(c *fakeConn, h header, _ []byte) {
		if h.procedure == procDomainSuspend.number {
			called <- struct{}{}
			return // never answered
		}
		c.reply(h, nil)
	}})
	d := newFakeDriver(t, f, time.Minute)
	ended := make(chan error, 1)
	go func() { ended <- d.Suspend(t.Context(), someVM) }()
	<-called
	f.stop()
	wantCode(t, "the call under way", <-ended, switchback.CodeUnavailable)
	wantCode(t, "a call while it is down", d.Resume(t.Context(), someVM), switchback.CodeUnavailable)
	startFake(t, &fake{socket: f.socket, handle: f.handle})
	if err := d.Resume(t.Context(), someVM); err != nil {
		t.Errorf("the call after it came back: %v", err)
	}
	d.Close()
	wantCode(t, "a call after Close", d.Resume(t.Context(), someVM), switchback.CodeUnavailable)
}

func TestSilentPeerIsDead(t *testing.T) {
	f := startFake(t, &fake{handle: func(c *fakeConn, h header, _ []byte) { c.reply(h, nil) }})
	d := newFakeDriver(t, f, 20*time.Millisecond)
	if err := d.Resume(t.Context(), someVM); err != nil {
		t.Fatal(err)
	}
	r, _ := ref(someVM)
	cn := d.work[int(r.uuid[15])%lanes].current
	time.Sleep(200 * time.Millisecond) // ten intervals of answered pings
	if !cn.alive() {
		t.Fatalf("an idle connection whose pings are answered was given up: %v", cn.failure())
	}

	quiet := startFake(t, &fake{handle: func(*fakeConn, header, []byte) {}})
	q := newFakeDriver(t, quiet, 20*time.Millisecond)
	if _, err := q.ask.conn(t.Context()); err != nil {
		t.Fatal(err)
	}
	quiet.mute.Store(true)
	_, err := q.Domains(t.Context())
	wantCode(t, "a call to a peer that went silent", err, switchback.CodeUnavailable)
}

func TestLoginIsRefused(t *testing.T) {
	d := newFakeDriver(t, startFake(t, &fake{auth: 1}), time.Minute)
	wantCode(t, "a libvirtd that wants SASL", d.Resume(t.Context(), someVM), switchback.CodeUnauthorized)
	gone, err := New(Config{Socket: filepath.Join(t.TempDir(), "none")})
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, "no libvirtd", gone.Resume(t.Context(), someVM), switchback.CodeUnavailable)
}

func TestErrorsAreTyped(t *testing.T) {
	for _, test := range []struct {
		number int32
		want   switchback.Code
	}{
		{errNoDomain, switchback.CodeNotFound},
		{errNoCheckpoint, switchback.CodeNotFound},
		{errOperationInvalid, switchback.CodeConflict},
		{errOperationTimeout, switchback.CodeConflict},
		{errBlockCopyActive, switchback.CodeConflict},
		{errCheckpointInconsistent, switchback.CodeBitmapLost},
		{errOperationUnsupported, switchback.CodeUnsupported},
		{errConfigUnsupported, switchback.CodeUnsupported},
		{errHookFailed, switchback.CodeRefused},
		{errNoNetwork, switchback.CodeInvalid},
		{errInternal, switchback.CodeInternal},
		{errRPC, switchback.CodeInternal},
	} {
		f := startFake(t, &fake{handle: func(c *fakeConn, h header, _ []byte) { c.refuse(h, test.number, "so it is") }})
		err := newFakeDriver(t, f, time.Minute).SetAutostart(t.Context(), someVM, true)
		wantCode(t, err.Error(), err, test.want)
		if got := numberOf(err); got != int(test.number) {
			t.Errorf("libvirt's number is %d, want %d", got, test.number)
		}
	}
}

func TestSlowReaderKeepsTheLast(t *testing.T) {
	f := startFake(t, &fake{})
	d := newFakeDriver(t, f, time.Minute)
	events, err := d.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r, _ := ref(someVM)
	f.mu.Lock()
	c := f.conns[len(f.conns)-1]
	f.mu.Unlock()
	const sent = 3000
	for i := range sent {
		h := header{program: programRemote, version: programVersion, procedure: procEventLifecycle, kind: typeMessage}
		c.send(h, newArgs().i32(1).domain(domainRef{name: "vm", uuid: r.uuid, id: int32(i)}).i32(4).i32(0).b)
	}
	time.Sleep(100 * time.Millisecond)
	got, lost := 0, false
	for done := false; !done; {
		select {
		case e := <-events:
			lost = lost || e.Kind == hypervisor.EventLost
			if e.Kind == hypervisor.EventResumed {
				got++
			}
		case <-time.After(200 * time.Millisecond):
			done = true
		}
	}
	if got < queueLimit || got == sent || !lost {
		t.Errorf("a slow reader got %d of %d events, lost told: %v; want at least %d and that some were lost", got, sent, lost, queueLimit)
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add(frame(header{program: programRemote, version: 1, procedure: 1, kind: typeReply, serial: 7}, []byte("payload")))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, payload, err := readFrame(readerOf(data))
		if err != nil {
			return
		}
		if back := frame(h, payload); string(back) != string(data[:len(back)]) {
			t.Errorf("frame changed by reading and writing it")
		}
	})
}

func readerOf(b []byte) io.Reader { return &sliceReader{b} }

// sliceReader gives a byte at a time, as a socket may.
type sliceReader struct{ b []byte }

func (r *sliceReader) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	p[0] = r.b[0]
	r.b = r.b[1:]
	return 1, nil
}

func FuzzDecode(f *testing.F) {
	r, _ := ref(someVM)
	f.Add(errorPayload(42, "no domain"))
	f.Add(newArgs().i32(1).domain(r).i32(5).i32(1).b)
	f.Add(newArgs().i32(1).domain(r).str("/p").str("virtio-disk0").i32(1).str("enospc").b)
	f.Add(newArgs().u32(2).domain(r).domain(r).u32(2).b)
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := decodeError(data); err == nil || switchback.CodeOf(wrap("x", err)) == "" {
			t.Error("an error payload was read as no error")
		}
		decodeEvent(procEventLifecycle, data)
		decodeEvent(procEventIOErrorReason, data)
		res := &result{b: data}
		n := 0
		for range res.count(maxDomains, 24) {
			res.domain()
			n++
		}
		if n*24 > len(data) {
			t.Errorf("%d domains in %d bytes", n, len(data))
		}
	})
}

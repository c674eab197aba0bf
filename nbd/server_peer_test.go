package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	switchback "github.com/switchback-dr/switchback"
)

// memory is a backend that finds its zeros by looking. Reads at or behind
// broken fail.
type memory struct {
	data   []byte
	broken int64
	reads  atomic.Int64
	block  chan struct{} // if not nil, reads wait until it is closed
}

func newMemory(data []byte) *memory { return &memory{data: data, broken: int64(len(data))} }

func (m *memory) Size() int64 { return int64(len(m.data)) }

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.reads.Add(1)
	if m.block != nil {
		<-m.block
	}
	if off+int64(len(p)) > m.broken {
		return 0, errors.New("medium error")
	}
	return copy(p, m.data[off:]), nil
}

func (m *memory) Extents(off, length int64) ([]Extent, error) {
	if off >= m.broken {
		return nil, errors.New("medium error")
	}
	const block = 64 << 10
	var list []Extent
	for at := off &^ (block - 1); at < off+length; at += block {
		e := Extent{Offset: at, Length: block}
		if allZero(m.data[at:min(at+block, m.Size())]) {
			e.Flags = StateHole | StateZero
		}
		list = append(list, e)
	}
	return list, nil
}

// serve runs a server with the exports until the test ends.
func serve(t testing.TB, exports map[string]Backend, log io.Writer) (socket string) {
	t.Helper()
	if log == nil {
		log = io.Discard
	}
	names := make([]string, 0)
	for n := range exports {
		names = append(names, n)
	}
	slices.Sort(names)
	s := NewServer(func(export string) (Backend, error) {
		if export == "secret" {
			return nil, switchback.Errorf(switchback.CodeRefused, "not for you")
		}
		if b, ok := exports[export]; ok {
			return b, nil
		}
		return nil, switchback.Errorf(switchback.CodeNotFound, "no export %q", export)
	}, func() []string { return names }, slog.New(slog.NewTextHandler(log, nil)))
	socket = tempSocket(t)
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(2 * drainTime):
			t.Error("Serve does not end")
		}
	})
	return socket
}

// sparseContent has data, zeros and an odd size.
func sparseContent() []byte {
	b := make([]byte, 24<<20+512)
	copy(b[1<<20:], randomBytes(5<<20, 4))
	copy(b[20<<20-4096:], randomBytes(70<<10, 5))
	copy(b[len(b)-100:], randomBytes(100, 6))
	return b
}

func uri(export, socket string) string { return "nbd+unix:///" + export + "?socket=" + socket }

func TestServerWithPeers(t *testing.T) {
	content := sparseContent()
	b := newMemory(content)
	socket := serve(t, map[string]Backend{"vda": b, "vdb": newMemory(make([]byte, 1<<20)), "": newMemory(nil)}, nil)
	raw := writeImage(t, content)

	t.Run("qemu-img compare", func(t *testing.T) {
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", raw, uri("vda", socket))
	})
	t.Run("qemu-img convert", func(t *testing.T) {
		b.reads.Store(0)
		dst := filepath.Join(t.TempDir(), "copy.qcow2")
		run(t, "qemu-img", "convert", "-O", "qcow2", uri("vda", socket), dst)
		run(t, "qemu-img", "compare", raw, dst)
		// Zeros are not read: 5 MiB and two ends in requests of up to 2 MiB.
		if n := b.reads.Load(); n > 16 {
			t.Errorf("%d reads", n)
		}
	})
	t.Run("qemu overlay", func(t *testing.T) {
		overlay := filepath.Join(t.TempDir(), "overlay.qcow2")
		run(t, "qemu-img", "create", "-f", "qcow2", "-F", "raw", "-b", uri("vda", socket), overlay)
		run(t, "qemu-io", "-c", "write -P 7 3M 1M", "-c", "read -P 7 3M 1M", "-c", "read -P 0 0 1M", overlay)
	})
	t.Run("nbdcopy", func(t *testing.T) {
		dst := filepath.Join(t.TempDir(), "copy.raw")
		run(t, "nbdcopy", uri("vda", socket), dst)
		got, err := os.ReadFile(dst)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("copy differs (%v)", err)
		}
	})
	t.Run("nbdinfo", func(t *testing.T) {
		out := run(t, "nbdinfo", uri("vda", socket))
		for _, want := range []string{"export-size: 25166336", "is_read_only: true", "can_multi_conn: true", "can_df: true",
			"using structured packets", "base:allocation", "block_size_maximum: 33554432"} {
			if !strings.Contains(out, want) {
				t.Errorf("nbdinfo says nothing of %q:\n%s", want, out)
			}
		}
	})
	t.Run("nbdinfo list", func(t *testing.T) {
		out := run(t, "nbdinfo", "--list", uri("", socket))
		for _, want := range []string{`export="vda"`, `export="vdb"`, `export=""`} {
			if !strings.Contains(out, want) {
				t.Errorf("nbdinfo --list has no %s:\n%s", want, out)
			}
		}
	})
	t.Run("nbdinfo map", func(t *testing.T) {
		out := run(t, "nbdinfo", "--map", uri("vda", socket))
		var got [][]string
		for line := range strings.Lines(out) {
			got = append(got, strings.Fields(line)[:3])
		}
		want := [][]string{{"0", "1048576", "3"}, {"1048576", "5242880", "0"}, {"6291456", "14614528", "3"},
			{"20905984", "196608", "0"}, {"21102592", "4063232", "3"}, {"25165824", "512", "0"}}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("map (-want +got):\n%s", d)
		}
	})
	t.Run("qemu-img map", func(t *testing.T) {
		if out := run(t, "qemu-img", "map", "-f", "raw", uri("vda", socket)); !strings.Contains(out, "0x500000") {
			t.Errorf("map: %s", out)
		}
	})
}

func TestServerWithOwnClient(t *testing.T) {
	content := sparseContent()
	var log syncBuffer
	broken := newMemory(content)
	broken.broken = 8 << 20
	socket := serve(t, map[string]Backend{"vda": newMemory(content), "broken": broken}, &log)
	ctx := t.Context()

	t.Run("many clients", func(t *testing.T) {
		var wg sync.WaitGroup
		for g := range 24 {
			wg.Go(func() {
				c, err := Dial(ctx, "unix", socket, Options{Export: "vda"})
				if err != nil {
					t.Error(err)
					return
				}
				defer c.Close()
				r := rand.New(rand.NewPCG(uint64(g), 9))
				var inner sync.WaitGroup
				for range 4 {
					seed := r.Uint64()
					inner.Go(func() {
						r := rand.New(rand.NewPCG(seed, 9))
						buf := make([]byte, 1<<20)
						for range 30 {
							off := r.IntN(len(content))
							n := min(1+r.IntN(1<<(1+r.IntN(19))), len(content)-off)
							if _, err := c.ReadAt(buf[:n], int64(off)); err != nil || !bytes.Equal(buf[:n], content[off:off+n]) {
								t.Errorf("read %d at %d: %v", n, off, err)
							}
						}
					})
				}
				inner.Wait()
			})
		}
		wg.Wait()
	})
	t.Run("extents", func(t *testing.T) {
		c := dial(t, socket, Options{Export: "vda", MetaContexts: []string{ContextAllocation}})
		got, err := c.BlockStatus(ctx, ContextAllocation, 1000, 2<<20)
		want := []Extent{{1000, 1<<20 - 1000, StateHole | StateZero}, {1 << 20, 1<<20 + 1000, 0}}
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Errorf("%v (-want +got):\n%s", err, d)
		}
		p := randomBytes(512<<10, 1)
		if _, err := c.ReadAt(p, 10<<20); err != nil || !allZero(p) {
			t.Errorf("hole chunk: %v, zero %v", err, allZero(p))
		}
	})
	t.Run("errors", func(t *testing.T) {
		c := dial(t, socket, Options{Export: "broken", MetaContexts: []string{ContextAllocation}})
		if _, err := c.ReadAt(make([]byte, 4096), 8<<20); !errors.Is(err, syscall.EIO) {
			t.Errorf("backend error: %v", err)
		}
		if _, err := c.BlockStatus(ctx, ContextAllocation, 8<<20, 4096); !errors.Is(err, syscall.EIO) {
			t.Errorf("backend error of extents: %v", err)
		}
		if s := log.String(); !strings.Contains(s, "export=broken offset=8388608 length=4096 err=\"medium error\"") {
			t.Errorf("log: %s", s)
		}
		for name, r := range map[string]struct {
			request
			want syscall.Errno
		}{
			"write":              {request{command: cmdTrim, length: 4096}, syscall.EPERM},
			"zero":               {request{command: cmdWriteZeroes, length: 4096}, syscall.EPERM},
			"behind the end":     {request{command: cmdRead, offset: uint64(len(content)) - 1, length: 2}, syscall.EINVAL},
			"offset overflow":    {request{command: cmdRead, offset: 1<<64 - 1, length: 2}, syscall.EINVAL},
			"too large":          {request{command: cmdRead, length: maxPayload + 1}, syscall.EINVAL},
			"status of nothing":  {request{command: cmdBlockStatus}, syscall.EINVAL},
			"status behind end":  {request{command: cmdBlockStatus, offset: 1 << 50, length: 1}, syscall.EINVAL},
			"unknown command":    {request{command: 77}, syscall.EINVAL},
			"flush does nothing": {request{command: cmdFlush}, 0},
			"empty read":         {request{command: cmdRead}, 0},
		} {
			err := c.request(ctx, r.request)
			if r.want == 0 && err != nil || r.want != 0 && !errors.Is(err, r.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
		o := newOp()
		s, _ := c.acquire(ctx, o)
		c.start(o, s, request{command: cmdWrite, length: 5000})
		err := c.send(ctx, o, make([]byte, 5000))
		if _, err = c.wait(ctx, o, err); !errors.Is(err, syscall.EPERM) {
			t.Errorf("write: %v", err)
		}
		if _, err := c.ReadAt(make([]byte, 4096), 0); err != nil {
			t.Errorf("read after errors: %v", err)
		}
	})
	t.Run("refused export", func(t *testing.T) {
		_, err := Dial(ctx, "unix", socket, Options{Export: "secret"})
		if switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "not for you") {
			t.Errorf("got %v", err)
		}
	})
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// A client that vanishes with requests in work costs nothing but them.
func TestClientVanishes(t *testing.T) {
	slow := newMemory(make([]byte, 64<<20))
	slow.block = make(chan struct{})
	socket := serve(t, map[string]Backend{"slow": slow, "fast": newMemory(make([]byte, 1<<20))}, nil)
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	n := negotiation{conn}
	if err := n.greet(); err != nil {
		t.Fatal(err)
	}
	if err := n.option(optGo, be.AppendUint16(appendString(nil, "slow"), 0), ignoreReply); err != nil {
		t.Fatal(err)
	}
	var b []byte
	for i := range uint64(50) {
		b = appendRequest(b, request{command: cmdRead, handle: i, length: 1 << 20})
	}
	if _, err := conn.Write(b[:len(b)-5]); err != nil {
		t.Fatal(err)
	}
	for slow.reads.Load() < maxWorkers {
		time.Sleep(time.Millisecond)
	}
	conn.Close()
	c := dial(t, socket, Options{Export: "fast"})
	if _, err := c.ReadAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
	close(slow.block)
}

// Serve ends although a client reads no replies.
func TestServeEndsWithStuckClient(t *testing.T) {
	socket := serve(t, map[string]Backend{"": newMemory(randomBytes(8<<20, 1))}, nil)
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	n := negotiation{conn}
	if err := n.greet(); err != nil {
		t.Fatal(err)
	}
	if err := n.option(optGo, be.AppendUint16(appendString(nil, ""), 0), ignoreReply); err != nil {
		t.Fatal(err)
	}
	var b []byte
	for i := range uint64(100) {
		b = appendRequest(b, request{command: cmdRead, handle: i, length: 4 << 20})
	}
	if _, err := conn.Write(b); err != nil {
		t.Fatal(err)
	}
	// The cleanup of serve judges.
}

// What older clients do: no structured replies, choice by name.
func TestServerOldClient(t *testing.T) {
	content := randomBytes(1<<20, 1)
	socket := serve(t, map[string]Backend{"vda": newMemory(content)}, nil)
	for _, flags := range []uint32{flagFixedNewstyle, flagFixedNewstyle | flagNoZeroes} {
		t.Run(fmt.Sprintf("flags=%d", flags), func(t *testing.T) {
			conn, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			io.ReadFull(conn, make([]byte, 18))
			conn.Write(be.AppendUint32(nil, flags))
			conn.Write(appendOption(nil, optExportName, []byte("vda")))
			head := make([]byte, 10)
			if flags&flagNoZeroes == 0 {
				head = make([]byte, 134)
			}
			if _, err := io.ReadFull(conn, head); err != nil || be.Uint64(head) != 1<<20 {
				t.Fatalf("%v, %x", err, head)
			}
			conn.Write(appendRequest(nil, request{command: cmdRead, handle: 99, offset: 5, length: 9}))
			got := make([]byte, simpleSize+9)
			if _, err := io.ReadFull(conn, got); err != nil {
				t.Fatal(err)
			}
			want := append(be.AppendUint64(be.AppendUint32(be.AppendUint32(nil, magicSimple), 0), 99), content[5:14]...)
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("reply (-want +got):\n%s", d)
			}
		})
	}
}

// fileBackend is what qemu-nbd serves in the comparison.
type fileBackend struct {
	*os.File
	size int64
}

func (f fileBackend) Size() int64 { return f.size }
func (f fileBackend) Extents(off, length int64) ([]Extent, error) {
	return []Extent{{Offset: off, Length: length}}, nil
}

func BenchmarkServer(b *testing.B) {
	f, err := os.Open(benchImage(b))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	c := dial(b, serve(b, map[string]Backend{"": fileBackend{f, benchSize}}, nil), Options{})
	benchReads(b, c)
}

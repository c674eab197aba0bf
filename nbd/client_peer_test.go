package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	switchback "github.com/switchback-dr/switchback"
)

func TestClientReadsFromPeers(t *testing.T) {
	content := randomBytes(9<<20+512, 1)
	clear(content[4<<20 : 5<<20])
	peers := []struct {
		name  string
		start func(t *testing.T) string
	}{
		{"qemu-nbd raw", func(t *testing.T) string { return startQEMU(t, writeImage(t, content), "raw", "-r") }},
		{"qemu-nbd qcow2", func(t *testing.T) string {
			image := filepath.Join(t.TempDir(), "disk.qcow2")
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", writeImage(t, content), image)
			return startQEMU(t, image, "qcow2", "-r")
		}},
		{"nbdkit", func(t *testing.T) string {
			socket := tempSocket(t)
			startPeer(t, socket, "nbdkit", "-f", "-r", "-U", socket, "file", writeImage(t, content))
			return socket
		}},
		{"nbdkit without structured replies", func(t *testing.T) string {
			socket := tempSocket(t)
			startPeer(t, socket, "nbdkit", "-f", "-r", "--no-sr", "-U", socket, "file", writeImage(t, content))
			return socket
		}},
	}
	for _, p := range peers {
		t.Run(p.name, func(t *testing.T) {
			c := dial(t, p.start(t), Options{MetaContexts: []string{ContextAllocation}})
			if c.Size() != int64(len(content)) || !c.ReadOnly() {
				t.Fatalf("size %d, read-only %v", c.Size(), c.ReadOnly())
			}
			whole := make([]byte, len(content)+100)
			if n, err := c.ReadAt(whole, 0); n != len(content) || err != io.EOF || !bytes.Equal(whole[:n], content) {
				t.Fatalf("read of all: %d bytes, %v, equal %v", n, err, bytes.Equal(whole[:n], content))
			}
			var wg sync.WaitGroup
			for g := range 32 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(g), 7))
					buf := make([]byte, 3<<20)
					for range 20 {
						off := r.IntN(len(content))
						n := min(1+r.IntN(1<<(1+r.IntN(21))), len(content)-off)
						if m, err := c.ReadAt(buf[:n], int64(off)); m != n || err != nil {
							t.Errorf("read %d at %d: %d, %v", n, off, m, err)
						} else if !bytes.Equal(buf[:n], content[off:off+n]) {
							t.Errorf("read %d at %d: wrong bytes", n, off)
						}
					}
				})
			}
			wg.Wait()
			if _, err := c.WriteAt(make([]byte, 512), 0); switchback.CodeOf(err) != switchback.CodeRefused {
				t.Errorf("write to a read-only export: %v", err)
			}
			extents, err := c.BlockStatus(t.Context(), ContextAllocation, 0, c.Size())
			if !c.structured {
				if switchback.CodeOf(err) != switchback.CodeUnsupported {
					t.Errorf("block status without structured replies: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			at := int64(0)
			for _, e := range extents {
				if e.Offset != at {
					t.Fatalf("gap before %+v", e)
				}
				at = e.End()
				if e.Zero() && !allZero(content[e.Offset:e.End()]) {
					t.Fatalf("%+v is not zero", e)
				}
			}
			if at != c.Size() {
				t.Fatalf("extents end at %d", at)
			}
		})
	}
}

func allZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

func TestClientWrites(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.qcow2")
	run(t, "qemu-img", "create", "-f", "qcow2", image, "32M")
	socket := startQEMU(t, image, "qcow2", "--discard=unmap")
	c := dial(t, socket, Options{MetaContexts: []string{ContextAllocation}})
	ctx := t.Context()
	want := make([]byte, 32<<20)
	data := randomBytes(5<<20, 2)
	write := func(p []byte, off int64) {
		t.Helper()
		if n, err := c.WriteAtContext(ctx, p, off); n != len(p) || err != nil {
			t.Fatalf("write: %d, %v", n, err)
		}
		copy(want[off:], p)
	}
	write(data, 1<<20)
	write(data[:777], 20<<20+3)
	write(data, 16<<20)
	if err := c.WriteZeroes(ctx, 2<<20, 1<<20, true); err != nil {
		t.Fatal(err)
	}
	clear(want[2<<20 : 3<<20])
	if err := c.WriteZeroes(ctx, 17<<20, 1<<20, false); err != nil {
		t.Fatal(err)
	}
	clear(want[17<<20 : 18<<20])
	if err := c.Trim(ctx, 4<<20, 1<<20); err != nil {
		t.Fatal(err)
	}
	clear(want[4<<20 : 5<<20]) // a trimmed qcow2 cluster reads as zeros
	if err := c.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := c.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("read back: %v, equal %v", err, bytes.Equal(got, want))
	}
	extents, err := c.BlockStatus(ctx, ContextAllocation, 0, c.Size())
	if err != nil {
		t.Fatal(err)
	}
	find := func(off int64) Extent {
		for _, e := range extents {
			if off < e.End() {
				return e
			}
		}
		return Extent{}
	}
	if e := find(2 << 20); !e.Zero() || !e.Hole() {
		t.Errorf("zeroed with trim: %+v", e)
	}
	if e := find(17 << 20); !e.Zero() {
		t.Errorf("zeroed without trim: %+v", e)
	}
	_, err = c.WriteAt(make([]byte, 2), c.Size()-1)
	if switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("write over the end: %v", err)
	}
}

func TestClientDirtyBitmap(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.qcow2")
	run(t, "qemu-img", "create", "-f", "qcow2", image, "5T")
	run(t, "qemu-img", "bitmap", "--add", "-g", "65536", image, "k0")
	run(t, "qemu-io", "-f", "qcow2", "-c", "write 1M 64k", "-c", "write 3T 4k", "-c", "write 5497558073344 4k", image)
	socket := startQEMU(t, image, "qcow2", "-r", "-B", "k0", "-x", "vda")
	c := dial(t, socket, Options{Export: "vda", MetaContexts: []string{ContextAllocation, ContextDirtyPrefix + "k0", "x:absent"}})
	if c.HasMetaContext("x:absent") {
		t.Error("server has a context that it has not")
	}
	got, err := c.BlockStatus(t.Context(), ContextDirtyPrefix+"k0", 0, c.Size())
	if err != nil {
		t.Fatal(err)
	}
	dirty := got[:0]
	for _, e := range got {
		if e.Dirty() {
			dirty = append(dirty, e)
		}
	}
	want := []Extent{{1 << 20, 65536, StateDirty}, {3 << 40, 65536, StateDirty}, {5497558073344 &^ 65535, 65536, StateDirty}}
	if d := cmp.Diff(want, dirty); d != "" {
		t.Errorf("dirty extents (-want +got):\n%s", d)
	}
}

func TestDialErrors(t *testing.T) {
	image := writeImage(t, make([]byte, 1<<20))
	socket := startQEMU(t, image, "raw", "-r", "-x", "there")
	tests := []struct {
		name, socket, export string
		want                 switchback.Code
	}{
		{"no server", tempSocket(t), "", switchback.CodeUnavailable},
		{"no export", socket, "absent", switchback.CodeNotFound},
		{"long name", socket, strings.Repeat("x", 5000), switchback.CodeInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Dial(t.Context(), "unix", tt.socket, Options{Export: tt.export})
			if switchback.CodeOf(err) != tt.want {
				t.Errorf("got %v, want code %s", err, tt.want)
			}
		})
	}
	names, err := List(t.Context(), "unix", socket)
	if err != nil || !cmp.Equal(names, []string{"there"}) {
		t.Errorf("list: %q, %v", names, err)
	}
}

func TestServerErrorLeavesConnectionUsable(t *testing.T) {
	socket := tempSocket(t)
	startPeer(t, socket, "nbdkit", "-f", "-U", socket, "--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=100%")
	c := dial(t, socket, Options{})
	for range 3 {
		_, err := c.ReadAt(make([]byte, 10<<10), 0)
		if !errors.Is(err, syscall.ENOSPC) || switchback.CodeOf(err) != switchback.CodeNoSpace {
			t.Fatalf("got %v", err)
		}
	}
	if _, err := c.WriteAt(make([]byte, 512), 0); err != nil {
		t.Fatal(err)
	}
}

func TestConnectionLossEndsAllRequests(t *testing.T) {
	socket := tempSocket(t)
	cmd := startPeer(t, socket, "nbdkit", "-f", "-U", socket, "--filter=delay", "memory", "64M", "rdelay=60")
	c := dial(t, socket, Options{})
	errs := make(chan error)
	for i := range 100 { // more than fit in flight
		go func() {
			_, err := c.ReadAt(make([]byte, 5<<20), int64(i)<<10)
			errs <- err
		}()
	}
	time.Sleep(20 * time.Millisecond)
	cmd.Process.Signal(syscall.SIGKILL)
	for range 100 {
		select {
		case err := <-errs:
			if switchback.CodeOf(err) != switchback.CodeUnavailable {
				t.Fatalf("got %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("a request hangs after the server was killed")
		}
	}
	if _, err := c.ReadAt(make([]byte, 1), 0); switchback.CodeOf(err) != switchback.CodeUnavailable {
		t.Errorf("read after the loss: %v", err)
	}
	if c.Err() == nil {
		t.Error("Err is nil after the loss")
	}
}

func TestCancelledReadLeavesMemoryAlone(t *testing.T) {
	socket := tempSocket(t)
	startPeer(t, socket, "nbdkit", "-f", "-U", socket, "--filter=delay", "pattern", "64M", "rdelay=100ms")
	c := dial(t, socket, Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	p := make([]byte, 8<<20)
	if _, err := c.ReadAtContext(ctx, p, 8); switchback.CodeOf(err) != switchback.CodeTimeout {
		t.Fatalf("got %v", err)
	}
	b := make([]byte, 8) // answered after the cancelled one
	if _, err := c.ReadAt(b, 4096); err != nil || be.Uint64(b) != 4096 {
		t.Fatalf("later read: %x, %v", b, err)
	}
	if !allZero(p) {
		t.Error("memory of a cancelled read was written")
	}
}

func TestCloseEndsServerSide(t *testing.T) {
	image := writeImage(t, make([]byte, 1<<20))
	socket := tempSocket(t)
	cmd := exec.Command("qemu-nbd", "-k", socket, "-f", "raw", "-r", image) // ends with its only client
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	c, err := Dial(t.Context(), "unix", socket, Options{})
	for range 1000 {
		if err == nil {
			break
		}
		time.Sleep(3 * time.Millisecond)
		c, err = Dial(t.Context(), "unix", socket, Options{})
	}
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	ended := make(chan error)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Error("qemu-nbd did not notice the end of its client")
	}
}

func BenchmarkClient(b *testing.B) {
	image := benchImage(b)
	c := dial(b, startQEMU(b, image, "raw", "-r"), Options{})
	benchReads(b, c)
}

const benchSize = 1 << 30

// benchImage is in memory, so that the protocol is measured and not the disk.
func benchImage(b *testing.B) string {
	b.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nbd")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(dir) })
	p := filepath.Join(dir, "disk.raw")
	f, err := os.Create(p)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	block := randomBytes(64<<20, 3)
	for range benchSize / len(block) {
		if _, err := f.Write(block); err != nil {
			b.Fatal(err)
		}
	}
	return p
}

// benchReads measures a client of whatever server.
func benchReads(b *testing.B, c *Client) {
	for _, m := range []struct {
		size, depth int
		random      bool
	}{{1 << 20, 1, false}, {1 << 20, 4, false}, {16 << 20, 1, false}, {64 << 10, 4, false}, {4 << 10, 1, true}, {4 << 10, 16, true}} {
		b.Run(fmt.Sprintf("size=%d/depth=%d/random=%v", m.size, m.depth, m.random), func(b *testing.B) {
			b.SetBytes(int64(m.size))
			b.ReportAllocs()
			jobs := make(chan int64, 1024)
			var wg sync.WaitGroup
			for range m.depth {
				wg.Go(func() {
					buf := make([]byte, m.size)
					for off := range jobs {
						if _, err := c.ReadAt(buf, off); err != nil {
							b.Error(err)
						}
					}
				})
			}
			blocks := int64(benchSize / m.size)
			for i := range int64(b.N) {
				if m.random {
					i = rand.Int64N(blocks)
				}
				jobs <- i % blocks * int64(m.size)
			}
			close(jobs)
			wg.Wait()
		})
	}
}

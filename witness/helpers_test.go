package witness

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const MiB = 1 << 20

// sh runs a tool; a missing one fails the test.
func sh(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// rawDisk makes a sparse raw disk of 64 MiB with some seeded data.
func rawDisk(t *testing.T, name string, seed uint64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(64 * MiB); err != nil {
		t.Fatal(err)
	}
	rnd := rand.NewChaCha8([32]byte{byte(seed)})
	for _, at := range []int64{0, 3*MiB + 8192, 17 * MiB, 64*MiB - 65536} {
		b := make([]byte, 65536)
		rnd.Read(b)
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func qcow2(t *testing.T, raw string) string {
	t.Helper()
	path := raw + ".qcow2"
	sh(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
	return path
}

// patch writes into the guest-visible content of an image.
func patch(t *testing.T, image string, off, n int64, pattern string) {
	t.Helper()
	sh(t, "qemu-io", "-c", fmt.Sprintf("write %s %d %d", pattern, off, n), image)
}

// serve runs an NBD server that takes its socket as last argument.
func serve(t *testing.T, socket string, name string, args ...string) string {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		stop()
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(); cmd.Wait() })
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			return "nbd+unix:///?socket=" + url.QueryEscape(socket)
		}
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("%s does not come up", name)
		}
	}
}

func socket(t *testing.T) string { return filepath.Join(t.TempDir(), "s") }

// rec is a record of the guest, as the format's description has it.
type rec struct {
	seq         uint64
	boot, vm    byte
	disk, disks uint16
	slots       uint32
}

func (r rec) encode() []byte {
	b := make([]byte, 4096)
	le := binary.LittleEndian
	copy(b, "SWBREC01")
	le.PutUint64(b[8:], r.seq)
	le.PutUint64(b[16:], r.seq*1000)
	for i := range 16 {
		b[24+i], b[40+i] = r.boot, r.vm
	}
	le.PutUint16(b[56:], r.disk)
	le.PutUint16(b[58:], r.disks)
	le.PutUint32(b[60:], r.slots)
	for i := 64; i < 4088; i++ {
		b[i] = byte(r.seq) + byte(i)
	}
	le.PutUint32(b[4092:], crc32.Checksum(b[:4092], crc32.MakeTable(crc32.Castagnoli)))
	return b
}

var ring = Ring{Offset: 8 * MiB, Slots: 64}

// vm is the raw disks of a pretended VM.
type vm struct {
	t     *testing.T
	disks []string
}

func newVM(t *testing.T, disks int) vm {
	v := vm{t: t}
	for i := range disks {
		v.disks = append(v.disks, rawDisk(t, fmt.Sprintf("disk%d", i), uint64(i)))
	}
	return v
}

// write puts the record where it belongs.
func (v vm) write(seq uint64, boot byte) {
	n := uint64(len(v.disks))
	v.put(rec{seq: seq, boot: boot, vm: 0xaa, disk: uint16(seq % n), disks: uint16(n), slots: uint32(ring.Slots)}.encode(), int(seq%n), int64(seq/n%uint64(ring.Slots)))
}

func (v vm) put(b []byte, disk int, slot int64) {
	v.t.Helper()
	f, err := os.OpenFile(v.disks[disk], os.O_WRONLY, 0)
	if err != nil {
		v.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(b, ring.Offset+slot*4096); err != nil {
		v.t.Fatal(err)
	}
}

// images converts the disks to qcow2.
func (v vm) images() []string {
	var qs []string
	for _, d := range v.disks {
		qs = append(qs, qcow2(v.t, d))
	}
	return qs
}

package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/switchback-dr/switchback"
)

// qemu runs a QEMU tool, or skips the test where it is not installed.
func qemu(t testing.TB, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(args[0]); err != nil {
		t.Fatal(args[0] + " is not installed: scripts/install-packages.sh test")
	}
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "failed") {
		t.Fatalf("%v: %v\n%s", args, err, out)
	}
	return string(out)
}

// scribble makes random changes to an image with qemu-io.
func scribble(t testing.TB, path string, size int64, rng *rand.Rand, version3 bool) {
	args := []string{"qemu-io", "-f", "qcow2", "-d", "unmap"}
	for range 60 {
		off := rng.Int64N(size/512-200) * 512
		n := (1 + rng.Int64N(200)) * 512
		cmd := fmt.Sprintf("write -P %d %d %d", 1+rng.IntN(255), off, n)
		switch rng.IntN(5) {
		case 0:
			cmd = fmt.Sprintf("write -z %d %d", off, n)
		case 1:
			cmd = fmt.Sprintf("write -z -u %d %d", off, n)
		case 2:
			if version3 {
				cmd = fmt.Sprintf("discard %d %d", off, n)
			}
		}
		args = append(args, "-c", cmd)
	}
	qemu(t, append(args, path)...)
}

// compare reads path with this package in many ways and compares with what
// qemu-img makes of it.
func compare(t *testing.T, path string, rng *rand.Rand) {
	t.Helper()
	raw := path + ".raw"
	qemu(t, "qemu-img", "convert", "-O", "raw", path, raw)
	want, err := os.ReadFile(raw)
	if err != nil {
		t.Fatal(err)
	}
	im, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer im.Close()
	if im.Size() != int64(len(want)) {
		t.Fatalf("size %d, want %d", im.Size(), len(want))
	}
	got := make([]byte, len(want)+100)
	if n, err := im.ReadAt(got, 0); n != len(want) || err != io.EOF {
		t.Fatalf("read %d bytes, %v", n, err)
	}
	if !bytes.Equal(got[:len(want)], want) {
		t.Fatal("content differs")
	}
	for range 300 {
		off := rng.IntN(len(want))
		p := make([]byte, 1+rng.IntN(min(len(want)-off, 300<<10)))
		if _, err := im.ReadAt(p, int64(off)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(p, want[off:off+len(p)]) {
			t.Fatalf("[%d, %d) differs", off, off+len(p))
		}
	}
	for _, whole := range []bool{true, false} {
		off, length := int64(0), im.Size()
		if !whole {
			off = rng.Int64N(im.Size())
			length = rng.Int64N(im.Size() - off)
		}
		extents, err := im.Extents(off, length)
		if err != nil {
			t.Fatal(err)
		}
		at := off
		zeros := int64(0)
		for i, e := range extents {
			if e.Offset != at || e.Length <= 0 || i > 0 && extents[i-1].Zero == e.Zero {
				t.Fatalf("extents %v", extents)
			}
			at += e.Length
			if e.Zero {
				zeros += e.Length
				if len(bytes.Trim(want[e.Offset:at], "\x00")) != 0 {
					t.Fatalf("%+v is not zero", e)
				}
			}
		}
		if at != off+length {
			t.Fatalf("extents end at %d, want %d", at, off+length)
		}
		if whole && zeros == 0 {
			t.Error("no zero extent in a sparse image")
		}
	}
}

func TestAgainstQEMU(t *testing.T) {
	for _, c := range []struct {
		name, options string
	}{
		{"version 3", ""},
		{"version 2", "compat=0.10"},
		{"clusters of 512", "cluster_size=512"},
		{"clusters of 4K", "cluster_size=4096"},
		{"clusters of 2M", "cluster_size=2M"},
		{"lazy refcounts", "lazy_refcounts=on"},
		{"metadata preallocated", "preallocation=metadata"},
	} {
		t.Run(c.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(1, 2))
			path := filepath.Join(t.TempDir(), "disk.qcow2")
			const size = 40<<20 + 512
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", strings.Trim("size=41943552,"+c.options, ","), path)
			scribble(t, path, size, rng, !strings.Contains(c.options, "0.10"))
			compare(t, path, rng)
			if !strings.Contains(c.options, "0.10") {
				qemu(t, "qemu-img", "bitmap", "--add", path, "b0")
			}
			qemu(t, "qemu-img", "snapshot", "-c", "s", path)
			scribble(t, path, size, rng, false)
			compare(t, path, rng)
			qemu(t, "qemu-img", "snapshot", "-d", "s", path)
			qemu(t, "qemu-img", "resize", "-q", path, "50M")
			compare(t, path, rng)
		})
	}
}

func TestCompressed(t *testing.T) {
	for _, kind := range []string{"zlib", "zstd"} {
		t.Run(kind, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(5, 2))
			dir := t.TempDir()
			path, packed := filepath.Join(dir, "disk.qcow2"), filepath.Join(dir, "packed.qcow2")
			qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", path, "30M")
			scribble(t, path, 30<<20, rng, true)
			qemu(t, "qemu-img", "convert", "-c", "-O", "qcow2", "-o", "compression_type="+kind, path, packed)
			scribble(t, packed, 30<<20, rng, true)
			compare(t, packed, rng)
		})
	}
}

func TestUnsupported(t *testing.T) {
	dir := t.TempDir()
	base := filepath.Join(dir, "base.qcow2")
	qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
	for name, args := range map[string][]string{
		"backing":  {"-b", base, "-F", "qcow2"},
		"extended": {"-o", "extended_l2=on"},
		"luks":     {"--object", "secret,id=s,data=x", "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"},
		"external": {"-o", "data_file=" + filepath.Join(dir, "data")},
	} {
		path := filepath.Join(dir, name)
		qemu(t, append(append([]string{"qemu-img", "create", "-q", "-f", "qcow2"}, args...), path, "1M")...)
		if _, err := Open(path); switchback.CodeOf(err) != switchback.CodeUnsupported {
			t.Errorf("%s: %v", name, err)
		}
	}
	raw := filepath.Join(dir, "raw")
	os.WriteFile(raw, make([]byte, 4096), 0o600)
	if _, err := Open(raw); switchback.CodeOf(err) != switchback.CodeCorrupt {
		t.Errorf("raw file: %v", err)
	}
	if _, err := Open(raw + "x"); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("missing file: %v", err)
	}
}

// TestWhileWritten opens an image, lets qemu-io write other ranges, in the
// same and in new L2 tables, and reads what was not written: partly
// with tables cached before, partly not.
func TestWhileWritten(t *testing.T) {
	for _, warm := range []bool{true, false} {
		rng := rand.New(rand.NewPCG(8, 2))
		path := filepath.Join(t.TempDir(), "disk.qcow2")
		const size = 200 << 20
		qemu(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, fmt.Sprint(size))
		scribble(t, path, size/4, rng, true) // the rest has no L2 tables yet
		im, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer im.Close()
		want := make([]byte, size)
		if n, err := im.ReadAt(want, 0); err != nil {
			t.Fatal(n, err)
		}
		if !warm {
			im.l2, im.order = map[int][]byte{}, nil
		}
		written := make([]bool, size/512)
		args := []string{"qemu-io", "-f", "qcow2", "-d", "unmap"}
		for range 200 {
			off, n := rng.Int64N(size/512-200), 1+rng.Int64N(100)
			for i := off; i < off+n; i++ {
				written[i] = true
			}
			args = append(args, "-c", fmt.Sprintf("%s %d %d", []string{"write -P 7", "write -z", "write -z -u"}[rng.IntN(3)], off*512, n*512))
		}
		qemu(t, append(args, path)...)
		p := make([]byte, 512)
		for i, w := range written {
			if w {
				continue
			}
			if _, err := im.ReadAt(p, int64(i)*512); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(p, want[i*512:(i+1)*512]) {
				t.Fatalf("warm %v: sector %d, which was not written, changed", warm, i)
			}
		}
	}
}

// tiny is a small image with every kind of cluster, made without QEMU.
func tiny() []byte {
	const cluster = 512
	b := make([]byte, 8*cluster)
	be := binary.BigEndian
	be.PutUint32(b, magic)
	be.PutUint32(b[4:], 3)
	be.PutUint32(b[20:], 9)
	be.PutUint64(b[24:], 100*cluster)
	be.PutUint32(b[36:], 2)          // L1 entries
	be.PutUint64(b[40:], cluster)    // L1
	be.PutUint32(b[100:], 104)       // header length
	be.PutUint64(b[cluster:], 2*512) // L2 of the first 64 clusters
	be.PutUint64(b[2*512:], 3*512)   // data
	be.PutUint64(b[2*512+8:], 4*512) // contiguous
	be.PutUint64(b[2*512+16:], 5*512|flagZero)
	be.PutUint64(b[2*512+32:], flagCompressed|6*512)
	for i := range 1024 {
		b[3*512+i] = byte(i)
	}
	return b
}

func FuzzImage(f *testing.F) {
	f.Add(tiny())
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<20 {
			return
		}
		path := filepath.Join(t.TempDir(), "disk")
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		exercise(path)
	})
}

// exercise must neither panic nor take long.
func exercise(path string) {
	im, err := Open(path)
	if err != nil {
		return
	}
	defer im.Close()
	p := make([]byte, 128<<10)
	for _, off := range []int64{0, 1000, im.Size() / 2, im.Size() - 1000, im.Size()} {
		im.ReadAt(p, max(0, off))
		im.Extents(max(0, off), 1<<20)
	}
}

func TestFlippedBytes(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 9))
	path := filepath.Join(t.TempDir(), "disk")
	good := tiny()
	for range 3000 {
		b := bytes.Clone(good)
		for range 1 + rng.IntN(3) {
			b[rng.IntN(3*512)] = byte(rng.Uint32())
		}
		if err := os.WriteFile(path, b[:len(b)-rng.IntN(2)*rng.IntN(len(b))], 0o600); err != nil {
			t.Fatal(err)
		}
		exercise(path)
	}
}

func BenchmarkReadAt(b *testing.B) {
	path := filepath.Join(b.TempDir(), "disk.qcow2")
	qemu(b, "qemu-img", "create", "-q", "-f", "qcow2", path, "256M")
	qemu(b, "qemu-io", "-f", "qcow2", "-c", "write -P 5 0 256M", path)
	im, err := Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer im.Close()
	for _, size := range []int{4 << 10, 1 << 20} {
		b.Run(fmt.Sprintf("%dK", size>>10), func(b *testing.B) {
			p := make([]byte, size)
			b.SetBytes(int64(size))
			rng := rand.New(rand.NewPCG(1, 1))
			for b.Loop() {
				if _, err := im.ReadAt(p, rng.Int64N((256<<20)/int64(size))*int64(size)); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

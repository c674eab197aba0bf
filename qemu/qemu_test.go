package qemu

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	switchback "github.com/switchback-dr/switchback"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantCode checks code and a part of the text.
func wantCode(t testing.TB, err error, code switchback.Code, text string) {
	t.Helper()
	if switchback.CodeOf(err) != code || err != nil && !strings.Contains(err.Error(), text) {
		t.Errorf("got %v (code %q), want code %q and %q", err, switchback.CodeOf(err), code, text)
	}
}

// qemuIO runs commands of qemu-io on an image; a pattern that does not match
// is an error of the test.
func qemuIO(t testing.TB, format, image string, commands ...string) {
	t.Helper()
	args := []string{"-f", format}
	readOnly := true
	for _, c := range commands {
		args = append(args, "-c", c)
		readOnly = readOnly && strings.HasPrefix(c, "read")
	}
	if readOnly {
		args = append(args, "-r")
	}
	out, err := exec.Command("qemu-io", append(args, image)...).CombinedOutput()
	if err != nil || strings.Contains(string(out), "Pattern verification failed") {
		t.Fatalf("qemu-io %q: %v\n%s", args, err, out)
	}
}

func create(t testing.TB, path string, o CreateOptions) string {
	t.Helper()
	must(t, Create(t.Context(), path, o))
	return path
}

func TestImageLife(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	base := create(t, filepath.Join(dir, "base, with: odd=name.qcow2"), CreateOptions{Format: "qcow2", SizeBytes: 64 << 20, ClusterSizeBytes: 4096})
	qemuIO(t, "qcow2", base, "write -P 1 0 2M")
	overlay := create(t, filepath.Join(dir, "overlay.qcow2"), CreateOptions{Format: "qcow2", Backing: base, BackingFormat: "qcow2"})
	info, err := Info(ctx, overlay)
	must(t, err)
	if info.ActualSizeBytes <= 0 {
		t.Errorf("actual size %d", info.ActualSizeBytes)
	}
	info.ActualSizeBytes = 0
	want := ImageInfo{Format: "qcow2", VirtualSizeBytes: 64 << 20, ClusterSizeBytes: 65536, Backing: base, BackingFormat: "qcow2"}
	if d := cmp.Diff(want, info); d != "" {
		t.Errorf("info (-want +got):\n%s", d)
	}
	qemuIO(t, "qcow2", overlay, "write -P 2 1M 2M")

	o, b := Image{overlay, "qcow2"}, Image{base, "qcow2"}
	flat := Image{filepath.Join(dir, "flat.raw"), "raw"}
	must(t, Convert(ctx, o, flat, ConvertOptions{}))
	compare := func(x, y Image, want bool) {
		t.Helper()
		if equal, err := Compare(ctx, x, y); err != nil || equal != want {
			t.Errorf("compare %s %s: %v, %v", x.Path, y.Path, equal, err)
		}
	}
	compare(o, flat, true)
	compare(b, flat, false)
	must(t, Commit(ctx, overlay, ""))
	compare(b, flat, true)

	must(t, Rebase(ctx, overlay, flat.Path, "raw"))
	compare(o, flat, true)
	must(t, Rebase(ctx, overlay, "", ""))
	if info, err = Info(ctx, overlay); err != nil || info.Backing != "" {
		t.Errorf("backing %q, %v", info.Backing, err)
	}
	must(t, Resize(ctx, b, 96<<20))
	if info, err = Info(ctx, base); err != nil || info.VirtualSizeBytes != 96<<20 || info.ClusterSizeBytes != 4096 {
		t.Errorf("resized: %+v, %v", info, err)
	}
	must(t, Check(ctx, base))
	must(t, Check(ctx, overlay))
}

func TestImageErrors(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	image := create(t, filepath.Join(dir, "a.qcow2"), CreateOptions{Format: "qcow2", SizeBytes: 1 << 20})
	qemuIO(t, "qcow2", image, "write 0 1M")
	absent := filepath.Join(dir, "absent")
	_, err := Info(ctx, absent)
	wantCode(t, err, switchback.CodeNotFound, "No such file or directory")
	wantCode(t, Create(ctx, image, CreateOptions{Format: "qcow2", SizeBytes: 1}), switchback.CodeConflict, "exists")
	wantCode(t, Create(ctx, absent, CreateOptions{SizeBytes: 1}), switchback.CodeInvalid, "formats")
	wantCode(t, Create(ctx, absent, CreateOptions{Format: "qcow2", Backing: "nbd+unix:///x?socket=" + dir + "/none", BackingFormat: "raw"}),
		switchback.CodeNotFound, "")
	wantCode(t, Resize(ctx, Image{image, "qcow2"}, 4096), switchback.CodeInternal, "shrink")
	wantCode(t, RemoveBitmap(ctx, image, "k0"), switchback.CodeBitmapLost, "k0")
	wantCode(t, Commit(ctx, image, ""), switchback.CodeInternal, "backing")
	full := startFullDisk(t)
	wantCode(t, Convert(ctx, Image{image, "qcow2"}, Image{full, "raw"}, ConvertOptions{Existing: true}), switchback.CodeNoSpace, "No space left")

	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	wantCode(t, Check(cancelled, image), switchback.CodeCancelled, "")

	b, err := os.ReadFile(image)
	must(t, err)
	for i := 3 << 16; i < len(b) && i < 4<<16; i++ { // the first L2 table's neighbourhood
		b[i] ^= 0x55
	}
	for i := 1 << 16; i < 3<<16; i++ { // refcounts
		b[i] ^= 0x55
	}
	must(t, os.WriteFile(image, b, 0o600))
	wantCode(t, Check(ctx, image), switchback.CodeCorrupt, "")

	t.Setenv("PATH", dir)
	_, err = Info(ctx, image)
	wantCode(t, err, switchback.CodeUnavailable, "install")
}

// startFullDisk serves a disk that has no room and returns its name.
func startFullDisk(t testing.TB) string {
	t.Helper()
	socket := socketPath(t)
	cmd := exec.Command("nbdkit", "-f", "-U", socket, "--filter=error", "memory", "1M", "error=ENOSPC", "error-rate=0", "error-pwrite-rate=100%", "error-zero-rate=100%")
	must(t, cmd.Start())
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	for range 1000 {
		if probe(t.Context(), socket) == nil {
			return "nbd+unix:///?socket=" + socket
		}
		time.Sleep(3 * time.Millisecond)
	}
	t.Fatal("nbdkit does not listen")
	return ""
}

func TestToolError(t *testing.T) {
	tests := []struct {
		stderr string
		want   switchback.Code
	}{
		{"qemu-img: error while writing at byte 0: No space left on device\n", switchback.CodeNoSpace},
		{"qemu-img: Could not open 'x': Could not open backing file: Could not open 'y': No such file or directory", switchback.CodeNotFound},
		{"qemu-nbd: Failed to get \"write\" lock\nIs another process using the image [/x]?\n", switchback.CodeConflict},
		{"qemu-img: Failed to get block status: Input/output error", switchback.CodeInternal},
		{"qemu-img: warning\nqemu-img: Could not open 'x': Image is corrupt; cannot be opened read/write", switchback.CodeCorrupt},
		{"qemu-nbd: Bitmap 'k0' is not found", switchback.CodeBitmapLost},
		{"", switchback.CodeInternal},
	}
	for _, tt := range tests {
		err := toolError(t.Context(), "qemu-img x", tt.stderr, errors.New("exit status 1"))
		if switchback.CodeOf(err) != tt.want {
			t.Errorf("%q: %v, want %s", tt.stderr, err, tt.want)
		}
	}
}

func TestBitmaps(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	base := create(t, filepath.Join(dir, "base.qcow2"), CreateOptions{Format: "qcow2", SizeBytes: 64 << 20})
	top := create(t, filepath.Join(dir, "top.qcow2"), CreateOptions{Format: "qcow2", Backing: base, BackingFormat: "qcow2"})
	must(t, AddBitmap(ctx, base, "k0", 0))
	must(t, AddBitmap(ctx, base, "sum", 1<<20))
	must(t, AddBitmap(ctx, top, "k0", 65536))
	qemuIO(t, "qcow2", top, "write 5M 64k")
	must(t, MergeBitmap(ctx, base, "sum", "k0", top))
	must(t, MergeBitmap(ctx, base, "k0", "sum", ""))
	must(t, RemoveBitmap(ctx, base, "sum"))
	info, err := Info(ctx, base)
	must(t, err)
	if d := cmp.Diff([]Bitmap{{Name: "k0", GranularityBytes: 65536, Auto: true}}, info.Bitmaps); d != "" {
		t.Errorf("bitmaps (-want +got):\n%s", d)
	}
	if b, ok := info.Bitmap("k0"); !ok || b.Inconsistent() {
		t.Errorf("k0: %+v, %v", b, ok)
	}
	if _, ok := info.Bitmap("sum"); ok {
		t.Error("sum is still there")
	}

	// A copy with --bitmaps has it too.
	copied := Image{filepath.Join(dir, "copy.qcow2"), "qcow2"}
	must(t, Convert(ctx, Image{base, "qcow2"}, copied, ConvertOptions{Bitmaps: true, ClusterSizeBytes: 4096}))
	if info, err = Info(ctx, copied.Path); err != nil || len(info.Bitmaps) != 1 || info.ClusterSizeBytes != 4096 {
		t.Errorf("copy: %+v, %v", info, err)
	}

	// What the bitmap marks is seen by a reader of the export: 1 MiB at 5 MiB.
	s := startNBD(t, NBDOptions{Path: base, Format: "qcow2", Socket: socketPath(t), Export: "vda", Bitmap: "k0", ReadOnly: true})
	out, err := exec.Command("nbdinfo", "--map=qemu:dirty-bitmap:k0", "nbd+unix:///vda?socket="+s.Socket()).CombinedOutput()
	must(t, err)
	var dirty []string
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); f[2] == "1" {
			dirty = append(dirty, f[0]+"+"+f[1])
		}
	}
	if d := cmp.Diff([]string{"5242880+1048576"}, dirty); d != "" {
		t.Errorf("dirty (-want +got):\n%s", d)
	}
}

// socketPath is short enough for a socket.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "qemu")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// startNBD stops the server at the end of the test.
func startNBD(t testing.TB, o NBDOptions) *NBDServer {
	t.Helper()
	s, err := StartNBD(t.Context(), o)
	must(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		s.Stop(ctx)
	})
	return s
}

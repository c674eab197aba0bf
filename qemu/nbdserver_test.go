package qemu

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

func TestNBDServer(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	image := create(t, filepath.Join(dir, "a,b.qcow2"), CreateOptions{Format: "qcow2", SizeBytes: 16 << 20})
	o := NBDOptions{Path: image, Format: "qcow2", Socket: socketPath(t), Export: "vda", Discard: true, DetectZeroes: true, Cache: "writeback"}
	s := startNBD(t, o)
	uri := "nbd+unix:///vda?socket=" + s.Socket()
	qemuIO(t, "raw", uri, "write -P 9 1M 1M", "flush")

	second := o
	second.Socket = socketPath(t)
	_, err := StartNBD(ctx, second)
	wantCode(t, err, switchback.CodeConflict, fmt.Sprintf("qemu-nbd (pid %d)", s.PID()))
	_, err = StartNBD(ctx, o)
	wantCode(t, err, switchback.CodeConflict, "socket")
	_, err = Info(ctx, image)
	must(t, err) // forced

	shared := second
	shared.ReadOnly, shared.ForceShare = true, true
	reader := startNBD(t, shared)
	qemuIO(t, "raw", "nbd+unix:///vda?socket="+reader.Socket(), "read -P 9 1M 1M")
	if err := exec.Command("qemu-io", "-f", "raw", "-c", "write 0 4k", "nbd+unix:///vda?socket="+reader.Socket()).Run(); err == nil {
		t.Error("a read-only server takes writes")
	}

	// An open client does not keep a server.
	conn, err := net.Dial("unix", s.Socket())
	must(t, err)
	defer conn.Close()
	must(t, s.Stop(ctx))
	must(t, s.Stop(ctx))
	select {
	case <-s.Done():
	default:
		t.Error("not done after Stop")
	}
	// The lock is free although the force-sharing reader is still there.
	qemuIO(t, "qcow2", image, "read -P 9 1M 1M", "write -P 0 1M 1M")
	must(t, reader.Stop(ctx))
	must(t, Check(ctx, image))
	s = startNBD(t, o)
	must(t, s.Stop(ctx))
}

func TestNBDServerStartErrors(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	image := create(t, filepath.Join(dir, "a.qcow2"), CreateOptions{Format: "qcow2", SizeBytes: 1 << 20})
	tests := []struct {
		name string
		edit func(*NBDOptions)
		code switchback.Code
		text string
	}{
		{"no image", func(o *NBDOptions) { o.Path += "x" }, switchback.CodeNotFound, "No such file"},
		{"no bitmap", func(o *NBDOptions) { o.Bitmap = "k7" }, switchback.CodeBitmapLost, "k7"},
		{"no format", func(o *NBDOptions) { o.Format = "" }, switchback.CodeInvalid, ""},
		{"other format", func(o *NBDOptions) { o.Format = "vmdk" }, switchback.CodeInternal, "VMDK"},
		{"long socket", func(o *NBDOptions) { o.Socket += strings.Repeat("x", 107) }, switchback.CodeInvalid, "107"},
		{"writable and shared", func(o *NBDOptions) { o.ForceShare = true }, switchback.CodeInvalid, "read-only"},
		{"no directory for the socket", func(o *NBDOptions) { o.Socket = "/nowhere/s" }, switchback.CodeNotFound, "/nowhere/s"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := NBDOptions{Path: image, Format: "qcow2", Socket: socketPath(t)}
			tt.edit(&o)
			_, err := StartNBD(ctx, o)
			wantCode(t, err, tt.code, tt.text)
		})
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	_, err := StartNBD(cancelled, NBDOptions{Path: image, Format: "qcow2", Socket: socketPath(t)})
	wantCode(t, err, switchback.CodeCancelled, "")
	qemuIO(t, "qcow2", image, "write 0 4k") // none of them left a lock
}

func TestKilledNBDServer(t *testing.T) {
	ctx, dir := t.Context(), t.TempDir()
	image := create(t, filepath.Join(dir, "a.qcow2"), CreateOptions{Format: "qcow2", SizeBytes: 16 << 20})
	must(t, AddBitmap(ctx, image, "k0", 0))
	o := NBDOptions{Path: image, Format: "qcow2", Socket: socketPath(t)}
	s := startNBD(t, o)
	qemuIO(t, "raw", "nbd+unix:///?socket="+s.Socket(), "write 0 1M", "flush")
	must(t, syscall.Kill(s.PID(), syscall.SIGKILL))
	<-s.Done()
	wantCode(t, s.Stop(ctx), switchback.CodeInternal, "killed")

	info, err := Info(ctx, image)
	must(t, err)
	if b, _ := info.Bitmap("k0"); !b.Inconsistent() {
		t.Errorf("bitmap after a killed writer: %+v", b)
	}
	bad := o
	bad.Bitmap, bad.ReadOnly = "k0", true
	_, err = StartNBD(ctx, bad)
	wantCode(t, err, switchback.CodeBitmapLost, "inconsistent")
	must(t, RemoveBitmap(ctx, image, "k0"))
	must(t, Check(ctx, image))
	s = startNBD(t, o) // over the socket that the killed one left
	must(t, s.Stop(ctx))
}

// TestMain is also the agent of TestServerDiesWithAgent.
func TestMain(m *testing.M) {
	if image := os.Getenv("QEMU_TEST_AGENT"); image != "" {
		agent(image)
		return
	}
	os.Exit(m.Run())
}

// agent serves an image twice, prints the process ids and waits to be killed.
// Other goroutines meanwhile make the runtime start and end threads.
func agent(image string) {
	var wg sync.WaitGroup
	for i := range 2 {
		wg.Go(func() {
			s, err := StartNBD(context.Background(), NBDOptions{Path: image, Format: "raw", ReadOnly: true, Socket: fmt.Sprintf("%s.s%d", image, i)})
			if err != nil {
				fmt.Println(err)
				os.Exit(1)
			}
			fmt.Println(s.PID())
		})
	}
	wg.Wait()
	for range 50 {
		wg.Go(func() {
			_ = exec.Command("true").Run()
		})
	}
	wg.Wait()
	fmt.Println("ready")
	select {}
}

func TestServerDiesWithAgent(t *testing.T) {
	image := filepath.Join(filepath.Dir(socketPath(t)), "i")
	must(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "QEMU_TEST_AGENT="+image)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill() })
	var pids []int
	for lines := bufio.NewScanner(out); lines.Scan() && lines.Text() != "ready"; {
		pid, err := strconv.Atoi(lines.Text())
		if err != nil {
			t.Fatal(lines.Text())
		}
		pids = append(pids, pid)
	}
	if len(pids) != 2 {
		t.Fatalf("servers: %v", pids)
	}
	for _, pid := range pids {
		if !alive(pid) {
			t.Fatalf("server %d is gone before its agent", pid)
		}
	}
	must(t, cmd.Process.Kill())
	_ = cmd.Wait()
	deadline := time.Now().Add(5 * time.Second)
	for _, pid := range pids {
		for alive(pid) {
			if time.Now().After(deadline) {
				_ = syscall.Kill(pid, syscall.SIGKILL)
				t.Fatalf("server %d outlives its agent", pid)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// alive reports that a process runs; one that nobody has waited for does not.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	_, state, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(state, "Z")
}

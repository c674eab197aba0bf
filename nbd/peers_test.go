package nbd

import (
	"bytes"
	"context"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// tempSocket returns a path short enough for a unix socket.
func tempSocket(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// startPeer runs a server in the foreground until the test ends and waits
// until its socket takes connections.
func startPeer(t testing.TB, socket, name string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-exited
	})
	deadline := time.Now().Add(5 * time.Second)
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			conn.Close()
			return cmd
		}
		select {
		case <-exited:
			t.Fatalf("%s ended: %s", name, out.Bytes())
		case <-time.After(3 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s does not listen: %s", name, out.Bytes())
		}
	}
}

// startQEMU serves an image with qemu-nbd and returns the socket.
func startQEMU(t testing.TB, image, format string, args ...string) string {
	t.Helper()
	socket := tempSocket(t)
	args = append([]string{"-k", socket, "-f", format, "-t", "-e", "16"}, args...)
	startPeer(t, socket, "qemu-nbd", append(args, image)...)
	return socket
}

func dial(t testing.TB, socket string, o Options) *Client {
	t.Helper()
	c, err := Dial(context.Background(), "unix", socket, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// run runs a tool to its end and returns what it prints.
func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// randomBytes is reproducible.
func randomBytes(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	i := 0
	for ; i+8 <= n; i += 8 {
		be.PutUint64(b[i:], r.Uint64())
	}
	for ; i < n; i++ {
		b[i] = byte(r.Uint32())
	}
	return b
}

// writeImage makes a raw file of content.
func writeImage(t testing.TB, content []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(p, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

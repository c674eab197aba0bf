package qemu

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

const (
	// maxClients is how many connections a server takes at once.
	maxClients = "16"
	// maxSocketPath is what fits into a Unix socket's address.
	maxSocketPath = 107
	// startTimeout bounds StartNBD where its context does not.
	startTimeout = 30 * time.Second
	// greeting is the first thing an NBD server says.
	greeting = "NBDMAGIC"
)

// NBDOptions describe an image to serve.
type NBDOptions struct {
	Path, Format string
	// Socket is the path of the Unix socket to listen on; at most 107 bytes.
	Socket string
	// Export is the export's name.
	Export string
	// Bitmap is a persistent bitmap to offer as qemu:dirty-bitmap:NAME.
	Bitmap   string
	ReadOnly bool
	// ForceShare serves a local image though somebody has it open for writing,
	// or opens it later: the server takes no lock. Only with ReadOnly. What it
	// reads is out of date as soon as there is a writer.
	ForceShare bool
	// Cache is QEMU's cache mode; empty is "writeback".
	Cache string
	// Discard frees the space of trimmed ranges.
	Discard bool
	// DetectZeroes makes written zeros sparse (with Discard) or cheap.
	DetectZeroes bool
}

func (o NBDOptions) args() ([]string, error) {
	switch {
	case o.Path == "" || o.Format == "" || o.Socket == "":
		return nil, switchback.Errorf(switchback.CodeInvalid, "serve image %q: path, format and socket must be given", o.Path)
	case len(o.Socket) > maxSocketPath:
		return nil, switchback.Errorf(switchback.CodeInvalid, "socket path %s has more than %d bytes", o.Socket, maxSocketPath)
	case o.ForceShare && !o.ReadOnly:
		return nil, switchback.Errorf(switchback.CodeInvalid, "serve image %s: force-share needs read-only", o.Path)
	}
	args := []string{"-k", o.Socket, "-t", "-e", maxClients, "-x", o.Export}
	if o.ReadOnly {
		args = append(args, "-r")
	}
	if o.Bitmap != "" {
		args = append(args, "-B", o.Bitmap)
	}
	if o.Cache != "" {
		args = append(args, "--cache="+o.Cache)
	}
	if o.Discard {
		args = append(args, "--discard=unmap")
	}
	switch {
	case o.DetectZeroes && o.Discard:
		args = append(args, "--detect-zeroes=unmap")
	case o.DetectZeroes:
		args = append(args, "--detect-zeroes=on")
	}
	if o.ForceShare {
		path, err := filepath.Abs(o.Path)
		if err != nil {
			return nil, switchback.Errorf(switchback.CodeInternal, "serve image %s: %w", o.Path, err)
		}
		return append(args, "--image-opts", fmt.Sprintf("driver=%s,file.driver=file,file.filename=%s,force-share=on",
			o.Format, strings.ReplaceAll(path, ",", ",,"))), nil
	}
	return append(args, "-f", o.Format, imageName(o.Path)), nil
}

// NBDServer is a running qemu-nbd. It gets SIGTERM when this process dies, on
// which it flushes and ends.
type NBDServer struct {
	socket  string
	cmd     *exec.Cmd
	stderr  tail          // read when exited is closed
	started chan error    // receives once
	exited  chan struct{} // closed when the process is gone
	err     error         // how it ended; read when exited is closed
}

// StartNBD serves an image and returns when clients can connect. A lock held by
// somebody else is CodeConflict. The caller owes Stop.
func StartNBD(ctx context.Context, o NBDOptions) (*NBDServer, error) {
	args, err := o.args()
	if err != nil {
		return nil, err
	}
	// The tool takes over the path of a socket that is in use.
	if probe(ctx, o.Socket) == nil {
		return nil, switchback.Errorf(switchback.CodeConflict, "serve image %s: socket %s has a server already", o.Path, o.Socket)
	}
	if st, err := os.Lstat(o.Socket); err == nil && st.Mode()&os.ModeSocket != 0 {
		_ = os.Remove(o.Socket)
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	s := &NBDServer{socket: o.Socket, cmd: command("qemu-nbd", args...), stderr: tail{limit: 64 << 10},
		started: make(chan error, 1), exited: make(chan struct{})}
	s.cmd.Stderr = &s.stderr
	go s.run()
	if err := <-s.started; err != nil {
		return nil, toolError(ctx, "qemu-nbd", "", err)
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 20*time.Millisecond) {
		if probe(ctx, o.Socket) == nil {
			return s, nil
		}
		select {
		case <-s.exited:
			if s.err == nil {
				s.err = errors.New("ended before it served")
			}
			return nil, toolError(context.Background(), "qemu-nbd", string(s.stderr.b), s.err)
		case <-ctx.Done():
			s.kill()
			return nil, toolError(ctx, "qemu-nbd", string(s.stderr.b), ctx.Err())
		case <-time.After(wait):
		}
	}
}

// run starts the process and waits for it. Both happen on one thread, which is
// locked for so long: the child is bound to its life (see command). The thread
// costs nothing while it waits.
func (s *NBDServer) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := s.cmd.Start()
	s.started <- err
	if err != nil {
		return
	}
	s.err = s.cmd.Wait()
	close(s.exited)
}

// probe reads a server's greeting. That a connection stands says little:
// qemu-nbd listens before it has opened the image.
func probe(ctx context.Context, socket string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Second)); err != nil {
		return err
	}
	var b [len(greeting) + 10]byte
	if _, err := io.ReadFull(conn, b[:]); err != nil {
		return err
	}
	if string(b[:len(greeting)]) != greeting {
		return errors.New("not an nbd server")
	}
	// Client flags, then NBD_OPT_ABORT without data.
	_, err = conn.Write([]byte("\x00\x00\x00\x01IHAVEOPT\x00\x00\x00\x02\x00\x00\x00\x00"))
	return err
}

// Socket is where the server listens.
func (s *NBDServer) Socket() string { return s.socket }

// PID of the process.
func (s *NBDServer) PID() int { return s.cmd.Process.Pid }

// Done is closed when the process is gone, for whatever reason.
func (s *NBDServer) Done() <-chan struct{} { return s.exited }

// Stop ends the server and returns when the process is gone, and with it the
// image's lock. What was written is flushed; clients lose their connections. If
// ctx ends first, the process is killed, which leaves bitmaps of a writable
// image inconsistent. An end that was not clean is an error, also if it came
// before Stop. Stop is idempotent.
func (s *NBDServer) Stop(ctx context.Context) error {
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-s.exited:
	case <-ctx.Done():
		s.kill()
	}
	// Left behind by a server that was killed.
	_ = os.Remove(s.socket)
	if s.err != nil {
		return toolError(ctx, "qemu-nbd", string(s.stderr.b), s.err)
	}
	return nil
}

func (s *NBDServer) kill() {
	_ = s.cmd.Process.Kill()
	<-s.exited
}

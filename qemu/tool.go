package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// outputLimit bounds what is kept of what a tool prints.
const outputLimit = 16 << 20

// killDelay is how long a tool may take to end after SIGTERM.
const killDelay = 10 * time.Second

// command prepares a tool that gets SIGTERM when this process dies. The kernel
// sends that signal when the *thread* that started the child ends, and the Go
// runtime ends threads as it likes; whoever starts the command must therefore
// do so on a locked thread and keep it until the child is gone (see run, and
// NBDServer.run).
func command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	return cmd
}

// run runs qemu-img to its end and returns what it wrote to its output, also
// with an error.
func run(ctx context.Context, args ...string) ([]byte, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := command("qemu-img", args...)
	stdout, stderr := &tail{limit: outputLimit}, &tail{limit: 64 << 10}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if err := ctx.Err(); err != nil {
		return nil, toolError(ctx, "qemu-img "+args[0], "", err)
	}
	if err := cmd.Start(); err != nil {
		return nil, toolError(ctx, "qemu-img "+args[0], "", err)
	}
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(killDelay):
			_ = cmd.Process.Kill()
		}
	})
	err := cmd.Wait()
	close(ended)
	stop()
	if err != nil {
		return stdout.b, toolError(ctx, "qemu-img "+args[0], string(stderr.b), err)
	}
	return stdout.b, nil
}

// tail keeps the last bytes written to it.
type tail struct {
	b     []byte
	limit int
}

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if over := len(t.b) - t.limit; over > 0 {
		t.b = append(t.b[:0], t.b[over:]...)
	}
	return len(p), nil
}

// patterns tell errors by the tools' messages, which have no other mark. The
// first that matches counts.
var patterns = []struct {
	text string
	code switchback.Code
}{
	{"No space left", switchback.CodeNoSpace},
	{"Disk quota exceeded", switchback.CodeNoSpace},
	{"Failed to get ", switchback.CodeConflict}, // … "write" lock; QEMU's docs/system/images.rst, "Disk image file locking"
	{"Dirty bitmap", switchback.CodeBitmapLost},
	{"Bitmap '", switchback.CodeBitmapLost},
	{"No such file or directory", switchback.CodeNotFound},
	{"Requested export not available", switchback.CodeNotFound},
	{"Connection refused", switchback.CodeUnavailable},
	{"Failed to connect", switchback.CodeUnavailable},
	{"Image is corrupt", switchback.CodeCorrupt},
	{"Image is not in ", switchback.CodeCorrupt},
}

// toolError makes an error of how a tool ended.
func toolError(ctx context.Context, op, stderr string, err error) error {
	e := &switchback.Error{Code: switchback.CodeInternal, Op: op, Message: lastLines(stderr), Err: err}
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		e.Code, e.Err = switchback.CodeTimeout, ctx.Err()
		return e
	case ctx.Err() != nil:
		e.Code, e.Err = switchback.CodeCancelled, ctx.Err()
		return e
	case errors.Is(err, exec.ErrNotFound):
		e.Code, e.Hint = switchback.CodeUnavailable, "install QEMU's tools (Debian: qemu-utils)"
		return e
	}
	for _, p := range patterns {
		if strings.Contains(e.Message, p.text) {
			e.Code = p.code
			break
		}
	}
	if e.Code == switchback.CodeConflict && !strings.Contains(e.Message, " lock") {
		e.Code = switchback.CodeInternal
	}
	if e.Code == switchback.CodeConflict {
		e.Hint = lockHint(e.Message)
	}
	return e
}

// lastLines puts the last lines that a tool printed on one line: the cause of
// the last is often in the line before.
func lastLines(s string) string {
	lines := strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' })
	return strings.Join(lines[max(0, len(lines)-2):], "; ")
}

// lockHint says which processes have the image open that the message is about:
// `Is another process using the image [path]?`.
func lockHint(message string) string {
	const unknown = "a running VM, a qemu-nbd or another qemu-img has the image open"
	_, path, ok := strings.Cut(message, "using the image [")
	if !ok {
		return unknown
	}
	path, _, ok = strings.Cut(path, "]")
	if !ok {
		return unknown
	}
	who := holders(path)
	if len(who) == 0 {
		return unknown
	}
	return "the image is open in " + strings.Join(who, ", ")
}

// holders finds processes on this host that have the file open. QEMU's locks
// belong to open files and not to processes, so the kernel's list of locks
// does not name them.
func holders(path string) []string {
	want, err := os.Stat(path)
	if err != nil {
		return nil
	}
	links, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	var who []string
	last := ""
	for _, l := range links {
		pid := strings.Split(l, "/")[2]
		if pid == last {
			continue
		}
		if st, err := os.Stat(l); err != nil || !os.SameFile(st, want) {
			continue
		}
		last = pid
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		who = append(who, fmt.Sprintf("%s (pid %s)", bytes.TrimSpace(name), pid))
	}
	return who
}

// imageName makes a path safe as an argument: QEMU takes what stands before a
// colon for a protocol, and a leading dash for an option.
func imageName(path string) string {
	if path == "" || filepath.IsAbs(path) || strings.Contains(path, "://") || strings.HasPrefix(path, "json:") {
		return path
	}
	return "./" + filepath.Clean(path)
}

// exitStatus is how a tool that ran to its end ended; -1 otherwise.
func exitStatus(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	return -1
}

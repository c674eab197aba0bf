package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// virsh is one virsh process that takes commands, so that a peer is not charged
// with the start of a process and a connection for each.
type virsh struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *os.File
	n    int
	rest []byte // read, not yet used
}

func openVirsh(ctx context.Context, uri string) (*virsh, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	// Without a terminal the C library would keep the output back.
	cmd := exec.Command("stdbuf", "-o0", "virsh", "-q", "-c", uri)
	cmd.Stdout, cmd.Stderr = w, w
	in, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	w.Close()
	if err != nil {
		r.Close()
		return nil, fmt.Errorf("start virsh: %w", err)
	}
	v := &virsh{cmd: cmd, in: in, out: r}
	_, err = v.do(ctx, "uri")
	return v, err
}

// do runs one command and returns what it printed. A command that prints an
// error is one.
func (v *virsh) do(ctx context.Context, command string) (string, error) {
	v.n++
	mark := fmt.Sprintf("\n@done-%d@", v.n)
	// The shell repeats what it reads, so the mark is told by its place: a new line.
	if _, err := fmt.Fprintf(v.in, "%s\necho %s\n", command, mark[1:]); err != nil {
		return "", fmt.Errorf("virsh %s: %w", command, err)
	}
	stop := context.AfterFunc(ctx, func() { v.cmd.Process.Kill() })
	defer stop()
	buf := make([]byte, 64<<10)
	for {
		if before, after, ok := bytes.Cut(v.rest, []byte(mark)); ok {
			v.rest = bytes.Clone(after)
			return answer(command, string(before))
		}
		n, err := v.out.Read(buf)
		v.rest = append(v.rest, buf[:n]...)
		if err != nil {
			if ctx.Err() != nil {
				err = ctx.Err()
			}
			return "", fmt.Errorf("virsh %s: %w: %s", command, err, v.rest)
		}
	}
}

// answer drops the prompts from what virsh printed.
func answer(command, text string) (string, error) {
	var lines []string
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, "virsh # ") || line == "" {
			continue
		}
		if msg, ok := strings.CutPrefix(line, "error: "); ok {
			return "", fmt.Errorf("virsh %s: %s", command, msg)
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n"), nil
}

func (v *virsh) close() {
	v.in.Close()
	v.cmd.Wait()
	v.out.Close()
}

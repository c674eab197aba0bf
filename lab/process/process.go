// Package process names the processes of a lab, which may outlive their starter.
package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Process names one process for good: the start time tells it from a later one
// with the same number.
type Process struct {
	PID   int    `json:"pid"`
	Start uint64 `json:"start"` // clock ticks since boot, field 22 of /proc/PID/stat
}

// Identify names the process that has the number now.
func Identify(pid int) (Process, error) {
	st, err := readStat(pid)
	return Process{pid, st.start}, err
}

// Start starts cmd in a session of its own, its output appended to log.
func Start(cmd *exec.Cmd, log string) (Process, error) {
	if err := os.MkdirAll(filepath.Dir(log), 0o755); err != nil {
		return Process{}, err
	}
	f, err := os.OpenFile(log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return Process{}, err
	}
	defer f.Close()
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return Process{}, err
	}
	p, err := Identify(cmd.Process.Pid)
	go cmd.Wait() // reaped where the starter lives long enough
	return p, err
}

// Alive is false for a zombie without other threads, which holds nothing any
// more. The leader of a killed process can be one while other threads of it
// still hold its locks and sockets.
func (p Process) Alive() bool {
	if p.PID == 0 {
		return false
	}
	st, err := readStat(p.PID)
	return err == nil && st.start == p.Start && (st.threads > 1 || st.state != 'Z' && st.state != 'X')
}

// Signal sends a signal; to a process that is gone, none.
func (p Process) Signal(sig syscall.Signal) error {
	if !p.Alive() {
		return nil
	}
	if err := syscall.Kill(p.PID, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal %v to process %d: %w", sig, p.PID, err)
	}
	return nil
}

// WaitGone blocks until the process is gone or the context is done.
func (p Process) WaitGone(ctx context.Context) error {
	for p.Alive() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("process %d still runs: %w", p.PID, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// Kill sends a signal and waits until the process is gone, 20 s at most.
func (p Process) Kill(sig syscall.Signal) error {
	if err := p.Signal(sig); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return p.WaitGone(ctx)
}

type stat struct {
	start   uint64
	state   byte
	threads int
}

// readStat reads /proc/PID/stat. The command name, field 2, may hold blanks and
// parentheses, so fields are counted from the last ')'.
func readStat(pid int) (stat, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return stat{}, err
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 20 {
		return stat{}, fmt.Errorf("/proc/%d/stat: %d fields", pid, len(f))
	}
	st := stat{state: f[0][0]}
	if st.threads, err = strconv.Atoi(string(f[17])); err != nil {
		return stat{}, err
	}
	st.start, err = strconv.ParseUint(string(f[19]), 10, 64)
	return st, err
}

// In lists all processes in the mount namespace of the given one.
func In(pid int) ([]Process, error) {
	want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return nil, err
	}
	dir, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var ps []Process
	for _, e := range dir {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if ns, err := os.Readlink("/proc/" + e.Name() + "/ns/mnt"); err != nil || ns != want {
			continue
		}
		if p, err := Identify(n); err == nil && p.Alive() {
			ps = append(ps, p)
		}
	}
	return ps, nil
}

package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Process is a process of the lab that may outlive its starter.
type Process struct {
	PID int `json:"pid"`
	// Start is the kernel's start time of the process, which tells it from a
	// later one with the same number.
	Start string `json:"start"`
}

// startProcess starts cmd detached, its output appended to log.
func startProcess(cmd *exec.Cmd, log string) (Process, error) {
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
	p := Process{PID: cmd.Process.Pid, Start: startTime(cmd.Process.Pid)}
	go cmd.Wait() // reaped where the starter lives long enough
	return p, nil
}

// startTime is field 22 of /proc/PID/stat; "" when there is no such process, or
// only its zombie.
func startTime(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, rest, ok := strings.Cut(string(b), ") ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return fields[19]
}

// Alive reports whether the process still runs.
func (p Process) Alive() bool { return p.PID > 0 && startTime(p.PID) == p.Start && p.Start != "" }

// Kill sends a signal and waits until the process is gone.
func (p Process) Kill(sig syscall.Signal) error {
	if !p.Alive() {
		return nil
	}
	if err := syscall.Kill(p.PID, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	for range 2000 {
		if !p.Alive() {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("process %d does not end after signal %d", p.PID, sig)
}

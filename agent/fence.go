package agent

import (
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/internal/durable"
)

// hookScript refuses the start of a domain that is fenced, or has no grant. It is self-contained shell:
// it reads small files and never calls back into libvirt or the network.
//
//go:embed hook.sh
var hookScript string

const hookPath = "/etc/libvirt/hooks/qemu.d/50-switchback"

// installHook writes the hook and tells a running libvirtd about it: libvirtd
// looks for hooks when it starts and on SIGHUP only.
func (a *Agent) installHook() error {
	script := strings.NewReplacer("@FENCE_DIR@", a.fenceDir(), "@GUARD_DIR@", filepath.Dir(a.guardPath("x")),
		"@GRANT_DIR@", filepath.Dir(a.runPath("grants", "x"))).Replace(hookScript)
	hookPath := a.cfg.HookPath
	old, err := os.ReadFile(hookPath)
	if err == nil && string(old) == script {
		return nil
	}
	if err := durable.WriteFile(hookPath, []byte(script), 0o755); err != nil {
		return fmt.Errorf("install the libvirt hook: %w", err)
	}
	if err := os.Chmod(filepath.Dir(hookPath), 0o755); err != nil {
		return err
	}
	b, err := os.ReadFile(a.cfg.LibvirtPIDFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // not running: it will find the hook when it starts
	}
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return fmt.Errorf("pid of libvirtd in %s: %w", a.cfg.LibvirtPIDFile, err)
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if name := strings.TrimSpace(string(comm)); err != nil || (name != "libvirtd" && name != "virtqemud") {
		return nil // a stale number: libvirtd does not run, and will find the hook when it starts
	}
	if err := unix.Kill(pid, unix.SIGHUP); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("tell libvirtd about the hook: %w", err)
	}
	a.log.Info("libvirt hook installed", "path", hookPath)
	return nil
}

func (a *Agent) fenceDir() string { return filepath.Join(a.cfg.StateDir, "fenced") }

func (a *Agent) fencePath(vm switchback.VMUUID) string {
	return filepath.Join(a.fenceDir(), string(vm))
}

// setFence makes the hook refuse the VM's start, durably.
func (a *Agent) setFence(vm switchback.VMUUID, message string) error {
	return durable.WriteFile(a.fencePath(vm), []byte(message+"\n"), 0o644)
}

func (a *Agent) clearFence(vm switchback.VMUUID) error {
	if err := os.MkdirAll(a.fenceDir(), 0o700); err != nil {
		return err
	}
	return durable.Remove(a.fencePath(vm))
}

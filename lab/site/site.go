package site

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/switchback-dr/switchback/lab/process"
)

//go:embed holder.sh
var holderScript string

const (
	startLimit = 60 * time.Second // a cold capability probe on a loaded machine
	stopLimit  = 20 * time.Second
)

// Site is a running site. Its methods must not be called concurrently, except
// Command, the paths and the PIDs.
type Site struct {
	cfg      Config
	holder   process.Process
	libvirtd process.Process
	reap     sync.WaitGroup // one for each child of this process
}

// state is what site.json holds.
type state struct {
	Config   Config          `json:"config"`
	Holder   process.Process `json:"holder"`
	Libvirtd process.Process `json:"libvirtd"`
}

// Start makes the site's directories, its namespaces and its libvirtd, and
// returns when libvirtd answers: 0.2 s with a warm capability cache, 2 to 4 s
// with a cold one. Disks and definitions of an earlier site in the same Dir are
// found again, as after a reboot of the host. It is an error if that site runs.
func Start(ctx context.Context, cfg Config) (_ *Site, err error) {
	cfg, err = cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if old, err := readState(cfg.Dir); err == nil && old.Holder.Alive() {
		return nil, fmt.Errorf("site %s in %s runs already (process %d)", cfg.Name, cfg.Dir, old.Holder.PID)
	}
	s := &Site{cfg: cfg}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Destroy(context.WithoutCancel(ctx)))
		}
	}()
	if err := s.makeDirs(); err != nil {
		return nil, err
	}
	if err := s.startHolder(ctx); err != nil {
		return nil, err
	}
	if err := s.startLibvirtd(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// Attach finds a site that another process started. It succeeds while the
// namespaces exist, also when libvirtd is down.
func Attach(dir string) (*Site, error) {
	st, err := readState(dir)
	if err != nil {
		return nil, err
	}
	s := &Site{cfg: st.Config, holder: st.Holder, libvirtd: st.Libvirtd}
	if !s.holder.Alive() {
		return nil, fmt.Errorf("site %s in %s is not running", st.Config.Name, dir)
	}
	return s, nil
}

// Remove clears what a site that no longer runs left behind: its run directory
// (stale after a reboot) and, if data is set, its Dir.
func Remove(dir string, data bool) error {
	st, err := readState(dir)
	if err != nil {
		return err
	}
	if st.Holder.Alive() {
		return fmt.Errorf("site %s runs: destroy it first", st.Config.Name)
	}
	if err := os.RemoveAll(st.Config.RunDir); err != nil || !data {
		return err
	}
	return os.RemoveAll(st.Config.Dir)
}

func readState(dir string) (state, error) {
	var st state
	b, err := os.ReadFile(filepath.Join(dir, "site.json"))
	if err != nil {
		return st, err
	}
	if err := json.Unmarshal(b, &st); err != nil {
		return st, fmt.Errorf("read %s: %w", filepath.Join(dir, "site.json"), err)
	}
	return st, nil
}

func (s *Site) writeState() error {
	b, err := json.MarshalIndent(state{s.cfg, s.holder, s.libvirtd}, "", "  ")
	if err != nil {
		return err
	}
	tmp := s.cfg.stateFile() + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, s.cfg.stateFile())
}

// Name is the site's name.
func (s *Site) Name() string { return s.cfg.Name }

// Config is the site's configuration with all defaults filled in.
func (s *Site) Config() Config { return s.cfg }

// LibvirtSocket is libvirtd's socket as seen from outside the namespaces. Inside
// it is the standard /run/libvirt/libvirt-sock.
func (s *Site) LibvirtSocket() string { return s.cfg.socket() }

// URI is what virsh -c takes, from outside the namespaces.
func (s *Site) URI() string { return "qemu:///system?socket=" + s.LibvirtSocket() }

// DomainType is the domain type that works here: "kvm" or "qemu".
func (s *Site) DomainType() string {
	if s.cfg.KVM {
		return "kvm"
	}
	return "qemu"
}

// PID is libvirtd's; 0 if it is down.
func (s *Site) PID() int {
	if !s.libvirtd.Alive() {
		return 0
	}
	return s.libvirtd.PID
}

// NamespacePID is the holder's: its mount and network namespaces are the site's.
func (s *Site) NamespacePID() int { return s.holder.PID }

// HostPath translates a path inside the site to the path outside.
func (s *Site) HostPath(inside string) string {
	inside = filepath.Clean(inside)
	best := bind{}
	for _, b := range s.cfg.binds() {
		if (inside == b.inside || strings.HasPrefix(inside, b.inside+"/")) && len(b.inside) > len(best.inside) {
			best = b
		}
	}
	return filepath.Join(best.outside, strings.TrimPrefix(inside, best.inside))
}

// Command is exec.CommandContext for a program that runs inside the site's
// mount and network namespaces, with / as its directory. nsenter replaces itself
// with the program, so the command's process is the program's. Its root is the
// holder's, which matters where the lab runs in a chroot. A caller that
// wants it to outlive itself sets SysProcAttr.Setsid.
func (s *Site) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if strings.Contains(name, "/") && !filepath.IsAbs(name) {
		if abs, err := filepath.Abs(name); err == nil {
			name = abs
		}
	}
	return exec.CommandContext(ctx, "nsenter", append([]string{
		"-t", strconv.Itoa(s.holder.PID), "-m", "-n", "-r", "--wdns=/", "--", name}, args...)...)
}

// Processes lists the PIDs of everything that runs in the site, the holder too.
func (s *Site) Processes() ([]int, error) {
	ps, err := process.In(s.holder.PID)
	var pids []int
	for _, p := range ps {
		pids = append(pids, p.PID)
	}
	return pids, err
}

// Stop ends libvirtd in good order and waits for its end. Guests go on.
func (s *Site) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	if err := s.libvirtd.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return s.libvirtd.WaitGone(ctx)
}

// Kill ends libvirtd with SIGKILL and waits for its end. Guests go on.
func (s *Site) Kill(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	if err := s.libvirtd.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	return s.libvirtd.WaitGone(ctx)
}

// Restart stops libvirtd if it runs, starts it in the same namespaces and
// returns when it answers.
func (s *Site) Restart(ctx context.Context) error {
	if err := s.Stop(ctx); err != nil {
		return err
	}
	return s.startLibvirtd(ctx)
}

// Reload makes libvirtd read its configuration again and look for hooks.
func (s *Site) Reload() error { return s.libvirtd.Signal(syscall.SIGHUP) }

// Destroy kills every process in the site's namespaces and removes the run
// directory. Dir stays, with its disks, logs and site.json. It is idempotent.
func (s *Site) Destroy(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	// libvirtd first, so that it starts nothing new and writes nothing behind us;
	// the holder last, so that the namespaces can be searched again for what was
	// forked meanwhile.
	for s.holder.Alive() {
		ps, err := process.In(s.holder.PID)
		if err != nil {
			return err
		}
		var others []process.Process
		for _, p := range ps {
			if p.PID != s.holder.PID {
				others = append(others, p)
			}
		}
		if len(others) == 0 {
			others = append(others, s.holder)
		} else if s.libvirtd.Alive() {
			others = append([]process.Process{s.libvirtd}, others...)
		}
		for _, p := range others {
			if err := p.Signal(syscall.SIGKILL); err != nil {
				return err
			}
		}
		for _, p := range others {
			if err := p.WaitGone(ctx); err != nil {
				return err
			}
		}
	}
	s.reap.Wait()
	return os.RemoveAll(s.cfg.RunDir)
}

func (s *Site) makeDirs() error {
	for _, b := range s.cfg.binds() {
		if err := os.MkdirAll(b.outside, 0o755); err != nil {
			return err
		}
	}
	for _, d := range []string{"/etc/libvirt/hooks/qemu.d", "/var/lib/libvirt/images", "/var/log/libvirt/qemu"} {
		if err := os.MkdirAll(s.HostPath(d), 0o755); err != nil {
			return err
		}
	}
	for path, text := range map[string]string{
		"/etc/libvirt/libvirtd.conf": fmt.Sprintf(libvirtdConf, s.cfg.HostUUID),
		"/etc/libvirt/qemu.conf":     qemuConf + s.cfg.QEMUConf,
	} {
		if err := os.WriteFile(s.HostPath(path), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// startHolder makes the namespaces and waits until all mounts are in place.
func (s *Site) startHolder(ctx context.Context) error {
	args := []string{"-ceu", holderScript, "holder", s.cfg.Dir, map[bool]string{true: "kvm", false: "nokvm"}[s.cfg.KVM]}
	for _, b := range s.cfg.binds() {
		args = append(args, b.outside, b.inside)
	}
	cmd := exec.Command("/bin/sh", args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	// A regular file, not a pipe: nothing of this process is held open by the holder.
	logf, err := os.Create(filepath.Join(s.cfg.Dir, "holder.log"))
	if err != nil {
		return err
	}
	defer logf.Close()
	cmd.Stderr = logf
	cmd.Dir = "/"
	cmd.SysProcAttr = s.sysProcAttr()
	cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS | syscall.CLONE_NEWNET // Go makes the mounts private
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("make the namespaces of site %s: %w", s.cfg.Name, err)
	}
	if s.holder, err = process.Identify(cmd.Process.Pid); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { s.holder.Signal(syscall.SIGKILL) })
	ready, _ := io.ReadAll(out)
	stop()
	s.reap.Go(func() { cmd.Wait() })
	if string(ready) != "ready\n" {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		text, _ := os.ReadFile(logf.Name())
		return fmt.Errorf("mount the directories of site %s: %s", s.cfg.Name, bytes.TrimSpace(text))
	}
	return s.writeState()
}

func (s *Site) startLibvirtd(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	logPath := s.HostPath("/var/log/libvirt/libvirtd.log")
	logf, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer logf.Close()
	cmd := s.Command(context.WithoutCancel(ctx), "libvirtd", "-p", "/run/libvirt/libvirtd.pid")
	cmd.Stdout, cmd.Stderr, cmd.Dir = logf, logf, "/"
	cmd.SysProcAttr = s.sysProcAttr()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start libvirtd of site %s: %w", s.cfg.Name, err)
	}
	s.libvirtd, err = process.Identify(cmd.Process.Pid)
	s.reap.Go(func() { cmd.Wait() })
	if err != nil {
		return err
	}
	if err := s.writeState(); err != nil {
		return err
	}
	if err := s.waitReady(ctx); err != nil {
		tail, _ := os.ReadFile(logPath)
		return fmt.Errorf("libvirtd of site %s: %w: %s", s.cfg.Name, err, lastLines(tail, 5))
	}
	return nil
}

// waitReady returns when libvirtd answers a call. That its socket accepts is
// not enough: it listens before its drivers are ready.
func (s *Site) waitReady(ctx context.Context) error {
	for {
		if !s.libvirtd.Alive() {
			return errors.New("it ended while starting")
		}
		if c, err := net.Dial("unix", s.LibvirtSocket()); err == nil {
			c.Close()
			out, err := exec.CommandContext(ctx, "virsh", "-c", s.URI(), "hostname").CombinedOutput()
			if err == nil {
				return nil
			}
			if errors.Is(err, exec.ErrNotFound) {
				return err
			}
			if ctx.Err() != nil {
				return fmt.Errorf("%w: %s", ctx.Err(), bytes.TrimSpace(out))
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no answer: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *Site) sysProcAttr() *syscall.SysProcAttr {
	if s.cfg.Detach {
		return &syscall.SysProcAttr{Setsid: true}
	}
	// A test that is killed takes its site along; guests are daemons and are
	// not reached by this, Destroy is what ends them.
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}

func lastLines(b []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

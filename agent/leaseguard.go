package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/switchback-dr/switchback/fencing"
)

// A lease must end, whether or not the agent lives: a process of its own, the
// lease guard, looks at the files that the agent keeps and stops what has no
// lease any more. It decides and acts with the agent's own code, grants nothing,
// asks nobody, and ends when no VM here has the policy of a lease.

// guardPatience is by how much the guard leaves the agent the first move.
const guardPatience = time.Second

func leaseGuardLock(runDir string) string { return filepath.Join(runDir, "lease-guard.lock") }

// GuardLeases runs the lease guard until ctx ends or nothing is left to guard. A
// second one for the same run directory ends at once. Of cfg it uses StateDir,
// RunDir, Hypervisor and Logger.
func GuardLeases(ctx context.Context, cfg Config) error {
	f, err := os.OpenFile(leaseGuardLock(cfg.RunDir), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return nil // it is guarded
	} else if err != nil {
		return fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	a := &Agent{cfg: cfg, log: cfg.Logger, hv: cfg.Hypervisor}
	mine, err := f.Stat()
	if err != nil {
		return err
	}
	for idle := 0; ctx.Err() == nil && idle < 20; sleep(ctx, lookEvery) {
		if there, err := os.Stat(f.Name()); err != nil || !os.SameFile(mine, there) {
			return nil // the run directory is gone, and this boot with it
		}
		n, err := a.guardOnce(ctx)
		if err != nil {
			a.log.Warn("leases are not seen to, trying again", "error", err)
			continue
		}
		if idle++; n > 0 {
			idle = 0
		}
	}
	return nil
}

// guardOnce ends what leases have ended, and counts those that there are.
func (a *Agent) guardOnce(ctx context.Context) (leases int, err error) {
	boot, ok, err := readBoot(a.cfg.RunDir)
	if err != nil || !ok {
		return 0, err
	}
	a.boot = boot
	list, err := loadAssignments(a.assignmentDir())
	if err != nil {
		return 0, err
	}
	var errs []error
	var ended []*vm
	for _, as := range list {
		if !as.Role.Owns() || as.Policy.Fencing.Lease == 0 {
			continue
		}
		leases++
		v := &vm{agent: a, a: as}
		if v.grant, err = a.readGrant(as.VM); err != nil {
			errs = append(errs, err)
			continue
		}
		if m := v.moment(false); m.Grant.Until != 0 && m.Now < m.Grant.Until.Add(guardPatience) {
			continue
		}
		ended = append(ended, v)
	}
	return leases, errors.Join(append(errs, a.endLeases(ctx, ended, (*vm).keptFacts))...)
}

// keptFacts are the guard's: what the agent keeps in files. An assignment that
// changes while its grant is read says nothing, nor one that needs no lease any more.
func (v *vm) keptFacts(on bool) (s fencing.Standing, m fencing.Moment, err error) {
	a := v.agent
	read := func() (as Assignment, err error) {
		list, err := loadAssignments(a.assignmentDir())
		if i := slices.IndexFunc(list, func(x Assignment) bool { return x.Protection == v.a.Protection }); i >= 0 {
			as = list[i]
		}
		return as, err
	}
	before, err := read()
	if err != nil {
		return s, m, err
	}
	grant, err := a.readGrant(before.VM)
	if err != nil {
		return s, m, err
	}
	as, err := read()
	if err != nil || as.Role != before.Role || as.Epoch != before.Epoch || as.Policy.Fencing != before.Policy.Fencing || !as.Role.Owns() || as.Policy.Fencing.Lease == 0 {
		return s, m, err
	}
	v.mu.Lock()
	v.grant = grant
	v.mu.Unlock()
	// The site does not matter here: who is active elsewhere is the agent's to
	// hear, and a lease is not renewed then.
	s = as.standing("")
	s.Heard = fencing.Ruling{}
	return s, v.moment(on), nil
}

// ensureLeaseGuard starts the guard where a VM needs it and none runs. It is a
// process of its own, so that it outlives this one.
func (a *Agent) ensureLeaseGuard() error {
	if len(a.cfg.GuardCommand) == 0 {
		return nil
	}
	f, err := os.OpenFile(leaseGuardLock(a.cfg.RunDir), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil // one runs
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		return err
	}
	args := append([]string{a.cfg.Executable}, a.cfg.GuardCommand...)
	if _, err := os.Stat("/run/systemd/system"); err == nil {
		args = append([]string{"systemd-run", "--scope", "--quiet", "--collect"}, args...)
	}
	logFile, err := os.OpenFile(filepath.Join(a.cfg.LogDir, "lease-guard.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logFile.Close()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the lease guard: %w", err)
	}
	a.log.Info("lease guard started", "pid", cmd.Process.Pid)
	go cmd.Wait() // ends it as a child, whenever that is
	return nil
}

package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/internal/durable"
)

// What the hook reads, a file per VM named by its UUID:
//
//	STATE/guarded/UUID   the VM is active here: "epoch N" that a grant must be of,
//	                     or "epoch none"; then why, and what to do
//	RUN/grants/UUID      the grant: epoch, boot, until (uptime in seconds, 0 = no end), by
//
// And for the agent itself, gone with a reboot, too:
//
//	RUN/boot             the boot's name, and when the agent first ran in it
//	RUN/begun/UUID       autostart was seen to in this boot
//	RUN/ended/UUID       the VM was turned off, or paused, because its lease had ended

func (a *Agent) guardPath(vm switchback.VMUUID) string {
	return filepath.Join(a.cfg.StateDir, "guarded", string(vm))
}

func (a *Agent) runPath(kind string, vm switchback.VMUUID) string {
	return filepath.Join(a.cfg.RunDir, kind, string(vm))
}

// hostClock is the host's clock since its boot; setting the time does not move it.
func hostClock() fencing.Instant {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the kernel has had it since 2.6.39
	}
	return fencing.Instant(ts.Nano())
}

// bootRecord names the present boot of the host.
type bootRecord struct {
	name string
	up   fencing.Instant
}

// bootID is the kernel's name of this boot.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// readBoot finds the record of this boot; ok is false where there is none yet.
func readBoot(runDir string) (r bootRecord, ok bool, err error) {
	id, err := bootID()
	if err != nil {
		return r, false, err
	}
	b, err := os.ReadFile(filepath.Join(runDir, "boot"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, false, err
	}
	n, _ := fmt.Sscanf(string(b), "%s %d", &r.name, &r.up)
	return r, n == 2 && strings.HasPrefix(r.name, id+"-"), nil
}

// loadBoot finds the record of this boot, or makes it and removes what an
// earlier boot has left under a run directory that a reboot does not empty.
func loadBoot(runDir string) (bootRecord, error) {
	r, ok, err := readBoot(runDir)
	if err != nil || ok {
		return r, err
	}
	id, err := bootID()
	if err != nil {
		return r, err
	}
	for _, kind := range []string{"grants", "begun", "ended"} {
		if err := os.RemoveAll(filepath.Join(runDir, kind)); err != nil {
			return r, err
		}
	}
	r = bootRecord{id + "-" + uuid.NewString()[:8], hostClock()}
	return r, durable.WriteFile(filepath.Join(runDir, "boot"), fmt.Appendf(nil, "%s %d\n", r.name, r.up), 0o600)
}

// writeGrant lets the hook pass the VM's start.
func (a *Agent) writeGrant(vm switchback.VMUUID, g fencing.Grant) error {
	until := int64(0)
	if g.Until != 0 { // the hook's clock has seconds
		until = max(1, int64(time.Duration(g.Until)/time.Second))
	}
	text := fmt.Sprintf("epoch %d\nboot %s\nuntil %d\nby %s\n", g.Epoch, g.Boot, until, g.By)
	return durable.WriteFile(a.runPath("grants", vm), []byte(text), 0o644)
}

// readGrant returns the grant that stands; zero for none.
func (a *Agent) readGrant(vm switchback.VMUUID) (g fencing.Grant, err error) {
	b, err := os.ReadFile(a.runPath("grants", vm))
	if errors.Is(err, fs.ErrNotExist) {
		return g, nil
	}
	if err != nil {
		return g, err
	}
	var until int64
	if n, _ := fmt.Sscanf(string(b), "epoch %d\nboot %s\nuntil %d\nby %s\n", &g.Epoch, &g.Boot, &until, &g.By); n != 4 {
		return fencing.Grant{}, nil // no grant that anybody wrote
	}
	g.Until = fencing.Instant(until) * fencing.Instant(time.Second)
	return g, nil
}

// removeRun removes a file under the run directory, which need not exist.
func (a *Agent) removeRun(kind string, vm switchback.VMUUID) error {
	if err := os.Remove(a.runPath(kind, vm)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (a *Agent) markRun(kind string, vm switchback.VMUUID) error {
	return durable.WriteFile(a.runPath(kind, vm), nil, 0o600)
}

func (a *Agent) markedRun(kind string, vm switchback.VMUUID) bool {
	_, err := os.Stat(a.runPath(kind, vm))
	return err == nil
}

func (a *Agent) writeGuardFile(vm switchback.VMUUID, text string) error {
	return durable.WriteFile(a.guardPath(vm), []byte(text), 0o644)
}

// unguard removes guard and grant of a VM that is not active here.
func (a *Agent) unguard(vm switchback.VMUUID) error {
	if err := a.removeRun("grants", vm); err != nil {
		return err
	}
	if _, err := os.Stat(a.guardPath(vm)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return durable.Remove(a.guardPath(vm))
}

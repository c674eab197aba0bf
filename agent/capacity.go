package agent

import (
	"os"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
)

// capacity says what the agent works for, and what bounds it.
func (a *Agent) capacity() agentapi.Capacity {
	c := agentapi.Capacity{MaxDisks: a.cfg.MaxDisks, MaxCopies: a.cfg.MaxCopies, StorageReserveBytes: a.cfg.StorageReserveBytes,
		Scratch: agentapi.Storage{Path: a.cfg.ScratchDir}, Disks: a.disksBut("")}
	c.Scratch.FreeBytes, c.Scratch.SizeBytes = freeBytes(a.cfg.ScratchDir)
	if entries, err := os.ReadDir("/proc/self/fd"); err == nil {
		c.OpenFiles = len(entries)
	}
	var limit unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &limit) == nil {
		c.MaxOpenFiles = int(min(limit.Cur, 1<<30))
	}
	return c
}

// disksBut counts the disks that the agent works for, without those of one VM.
func (a *Agent) disksBut(id switchback.ProtectionID) int {
	n := 0
	for _, v := range a.all() {
		if as := v.assignment(); as.Protection != id && as.Role != agentapi.RoleFenced {
			n += len(as.Disks)
		}
	}
	return n
}

// diskRoom refuses what is above the limit of disks.
func (a *Agent) diskRoom(id switchback.ProtectionID, disks int) error {
	if n := a.disksBut(id); a.cfg.MaxDisks > 0 && n+disks > a.cfg.MaxDisks {
		return switchback.Errorf(switchback.CodeRefused, "this agent works for %d disks, %d more are above its limit of %d", n, disks, a.cfg.MaxDisks).
			WithHint("unprotect a VM here, or raise the agent's --max-disks")
	}
	return nil
}

package process_test

import (
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/switchback-dr/switchback/lab/process"
)

func TestKill(t *testing.T) {
	p, err := process.Start(exec.Command("sleep", "1000"), filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	if !p.Alive() {
		t.Fatal("not alive after Start")
	}
	if other := (process.Process{PID: p.PID, Start: p.Start + 1}); other.Alive() {
		t.Error("another process with the same number is taken for it")
	}
	for range 2 { // the second finds it gone
		if err := p.Kill(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if p.Alive() {
			t.Error("alive after Kill")
		}
	}
}

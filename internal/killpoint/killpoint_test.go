package killpoint

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestMain is also the process that is killed.
func TestMain(m *testing.M) {
	if with := os.Getenv(Environment); with != "" {
		Arm(with)
		At("server", "failover", "fence", AfterEffect)
		return
	}
	os.Exit(m.Run())
}

// killed runs the process and reports whether it was killed.
func killed(t *testing.T, with string) bool {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), Environment+"="+with)
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	}
	if err != nil {
		t.Fatal(err)
	}
	return false
}

func TestKill(t *testing.T) {
	for spec, want := range map[string]bool{
		"server:failover/fence:after-effect":  true,
		"server:*/fence:after-effect":         true,
		"server:failover/fence:before-effect": false,
		"server:failover/start:after-effect":  false,
		"agent:failover/fence:after-effect":   false,
		"server:commit/fence:after-effect":    false,
	} {
		if got := killed(t, spec); got != want {
			t.Errorf("%s kills: %v, want %v", spec, got, want)
		}
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "a.spec"), []byte(spec+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := killed(t, dir); got != want {
			t.Errorf("%s in a file kills: %v, want %v", spec, got, want)
		}
		if _, err := os.Stat(filepath.Join(dir, "a.hit")); (err == nil) != want {
			t.Errorf("%s was hit: %v, want %v", spec, err, want)
		}
		if killed(t, dir) {
			t.Errorf("%s kills twice", spec)
		}
	}
}

func TestHold(t *testing.T) {
	dir := t.TempDir()
	Arm(dir)
	defer Arm("")
	if err := os.WriteFile(filepath.Join(dir, "a.spec"), []byte("hold "+Spec("agent", "*", "fence", BeforeEffect)), 0o600); err != nil {
		t.Fatal(err)
	}
	passed := make(chan struct{})
	go func() { At("agent", "fence", "fence", BeforeEffect); close(passed) }()
	hit := filepath.Join(dir, "a.hit")
	for {
		if _, err := os.Stat(hit); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
	select {
	case <-passed:
		t.Fatal("it is not held")
	case <-time.After(20 * time.Millisecond):
	}
	if err := os.Remove(hit); err != nil {
		t.Fatal(err)
	}
	<-passed
}

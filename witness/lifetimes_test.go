package witness

import (
	"context"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// qemu starts a QEMU that runs nothing, in a mount namespace of its own.
func qemu(t *testing.T, uuid string) (stop func()) {
	t.Helper()
	cmd := exec.Command("qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-uuid", uuid)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var done bool
	stop = func() {
		if !done {
			done = true
			cmd.Process.Kill()
			cmd.Wait()
		}
	}
	t.Cleanup(stop)
	return stop
}

func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for begin := time.Now(); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("no %s", what)
		}
	}
}

func TestWatch(t *testing.T) {
	var w Watch
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	const x, y = "aaaaaaaa-0000-4000-8000-000000000001", "aaaaaaaa-0000-4000-8000-000000000002"
	stopX := qemu(t, x) // runs before the watch begins
	go func() { ended <- w.Run(ctx) }()
	await(t, "first look", w.Ready)
	await(t, "QEMU of x", func() bool { return len(w.Lifetimes(x)) == 1 })

	// A second VM, and the first one again after its end: no overlap.
	stopY := qemu(t, y)
	await(t, "QEMU of y", func() bool { return len(w.Lifetimes(y)) == 1 })
	begin := time.Now()
	stopX()
	await(t, "end of x", func() bool { return !w.Lifetimes(x)[0].End.IsZero() })
	if end := w.Lifetimes(x)[0].End; end.Before(begin) || end.After(time.Now()) {
		t.Errorf("x ended at %v, was killed at %v", end, begin)
	}
	time.Sleep(20 * time.Millisecond)
	qemu(t, x)
	await(t, "second QEMU of x", func() bool { return len(w.Lifetimes(x)) == 2 })
	if d := w.DoubleActive(x); d != 0 {
		t.Errorf("x was double active for %v: %+v", d, w.Lifetimes(x))
	}

	// Sabotage: a second copy of y, at another site.
	copied := time.Now()
	stopCopy := qemu(t, y)
	await(t, "copy of y", func() bool { return len(w.Lifetimes(y)) == 2 })
	time.Sleep(100 * time.Millisecond)
	stopCopy()
	span := time.Since(copied)
	stopY()
	await(t, "ends of y", func() bool { ls := w.Lifetimes(y); return !ls[0].End.IsZero() && !ls[1].End.IsZero() })
	if d := w.DoubleActive(y); d < 80*time.Millisecond || d > span+20*time.Millisecond {
		t.Errorf("y was double active for %v, %v was the copy's life: %+v", d, span, w.Lifetimes(y))
	}
	if ls := w.Lifetimes(y); ls[0].Site == ls[1].Site || ls[0].Site == "" {
		t.Errorf("the sites of y are not told apart: %+v", ls)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestOverlap(t *testing.T) {
	at := func(s float64) time.Time {
		if s == 0 {
			return time.Time{}
		}
		return time.Unix(1000, int64(s*1e9))
	}
	for name, tt := range map[string]struct {
		lives [][2]float64 // start and end in seconds; end 0 for running
		want  float64
	}{
		"none":            {nil, 0},
		"one":             {[][2]float64{{1, 5}}, 0},
		"one after other": {[][2]float64{{1, 5}, {5, 9}, {10, 0}}, 0},
		"two":             {[][2]float64{{1, 5}, {4, 9}}, 1},
		"within":          {[][2]float64{{1, 9}, {2, 3}, {4, 6}}, 3},
		"three at once":   {[][2]float64{{1, 5}, {2, 5}, {3, 5}}, 3},
		"both running":    {[][2]float64{{1, 0}, {15, 0}}, 5},
		"chain":           {[][2]float64{{1, 4}, {3, 7}, {6, 9}}, 2},
	} {
		var ls []Lifetime
		for _, l := range tt.lives {
			ls = append(ls, Lifetime{Start: at(l[0]), End: at(l[1])})
		}
		if got := overlap(ls, at(20)).Seconds(); got != tt.want {
			t.Errorf("%s: %v s, want %v", name, got, tt.want)
		}
	}
}

func TestInterfaceCounters(t *testing.T) {
	cmd := exec.Command("sh", "-c", "ip link set lo up; head -c 1000 /dev/zero | bash -c 'cat >/dev/udp/127.0.0.1/9' 2>/dev/null; echo; exec sleep 60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	before, err := InterfaceCounters(os.Getpid(), "lo")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	c, err := InterfaceCounters(cmd.Process.Pid, "lo")
	if err != nil || c.TxBytes < 1000 || c.TxBytes > 10_000 {
		t.Errorf("%+v, %v", c, err)
	}
	if c == before {
		t.Error("the counters are those of the machine's own namespace")
	}
	if d := (Traffic{10, 20}).Sub(Traffic{3, 5}); d != (Traffic{7, 15}) {
		t.Errorf("%+v", d)
	}
	if c, err := InterfaceCounters(cmd.Process.Pid, "eth9"); err == nil {
		t.Errorf("unknown interface: %+v", c)
	}
}

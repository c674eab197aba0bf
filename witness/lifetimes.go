package witness

import (
	"bytes"
	"context"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Lifetime is the life of one QEMU process that runs a VM.
type Lifetime struct {
	UUID string `json:"uuid"`
	PID  int    `json:"pid"`
	// Site tells the processes of the sites apart: their mount namespace.
	Site string `json:"site"`
	// Start is when it was forked, by the kernel's clock of 10 ms ticks: never too
	// late, up to 10 ms too early.
	Start time.Time `json:"start"`
	// End is when the process ended, exact; zero while it lives.
	End time.Time `json:"end"`
}

// Watch records the lifetimes of all QEMU processes of the machine that run a
// VM, while Run runs.
type Watch struct {
	mu     sync.Mutex
	lives  []*Lifetime
	rounds int
}

const (
	pollEvery = 10 * time.Millisecond
	// youth is how long a process is looked at again: before its exec it has the
	// command line of its parent.
	youth = 2 * time.Second
)

// Run looks for processes every 10 ms until the context is done.
func (w *Watch) Run(ctx context.Context) error {
	var waiters sync.WaitGroup
	defer waiters.Wait()
	seen := map[int]time.Time{} // first seen; zero once it is known what it is
	for {
		pids, err := processes()
		if err != nil {
			return err
		}
		alive := make(map[int]bool, len(pids))
		now := time.Now()
		for _, pid := range pids {
			alive[pid] = true
			first, known := seen[pid]
			if !known {
				first = now
				seen[pid] = first
			}
			if first.IsZero() {
				continue
			}
			if uuid := qemuUUID(pid); uuid != "" {
				w.adopt(ctx, pid, uuid, &waiters)
				seen[pid] = time.Time{}
			} else if now.Sub(first) > youth {
				seen[pid] = time.Time{}
			}
		}
		for pid := range seen {
			if !alive[pid] {
				delete(seen, pid)
			}
		}
		w.mu.Lock()
		w.rounds++
		w.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pollEvery):
		}
	}
}

// Ready reports whether every process that ran when Run began has been seen.
func (w *Watch) Ready() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rounds > 0
}

// adopt notes a process and waits, in a goroutine of waiters, for its end.
func (w *Watch) adopt(ctx context.Context, pid int, uuid string, waiters *sync.WaitGroup) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // gone
	}
	site, _ := os.Readlink("/proc/" + strconv.Itoa(pid) + "/ns/mnt")
	l := &Lifetime{UUID: uuid, PID: pid, Site: site, Start: startTime(pid)}
	w.mu.Lock()
	w.lives = append(w.lives, l)
	w.mu.Unlock()
	waiters.Go(func() {
		defer unix.Close(fd)
		for ctx.Err() == nil {
			fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(fds, 200)
			if n > 0 {
				w.mu.Lock()
				l.End = time.Now()
				w.mu.Unlock()
				return
			}
			if err != nil && err != unix.EINTR {
				return
			}
		}
	})
}

// Lifetimes are those of one VM so far, by start.
func (w *Watch) Lifetimes(uuid string) []Lifetime {
	w.mu.Lock()
	defer w.mu.Unlock()
	var ls []Lifetime
	for _, l := range w.lives {
		if strings.EqualFold(l.UUID, uuid) {
			ls = append(ls, *l)
		}
	}
	slices.SortFunc(ls, func(a, b Lifetime) int { return a.Start.Compare(b.Start) })
	return ls
}

// DoubleActive is for how long so far two or more processes ran the VM at once,
// at whatever site. As a start may be noted up to 10 ms too early, it is never
// too small.
func (w *Watch) DoubleActive(uuid string) time.Duration {
	return overlap(w.Lifetimes(uuid), time.Now())
}

// overlap is the time in which at least two of the lives, sorted by start, last.
func overlap(ls []Lifetime, now time.Time) time.Duration {
	var total time.Duration
	var covered, counted time.Time // the latest end so far, and up to where overlap is counted
	for _, l := range ls {
		end := l.End
		if end.IsZero() {
			end = now
		}
		from, to := l.Start, end
		if covered.Before(to) {
			to = covered
		}
		if counted.After(from) {
			from = counted
		}
		if to.After(from) {
			total += to.Sub(from)
			counted = to
		}
		if end.After(covered) {
			covered = end
		}
	}
	return total
}

func processes() ([]int, error) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// qemuUUID is the VM that a process runs, "" if it is no QEMU with one.
func qemuUUID(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil {
		return ""
	}
	args := bytes.Split(b, []byte{0})
	if !bytes.Contains(args[0], []byte("qemu-system")) {
		return ""
	}
	for i, a := range args {
		if string(a) == "-uuid" && i+1 < len(args) {
			return string(args[i+1])
		}
	}
	return ""
}

// startTime is field 22 of /proc/PID/stat, in ticks of 10 ms since the machine
// started; the present time if the process is gone.
func startTime(pid int) time.Time {
	now := time.Now()
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return now
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 20 {
		return now
	}
	ticks, err := strconv.ParseInt(string(f[19]), 10, 64)
	if err != nil {
		return now
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return now
	}
	age := time.Duration(up.Nano()) - time.Duration(ticks)*10*time.Millisecond
	return now.Add(-max(age, 0))
}

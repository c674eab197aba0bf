package network

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Delay is what a Delayed link does to packets, each way by itself.
type Delay struct {
	// OneWay is added to each packet; a round trip has it twice.
	OneWay time.Duration
	// Loss is the share of packets that vanish, 0 to 1; Seed says which.
	Loss float64
	Seed uint64
}

// Delayed is a point-to-point link between two named network namespaces whose
// packets pass through this process, which delays and loses them: what netem
// does, for kernels that are built without it. The kernels at both ends do TCP
// as ever.
type Delayed struct {
	files [2]*os.File
	wg    sync.WaitGroup
}

const (
	delayedMTU = 1500
	// delayedQueue is how many packets may be under way in each direction.
	delayedQueue = 1 << 15
)

// ConnectDelayed makes interface WAN with a /30 address in each of the two
// namespaces (ip netns add), and passes packets between them until Close.
func ConnectDelayed(ctx context.Context, namespaces [2]string, addresses [2]netip.Addr, d Delay) (_ *Delayed, err error) {
	l := &Delayed{}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	for i, ns := range namespaces {
		if l.files[i], err = openTUN(ns); err != nil {
			return nil, err
		}
		for _, args := range [][]string{
			{"addr", "add", addresses[i].String() + "/30", "dev", WAN},
			{"link", "set", "dev", WAN, "mtu", strconv.Itoa(delayedMTU), "txqueuelen", "10000", "up"},
		} {
			out, err := exec.CommandContext(ctx, "ip", append([]string{"-n", ns}, args...)...).CombinedOutput()
			if err != nil {
				return nil, fmt.Errorf("ip %v in %s: %w: %s", args, ns, err, out)
			}
		}
	}
	for i := range l.files {
		l.pass(l.files[i], l.files[1-i], d, rand.New(rand.NewPCG(d.Seed, uint64(i))))
	}
	return l, nil
}

type packet struct {
	due  time.Time
	data []byte
}

// pass carries packets one way, in order.
func (l *Delayed) pass(from, to *os.File, d Delay, chance *rand.Rand) {
	queue := make(chan packet, delayedQueue)
	buffers := sync.Pool{New: func() any { b := make([]byte, delayedMTU+64); return &b }}
	l.wg.Go(func() {
		defer close(queue)
		for {
			b := buffers.Get().(*[]byte)
			n, err := from.Read(*b)
			if err != nil {
				return // closed
			}
			if chance.Float64() < d.Loss {
				buffers.Put(b)
				continue
			}
			select {
			case queue <- packet{time.Now().Add(d.OneWay), (*b)[:n]}:
			default: // as a router whose queue is full
			}
		}
	})
	l.wg.Go(func() {
		for p := range queue {
			if wait := time.Until(p.due); wait > 0 {
				time.Sleep(wait)
			}
			if _, err := to.Write(p.data); err != nil && errors.Is(err, os.ErrClosed) {
				continue // drain
			}
			b := p.data[:cap(p.data)]
			buffers.Put(&b)
		}
	})
}

// Close ends the link; its interfaces vanish.
func (l *Delayed) Close() error {
	var errs []error
	for _, f := range l.files {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	l.wg.Wait()
	return errors.Join(errs...)
}

// openTUN makes interface WAN in a named namespace. The file can be used from any.
func openTUN(namespace string) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	done := make(chan result)
	go func() {
		// The thread is left in that namespace, and so ends with this goroutine.
		runtime.LockOSThread()
		f, err := func() (*os.File, error) {
			ns, err := os.Open("/run/netns/" + namespace)
			if err != nil {
				return nil, err
			}
			defer ns.Close()
			if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
				return nil, fmt.Errorf("enter %s: %w", namespace, err)
			}
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
			if err != nil {
				return nil, fmt.Errorf("/dev/net/tun: %w", err)
			}
			ifr, err := unix.NewIfreq(WAN)
			if err != nil {
				return nil, err
			}
			ifr.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
				return nil, errors.Join(fmt.Errorf("make %s: %w", WAN, err), unix.Close(fd))
			}
			return os.NewFile(uintptr(fd), "tun"), nil
		}()
		done <- result{f, err}
	}()
	r := <-done
	return r.f, r.err
}

package network

import (
	"context"
	"fmt"
	"io"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// namespace is a site as far as this package is concerned: something that holds
// a network namespace.
func namespace(t *testing.T, name string) End {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return End{Name: name, PID: cmd.Process.Pid}
}

func connect(t *testing.T, lab string, a, b End) *Network {
	t.Helper()
	n, err := Connect(t.Context(), lab, a, b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Disconnect(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return n
}

func in(e End, name string, args ...string) *exec.Cmd {
	return exec.Command("nsenter", append([]string{"-t", strconv.Itoa(e.PID), "-n", "--", name}, args...)...)
}

func pings(e End, to fmt.Stringer) bool {
	// No ping in a bare system: a refused TCP connection is an answer, too.
	out, err := in(e, "bash", "-c", "exec 3<>/dev/tcp/"+to.String()+"/9").CombinedOutput()
	return err == nil || strings.Contains(string(out), "refused")
}

func TestConnect(t *testing.T) {
	n := connect(t, t.Name(), namespace(t, "a"), namespace(t, "b"))
	if !pings(n.A, n.B.WANAddr) || !pings(n.B, n.A.WANAddr) {
		t.Error("the sites do not reach each other")
	}
	if !pings(n.A, n.A.HostAddr) || !pings(n.B, n.B.HostAddr) {
		t.Error("a site does not reach the machine")
	}
	if pings(n.A, n.B.ManagementAddr) || pings(n.A, n.B.HostAddr) {
		t.Error("site a reaches b's management network")
	}

	t.Run("Counters", func(t *testing.T) {
		l, err := net.Listen("tcp", n.A.HostAddr.String()+":0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		before, err := n.Counters("a")
		if err != nil {
			t.Fatal(err)
		}
		// Management traffic is not the WAN's.
		const size = 1 << 20
		port := l.Addr().(*net.TCPAddr).Port
		cmd := in(n.A, "bash", "-c", fmt.Sprintf("head -c %d /dev/zero >/dev/tcp/%s/%d", size, n.A.HostAddr, port))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.Copy(io.Discard, c); got != size || err != nil {
			t.Errorf("received %d bytes, %v", got, err)
		}
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
		if after, _ := n.Counters("a"); after.TxBytes-before.TxBytes > 1000 {
			t.Errorf("management traffic shows on the WAN: %+v then %+v", before, after)
		}
		for range 100 {
			pings(n.A, n.B.WANAddr)
		}
		a, _ := n.Counters("a")
		b, _ := n.Counters("b")
		if d := a.TxBytes - before.TxBytes; d < 100*54 || d > 100*200 {
			t.Errorf("100 connection attempts sent %d bytes", d)
		}
		if a.TxBytes != b.RxBytes || a.RxBytes != b.TxBytes {
			t.Errorf("counters disagree: a %+v, b %+v", a, b)
		}
		if _, err := n.Counters("c"); err == nil {
			t.Error("counters of an unknown site")
		}
	})

	t.Run("CutWAN", func(t *testing.T) {
		if err := n.CutWAN(t.Context(), true); err != nil {
			t.Fatal(err)
		}
		if pings(n.A, n.B.WANAddr) {
			t.Error("the WAN works while cut")
		}
		if !pings(n.A, n.A.HostAddr) {
			t.Error("the management network is cut, too")
		}
		if err := n.CutWAN(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		for begin := time.Now(); !pings(n.A, n.B.WANAddr); {
			if time.Since(begin) > 5*time.Second {
				t.Fatal("the WAN stays cut")
			}
		}
	})
}

func TestTwoLabsOfOneName(t *testing.T) {
	first := connect(t, t.Name(), namespace(t, "a"), namespace(t, "b"))
	second := connect(t, t.Name(), namespace(t, "a"), namespace(t, "b"))
	if first.Block == second.Block {
		t.Fatalf("both labs have block %d", first.Block)
	}
	if err := second.Disconnect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !pings(first.A, first.B.WANAddr) || !pings(first.A, first.A.HostAddr) {
		t.Error("removing the second lab broke the first")
	}
}

func TestConnectFailsWhole(t *testing.T) {
	a := namespace(t, "a")
	n, err := Connect(t.Context(), t.Name(), a, End{Name: "b", PID: 1 << 30})
	if err == nil {
		n.Disconnect(t.Context())
		t.Fatal("connected to a process that does not exist")
	}
	out, err := in(a, "ip", "-o", "link").Output()
	if err != nil || strings.Contains(string(out), Management) || strings.Contains(string(out), WAN+"@") {
		t.Errorf("left behind: %s %v", out, err)
	}
}

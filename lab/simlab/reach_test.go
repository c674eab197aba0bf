package simlab_test

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor/simulated"
	"github.com/switchback-dr/switchback/lab/network"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
)

// firewalled is a network namespace for each of server and agents, joined in
// pairs, and the machine's own, where the command line runs:
//
//	machine ── server ── primary
//	             │          │
//	             └──────recovery
//
// Whoever is closed drops every attempt to open a connection to it; the server
// lets the command line through. With wan the agents' packets to each other are
// delayed and lost.
type firewalled struct {
	names map[string]string
	hosts map[string]string
}

func newFirewalled(t *testing.T, wan *network.Delay, closed ...string) firewalled {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces need root")
	}
	for _, tool := range []string{"ip", "iptables"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skip(err)
		}
	}
	f := firewalled{names: map[string]string{}, hosts: map[string]string{}}
	run := func(args ...string) {
		t.Helper()
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	id := os.Getpid() % 10000
	for _, n := range []string{simlab.Server, simlab.Primary, simlab.Recovery} {
		f.names[n] = fmt.Sprintf("sbn%d%c", id, n[0])
		run("ip", "netns", "add", f.names[n])
		t.Cleanup(func() { run("ip", "netns", "del", f.names[n]) })
		run("ip", "-n", f.names[n], "link", "set", "lo", "up")
	}
	block := 0
	base := fmt.Sprintf("10.214.%d.", id%256)
	link := func(a, b string) (atA, atB, toA, toB string) {
		block++
		atA, atB = fmt.Sprintf("%s%d", base, block*4+1), fmt.Sprintf("%s%d", base, block*4+2)
		toB, toA = fmt.Sprintf("sb%d%s", id, b[:1]), "to"+a[:1]
		in := func(ns string, args ...string) []string {
			if name := f.names[ns]; name != "" {
				return append([]string{"ip", "-n", name}, args...)
			}
			return append([]string{"ip"}, args...)
		}
		run(in(a, "link", "add", toB, "type", "veth", "peer", "name", toA, "netns", f.names[b])...)
		if f.names[a] == "" {
			t.Cleanup(func() { _ = exec.Command("ip", "link", "del", toB).Run() }) // gone with its namespace, perhaps
		}
		run(in(a, "addr", "add", atA+"/30", "dev", toB)...)
		run(in(b, "addr", "add", atB+"/30", "dev", toA)...)
		run(in(a, "link", "set", toB, "up")...)
		run(in(b, "link", "set", toA, "up")...)
		return
	}
	_, f.hosts[simlab.Server], _, _ = link("machine", simlab.Server)
	links := map[string][]string{}
	for _, site := range simlab.Sites {
		atServer, atSite, toServer, toSite := link(simlab.Server, site)
		f.hosts[site] = atSite
		run("ip", "-n", f.names[site], "route", "add", f.hosts[simlab.Server], "via", atServer)
		links[simlab.Server], links[site] = append(links[simlab.Server], toSite), append(links[site], toServer)
	}
	var atPrimary, atRecovery, toPrimary, toRecovery string
	if wan == nil {
		atPrimary, atRecovery, toPrimary, toRecovery = link(simlab.Primary, simlab.Recovery)
	} else {
		atPrimary, atRecovery, toPrimary, toRecovery = base+"101", base+"102", network.WAN, network.WAN
		l, err := network.ConnectDelayed(t.Context(), [2]string{f.names[simlab.Primary], f.names[simlab.Recovery]},
			[2]netip.Addr{netip.MustParseAddr(atPrimary), netip.MustParseAddr(atRecovery)}, *wan)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	run("ip", "-n", f.names[simlab.Primary], "route", "add", f.hosts[simlab.Recovery], "via", atRecovery)
	run("ip", "-n", f.names[simlab.Recovery], "route", "add", f.hosts[simlab.Primary], "via", atPrimary)
	links[simlab.Primary], links[simlab.Recovery] = append(links[simlab.Primary], toRecovery), append(links[simlab.Recovery], toPrimary)
	for _, n := range closed {
		for _, l := range links[n] {
			run("ip", "netns", "exec", f.names[n], "iptables", "-A", "INPUT", "-i", l, "-p", "tcp", "--syn", "-j", "DROP")
		}
	}
	return f
}

func (f firewalled) place(name string, p simlab.Place) simlab.Place {
	p.Enter, p.Host = []string{"ip", "netns", "exec", f.names[name]}, f.hosts[name]
	return p
}

// opens reports whether a connection from one namespace to another's port can be opened.
func (f firewalled) opens(t *testing.T, from, to string) bool {
	t.Helper()
	return exec.Command("ip", "netns", "exec", f.names[from], "timeout", "1", "bash", "-c", "exec 3<>/dev/tcp/"+f.hosts[to]+"/7443").Run() == nil
}

// TestFirewalls is the loop with each party in turn behind a firewall that lets
// nobody in.
func TestFirewalls(t *testing.T) {
	for _, c := range []struct {
		name   string
		closed []string
		places map[string]simlab.Place
		// whole: home again, too, and each process is killed once.
		whole bool
	}{
		{"source agent closed", []string{simlab.Primary}, map[string]simlab.Place{simlab.Primary: {Unreachable: true}}, true},
		{"target agent closed, found out", []string{simlab.Recovery}, map[string]simlab.Place{simlab.Recovery: {Auto: true}}, false},
		{"server closed", []string{simlab.Server}, map[string]simlab.Place{simlab.Server: {Unreachable: true}}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFirewalled(t, nil, c.closed...)
			places := map[string]simlab.Place{}
			for _, n := range []string{simlab.Server, simlab.Primary, simlab.Recovery} {
				places[n] = f.place(n, c.places[n])
			}
			b := newPlacedBed(t, places)
			for _, from := range []string{simlab.Server, simlab.Primary, simlab.Recovery} {
				for _, to := range c.closed {
					if from != to && f.opens(t, from, to) {
						t.Fatalf("%s can open a connection to %s: the firewall is of no use", from, to)
					}
				}
			}
			b.operate(recovery.Protect, fast())
			from, to := simlab.Primary, simlab.Recovery
			for _, kind := range []recovery.Kind{recovery.Failover, recovery.Failback} {
				b.runsAt(from)
				b.operate(kind, api.OperationRequest{})
				b.cutOver(from, to)
				b.runsAt(to)
				b.operate(recovery.Commit, api.OperationRequest{})
				b.operate(recovery.Reprotect, api.OperationRequest{})
				from, to = to, from
				if !c.whole {
					break
				}
			}
			b.shownWithLines()
			if c.whole {
				b.comesBack()
			}
		})
	}
}

// TestLoopOverWAN is the way out and back with 100 ms and 1 % loss between the
// agents, one of which cannot be dialled. What it costs is logged.
func TestLoopOverWAN(t *testing.T) {
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Skip(err)
	}
	f := newFirewalled(t, &network.Delay{OneWay: 50 * time.Millisecond, Loss: 0.01, Seed: 1}, simlab.Recovery)
	places := map[string]simlab.Place{}
	for _, n := range []string{simlab.Server, simlab.Primary, simlab.Recovery} {
		places[n] = f.place(n, simlab.Place{Unreachable: n == simlab.Recovery})
	}
	b := newPlacedBed(t, places)
	began := time.Now()
	b.operate(recovery.Protect, fast())
	t.Logf("protected after %v", time.Since(began).Round(10*time.Millisecond))
	from, to := simlab.Primary, simlab.Recovery
	for _, kind := range []recovery.Kind{recovery.Failover, recovery.Failback} {
		b.runsAt(from)
		b.until("five cycles", func() (bool, string) {
			v := b.vm()
			return v.AtSource != nil && v.AtSource.Replication != nil && v.AtSource.Replication.Cycles >= 5, fmt.Sprint(v.Conditions)
		})
		if c := b.vm().AtSource.Replication.LastCycle; c != nil {
			t.Logf("a cycle from %s: %v in all, %d bytes sent in %v", from, c.Total.Round(time.Millisecond), c.SentBytes, c.Transfer.Round(time.Millisecond))
		}
		began = time.Now()
		b.operate(kind, api.OperationRequest{})
		t.Logf("%s took %v", kind, time.Since(began).Round(10*time.Millisecond))
		b.cutOver(from, to)
		b.operate(recovery.Commit, api.OperationRequest{})
		b.operate(recovery.Reprotect, api.OperationRequest{})
		from, to = to, from
	}
}

// TestLoopReaddressed: an agent that others dialled becomes one that dials, and
// the way home goes over its lines.
func TestLoopReaddressed(t *testing.T) {
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	b.must(b.Kill(simlab.Primary, syscall.SIGKILL))
	if out, err := exec.Command(executable, "agent", "readdress", "--state", b.StateDir(simlab.Primary), "--reachable=false").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	started := time.Now()
	b.must(b.Start(t.Context(), simlab.Primary))
	b.must(b.AwaitAgent(t.Context(), simlab.Primary, started))
	id := b.agentOf(simlab.Primary)
	b.until("the peer goes by the name of the agent", func() (bool, string) {
		files, _ := filepath.Glob(filepath.Join(b.StateDir(simlab.Recovery), "assignments", "*.json"))
		for _, f := range files {
			if text, err := os.ReadFile(f); err == nil && strings.Contains(string(text), transport.AgentName(id)) {
				return true, ""
			}
		}
		return false, fmt.Sprint(files)
	})
	b.operate(recovery.Failover, api.OperationRequest{})
	b.operate(recovery.Commit, api.OperationRequest{})
	b.operate(recovery.Reprotect, api.OperationRequest{})
	b.runsAt(simlab.Recovery)
	b.shownWithLines()
}

// shownWithLines fails the test unless agent show names lines that are up.
func (b *bed) shownWithLines() {
	b.t.Helper()
	agents, err := b.client.Agents(b.t.Context())
	b.must(err)
	up := 0
	for _, a := range agents {
		out, err := exec.Command(executable, "--config", b.ConfigDir(), "agent", "show", string(a.ID)).CombinedOutput()
		if err != nil {
			b.t.Fatalf("agent show: %v: %s", err, out)
		}
		up += strings.Count(string(out), "  up  ")
	}
	if up == 0 {
		b.t.Error("agent show names no line that is up")
	}
}

// comesBack kills each process in turn: points have to arrive again.
func (b *bed) comesBack() {
	b.t.Helper()
	for _, name := range []string{simlab.Primary, simlab.Recovery, simlab.Server} {
		b.must(b.Kill(name, syscall.SIGKILL))
		killed := time.Now()
		b.must(b.Start(b.t.Context(), name))
		for _, site := range simlab.Sites {
			b.must(b.AwaitAgent(b.t.Context(), site, killed))
		}
		b.until("points arrive after the kill of "+name, func() (bool, string) {
			v := b.vm()
			return v.LastPoint != nil && v.LastPoint.Time.After(killed), fmt.Sprint(v.Conditions)
		})
		b.t.Logf("%s was killed: a new point after %v", name, time.Since(killed).Round(100*time.Millisecond))
	}
}

func newPlacedBed(t *testing.T, places map[string]simlab.Place) *bed {
	t.Helper()
	l, err := simlab.Up(context.Background(), simlab.Config{Dir: filepath.Join(memoryDir(t), "l"), Executable: executable, Places: places})
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{Lab: l, t: t}
	t.Cleanup(func() {
		if t.Failed() {
			b.keepLogs()
		}
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if b.client, err = l.Client(); err != nil {
		t.Fatal(err)
	}
	b.machine = simlab.Machine{Name: "vm", Disks: []int64{16 << 20, 8 << 20}, Program: simulated.Program{Reacts: true, Agent: true, Boot: 20 * time.Millisecond, Rate: 50, Seed: 7}}
	b.must(l.Add(t.Context(), simlab.Primary, b.machine))
	return b
}

// Package network joins the two sites of a lab: a veth pair straight from one
// site's network namespace to the other's is the WAN, and a veth pair from each
// site to the machine's own namespace is its management network, where the
// server is reached. There is no bridge, no forwarding and no route but the
// point-to-point ones, so sites reach each other over the WAN only and nothing
// else at all.
//
//	site A                                     site B
//	 wan  .1/30 ───────── WAN ───────── .2/30  wan
//	 mgmt .6/30 ── .5/30 machine .9/30 ── .10/30 mgmt
//
// A lab has sixteen addresses of 10.213.0.0/16; which, comes from a hash of its
// name, or the next sixteen that are free. The names of the machine's two
// interfaces hold the number of the block, and so reserve it. They vanish with
// the sites' namespaces; Disconnect removes them before.
package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

const (
	// WAN is the interface to the other site, in each site.
	WAN = "wan"
	// Management is the interface to the machine, in each site.
	Management = "mgmt"

	blocks = 1 << 12 // of sixteen addresses in 10.213.0.0/16
)

// End is one site as the network sees it.
type End struct {
	Name string `json:"name"`
	// PID of a process in the site's network namespace: (*site.Site).NamespacePID.
	PID int `json:"pid"`
	// WANAddr is how the other site reaches it, ManagementAddr how the machine does.
	WANAddr        netip.Addr `json:"wan_addr"`
	ManagementAddr netip.Addr `json:"management_addr"`
	// HostAddr is the machine, as the site reaches it.
	HostAddr netip.Addr `json:"host_addr"`
	// HostLink is the machine's interface to the site.
	HostLink string `json:"host_link"`
}

// Network is a connected pair of sites. It is plain data: a lab keeps it in its
// state file, and another process goes on with it.
type Network struct {
	Block int `json:"block"` // which sixteen addresses
	A     End `json:"a"`
	B     End `json:"b"`
}

// Connect makes the interfaces of a lab whose sites exist. Either all of them
// are there on return, or none.
func Connect(ctx context.Context, lab string, a, b End) (_ *Network, err error) {
	used, err := usedPrefixes(ctx)
	if err != nil {
		return nil, err
	}
	h := fnv.New32a()
	h.Write([]byte(lab))
	first := int(h.Sum32() % blocks)
	for i := range blocks {
		n := newNetwork((first+i)%blocks, a, b)
		if overlaps(used, n.prefix()) {
			continue
		}
		err := n.create(ctx)
		if errors.Is(err, errTaken) {
			continue
		}
		if err != nil {
			return nil, errors.Join(err, n.Disconnect(context.WithoutCancel(ctx)))
		}
		return n, nil
	}
	return nil, errors.New("no free addresses for a lab in 10.213.0.0/16")
}

func newNetwork(block int, a, b End) *Network {
	addr := func(host int) netip.Addr {
		n := block<<4 + host
		return netip.AddrFrom4([4]byte{10, 213, byte(n >> 8), byte(n)})
	}
	a.WANAddr, b.WANAddr = addr(1), addr(2)
	a.HostAddr, a.ManagementAddr = addr(5), addr(6)
	b.HostAddr, b.ManagementAddr = addr(9), addr(10)
	a.HostLink, b.HostLink = fmt.Sprintf("switchb%03xa", block), fmt.Sprintf("switchb%03xb", block)
	return &Network{Block: block, A: a, B: b}
}

func (n *Network) prefix() netip.Prefix {
	p, _ := n.A.WANAddr.Prefix(28)
	return p
}

var errTaken = errors.New("this block is taken by another lab")

func (n *Network) create(ctx context.Context) error {
	for _, e := range []End{n.A, n.B} {
		err := ip(ctx, 0, "link", "add", e.HostLink, "type", "veth", "peer", "name", Management, "netns", strconv.Itoa(e.PID))
		if err != nil && strings.Contains(err.Error(), "File exists") && e.HostLink == n.A.HostLink {
			// The reservation: whose interface this is may not be touched.
			return errTaken
		}
		if err != nil {
			return err
		}
	}
	if err := ip(ctx, 0, "link", "add", WAN, "netns", strconv.Itoa(n.A.PID), "type", "veth", "peer", "name", WAN, "netns", strconv.Itoa(n.B.PID)); err != nil {
		return err
	}
	for _, e := range []End{n.A, n.B} {
		for _, l := range []struct {
			pid  int
			dev  string
			addr netip.Addr
		}{{0, e.HostLink, e.HostAddr}, {e.PID, Management, e.ManagementAddr}, {e.PID, WAN, e.WANAddr}} {
			// Without IPv6 the counters count what the sites send and nothing else.
			if err := ip(ctx, l.pid, "link", "set", "dev", l.dev, "addrgenmode", "none"); err != nil && !strings.Contains(err.Error(), "not supported") {
				return err
			}
			if err := ip(ctx, l.pid, "addr", "add", l.addr.String()+"/30", "dev", l.dev); err != nil {
				return err
			}
			if err := ip(ctx, l.pid, "link", "set", "dev", l.dev, "up"); err != nil {
				return err
			}
		}
	}
	return nil
}

// Disconnect removes the interfaces, in both namespaces of each pair. It is
// idempotent, and content with sites that are gone.
func (n *Network) Disconnect(ctx context.Context) error {
	var errs []error
	remove := func(pid int, dev string) {
		err := ip(ctx, pid, "link", "del", "dev", dev)
		if err != nil && !strings.Contains(err.Error(), "Cannot find device") {
			errs = append(errs, err)
		}
	}
	remove(0, n.A.HostLink)
	remove(0, n.B.HostLink)
	if namespaceExists(n.A.PID) {
		remove(n.A.PID, WAN)
	}
	return errors.Join(errs...)
}

// CutWAN takes the link between the sites down, or up again. The management
// networks stay. Open connections hang rather than break, as on a real outage, and go
// on if it ends before they give up; site A is told at once that a new one cannot be made.
func (n *Network) CutWAN(ctx context.Context, cut bool) error {
	state := map[bool]string{true: "down", false: "up"}[cut]
	return ip(ctx, n.A.PID, "link", "set", "dev", WAN, state)
}

// Counters are an interface's byte counters since it was made, Ethernet and IP
// headers included. A segment that the kernel passes on undivided (up to 64 KiB)
// counts one set of headers.
type Counters struct {
	RxBytes, TxBytes uint64
}

// Counters reads the WAN interface of the named site.
func (n *Network) Counters(site string) (Counters, error) {
	for _, e := range []End{n.A, n.B} {
		if e.Name == site {
			return counters(e.PID, WAN)
		}
	}
	return Counters{}, fmt.Errorf("the network has no site %q", site)
}

func counters(pid int, dev string) (Counters, error) {
	path := fmt.Sprintf("/proc/%d/net/dev", pid)
	b, err := os.ReadFile(path)
	if err != nil {
		return Counters{}, err
	}
	for line := range strings.Lines(string(b)) {
		name, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		f := strings.Fields(rest)
		if !ok || name != dev || len(f) < 9 {
			continue
		}
		rx, err1 := strconv.ParseUint(f[0], 10, 64)
		tx, err2 := strconv.ParseUint(f[8], 10, 64)
		return Counters{rx, tx}, errors.Join(err1, err2)
	}
	return Counters{}, fmt.Errorf("%s lists no interface %s", path, dev)
}

// ip runs the ip tool in the namespace of a process; 0 is the machine's own.
func ip(ctx context.Context, pid int, args ...string) error {
	_, err := ipOutput(ctx, pid, args...)
	return err
}

func ipOutput(ctx context.Context, pid int, args ...string) (string, error) {
	name, all := "ip", args
	if pid != 0 {
		name, all = "nsenter", append([]string{"-t", strconv.Itoa(pid), "-n", "--", "ip"}, args...)
	}
	cmd := exec.CommandContext(ctx, name, all...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.String(), nil
}

func namespaceExists(pid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", pid))
	return err == nil
}

// usedPrefixes are the machine's addresses and routes.
func usedPrefixes(ctx context.Context) ([]netip.Prefix, error) {
	addrs, err := ipOutput(ctx, 0, "-4", "-o", "addr", "show")
	if err != nil {
		return nil, err
	}
	routes, err := ipOutput(ctx, 0, "-4", "route", "show", "table", "all")
	if err != nil {
		return nil, err
	}
	var ps []netip.Prefix
	for _, f := range strings.Fields(addrs + " " + routes) {
		if p, err := netip.ParsePrefix(f); err == nil && p.Addr().Is4() && p.Bits() > 8 {
			ps = append(ps, p)
		} else if a, err := netip.ParseAddr(f); err == nil && a.Is4() {
			ps = append(ps, netip.PrefixFrom(a, 32))
		}
	}
	return ps, nil
}

func overlaps(used []netip.Prefix, p netip.Prefix) bool {
	for _, u := range used {
		if u.Overlaps(p) {
			return true
		}
	}
	return false
}

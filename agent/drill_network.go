package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
)

// port is a network device that is part of a bridge. Kind is the kernel's word
// for a virtual one ("tun", "veth", "vlan"); "" = a piece of hardware.
type port struct{ name, kind string }

// isolated is nil where every network of the drill is shown not to reach
// production; otherwise it says which does, and how.
func (a *Agent) isolated(ctx context.Context, p agentapi.DrillNetworks) error {
	used := p.Used()
	if len(used) == 0 {
		return nil
	}
	hv, err := a.inspector()
	if err != nil {
		return err
	}
	networks, err := hv.Networks(ctx)
	if err != nil {
		return err
	}
	domains, err := a.hv.Domains(ctx)
	if err != nil {
		return err
	}
	protected := map[switchback.VMUUID]bool{}
	for _, v := range a.all() {
		protected[v.assignment().VM] = true
	}
	// Protected VMs that run here, by network and bridge.
	inUse := map[string]string{}
	for _, d := range domains {
		if protected[d.UUID] && d.State != hypervisor.StateOff {
			for _, n := range d.Networks {
				inUse[n] = d.Name
			}
		}
	}
	for _, name := range used {
		n, ok := networkNamed(networks, name)
		var ports []port
		if ok && n.Bridge != "" {
			if ports, err = bridgePorts(n.Bridge); err != nil {
				return err
			}
		}
		if err := judgeNetwork(name, n, ok, ports, p.Production, inUse, networks); err != nil {
			return err
		}
	}
	return nil
}

func networkNamed(list []hypervisor.Network, name string) (hypervisor.Network, bool) {
	for _, n := range list {
		if n.Name == name {
			return n, true
		}
	}
	return hypervisor.Network{}, false
}

// judgeNetwork decides whether a drill may be connected to a network. inUse
// names, by network or bridge, a protected VM that runs on it.
func judgeNetwork(name string, n hypervisor.Network, known bool, ports []port, production []string, inUse map[string]string, all []hypervisor.Network) error {
	no := func(format string, args ...any) error {
		return switchback.Errorf(switchback.CodeRefused, "network %s is not fit for a drill: %s", name, fmt.Sprintf(format, args...)).
			WithHint("make a network without <forward> (virsh net-define, net-start) that nothing else uses and name it, or drill with --no-network")
	}
	if !known {
		return no("this site has no libvirt network of that name, and of nothing else can it be shown that it is isolated")
	}
	if n.Forward != "" {
		to := ""
		if len(n.Devices) > 0 {
			to = " to " + strings.Join(n.Devices, ", ")
		}
		return no("it can reach production: its forward mode is %q%s", n.Forward, to)
	}
	if n.Bridge == "" {
		return no("it has no bridge of its own")
	}
	if !n.Active {
		return no("it is not active; start it with 'virsh net-start %s'", name)
	}
	for _, x := range production {
		if x == name || x == n.Bridge {
			return no("a protected VM uses it, or would after a failover")
		}
	}
	for _, key := range []string{name, n.Bridge} {
		if vm, ok := inUse[key]; ok {
			return no("VM %s, which is protected and runs here, uses it", vm)
		}
	}
	for _, other := range all {
		if other.Name != name && other.Bridge == n.Bridge {
			return no("network %s has the same bridge %s", other.Name, n.Bridge)
		}
	}
	var reach []string
	for _, p := range ports {
		// QEMU's own ports, and the one that older libvirt makes for itself.
		if p.kind != "tun" && p.kind != "dummy" {
			reach = append(reach, p.name)
		}
	}
	if len(reach) > 0 {
		slices.Sort(reach)
		return no("it can reach production: its bridge %s has the port %s", n.Bridge, strings.Join(reach, ", "))
	}
	return nil
}

// bridgePorts lists the devices that belong to a bridge, in this network
// namespace (rtnetlink(7)); none where there is no such bridge.
func bridgePorts(bridge string) ([]port, error) {
	raw, err := syscall.NetlinkRIB(syscall.RTM_GETLINK, syscall.AF_UNSPEC)
	if err != nil {
		return nil, fmt.Errorf("list network devices: %w", err)
	}
	messages, err := syscall.ParseNetlinkMessage(raw)
	if err != nil {
		return nil, fmt.Errorf("list network devices: %w", err)
	}
	type link struct {
		port
		master uint32
	}
	links, master := []link{}, uint32(0)
	for i := range messages {
		m := &messages[i]
		if m.Header.Type != syscall.RTM_NEWLINK || len(m.Data) < syscall.SizeofIfInfomsg {
			continue
		}
		index := native32(m.Data[4:])
		var l link
		for kind, value := range attributes(m.Data[syscall.SizeofIfInfomsg:]) {
			switch kind {
			case unix.IFLA_IFNAME:
				l.name = strings.TrimRight(string(value), "\x00")
			case unix.IFLA_MASTER:
				l.master = native32(value)
			case unix.IFLA_LINKINFO:
				for kind, value := range attributes(value) {
					if kind == unix.IFLA_INFO_KIND {
						l.kind = strings.TrimRight(string(value), "\x00")
					}
				}
			}
		}
		if l.name == bridge {
			master = index
		}
		links = append(links, l)
	}
	var ports []port
	for _, l := range links {
		if master != 0 && l.master == master {
			ports = append(ports, l.port)
		}
	}
	return ports, nil
}

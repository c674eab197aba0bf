package guest

import (
	"encoding/xml"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Paths inside a site; each site has its own files under them.
const (
	ImageDir   = "/var/lib/libvirt/images"
	consoleDir = "/var/log/libvirt/qemu"
	controlDir = "/run/libvirt/qemu"
)

// ConsolePath is where the guest's console goes, inside its site.
func ConsolePath(name string) string { return consoleDir + "/" + name + ".console" }

// ControlPath is the socket of the guest's control port, inside its site.
func ControlPath(name string) string { return controlDir + "/" + name + ".lab" }

// Workload says what the guest does; it becomes part of the kernel's command line.
type Workload struct {
	// MountDisk is the disk whose file system is mounted at boot; "" for none.
	MountDisk string
	// CheckBytes of files are read and verified after mounting.
	CheckBytes int64
	// RecordDisks get records, in this order; nil for no writer.
	RecordDisks []string
	// RecordOffset and Slots place the ring. Defaults: RecordOffset, Slots.
	RecordOffset int64
	Slots        int
	// Pace is the pause between two records.
	Pace time.Duration
	// Hold lets the writer wait for (*Control).Go.
	Hold bool
}

// Cmdline is the kernel's command line for the workload. The options before it
// save a fifth of the boot under an emulated processor.
func (w Workload) Cmdline() string {
	// The last console= is where /init writes to.
	a := []string{"console=ttyS0 quiet loglevel=2 panic=1 mitigations=off nokaslr tsc=reliable no_timer_check lpj=4000000 random.trust_cpu=on cryptomgr.notests"}
	if w.MountDisk != "" {
		a = append(a, "sb.fs="+w.MountDisk)
	}
	if w.CheckBytes > 0 {
		a = append(a, fmt.Sprintf("sb.check=%d", w.CheckBytes))
	}
	if len(w.RecordDisks) > 0 {
		if w.RecordOffset == 0 {
			w.RecordOffset = RecordOffset
		}
		if w.Slots == 0 {
			w.Slots = Slots
		}
		a = append(a, fmt.Sprintf("sb.records=%s sb.offset=%d sb.slots=%d sb.pace=%d",
			strings.Join(w.RecordDisks, ","), w.RecordOffset, w.Slots, w.Pace.Microseconds()))
		if w.Hold {
			a = append(a, "sb.hold=1")
		}
	}
	return strings.Join(a, " ")
}

// SpecDisk is one disk of a guest.
type SpecDisk struct {
	Path   string // inside the site
	Target string // "vda", "vdb", …
	Format string // default qcow2
}

// Spec describes a guest's domain.
type Spec struct {
	Name      string
	UUID      string
	Type      string // "qemu" or "kvm", see (*site.Site).DomainType; default qemu
	MemoryMiB int    // default 192
	Image     Image
	Disks     []SpecDisk
	Cmdline   string // see Workload.Cmdline
	// Network is a libvirt network to connect to, MAC the interface's address;
	// "" for no interface. The guest does not configure it.
	Network, MAC string
	// Screen adds a video device.
	Screen bool
}

// DomainXML is the definition of a guest. The same text serves every site: paths
// of disks, console and control socket are each site's own.
func DomainXML(s Spec) (string, error) {
	if s.Name == "" || s.UUID == "" || s.Image.Kernel == "" || s.Image.Initrd == "" {
		return "", errors.New("a guest needs name, UUID, kernel and initrd")
	}
	if s.Type == "" {
		s.Type = "qemu"
	}
	if s.MemoryMiB == 0 {
		s.MemoryMiB = 192
	}
	var b strings.Builder
	p := func(format string, args ...any) {
		for i, a := range args {
			if t, ok := a.(string); ok {
				var e strings.Builder
				xml.EscapeText(&e, []byte(t)) // never fails on a strings.Builder
				args[i] = e.String()
			}
		}
		fmt.Fprintf(&b, format+"\n", args...)
	}
	p(`<domain type='%s'>`, s.Type)
	p(`  <name>%s</name>`, s.Name)
	p(`  <uuid>%s</uuid>`, s.UUID)
	p(`  <memory unit='MiB'>%d</memory>`, s.MemoryMiB)
	p(`  <vcpu>1</vcpu>`)
	p(`  <os>`)
	p(`    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>`)
	p(`    <kernel>%s</kernel>`, s.Image.Kernel)
	p(`    <initrd>%s</initrd>`, s.Image.Initrd)
	p(`    <cmdline>%s</cmdline>`, s.Cmdline)
	p(`  </os>`)
	p(`  <features><acpi/></features>`)
	p(`  <clock offset='utc'/>`)
	p(`  <on_poweroff>destroy</on_poweroff>`)
	p(`  <on_reboot>restart</on_reboot>`)
	p(`  <on_crash>destroy</on_crash>`)
	p(`  <devices>`)
	p(`    <emulator>/usr/bin/qemu-system-x86_64</emulator>`)
	for _, d := range s.Disks {
		if d.Format == "" {
			d.Format = "qcow2"
		}
		p(`    <disk type='file' device='disk'>`)
		p(`      <driver name='qemu' type='%s' cache='none' io='threads' discard='unmap'/>`, d.Format)
		p(`      <source file='%s'/>`, d.Path)
		p(`      <target dev='%s' bus='virtio'/>`, d.Target)
		p(`    </disk>`)
	}
	if s.Network != "" {
		p(`    <interface type='network'>`)
		if s.MAC != "" {
			p(`      <mac address='%s'/>`, s.MAC)
		}
		p(`      <source network='%s'/>`, s.Network)
		p(`      <model type='virtio'/>`)
		p(`    </interface>`)
	}
	p(`    <serial type='file'>`)
	p(`      <source path='%s' append='on'/>`, ConsolePath(s.Name))
	p(`    </serial>`)
	p(`    <channel type='unix'>`)
	p(`      <target type='virtio' name='org.qemu.guest_agent.0'/>`)
	p(`    </channel>`)
	p(`    <channel type='unix'>`)
	p(`      <source mode='bind' path='%s'/>`, ControlPath(s.Name))
	p(`      <target type='virtio' name='org.switchback.lab.0'/>`)
	p(`    </channel>`)
	p(`    <controller type='usb' model='none'/>`)
	p(`    <memballoon model='none'/>`)
	if s.Screen {
		p(`    <video><model type='vga'/></video>`)
	}
	p(`  </devices>`)
	p(`</domain>`)
	return b.String(), nil
}

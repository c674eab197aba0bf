package export

import (
	"encoding/xml"
	"fmt"
	"strings"

	switchback "github.com/switchback-dr/switchback"
)

// domain is what run.sh needs of libvirt's domain XML
// (https://libvirt.org/formatdomain.html).
type domain struct {
	Type   string `xml:"type,attr"`
	Name   string `xml:"name"`
	UUID   string `xml:"uuid"`
	Memory struct {
		Unit string `xml:"unit,attr"`
		N    int64  `xml:",chardata"`
	} `xml:"memory"`
	CPUs int `xml:"vcpu"`
	OS   struct {
		Firmware string `xml:"firmware,attr"`
		Type     struct {
			Arch    string `xml:"arch,attr"`
			Machine string `xml:"machine,attr"`
		} `xml:"type"`
		Loader  string `xml:"loader"`
		Kernel  string `xml:"kernel"`
		Initrd  string `xml:"initrd"`
		Cmdline string `xml:"cmdline"`
	} `xml:"os"`
	Disks []struct {
		Device string `xml:"device,attr"`
		Target struct {
			Dev string `xml:"dev,attr"`
			Bus string `xml:"bus,attr"`
		} `xml:"target"`
	} `xml:"devices>disk"`
	Interfaces []struct {
		MAC struct {
			Address string `xml:"address,attr"`
		} `xml:"mac"`
		Model struct {
			Type string `xml:"type,attr"`
		} `xml:"model"`
	} `xml:"devices>interface"`
}

// memoryMiB returns the memory in MiB; units as in libvirt's documentation.
func (d domain) memoryMiB() int64 {
	unit := map[string]int64{"": 1 << 10, "b": 1, "bytes": 1, "KB": 1000, "k": 1 << 10, "KiB": 1 << 10, "MB": 1e6, "M": 1 << 20, "MiB": 1 << 20,
		"GB": 1e9, "G": 1 << 30, "GiB": 1 << 30, "TB": 1e12, "T": 1 << 40, "TiB": 1 << 40}[d.Memory.Unit]
	if n := d.Memory.N * unit >> 20; n > 0 {
		return n
	}
	return 1024
}

// Script returns a shell script that starts QEMU on the images DISK.qcow2 beside
// it, as far as possible as the definition says; "" stands for a plain machine.
// It is a starting point: networks are QEMU's user network, arguments are added.
func Script(definition string, disks []string) (string, error) {
	var d domain
	if definition != "" {
		if err := xml.Unmarshal([]byte(definition), &d); err != nil {
			return "", switchback.Errorf(switchback.CodeInvalid, "definition: %w", err)
		}
	}
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	def(&d.Name, "exported")
	def(&d.OS.Type.Arch, "x86_64")
	def(&d.OS.Type.Machine, "q35")
	d.CPUs = max(1, d.CPUs)
	accel := "-accel kvm -accel tcg"
	if d.Type == "qemu" { // it ran without KVM, perhaps for a reason
		accel = "-accel tcg"
	}
	bus := map[string]string{}
	for _, x := range d.Disks {
		bus[x.Target.Dev] = x.Target.Bus
	}

	var b strings.Builder
	b.WriteString("#!/bin/sh\n# Starts the VM from the images in this directory, which it writes to.\n")
	b.WriteString("# Further arguments go to QEMU, e.g. -snapshot to leave the images as they are.\n")
	if d.UUID != "" {
		b.WriteString("# VM_UUID=... gives this copy a UUID of its own.\n")
	}
	b.WriteString("here=$(cd \"$(dirname \"$0\")\" && pwd) || exit 1\n")
	args := []string{"qemu-system-" + d.OS.Type.Arch, "-name " + quote(d.Name), "-machine " + quote(d.OS.Type.Machine), accel,
		fmt.Sprintf("-m %d -smp %d", d.memoryMiB(), d.CPUs)}
	if d.UUID != "" {
		args = append(args, "-uuid \"${VM_UUID:-"+d.UUID+"}\"")
	}
	if d.OS.Firmware == "efi" || d.OS.Loader != "" {
		def(&d.OS.Loader, "/usr/share/OVMF/OVMF_CODE.fd")
		args = append(args, "-drive if=pflash,format=raw,readonly=on,file="+quote(d.OS.Loader))
	}
	if d.OS.Kernel != "" { // of this host
		args = append(args, "-kernel "+quote(d.OS.Kernel))
		if d.OS.Initrd != "" {
			args = append(args, "-initrd "+quote(d.OS.Initrd))
		}
		if d.OS.Cmdline != "" {
			args = append(args, "-append "+quote(d.OS.Cmdline))
		}
	}
	scsi := false
	for _, name := range disks {
		args = append(args, fmt.Sprintf(`-drive if=none,id=%s,format=qcow2,file="$here"/%s`, name, quote(name+".qcow2")))
		switch bus[name] {
		case "sata", "ide":
			args = append(args, "-device ide-hd,drive="+name)
		case "scsi":
			if !scsi {
				args, scsi = append(args, "-device virtio-scsi-pci"), true
			}
			args = append(args, "-device scsi-hd,drive="+name)
		default:
			args = append(args, "-device virtio-blk-pci,drive="+name)
		}
	}
	if len(d.Interfaces) == 0 {
		args = append(args, "-nic none")
	}
	for _, n := range d.Interfaces {
		model := "virtio-net-pci"
		if t := n.Model.Type; t != "" && t != "virtio" {
			model = t
		}
		nic := "-nic user,model=" + model
		if n.MAC.Address != "" {
			nic += ",mac=" + n.MAC.Address
		}
		args = append(args, nic)
	}
	b.WriteString("exec " + strings.Join(args, " \\\n  ") + " \\\n  \"$@\"\n")
	return b.String(), nil
}

// quote makes s one word of a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

package libvirt

import (
	"context"
	"strings"
	"testing"

	"github.com/beevik/etree"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

const production = `<domain type='kvm' xmlns:q='http://example.org/q'>
  <name>db</name>
  <uuid>11111111-1111-4111-8111-111111111111</uuid>
  <genid>22222222-2222-4222-8222-222222222222</genid>
  <os firmware='efi'><type>hvm</type><nvram>/var/lib/libvirt/qemu/nvram/db_VARS.fd</nvram></os>
  <sysinfo type='smbios'><system><entry name='uuid'>11111111-1111-4111-8111-111111111111</entry></system></sysinfo>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/a.qcow2'/><target dev='vda' bus='virtio'/></disk>
    <disk type='file' device='disk'><source file='/scratch.raw'/><target dev='vdb' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/cd.iso'/><target dev='sda' bus='sata'/></disk>
    <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><virtualport type='openvswitch'/><model type='virtio'/></interface>
    <interface type='network'><mac address='52:54:00:00:00:02'/><source network='backup' portgroup='x'/><filterref filter='f'/></interface>
    <interface type='direct'><mac address='52:54:00:00:00:03'/><source dev='eth5' mode='bridge'/></interface>
    <serial type='file'><source path='/var/log/db.console' append='on'/><target port='0'/></serial>
    <serial type='tcp'><source mode='bind' host='0.0.0.0' service='7777'/><protocol type='raw'/><target port='1'/></serial>
    <console type='file'><source path='/var/log/db.console'/><target type='serial' port='0'/></console>
    <channel type='unix'><source mode='bind' path='/run/db.agent'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='tcp'><source mode='connect' host='x' service='1'/><protocol type='raw'/><target type='virtio' name='x'/></channel>
    <graphics type='vnc' port='5901' autoport='no'><listen type='address' address='0.0.0.0'/></graphics>
    <hostdev mode='subsystem' type='pci'/>
    <filesystem type='mount'><source dir='/export'/><target dir='e'/></filesystem>
    <video><model type='vga'/></video>
  </devices>
  <q:keep/>
</domain>`

const copyUUID = "33333333-3333-4333-8333-333333333333"

func isolation() hypervisor.Isolation {
	return hypervisor.Isolation{Name: "db-drill-1", UUID: copyUUID, ConsoleLog: "/d/console.log", Network: "quiet",
		Networks: map[string]string{"backup": "quiet2"},
		Disks:    map[string]hypervisor.DiskSource{"vda": {Path: "/d/vda.qcow2", Format: "qcow2", BackingSocket: "/s", BackingExport: "vda"}}}
}

func TestIsolate(t *testing.T) {
	text, notes, err := isolate(production, isolation())
	if err != nil {
		t.Fatal(err)
	}
	// Nothing that is the original's, or the host's, is left anywhere.
	for _, own := range []string{"<name>db<", "11111111", "22222222", "nvram", "/a.qcow2", "scratch", "cd.iso", "br0", `"backup"`, "eth5", "openvswitch", "52:54:00",
		"filterref", "/var/log", "7777", "/run/db", "connect", "5901", "hostdev", "filesystem", "<console"} {
		if strings.Contains(text, own) {
			t.Errorf("the copy has %s of its original:\n%s", own, text)
		}
	}
	doc := etree.NewDocument()
	if err := doc.ReadFromString(text); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{
		"/domain/name[text()='db-drill-1']": 1, "/domain/uuid[text()='" + copyUUID + "']": 1, "/domain/sysinfo/system/entry[text()='" + copyUUID + "']": 1,
		"/domain/devices/disk[@device='disk']": 1, "/domain/devices/disk[@device='cdrom']": 1, "/domain/devices/disk/backingStore/source[@protocol='nbd']": 1,
		"/domain/devices/interface[@type='network']": 3, "/domain/devices/interface/source[@network='quiet']": 2, "/domain/devices/interface/source[@network='quiet2']": 1,
		"/domain/devices/serial[@type='pty']": 2, "/domain/devices/serial/log[@file='/d/console.log']": 1,
		"/domain/devices/channel[@type='unix']": 1, "/domain/devices/channel[@type='null']": 1, "/domain/devices/channel/source": 0,
		"/domain/devices/graphics[@port='-1']": 1, "/domain/devices/video": 1, "/domain/q:keep": 1, "/domain/genid": 1,
	} {
		if n := len(doc.FindElements(path)); n != want {
			t.Errorf("%d of %s, want %d:\n%s", n, path, want, text)
		}
	}
	for _, want := range []string{"firmware variables", "disk vdb", "cdrom sda is empty", "hostdev", "filesystem"} {
		if !strings.Contains(strings.Join(notes, "\n"), want) {
			t.Errorf("no note of %s: %q", want, notes)
		}
	}

	apart := isolation()
	apart.Network, apart.Networks, apart.KeepMACs = "", map[string]string{"br0": "quiet"}, true
	text, notes, err = isolate(production, apart)
	if err != nil || strings.Count(text, "<interface") != 1 || !strings.Contains(text, "52:54:00:00:00:01") || !strings.Contains(strings.Join(notes, "\n"), "interface on eth5 was left out") {
		t.Errorf("%v, %q:\n%s", err, notes, text)
	}
	for name, change := range map[string]func(*hypervisor.Isolation){
		"the same UUID":        func(i *hypervisor.Isolation) { i.UUID = "11111111-1111-4111-8111-111111111111" },
		"the same name":        func(i *hypervisor.Isolation) { i.Name = "db" },
		"no name":              func(i *hypervisor.Isolation) { i.Name = "" },
		"a disk there is not":  func(i *hypervisor.Isolation) { i.Disks["vdz"] = i.Disks["vda"] },
		"a disk without image": func(i *hypervisor.Isolation) { i.Disks["vda"] = hypervisor.DiskSource{} },
	} {
		i := isolation()
		change(&i)
		if _, _, err := isolate(production, i); switchback.CodeOf(err) != switchback.CodeInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestConsoleLog(t *testing.T) {
	d := &Driver{}
	copied, _, err := isolate(production, isolation())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ definition, want string }{
		{production, "/var/log/db.console"},
		{copied, "/d/console.log"},
		{"<domain><devices><serial type='pty'/></devices></domain>", ""},
		{"<domain/>", ""},
	} {
		got, err := d.ConsoleLog(c.definition)
		if got != c.want || (err == nil) != (c.want != "") || err != nil && switchback.CodeOf(err) != switchback.CodeUnsupported {
			t.Errorf("%q, %v; want %q", got, err, c.want)
		}
	}
}

func TestParseNetwork(t *testing.T) {
	for _, c := range []struct{ text, forward, bridge, devices string }{
		{"<network><name>n</name><bridge name='b'/></network>", "", "b", ""},
		{"<network><name>n</name><forward/><bridge name='b'/></network>", "nat", "b", ""},
		{"<network><name>n</name><forward mode='none'/></network>", "", "", ""},
		{"<network><name>n</name><forward dev='eth0' mode='route'><interface dev='eth0'/></forward></network>", "route", "", "eth0"},
		{"<network><name>n</name><forward dev='eth1' mode='nat'/></network>", "nat", "", "eth1"},
		{"<network connections='1'><name>n</name><forward mode='open'/></network>", "open", "", ""},
	} {
		n, err := parseNetwork(c.text)
		if err != nil || n.Name != "n" || n.Forward != c.forward || n.Bridge != c.bridge || strings.Join(n.Devices, " ") != c.devices {
			t.Errorf("%s: %+v, %v", c.text, n, err)
		}
	}
}

// TestScreenshot: a picture in several messages, and every way in which a
// stream can fail.
func TestScreenshot(t *testing.T) {
	const id = switchback.VMUUID(copyUUID)
	for _, c := range []struct {
		name    string
		answer  func(c *fakeConn, h header)
		picture string
		code    switchback.Code
	}{
		{"in two pieces", func(c *fakeConn, h header) {
			c.reply(h, newArgs().optional("image/png").b)
			h.kind, h.status = typeStream, statusContinue
			c.send(h, []byte("one "))
			c.send(h, []byte("two"))
			c.send(h, nil)
		}, "one two", ""},
		{"no screen", func(c *fakeConn, h header) { c.refuse(h, errInternal, "no screens to take screenshot from") }, "", switchback.CodeUnsupported},
		{"the stream breaks", func(c *fakeConn, h header) {
			c.reply(h, newArgs().optional("image/png").b)
			h.kind, h.status = typeStream, statusContinue
			c.send(h, []byte("one "))
			h.status = statusError
			c.send(h, errorPayload(errSystem, "I/O error"))
		}, "", switchback.CodeInternal},
		{"the connection breaks", func(c *fakeConn, h header) {
			c.reply(h, newArgs().optional("image/png").b)
			c.Close()
		}, "", switchback.CodeUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := startFake(t, &fake{handle: func(conn *fakeConn, h header, _ []byte) {
				switch {
				case h.kind == typeCall && h.procedure == procDomainScreenshot.number:
					c.answer(conn, h)
				case h.kind == typeStream && h.status == statusOK: // the finish, which is confirmed
					conn.send(h, nil)
				}
			}})
			d, err := New(Config{Socket: f.socket})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			mime, picture, err := d.Screenshot(context.Background(), id)
			if switchback.CodeOf(err) != c.code || string(picture) != c.picture || c.code == "" && mime != "image/png" {
				t.Errorf("%q %q, %v", mime, picture, err)
			}
		})
	}
}

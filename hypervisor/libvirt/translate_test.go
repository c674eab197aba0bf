package libvirt

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beevik/etree"
	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// canonical gives the same text for documents that say the same: attributes
// sorted, white space between elements dropped.
func canonical(t *testing.T, text string) string {
	t.Helper()
	doc := etree.NewDocument()
	doc.ReadSettings.PreserveCData = true
	doc.WriteSettings.CanonicalAttrVal = true
	if err := doc.ReadFromString(text); err != nil {
		t.Fatal(err)
	}
	var tidy func(e *etree.Element)
	tidy = func(e *etree.Element) {
		e.SortAttrs()
		for i := len(e.Child) - 1; i >= 0; i-- {
			switch c := e.Child[i].(type) {
			case *etree.CharData:
				if c.IsWhitespace() && !c.IsCData() {
					e.RemoveChildAt(i)
				}
			case *etree.Element:
				tidy(c)
			}
		}
	}
	tidy(&doc.Element)
	doc.Indent(2)
	out, err := doc.WriteToString()
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func readTestdata(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func translated(t *testing.T, text string, tr hypervisor.Translation) string {
	t.Helper()
	out, err := translate(text, tr)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

var (
	toTarget = hypervisor.Translation{
		Disks: map[string]hypervisor.DiskSource{
			"vda": {Path: "/dr/vda & more.qcow2", Format: "qcow2", BackingSocket: "/run/switchback/v.sock", BackingExport: "rp-7/vda"},
			"sda": {Path: "/dr/sda.qcow2", Format: "qcow2"},
		},
		Networks: map[string]string{"default": "dr-net", "br0": "br-dr", "eno1": "eth7"},
		Emulator: "/opt/qemu/bin/qemu-system-x86_64",
	}
	toHome = hypervisor.Translation{
		Disks: map[string]hypervisor.DiskSource{
			"vda": {Path: "/var/lib/libvirt/images/rich.qcow2", Format: "qcow2"},
			"sda": {Path: "/data/rich-data.qcow2", Format: "qcow2"},
		},
		Networks: map[string]string{"dr-net": "default", "br-dr": "br0", "eth7": "eno1"},
		Emulator: "/usr/bin/qemu-system-x86_64",
	}
)

func TestTranslateThereAndBack(t *testing.T) {
	original := readTestdata(t, "rich.xml")
	there := translated(t, original, toTarget)
	if canonical(t, there) == canonical(t, original) {
		t.Fatal("nothing was translated")
	}
	back := translated(t, there, toHome)
	if diff := cmp.Diff(canonical(t, original), canonical(t, back)); diff != "" {
		t.Errorf("there and back it changed (-original +back):\n%s", diff)
	}
	// Twice the same way changes nothing more.
	if again := translated(t, back, toHome); again != back {
		t.Errorf("translating is not idempotent:\n%s", cmp.Diff(back, again))
	}
}

func TestTranslateWhatChanges(t *testing.T) {
	there := canonical(t, translated(t, readTestdata(t, "rich.xml"), toTarget))
	for _, want := range []string{
		`<source file="/dr/vda &amp; more.qcow2" startupPolicy="mandatory">`,
		`<host socket="/run/switchback/v.sock" transport="unix"/>`,
		`<source name="rp-7/vda" protocol="nbd">`,
		`<source network="dr-net" portgroup="prod"/>`,
		`<source bridge="br-dr"/>`,
		`<source dev="eth7" mode="bridge"/>`,
		`<emulator>/opt/qemu/bin/qemu-system-x86_64</emulator>`,
		`<![CDATA[a < b && c]]>`,
		`<vendor:thing keep="me" xmlns:vendor="http://vendor.example/1">`,
		`passwd="s3cret &quot;&#xA;x"`,
		`<qemu:arg value="-device"/>`,
		`<!-- a comment -->`,
		`<nvram template="/usr/share/OVMF/OVMF_VARS_4M.fd">/var/lib/libvirt/qemu/nvram/rich_VARS.fd</nvram>`,
		`<source file="/iso/install.iso"/>`,
		`<alias name="ua-root"/>`,
	} {
		if !strings.Contains(there, want) {
			t.Errorf("the translated definition lacks %s", want)
		}
	}
	if t.Failed() {
		t.Log(there)
	}
}

func TestTranslateLiveForm(t *testing.T) {
	got := canonical(t, translated(t, readTestdata(t, "live.xml"), hypervisor.Translation{}))
	if diff := cmp.Diff(canonical(t, readTestdata(t, "live-as-inactive.xml")), got); diff != "" {
		t.Errorf("the live form was not made inactive (-want +got):\n%s", diff)
	}
}

func TestTranslateRefuses(t *testing.T) {
	rich := readTestdata(t, "rich.xml")
	disks := func(name string, s hypervisor.DiskSource) hypervisor.Translation {
		return hypervisor.Translation{Disks: map[string]hypervisor.DiskSource{name: s}}
	}
	for _, test := range []struct {
		name, text string
		tr         hypervisor.Translation
	}{
		{"not XML", "<domain", hypervisor.Translation{}},
		{"empty", "", hypervisor.Translation{}},
		{"not a domain", "<network/>", hypervisor.Translation{}},
		{"unknown disk", rich, disks("vdz", hypervisor.DiskSource{Path: "/x", Format: "qcow2"})},
		{"no path", rich, disks("vda", hypervisor.DiskSource{Format: "qcow2"})},
		{"no format", rich, disks("vda", hypervisor.DiskSource{Path: "/x"})},
		{"half a backing", rich, disks("vda", hypervisor.DiskSource{Path: "/x", Format: "qcow2", BackingExport: "e"})},
		{"long socket", rich, disks("vda", hypervisor.DiskSource{Path: "/x", Format: "qcow2", BackingExport: "e", BackingSocket: strings.Repeat("s", 108)})},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := translate(test.text, test.tr)
			wantCode(t, test.name, err, switchback.CodeInvalid)
		})
	}
}

func TestParseDomain(t *testing.T) {
	got, err := parseDomain(readTestdata(t, "rich.xml"))
	if err != nil {
		t.Fatal(err)
	}
	want := hypervisor.Domain{
		Name: "rich", UUID: "6c2d8a4e-51f0-4f0e-9b1f-2d0c6f4a7b11", MemoryMiB: 2048, CPUs: 2,
		Networks: []string{"default", "br0", "eno1"},
		Disks: []hypervisor.Disk{
			{Disk: switchback.Disk{Name: "vda", Path: "/var/lib/libvirt/images/rich.qcow2", Format: "qcow2"}, Device: "disk"},
			{Disk: switchback.Disk{Name: "sda", Path: "/data/rich-data.qcow2", Format: "qcow2"}, Device: "disk"},
			{Disk: switchback.Disk{Name: "sdb", Path: "/iso/install.iso", Format: "raw"}, Device: "cdrom", ReadOnly: true, Unsupported: "not a disk"},
		},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("parsed domain (-want +got):\n%s", diff)
	}
}

func TestUnsupportedDisks(t *testing.T) {
	for _, test := range []struct{ name, disk, want string }{
		{"plain", `<disk type='file'><driver type='qcow2'/><source file='/a'/><target dev='vda'/></disk>`, ""},
		{"raw", `<disk type='file'><driver type='raw'/><source file='/a'/><target dev='vda'/></disk>`, "convert to qcow2"},
		{"no format", `<disk type='file'><source file='/a'/><target dev='vda'/></disk>`, "convert to qcow2"},
		{"vmdk", `<disk type='file'><driver type='vmdk'/><source file='/a'/><target dev='vda'/></disk>`, "vmdk"},
		{"lun", `<disk type='block' device='lun'><driver type='raw'/><source dev='/dev/sdx'/><target dev='sda'/></disk>`, "passthrough"},
		{"block", `<disk type='block'><driver type='qcow2'/><source dev='/dev/vg/lv'/><target dev='vda'/></disk>`, "block device"},
		{"rbd", `<disk type='network'><driver type='raw'/><source protocol='rbd' name='p/i'/><target dev='vda'/></disk>`, "network source (rbd)"},
		{"volume", `<disk type='volume'><driver type='qcow2'/><source pool='p' volume='v'/><target dev='vda'/></disk>`, "volume"},
		{"nvme", `<disk type='nvme'><driver type='raw'/><source type='pci'/><target dev='vda'/></disk>`, "nvme"},
		{"shareable", `<disk type='file'><driver type='qcow2'/><source file='/a'/><target dev='vda'/><shareable/></disk>`, "shareable"},
		{"read-only", `<disk type='file'><driver type='qcow2'/><source file='/a'/><target dev='vda'/><readonly/></disk>`, "read-only"},
		{"transient", `<disk type='file'><driver type='qcow2'/><source file='/a'/><target dev='vda'/><transient/></disk>`, "transient"},
		{"encrypted", `<disk type='file'><driver type='qcow2'/><source file='/a'><encryption format='luks'/></source><target dev='vda'/></disk>`, "encrypted"},
		{"floppy", `<disk type='file' device='floppy'><driver type='raw'/><target dev='fda'/></disk>`, "not a disk"},
		{"empty", `<disk type='file'><driver type='qcow2'/><target dev='vda'/></disk>`, "no source"},
	} {
		t.Run(test.name, func(t *testing.T) {
			d, err := parseDomain("<domain><devices>" + test.disk + "</devices></domain>")
			if err != nil {
				t.Fatal(err)
			}
			got := d.Disks[0].Unsupported
			if (test.want == "") != (got == "") || !strings.Contains(got, test.want) {
				t.Errorf("reason is %q, want one with %q", got, test.want)
			}
		})
	}
}

func TestMemory(t *testing.T) {
	for text, want := range map[string]int64{
		`<memory>1048576</memory>`:                 1024,
		`<memory unit='KiB'>2097152</memory>`:      2048,
		`<memory unit='MiB'>64</memory>`:           64,
		`<memory unit='G'>3</memory>`:              3072,
		`<memory unit='bytes'>1073741824</memory>`: 1024,
		`<memory unit='GB'>1</memory>`:             953,
		`<memory>lots</memory>`:                    0,
	} {
		d, err := parseDomain("<domain>" + text + "</domain>")
		if err != nil {
			t.Fatal(err)
		}
		if d.MemoryMiB != want {
			t.Errorf("%s is %d MiB, want %d", text, d.MemoryMiB, want)
		}
	}
}

func FuzzTranslate(f *testing.F) {
	for _, name := range []string{"rich.xml", "live.xml"} {
		b, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	f.Fuzz(func(t *testing.T, text string) {
		tr := toTarget
		tr.Disks = nil
		out, err := translate(text, tr)
		if err != nil {
			return
		}
		if _, err := parseDomain(out); err != nil {
			t.Errorf("what was written cannot be read: %v", err)
		}
	})
}

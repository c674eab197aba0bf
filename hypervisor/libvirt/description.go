package libvirt

import (
	"slices"
	"strconv"
	"strings"

	"github.com/beevik/etree"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// readDocument parses a domain XML and keeps everything that is in it.
func readDocument(text string) (*etree.Document, *etree.Element, error) {
	doc := etree.NewDocument()
	doc.ReadSettings.PreserveCData = true
	// Line breaks in attributes and carriage returns stay references: written
	// bare, the next parser would turn them into something else.
	doc.WriteSettings.CanonicalAttrVal = true
	doc.WriteSettings.CanonicalText = true
	if err := doc.ReadFromString(text); err != nil {
		return nil, nil, switchback.Errorf(switchback.CodeInvalid, "the definition is not well-formed XML: %w", err)
	}
	root := doc.Root()
	if root == nil || root.Tag != "domain" {
		return nil, nil, switchback.Errorf(switchback.CodeInvalid, "the definition is not a libvirt domain")
	}
	return doc, root, nil
}

// parseDomain reads what a domain XML says; state, sizes and autostart are
// not in it.
func parseDomain(text string) (hypervisor.Domain, error) {
	_, root, err := readDocument(text)
	if err != nil {
		return hypervisor.Domain{}, err
	}
	dom := hypervisor.Domain{
		Name:      childText(root, "name"),
		UUID:      switchback.VMUUID(strings.ToLower(childText(root, "uuid"))),
		MemoryMiB: memoryMiB(root.SelectElement("memory")),
		CPUs:      vcpus(root.SelectElement("vcpu")),
		Disks:     []hypervisor.Disk{},
		Networks:  []string{},
	}
	devices := root.SelectElement("devices")
	if devices == nil {
		return dom, nil
	}
	for _, e := range devices.SelectElements("disk") {
		dom.Disks = append(dom.Disks, parseDisk(e))
	}
	for _, e := range devices.SelectElements("interface") {
		if a := networkAttr(e); a != nil && a.Value != "" && !slices.Contains(dom.Networks, a.Value) {
			dom.Networks = append(dom.Networks, a.Value)
		}
	}
	for _, e := range devices.SelectElements("channel") {
		if t := e.SelectElement("target"); t != nil && t.SelectAttrValue("name", "") == "org.qemu.guest_agent.0" {
			dom.GuestAgent = hypervisor.AgentChannel(t.SelectAttrValue("state", "")) // only the live definition has it
		}
	}
	return dom, nil
}

func parseDisk(e *etree.Element) hypervisor.Disk {
	disk := hypervisor.Disk{
		Device:   e.SelectAttrValue("device", "disk"),
		ReadOnly: e.SelectElement("readonly") != nil,
		Shared:   e.SelectElement("shareable") != nil,
	}
	if t := e.SelectElement("target"); t != nil {
		disk.Name = t.SelectAttrValue("dev", "")
	}
	if dr := e.SelectElement("driver"); dr != nil {
		disk.Format = dr.SelectAttrValue("type", "raw")
	}
	disk.Path = sourcePath(e)
	for b := e.SelectElement("backingStore"); b != nil && len(b.ChildElements()) > 0; b = b.SelectElement("backingStore") {
		disk.Backing = append(disk.Backing, sourcePath(b))
	}
	disk.Unsupported = unsupported(e, disk)
	return disk
}

// unsupported says why a disk cannot be protected, "" when it can.
func unsupported(e *etree.Element, d hypervisor.Disk) string {
	kind := e.SelectAttrValue("type", "file")
	switch {
	case d.Device == "cdrom" || d.Device == "floppy":
		return "not a disk"
	case d.Device == "lun":
		return "SCSI passthrough: writes do not pass through QEMU's block layer"
	case d.Shared:
		return "shareable: other machines may write to it"
	case kind == "block":
		return "block device: only image files can be protected"
	case kind == "volume":
		return "storage pool volume: give the disk its file as source"
	case kind == "network":
		protocol := ""
		if s := e.SelectElement("source"); s != nil {
			protocol = s.SelectAttrValue("protocol", "")
		}
		return "network source (" + protocol + "): only image files can be protected"
	case kind != "file":
		return kind + " source: only image files can be protected"
	case d.Format == "raw" || d.Format == "":
		return "raw has no persistent bitmaps; convert to qcow2"
	case d.Format != "qcow2":
		return d.Format + " has no persistent bitmaps; convert to qcow2"
	case d.ReadOnly:
		return "read-only: it cannot change"
	case e.SelectElement("transient") != nil:
		return "transient: its writes are thrown away at power-off"
	case e.SelectElement("encryption") != nil || e.FindElement("source/encryption") != nil:
		return "encrypted image: its replica would not be encrypted"
	case d.Path == "":
		return "no source"
	}
	return ""
}

// sourcePath names the source of a disk or backingStore element: a path, or a
// URI for what is not a path.
func sourcePath(e *etree.Element) string {
	s := e.SelectElement("source")
	if s == nil {
		return ""
	}
	switch kind := e.SelectAttrValue("type", "file"); kind {
	case "file":
		return s.SelectAttrValue("file", "")
	case "block":
		return s.SelectAttrValue("dev", "")
	case "dir":
		return s.SelectAttrValue("dir", "")
	case "volume":
		return s.SelectAttrValue("pool", "") + "/" + s.SelectAttrValue("volume", "")
	case "network":
		uri := s.SelectAttrValue("protocol", "") + "://"
		if h := s.SelectElement("host"); h != nil {
			if socket := h.SelectAttrValue("socket", ""); socket != "" {
				return s.SelectAttrValue("protocol", "") + "+unix:///" + s.SelectAttrValue("name", "") + "?socket=" + socket
			}
			uri += h.SelectAttrValue("name", "")
			if port := h.SelectAttrValue("port", ""); port != "" {
				uri += ":" + port
			}
		}
		return uri + "/" + s.SelectAttrValue("name", "")
	default:
		return kind
	}
}

// networkAttr returns the attribute that names an interface's network, bridge
// or host device; nil for an interface that has none.
func networkAttr(e *etree.Element) *etree.Attr {
	s := e.SelectElement("source")
	if s == nil {
		return nil
	}
	switch e.SelectAttrValue("type", "") {
	case "network":
		return s.SelectAttr("network")
	case "bridge":
		return s.SelectAttr("bridge")
	case "direct":
		return s.SelectAttr("dev")
	}
	return nil
}

func childText(e *etree.Element, tag string) string {
	if c := e.SelectElement(tag); c != nil {
		return strings.TrimSpace(c.Text())
	}
	return ""
}

// memoryMiB reads a scaled size; libvirt's default unit is KiB.
func memoryMiB(e *etree.Element) int64 {
	if e == nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(e.Text()), 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	switch e.SelectAttrValue("unit", "KiB") {
	case "b", "bytes":
		return n >> 20
	case "KB":
		return n * 1000 >> 20
	case "MB":
		return n * 1000 * 1000 >> 20
	case "GB":
		return n * 1000 * 1000 * 1000 >> 20
	case "M", "MiB":
		return n
	case "G", "GiB":
		return n << 10
	case "T", "TiB":
		return n << 20
	}
	return n >> 10
}

func vcpus(e *etree.Element) int {
	if e == nil {
		return 1
	}
	text := e.SelectAttrValue("current", e.Text())
	n, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		return 0
	}
	return n
}

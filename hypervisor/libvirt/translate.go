package libvirt

import (
	"strings"

	"github.com/beevik/etree"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// Translate rewrites a definition for another site. The document is edited in
// place, so whatever is not named in t survives: unknown elements, comments,
// CDATA, other namespaces. From the live form what only a running domain has
// is dropped first. A disk whose source stands alone is left without
// backingStore, as in an inactive definition, so that translating there and
// back gives the original. CodeInvalid: t names a disk the definition lacks.
func (d *Driver) Translate(definition string, t hypervisor.Translation) (string, error) {
	return translate(definition, t)
}

func translate(definition string, t hypervisor.Translation) (string, error) {
	const op = "libvirt.Translate"
	doc, root, err := readDocument(definition)
	if err != nil {
		return "", wrap(op, err)
	}
	if root.SelectAttr("id") != nil {
		dropLive(root)
	}
	for name, source := range t.Disks {
		e := findDisk(root, name)
		if e == nil {
			return "", wrap(op, switchback.Errorf(switchback.CodeInvalid, "the definition has no disk %s", name))
		}
		if err := setSource(e, source); err != nil {
			return "", wrap(op, err)
		}
	}
	for _, e := range root.FindElements("devices/interface") {
		if a := networkAttr(e); a != nil {
			if to, ok := t.Networks[a.Value]; ok {
				a.Value = to
			}
		}
	}
	if t.Emulator != "" {
		for _, e := range root.FindElements("devices/emulator") {
			e.SetText(t.Emulator)
		}
	}
	text, err := doc.WriteToString()
	return text, wrap(op, err)
}

// setSource points a disk at a local image and says what backs it.
func setSource(disk *etree.Element, s hypervisor.DiskSource) error {
	name := ""
	if t := disk.SelectElement("target"); t != nil {
		name = t.SelectAttrValue("dev", "")
	}
	if s.Path == "" || s.Format == "" || (s.BackingSocket == "") != (s.BackingExport == "") {
		return switchback.Errorf(switchback.CodeInvalid, "the new source of disk %s is incomplete", name)
	}
	if len(s.BackingSocket) > maxSocketPath {
		return switchback.Errorf(switchback.CodeInvalid, "the backing socket of disk %s has a path longer than %d bytes", name, maxSocketPath)
	}
	disk.CreateAttr("type", "file") // replaces
	driver := disk.SelectElement("driver")
	if driver == nil {
		driver = etree.NewElement("driver")
		driver.CreateAttr("name", "qemu")
		disk.InsertChildAt(0, driver)
	}
	driver.CreateAttr("type", s.Format)

	source := disk.SelectElement("source")
	if source == nil {
		source = etree.NewElement("source")
		disk.InsertChildAt(driver.Index()+1, source)
	}
	for _, attr := range []string{"dev", "dir", "protocol", "name", "tls", "pool", "volume", "mode", "index"} {
		source.RemoveAttr(attr)
	}
	for _, tag := range []string{"host", "auth", "snapshot", "config", "initiator"} {
		removeAll(source, tag)
	}
	source.CreateAttr("file", s.Path)
	removeAll(disk, "mirror")
	removeAll(disk, "backingStore")
	if s.BackingSocket == "" {
		return nil
	}
	backing := etree.NewElement("backingStore")
	backing.CreateAttr("type", "network")
	backing.CreateElement("format").CreateAttr("type", "raw")
	nbd := backing.CreateElement("source")
	nbd.CreateAttr("protocol", "nbd")
	nbd.CreateAttr("name", s.BackingExport)
	host := nbd.CreateElement("host")
	host.CreateAttr("transport", "unix")
	host.CreateAttr("socket", s.BackingSocket)
	backing.CreateElement("backingStore")
	disk.InsertChildAt(source.Index()+1, backing)
	return nil
}

// dropLive removes what libvirt shows of a running domain only.
func dropLive(root *etree.Element) {
	root.RemoveAttr("id")
	for _, e := range root.SelectElements("seclabel") {
		if e.SelectAttrValue("type", "") == "dynamic" {
			remove(e)
		}
	}
	devices := root.SelectElement("devices")
	if devices == nil {
		return
	}
	for _, e := range devices.FindElements(".//alias") {
		// Only a user's own aliases, which begin so, are part of the definition.
		if !strings.HasPrefix(e.SelectAttrValue("name", ""), "ua-") {
			remove(e)
		}
	}
	for _, e := range devices.SelectElements("disk") {
		removeAll(e, "mirror")
		removeAll(e, "backingStore")
		if s := e.SelectElement("source"); s != nil {
			s.RemoveAttr("index")
		}
	}
	for _, e := range devices.SelectElements("interface") {
		if s := e.SelectElement("source"); s != nil && e.SelectAttrValue("type", "") == "network" {
			s.RemoveAttr("bridge")
			s.RemoveAttr("portid")
		}
		if t := e.SelectElement("target"); t != nil && strings.HasPrefix(t.SelectAttrValue("dev", ""), "vnet") {
			remove(t)
		}
	}
	for _, tag := range []string{"serial", "console", "parallel", "channel"} {
		for _, e := range devices.SelectElements(tag) {
			e.RemoveAttr("tty")
			if e.SelectAttrValue("type", "") == "pty" {
				removeAll(e, "source")
			}
		}
	}
	for _, e := range devices.SelectElements("graphics") {
		if e.SelectAttrValue("autoport", "") == "yes" && e.SelectAttr("port") != nil {
			e.CreateAttr("port", "-1")
		}
	}
}

func removeAll(parent *etree.Element, tag string) {
	for _, e := range parent.SelectElements(tag) {
		remove(e)
	}
}

// remove takes an element out together with the white space before it.
func remove(e *etree.Element) {
	parent, at := e.Parent(), e.Index()
	parent.RemoveChildAt(at)
	if at == 0 {
		return
	}
	if text, ok := parent.Child[at-1].(*etree.CharData); ok && text.IsWhitespace() {
		parent.RemoveChildAt(at - 1)
	}
}

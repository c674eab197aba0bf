package libvirt

import (
	"fmt"
	"slices"

	"github.com/beevik/etree"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// shared are devices through which a copy would reach what the original uses.
var shared = []string{"hostdev", "filesystem", "shmem", "lease", "redirdev", "vsock"}

// Isolate implements hypervisor.Inspector: a definition under another name and
// UUID, with nothing in it that belongs to the original or to its host.
func (d *Driver) Isolate(definition string, i hypervisor.Isolation) (string, []string, error) {
	const op = "libvirt.Isolate"
	text, notes, err := isolate(definition, i)
	return text, notes, wrap(op, err)
}

func isolate(definition string, i hypervisor.Isolation) (string, []string, error) {
	if i.Name == "" || i.UUID == "" {
		return "", nil, switchback.Errorf(switchback.CodeInvalid, "a copy needs a name and a UUID of its own")
	}
	definition, err := translate(definition, hypervisor.Translation{Disks: i.Disks})
	if err != nil {
		return "", nil, err
	}
	doc, root, err := readDocument(definition)
	if err != nil {
		return "", nil, err
	}
	devices := root.SelectElement("devices")
	if devices == nil || childText(root, "name") == "" {
		return "", nil, switchback.Errorf(switchback.CodeInvalid, "the definition has no name or no devices")
	}
	if childText(root, "name") == i.Name || childText(root, "uuid") == string(i.UUID) {
		return "", nil, switchback.Errorf(switchback.CodeInvalid, "the copy has the name or the UUID of its original")
	}
	var notes []string
	note := func(format string, args ...any) { notes = append(notes, fmt.Sprintf(format, args...)) }

	setChild(root, "name", i.Name)
	setChild(root, "uuid", string(i.UUID))
	for _, e := range root.FindElements("sysinfo/system/entry[@name='uuid']") {
		e.SetText(string(i.UUID)) // libvirt wants them equal
	}
	if e := root.SelectElement("genid"); e != nil {
		e.SetText("") // a new one is made: the guest learns that it is a copy
	}
	if e := root.FindElement("os/nvram"); e != nil {
		remove(e)
		note("firmware variables begin anew, from the template")
	}
	isolateDisks(devices, i, note)
	for _, tag := range shared {
		for _, e := range devices.SelectElements(tag) {
			remove(e)
			note("%s was left out: it would share what the VM uses", tag)
		}
	}
	for _, e := range devices.SelectElements("memory") {
		if e.SelectAttrValue("model", "") != "dimm" && e.SelectElement("source") != nil {
			remove(e)
			note("memory device with a file of the host was left out")
		}
	}
	for _, e := range devices.SelectElements("interface") {
		isolateInterface(e, i, note)
	}
	isolateCharacters(devices, i.ConsoleLog)
	for _, e := range devices.SelectElements("graphics") {
		e.RemoveAttr("socket")
		if e.SelectAttr("port") != nil {
			e.CreateAttr("port", "-1")
		}
		e.RemoveAttr("tlsPort")
		e.CreateAttr("autoport", "yes")
		for _, l := range e.SelectElements("listen") {
			if l.SelectAttrValue("type", "") == "socket" {
				l.RemoveAttr("socket")
			}
		}
	}
	text, err := doc.WriteToString()
	return text, notes, err
}

// isolateDisks leaves out what the point does not hold.
func isolateDisks(devices *etree.Element, i hypervisor.Isolation, note func(string, ...any)) {
	for _, e := range devices.SelectElements("disk") {
		name := ""
		if t := e.SelectElement("target"); t != nil {
			name = t.SelectAttrValue("dev", "")
		}
		if _, ok := i.Disks[name]; ok {
			continue
		}
		if device := e.SelectAttrValue("device", "disk"); device == "cdrom" || device == "floppy" {
			e.CreateAttr("type", "file")
			removeAll(e, "source")
			removeAll(e, "backingStore")
			note("%s %s is empty", device, name)
			continue
		}
		remove(e)
		note("disk %s was left out: the point does not hold it", name)
	}
}

// isolateInterface puts an interface on the network of the test, or takes it out.
func isolateInterface(e *etree.Element, i hypervisor.Isolation, note func(string, ...any)) {
	was := e.SelectAttrValue("type", "")
	if a := networkAttr(e); a != nil {
		was = a.Value
	}
	to := i.Network
	if mapped, ok := i.Networks[was]; ok {
		to = mapped
	}
	for _, tag := range []string{"source", "target", "virtualport", "backend", "filterref", "ip", "route", "script", "vlan", "portForward"} {
		removeAll(e, tag)
	}
	e.RemoveAttr("trustGuestRxFilters")
	e.RemoveAttr("managed")
	if !i.KeepMACs {
		removeAll(e, "mac") // libvirt makes a new one
	}
	if to != "" {
		e.CreateAttr("type", "network")
		source := etree.NewElement("source")
		source.CreateAttr("network", to)
		e.InsertChildAt(0, source)
		return
	}
	remove(e)
	note("the interface on %s was left out", was)
}

// isolateCharacters gives the copy consoles and channels of its own.
func isolateCharacters(devices *etree.Element, consoleLog string) {
	for n, e := range devices.SelectElements("serial") {
		e.CreateAttr("type", "pty")
		for _, tag := range []string{"source", "log", "protocol"} {
			removeAll(e, tag)
		}
		e.RemoveAttr("tty")
		if n == 0 && consoleLog != "" {
			l := e.CreateElement("log")
			l.CreateAttr("file", consoleLog)
			l.CreateAttr("append", "on")
		}
	}
	for _, e := range devices.SelectElements("parallel") {
		remove(e)
	}
	for _, e := range devices.SelectElements("console") {
		if t := e.SelectElement("target"); t == nil || t.SelectAttrValue("type", "serial") == "serial" {
			remove(e) // libvirt shows the first serial port again as this
			continue
		}
		e.CreateAttr("type", "pty")
		removeAll(e, "source")
		removeAll(e, "log")
	}
	for _, e := range devices.SelectElements("channel") {
		removeAll(e, "log")
		switch kind := e.SelectAttrValue("type", ""); {
		case kind == "unix":
			removeAll(e, "source") // libvirt makes a path from the domain's name
		case !slices.Contains([]string{"spicevmc", "spiceport", "qemu-vdagent", "dbus"}, kind):
			e.CreateAttr("type", "null")
			removeAll(e, "source")
			removeAll(e, "protocol")
		}
	}
}

func setChild(parent *etree.Element, tag, text string) {
	c := parent.SelectElement(tag)
	if c == nil {
		c = etree.NewElement(tag)
		parent.InsertChildAt(0, c)
	}
	c.SetText(text)
}

// ConsoleLog implements hypervisor.Inspector: the log of the first serial port
// or console, or the file that it writes to.
func (d *Driver) ConsoleLog(definition string) (string, error) {
	const op = "libvirt.ConsoleLog"
	_, root, err := readDocument(definition)
	if err != nil {
		return "", wrap(op, err)
	}
	for _, path := range []string{"devices/serial", "devices/console"} {
		e := root.FindElement(path)
		if e == nil {
			continue
		}
		if l := e.SelectElement("log"); l != nil && l.SelectAttrValue("file", "") != "" {
			return l.SelectAttrValue("file", ""), nil
		}
		if s := e.SelectElement("source"); s != nil && e.SelectAttrValue("type", "") == "file" && s.SelectAttrValue("path", "") != "" {
			return s.SelectAttrValue("path", ""), nil
		}
	}
	return "", wrap(op, switchback.Errorf(switchback.CodeUnsupported, "the VM's serial console is kept in no file").
		WithHint("add <log file='…'/> to its first <serial> device"))
}

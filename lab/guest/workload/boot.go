package main

import (
	"encoding/hex"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"github.com/switchback-dr/switchback/lab/guest/manifest"
)

// options come from the kernel's command line, as sb.NAME=VALUE.
type options struct {
	fs      string   // disk whose file system is mounted
	check   int64    // bytes of files to read and verify at boot
	records []string // the writer's disks, in order
	offset  int64    // of the record area on each
	slots   int64
	pace    time.Duration // between two records
	hold    bool          // the writer waits for the command "go"
}

type guest struct {
	opt    options
	boot   [16]byte
	vm     [16]byte
	writer writer
	off    chan struct{} // holds one token; who takes it powers off
}

// modules in the order they must be loaded in: virtio_ring before virtio.
var modules = []string{"virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
	"virtio_blk", "virtio_console", "failover", "net_failover", "virtio_net", "button", "evdev"}

func boot() (*guest, error) {
	g := &guest{off: make(chan struct{}, 1)}
	g.off <- struct{}{}
	g.writer.init()
	for _, m := range [][3]string{{"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"dev", "/dev", "devtmpfs"}, {"run", "/run", "tmpfs"}} {
		os.MkdirAll(m[1], 0o755)
		if err := syscall.Mount(m[0], m[1], m[2], 0, ""); err != nil && err != syscall.EBUSY {
			return g, errors.New("mount " + m[1] + ": " + err.Error())
		}
	}
	// The kernel's own id alone may repeat where a machine has no randomness yet.
	now := time.Now()
	h := manifest.NewHash()
	h.Write([]byte(readLine("/proc/sys/kernel/random/boot_id") + dec(now.UnixNano()) + "/" + dec(uptime().Nanoseconds())))
	id := strings.ReplaceAll(readLine("/proc/sys/kernel/random/boot_id"), "-", "")
	b, _ := hex.DecodeString(id)
	copy(g.boot[:], b)
	for i, s := 0, h.Sum(); i < 8; i++ {
		g.boot[8+i] = byte(s >> (8 * i))
	}
	uuid := readLine("/sys/class/dmi/id/product_uuid")
	if b, err := hex.DecodeString(strings.ReplaceAll(uuid, "-", "")); err == nil {
		copy(g.vm[:], b)
	}
	say("BOOT " + hex.EncodeToString(g.boot[:]) + " vm=" + uuid)

	if err := g.opt.parse(readLine("/proc/cmdline")); err != nil {
		return g, err
	}
	for _, m := range modules {
		if err := load("/lib/modules/" + m + ".ko"); err != nil {
			return g, errors.New("load " + m + ": " + err.Error())
		}
	}
	return g, nil
}

func (o *options) parse(cmdline string) error {
	o.slots = 4096
	for _, f := range strings.Fields(cmdline) {
		f, ok := strings.CutPrefix(f, "sb.")
		if !ok {
			continue
		}
		name, value, _ := strings.Cut(f, "=")
		n, err := strconv.ParseInt(value, 10, 64)
		switch name {
		case "fs":
			o.fs, err = value, nil
		case "records":
			o.records, err = strings.Split(value, ","), nil
		case "hold":
			o.hold, err = value == "1", nil
		case "check":
			o.check = n
		case "offset":
			o.offset = n
		case "slots":
			o.slots = n
		case "pace":
			o.pace = time.Duration(n) * time.Microsecond
		default:
			return errors.New("unknown option sb." + name)
		}
		if err != nil {
			return errors.New("bad value of sb." + name)
		}
	}
	if o.slots < 1 {
		return errors.New("sb.slots must be positive")
	}
	return nil
}

func load(path string) error {
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return nil // built in, or not wanted in this image
	} else if err != nil {
		return err
	}
	defer f.Close()
	const finitModule = 313
	empty := [1]byte{}
	if _, _, e := syscall.Syscall(finitModule, f.Fd(), uintptr(unsafe.Pointer(&empty[0])), 0); e != 0 && e != syscall.EEXIST {
		return e
	}
	return nil
}

// waitDevice waits for a disk that the kernel may still be looking at.
func waitDevice(name string) (string, error) {
	path := "/dev/" + name
	for range 500 {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return path, errors.New("no disk " + name)
}

// port is the device of a virtio-serial port, "" if the machine has none of that name.
func port(name string) string {
	const dir = "/sys/class/virtio-ports/"
	ps, _ := os.ReadDir(dir)
	for _, p := range ps {
		if readLine(dir+p.Name()+"/name") == name {
			return "/dev/" + p.Name()
		}
	}
	return ""
}

func waitPort(name string) string {
	for range 100 {
		if p := port(name); p != "" {
			return p
		}
		time.Sleep(10 * time.Millisecond)
	}
	return ""
}

// startAgent starts the QEMU guest agent if image and machine have it.
func (g *guest) startAgent() {
	const agent = "/usr/sbin/qemu-ga"
	if _, err := os.Stat(agent); err != nil {
		return
	}
	go func() {
		dev := waitPort("org.qemu.guest_agent.0")
		if dev == "" {
			return
		}
		null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
		if err != nil {
			return
		}
		defer null.Close()
		_, err = syscall.ForkExec(agent, []string{agent, "-m", "virtio-serial", "-p", dev, "-t", "/run", "-f", "/run/qga.pid"},
			&syscall.ProcAttr{Dir: "/", Env: []string{"PATH=/usr/sbin:/sbin:/bin"}, Files: []uintptr{null.Fd(), null.Fd(), null.Fd()}})
		if err != nil {
			say("FAIL start agent: " + err.Error())
		}
	}()
}

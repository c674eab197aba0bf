package libvirt_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/conformance"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/lab/site"
	"github.com/switchback-dr/switchback/nbd"
)

// The tests here need root, libvirtd and QEMU, and fail without them: they
// drive a real libvirtd in namespaces of its own, whose QEMUs run under TCG.

// real is a site with its driver.
type real struct {
	site   *site.Site
	driver *libvirt.Driver
	dir    string // disks, sockets and scratch; short, for the sockets' sake
	count  atomic.Int64
}

func startSite(t *testing.T) *real {
	t.Helper()
	dir, err := os.MkdirTemp("", "lv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return startSiteIn(t, dir)
}

func startSiteIn(t *testing.T, dir string) *real {
	t.Helper()
	s, err := site.Start(context.Background(), site.Config{
		Name:            "lv-test",
		Dir:             filepath.Join(dir, "site"),
		CapabilityCache: filepath.Join(os.TempDir(), "switchback-test-capabilities"),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	d, err := libvirt.New(libvirt.Config{Socket: s.LibvirtSocket()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return &real{site: s, driver: d, dir: dir}
}

func (r *real) path(testing.TB) string {
	return filepath.Join(r.dir, "f"+strconv.FormatInt(r.count.Add(1), 10))
}

func (r *real) run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

func (r *real) image(t testing.TB, backing string) string {
	t.Helper()
	path := r.path(t)
	args := []string{"create", "-q", "-f", "qcow2"}
	if backing != "" {
		args = append(args, "-F", "qcow2", "-b", backing)
	}
	r.run(t, "qemu-img", append(args, path, strconv.Itoa(conformance.DiskBytes))...)
	return path
}

// install writes a boot sector to an image.
func (r *real) install(t testing.TB, image string, code []byte) {
	t.Helper()
	sector := make([]byte, 512)
	copy(sector, code)
	sector[510], sector[511] = 0x55, 0xaa
	boot := r.path(t)
	if err := os.WriteFile(boot, sector, 0o600); err != nil {
		t.Fatal(err)
	}
	r.run(t, "qemu-io", "-f", "qcow2", "-c", "write -s "+boot+" 0 512", image)
}

// shutdownGuest is a whole operating system: it enables the ACPI power button,
// says "!" on the first serial port, and when the button was pressed enters the
// power state S5. The ports are those of QEMU's q35 under SeaBIOS.
var shutdownGuest = []byte{
	0xba, 0x02, 0x06, //       mov dx, 0x602   PM1 enable
	0xb8, 0x00, 0x01, //       mov ax, 0x100   power button
	0xef,             //       out dx, ax
	0xba, 0xf8, 0x03, //       mov dx, 0x3f8   COM1
	0xb0, '!', //              mov al, '!'
	0xee,             //       out dx, al
	0xfb,             // wait: sti
	0xf4,             //       hlt             until the next timer tick
	0xba, 0x00, 0x06, //       mov dx, 0x600   PM1 status
	0xed,             //       in ax, dx
	0xf6, 0xc4, 0x01, //       test ah, 1      power button pressed?
	0x74, 0xf5, //             jz wait
	0xba, 0x04, 0x06, //       mov dx, 0x604   PM1 control
	0xb8, 0x00, 0x20, //       mov ax, 0x2000  sleep enable, type S5
	0xef,       //             out dx, ax
	0xeb, 0xec, //             jmp wait
}

// writingGuest writes one sector into every 64 KiB of its 8 MiB disk, again
// and again. At 0x40 lies the packet for the BIOS's extended write.
var writingGuest = append([]byte{
	0x31, 0xc0, //                         xor ax, ax
	0x8e, 0xd8, //                         mov ds, ax
	0xbe, 0x40, 0x7c, //             next: mov si, 0x7c40        the packet
	0xb4, 0x43, //                         mov ah, 0x43          extended write
	0xb0, 0x00, //                         mov al, 0
	0xb2, 0x80, //                         mov dl, 0x80          the first disk
	0xcd, 0x13, //                         int 0x13
	0x81, 0x06, 0x48, 0x7c, 0x80, 0x00, // add word [0x7c48], 128
	0x80, 0x3e, 0x49, 0x7c, 0x40, //       cmp byte [0x7c49], 0x40
	0x72, 0xe8, //                         jb next
	0xc7, 0x06, 0x48, 0x7c, 0x80, 0x00, // mov word [0x7c48], 128
	0xeb, 0xe0, //                         jmp next
	0x40: 0, // pads to the packet
}[:0x40], 0x10, 0, 1, 0, 0, 0x7c, 0, 0, 128, 0, 0, 0, 0, 0, 0, 0)

func (r *real) newVM(t testing.TB, vm conformance.VM) switchback.VMUUID {
	t.Helper()
	if len(vm.Disks) == 0 {
		vm.Disks = []string{"vda"}
	}
	id := switchback.VMUUID(uuid.NewString())
	var devices strings.Builder
	for i, name := range vm.Disks {
		backing := ""
		if vm.Backed {
			backing = r.image(t, "")
		}
		path := r.image(t, backing)
		if vm.Reacts && i == 0 {
			r.install(t, path, shutdownGuest)
		}
		fmt.Fprintf(&devices, `
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='%s'/>
      <target dev='%s' bus='virtio'/>
      <alias name='ua-%s'/>
    </disk>`, path, name, name)
	}
	if vm.Network {
		fmt.Fprintf(&devices, "<interface type='network'><source network='%s'/><model type='virtio'/></interface>", conformance.Network)
	}
	definition := fmt.Sprintf(`<domain type='%s'>
  <name>vm-%s</name>
  <uuid>%s</uuid>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <features><acpi/></features>
  <on_poweroff>restart</on_poweroff>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>%s
    <serial type='file'><source path='%s'/></serial>
    <memballoon model='none'/>
  </devices>
</domain>`, r.site.DomainType(), id[:8], id, devices.String(), r.console(id))
	ctx := context.Background()
	if _, err := r.driver.Define(ctx, definition); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.driver.Destroy(ctx, id)
		r.driver.Undefine(ctx, id)
	})
	return id
}

func (r *real) console(id switchback.VMUUID) string { return filepath.Join(r.dir, string(id)) }

func (r *real) boot(t testing.TB, id switchback.VMUUID) {
	t.Helper()
	for range 600 {
		if text, _ := os.ReadFile(r.console(id)); bytes.Contains(text, []byte("!")) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("the guest did not boot within 30 s")
}

func (r *real) write(t testing.TB, id switchback.VMUUID, disk string, off, length int64, pattern byte) {
	t.Helper()
	_, err := r.driver.Monitor(context.Background(), id,
		`qemu-io -d /machine/peripheral/ua-%s/virtio-backend "write -f -P %d %d %d"`, disk, pattern, off, length)
	if err != nil {
		t.Fatal(err)
	}
}

func (r *real) pid(t testing.TB, id switchback.VMUUID) int {
	t.Helper()
	d, err := r.driver.Domain(context.Background(), id)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(r.site.HostPath("/run/libvirt"), "qemu", d.Name+".pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func (r *real) kill(t testing.TB, id switchback.VMUUID) {
	t.Helper()
	if err := syscall.Kill(r.pid(t, id), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for range 600 {
		d, err := r.driver.Domain(context.Background(), id)
		if err != nil {
			t.Fatal(err)
		}
		if d.State == hypervisor.StateOff {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("libvirt did not notice the death of QEMU within 6 s")
}

type export struct {
	*nbd.Client
	metaContext string
}

func (r *real) export(t testing.TB, socket, disk, metaContext string) conformance.Export {
	t.Helper()
	o := nbd.Options{Export: disk}
	if metaContext != "" {
		o.MetaContexts = []string{metaContext}
	}
	c, err := nbd.Dial(context.Background(), "unix", socket, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return export{c, metaContext}
}

func (e export) Dirty() ([]conformance.Range, error) {
	extents, err := e.BlockStatus(context.Background(), e.metaContext, 0, e.Size())
	if err != nil {
		return nil, err
	}
	var out []conformance.Range
	for _, x := range extents {
		if x.Dirty() {
			out = append(out, conformance.Range{Offset: x.Offset, Length: x.Length})
		}
	}
	return out, nil
}

func (r *real) env() conformance.Env {
	return conformance.Env{
		NewVM: r.newVM, Write: r.write, Boot: r.boot, Kill: r.kill,
		NewImage: r.image, Path: r.path, Export: r.export,
	}
}

func TestConformance(t *testing.T) {
	r := startSite(t)
	conformance.Run(t, r.driver, r.env())
}

// TestRestart restarts, kills and stops libvirtd under a driver at work.
func TestRestart(t *testing.T) {
	r := startSite(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id := r.newVM(t, conformance.VM{})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(r.driver.Start(ctx, id, true))
	must(r.driver.CreateCheckpoint(ctx, id, "c0", []string{"vda"}))
	events, err := r.driver.Events(ctx)
	must(err)
	wantEvent := func(kind hypervisor.EventKind) {
		t.Helper()
		for {
			select {
			case e := <-events:
				if e.Kind == kind {
					return
				}
			case <-ctx.Done():
				t.Fatalf("no event %s", kind)
			}
		}
	}
	r.write(t, id, "vda", 0, conformance.Granularity, 1)
	socket := r.path(t)
	must(r.driver.BeginBackup(ctx, id, hypervisor.BackupSpec{
		Socket: socket, Checkpoint: "c1",
		Disks: []hypervisor.BackupDisk{{Name: "vda", Scratch: r.image(t, ""), Incremental: "c0"}},
	}))

	must(r.site.Kill(ctx))
	if _, err := r.driver.Domains(ctx); switchback.CodeOf(err) != switchback.CodeUnavailable {
		t.Errorf("Domains with libvirtd dead: %v, want CodeUnavailable", err)
	}
	e := r.export(t, socket, "vda", "qemu:dirty-bitmap:backup-vda") // goes on without libvirtd
	if dirty, err := e.Dirty(); err != nil || len(dirty) != 1 {
		t.Errorf("dirty ranges with libvirtd dead: %v, %v", dirty, err)
	}
	must(r.site.Restart(ctx))
	if open, err := r.driver.HasBackup(ctx, id); err != nil || !open {
		t.Errorf("after a restart of libvirtd HasBackup says %v, %v", open, err)
	}
	wantEvent(hypervisor.EventLost)
	e.Close()
	must(r.driver.EndBackup(ctx, id))
	must(r.driver.Resume(ctx, id))
	wantEvent(hypervisor.EventResumed)

	// A libvirtd that hangs: calls end with their context, then the driver
	// finds out by itself.
	quick, err := libvirt.New(libvirt.Config{Socket: r.site.LibvirtSocket(), KeepAliveInterval: 250 * time.Millisecond, KeepAliveCount: 4})
	must(err)
	defer quick.Close()
	_, err = quick.Domains(ctx)
	must(err)
	must(syscall.Kill(r.site.PID(), syscall.SIGSTOP))
	short, stop := context.WithTimeout(ctx, 100*time.Millisecond)
	defer stop()
	_, err = quick.Domains(short)
	if switchback.CodeOf(err) != switchback.CodeTimeout {
		t.Errorf("Domains with libvirtd stopped: %v, want CodeTimeout", err)
	}
	_, err = quick.Domains(ctx)
	if switchback.CodeOf(err) != switchback.CodeUnavailable {
		t.Errorf("Domains with libvirtd stopped for long: %v, want CodeUnavailable", err)
	}
	must(syscall.Kill(r.site.PID(), syscall.SIGCONT))
	_, err = quick.Domains(ctx)
	must(err)
}

// TestScratchFull lets the scratch file of a backup run out of space under a
// guest that writes. QEMU then pauses the guest: an event and the state say
// so, and after EndBackup the guest runs on and nothing is missing.
func TestScratchFull(t *testing.T) {
	dir, err := os.MkdirTemp("", "lv")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	small := filepath.Join(dir, "small")
	if err := os.Mkdir(small, 0o700); err != nil {
		t.Fatal(err)
	}
	// Mounted before the site starts, for its mount namespace sees no later ones.
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Unmount(small, syscall.MNT_DETACH) })
	r := startSiteIn(t, dir)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	id := r.newVM(t, conformance.VM{})
	d, err := r.driver.Domain(ctx, id)
	must(err)
	for _, disk := range d.Disks {
		if disk.Name == "vda" {
			// Old content, for that of zeros takes no room in the scratch file.
			r.run(t, "qemu-io", "-f", "qcow2", "-c", fmt.Sprintf("write -P 1 0 %d", conformance.DiskBytes), disk.Path)
			r.install(t, disk.Path, writingGuest)
		}
	}
	events, err := r.driver.Events(ctx)
	must(err)
	must(r.driver.Start(ctx, id, true))
	scratch := filepath.Join(small, "scratch")
	r.run(t, "qemu-img", "create", "-q", "-f", "qcow2", scratch, strconv.Itoa(conformance.DiskBytes))
	must(r.driver.BeginBackup(ctx, id, hypervisor.BackupSpec{
		Socket: r.path(t), Checkpoint: "c0",
		Disks: []hypervisor.BackupDisk{{Name: "vda", Scratch: scratch}},
	}))
	must(r.driver.Resume(ctx, id))
	for told := false; !told; {
		select {
		case e := <-events:
			if told = e.Kind == hypervisor.EventIOError; told && (e.UUID != id || e.Disk != "vda" || e.Detail != "enospc") {
				t.Errorf("the event is %+v", e)
			}
		case <-ctx.Done():
			t.Fatal("no I/O error was told")
		}
	}
	wait := func(what string, done func(hypervisor.Domain) bool) {
		t.Helper()
		for {
			d, err := r.driver.Domain(ctx, id)
			must(err)
			if done(d) {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	wait("paused", func(d hypervisor.Domain) bool {
		return d.State == hypervisor.StatePaused && d.PauseReason == hypervisor.PauseIOError
	})
	must(r.driver.EndBackup(ctx, id))
	must(r.driver.Resume(ctx, id))
	wait("running", func(d hypervisor.Domain) bool { return d.State == hypervisor.StateRunning })
	socket := r.path(t)
	for {
		must(r.driver.BeginBackup(ctx, id, hypervisor.BackupSpec{
			Socket: socket, Disks: []hypervisor.BackupDisk{{Name: "vda", Scratch: r.image(t, ""), Incremental: "c0"}},
		}))
		dirty, err := r.export(t, socket, "vda", "qemu:dirty-bitmap:backup-vda").Dirty()
		must(err)
		must(r.driver.EndBackup(ctx, id))
		// All but the boot sector's unit: the write that failed was repeated.
		if len(dirty) == 1 && dirty[0] == (conformance.Range{Offset: conformance.Granularity, Length: conformance.DiskBytes - conformance.Granularity}) {
			return
		}
	}
}

// TestGuest asks a Linux guest with an agent.
func TestGuest(t *testing.T) {
	cache := guest.DefaultCacheDir()
	workload, err := guest.BuildWorkload(t.Context(), "", cache)
	if err != nil {
		t.Fatal(err)
	}
	image, err := guest.Build(t.Context(), cache, workload)
	if err != nil {
		t.Fatal(err)
	}
	r := startSite(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	id := switchback.VMUUID(uuid.NewString())
	disk := filepath.Join(r.dir, "linux.qcow2")
	if err := guest.MakeDisk(ctx, disk, guest.MinDiskBytes, guest.Content{Bytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	text, err := guest.DomainXML(guest.Spec{
		Name: "linux", UUID: string(id), Type: r.site.DomainType(), Image: image,
		Disks:   []guest.SpecDisk{{Path: disk, Target: "vda"}},
		Cmdline: guest.Workload{MountDisk: "vda"}.Cmdline(),
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.driver.Define(ctx, text); err != nil {
		t.Fatal(err)
	}
	if err := r.driver.Start(ctx, id, false); err != nil {
		t.Fatal(err)
	}
	for {
		err := r.driver.AgentPing(ctx, id, time.Second)
		if err == nil {
			break
		}
		if code := switchback.CodeOf(err); code != switchback.CodeUnavailable {
			t.Fatalf("AgentPing of a booting guest: %v, want CodeUnavailable", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err := r.driver.Freeze(ctx, id); err != nil {
		t.Fatal(err)
	}
	if err := r.driver.Freeze(ctx, id); err == nil {
		t.Error("frozen file systems were frozen again: they were not frozen")
	}
	for range 2 {
		if err := r.driver.Thaw(ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	if err := r.driver.Shutdown(ctx, id, hypervisor.ShutdownOptions{Deadline: 30 * time.Second}); err != nil {
		t.Fatal(err)
	}
	t.Logf("shut down in %s", time.Since(began))
	console, err := os.ReadFile(r.site.HostPath(guest.ConsolePath("linux")))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(console, []byte("SB SHUTDOWN cause=agent")) {
		t.Errorf("the guest was not shut down by its agent:\n%s", console)
	}
}

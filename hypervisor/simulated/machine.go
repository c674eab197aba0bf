package simulated

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
)

// startTime bounds the start of a machine's process.
const startTime = 20 * time.Second

func (d *domain) qmpSocket() string { return d.host.runPath(string(d.uuid)[:13] + ".qmp") }
func (d *domain) nbdSocket() string { return d.host.runPath(string(d.uuid)[:13] + ".nbd") }

// deviceExport is the writable export that stands for a disk's device.
func deviceExport(disk string) string { return "device-" + disk }

// Start makes the machine's process and, unless paused, lets its guest run.
func (h *Host) Start(ctx context.Context, id switchback.VMUUID, paused bool) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	if d.mon != nil {
		return switchback.Errorf(switchback.CodeConflict, "domain %s runs already", id)
	}
	if err := h.callHooks(d); err != nil {
		return err
	}
	if err := d.launch(); err != nil {
		return err
	}
	d.power(PowerStart, "")
	d.event(hypervisor.EventStarted, "booted")
	if paused {
		d.event(hypervisor.EventSuspended, "paused")
		return nil
	}
	return d.run()
}

func (d *domain) power(kind PowerKind, detail string) { d.host.power(d, kind, detail) }

// callHooks asks every hook whether the machine may start, as libvirtd does.
func (h *Host) callHooks(d *domain) error {
	hooks, err := filepath.Glob(filepath.Join(h.dir, "hooks", "qemu.d", "*"))
	if err != nil {
		return err
	}
	parsed, err := libvirt.ParseDefinition(d.s.Definition)
	if err != nil {
		return err
	}
	for _, hook := range hooks {
		if st, err := os.Stat(hook); err != nil || st.Mode()&0o100 == 0 {
			continue
		}
		cmd := exec.Command(hook, parsed.Name, "prepare", "begin", "-")
		cmd.Stdin = strings.NewReader(d.s.Definition)
		var said bytes.Buffer
		cmd.Stderr = &said
		if err := cmd.Run(); err != nil {
			return switchback.Errorf(switchback.CodeRefused, "the hook %s refuses to start %s: %s", filepath.Base(hook), parsed.Name, strings.TrimSpace(said.String()))
		}
	}
	return nil
}

// launch makes the process with all disks attached; the guest does not run yet.
func (d *domain) launch() error {
	parsed, err := libvirt.ParseDefinition(d.s.Definition)
	if err != nil {
		return err
	}
	for _, s := range []string{d.qmpSocket(), d.nbdSocket()} {
		if err := os.Remove(s); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	said, err := os.Create(d.host.runPath(string(d.uuid)[:13] + ".log"))
	if err != nil {
		return err
	}
	defer said.Close()
	// wait=on: a client that comes while QEMU sets up its monitor would be greeted
	// twice, and what it says in between be lost.
	cmd := exec.Command("qemu-storage-daemon", "--chardev", "socket,id=q,server=on,wait=on,path="+d.qmpSocket(), "--monitor", "chardev=q")
	cmd.Stdout, cmd.Stderr = said, said
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // outlives the daemon
	if err := cmd.Start(); err != nil {
		return switchback.Errorf(switchback.CodeUnsupported, "start a machine: %w", err).WithHint("install qemu-system-common")
	}
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	fail := func(err error) error {
		cmd.Process.Kill()
		<-exited
		d.mon, d.s.Live = nil, nil
		text, _ := os.ReadFile(said.Name()) // only more detail
		var refused *qmpError
		if errors.As(err, &refused) {
			return switchback.Errorf(switchback.CodeInternal, "machine %s: %w", parsed.Name, err)
		}
		return fmt.Errorf("machine %s: %w: %s", parsed.Name, err, strings.TrimSpace(string(text)))
	}
	var mon *monitor
	for deadline := time.Now().Add(startTime); ; {
		if mon, err = dialMonitor(d.qmpSocket()); err == nil {
			break
		}
		select {
		case <-exited:
			return fail(errors.New("its process ended"))
		case <-time.After(time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fail(err)
		}
	}
	d.mon = mon
	d.s.Boot = time.Now().UnixMicro()
	d.s.Live = &live{Definition: d.s.Definition, PID: cmd.Process.Pid, Paused: true, Nodes: map[string]string{}, Jobs: map[string]blockJob{}}
	if err := d.attach(parsed); err != nil {
		mon.conn.Close()
		return fail(err)
	}
	if err := d.save(); err != nil {
		mon.conn.Close()
		return fail(err)
	}
	go d.watch(mon)
	return nil
}

// attach opens all disks and gives each its device.
func (d *domain) attach(parsed hypervisor.Domain) error {
	err := d.mon.do("nbd-server-start", args{"addr": args{"type": "unix", "data": args{"path": d.nbdSocket()}}}, nil)
	if err != nil {
		return err
	}
	for _, disk := range parsed.Disks {
		if disk.Device != "disk" || disk.Path == "" {
			continue
		}
		node := d.nextNode(disk.Name)
		if err := d.mon.do("blockdev-add", imageNode(node, disk.Path, disk.Format), nil); err != nil {
			return err
		}
		err := d.mon.do("block-export-add", args{"type": "nbd", "id": deviceExport(disk.Name), "name": deviceExport(disk.Name), "node-name": node, "writable": !disk.ReadOnly}, nil)
		if err != nil {
			return err
		}
		d.s.Live.Nodes[disk.Name] = node
	}
	return nil
}

func (d *domain) nextNode(disk string) string {
	d.s.Live.NodeCount++
	return fmt.Sprintf("%s-%d", disk, d.s.Live.NodeCount)
}

// imageNode describes an image to QEMU. The host's page cache is taken for stable.
func imageNode(node, path, format string) args {
	if format == "" {
		format = "raw"
	}
	return args{"driver": format, "node-name": node, "discard": "unmap", "cache": args{"no-flush": true},
		"file": args{"driver": "file", "filename": path, "discard": "unmap", "cache": args{"no-flush": true}}}
}

// run lets the guest run.
func (d *domain) run() error {
	if !d.s.Live.Paused {
		return nil
	}
	first := !d.s.Live.Ran
	d.s.Live.Paused, d.s.Live.Ran = false, true
	if err := d.save(); err != nil {
		return err
	}
	d.power(PowerRun, "")
	if d.guest == nil {
		d.startGuest(first)
	}
	d.guest.let(true)
	d.event(hypervisor.EventResumed, "unpaused")
	return nil
}

// Resume lets a paused machine run.
func (h *Host) Resume(ctx context.Context, id switchback.VMUUID) error {
	d, err := h.running(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	return d.run()
}

// Suspend pauses a machine.
func (h *Host) Suspend(ctx context.Context, id switchback.VMUUID) error {
	d, err := h.running(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	if d.s.Live.Paused {
		return nil
	}
	if d.guest != nil {
		d.guest.let(false)
	}
	d.s.Live.Paused = true
	if err := d.save(); err != nil {
		return err
	}
	d.power(PowerPause, "")
	d.event(hypervisor.EventSuspended, "paused")
	return nil
}

// Shutdown asks the guest's program to end and waits for it.
func (h *Host) Shutdown(ctx context.Context, id switchback.VMUUID, o hypervisor.ShutdownOptions) error {
	if o.Deadline <= 0 {
		if _, err := h.Domain(ctx, id); err != nil {
			return err
		}
		return switchback.Errorf(switchback.CodeInvalid, "a shutdown needs a deadline")
	}
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	mon := d.mon
	paused := mon != nil && d.s.Live.Paused
	if mon != nil && !paused && d.guest != nil {
		d.guest.pressButton()
	}
	d.mu.Unlock()
	if mon == nil {
		return nil
	}
	if paused {
		if o.Force {
			return h.Destroy(ctx, id)
		}
		return switchback.Errorf(switchback.CodeConflict, "domain %s is paused: its guest cannot react", id)
	}
	timer := time.NewTimer(o.Deadline)
	defer timer.Stop()
	select {
	case <-mon.gone:
		// The watcher notes it; whoever asks next must see it.
		d.mu.Lock()
		d.noteGone(mon, "shutdown")
		d.mu.Unlock()
		return nil
	case <-ctx.Done():
		return switchback.Flatten(ctx.Err())
	case <-timer.C:
	}
	if o.Force {
		return h.Destroy(ctx, id)
	}
	return switchback.Errorf(switchback.CodeTimeout, "the guest of %s did not power off within %s", id, o.Deadline)
}

// Destroy pulls the plug; the process stores its bitmaps as it ends.
func (h *Host) Destroy(ctx context.Context, id switchback.VMUUID) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	return d.powerOff("destroyed")
}

// powerOff ends the process in good order.
func (d *domain) powerOff(detail string) error {
	mon := d.mon
	if mon == nil {
		return nil
	}
	if d.guest != nil {
		d.guest.stop()
		d.guest = nil
	}
	if err := mon.do("quit", nil, nil); err != nil && !errors.Is(err, errGone) {
		return err
	}
	select {
	case <-mon.gone:
	case <-time.After(commandTime):
		return switchback.Errorf(switchback.CodeTimeout, "the machine %s does not end", d.uuid)
	}
	return d.noteGone(mon, detail)
}

// watch notes the end of a process that nobody asked for.
func (d *domain) watch(mon *monitor) {
	<-mon.gone
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.host.closing.Load() {
		return // the daemon closes down, the machine stays
	}
	detail := "crashed"
	if d.guest != nil && d.guest.pressed.Load() {
		detail = "shutdown"
	}
	if err := d.noteGone(mon, detail); err != nil {
		d.host.log.Error("noting a machine's end", "vm", d.uuid, "error", err)
	}
}

// noteGone records that the process of mon has ended.
func (d *domain) noteGone(mon *monitor, detail string) error {
	if d.mon != mon || mon == nil {
		return nil
	}
	for i := 0; processExists(d.s.Live.PID); i++ { // its socket closes a moment before its locks
		if i == 2000 { // one that has lost its monitor cannot be asked anything any more
			if err := syscall.Kill(d.s.Live.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return err
			}
		}
		time.Sleep(time.Millisecond)
	}
	mon.conn.Close()
	d.mon = nil
	if d.guest != nil {
		d.guest.stop()
		d.guest = nil
	}
	d.power(PowerOff, detail)
	d.s.Live = nil
	d.event(hypervisor.EventStopped, detail)
	if d.s.Definition == "" {
		return d.forget()
	}
	return d.save()
}

func processExists(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	return len(f) > 0 && f[0][0] != 'Z' && f[0][0] != 'X'
}

// findAgain connects to the machine that a daemon before this one has started.
func (d *domain) findAgain() {
	if d.s.Live == nil {
		return
	}
	mon, err := dialMonitor(d.qmpSocket())
	if err != nil {
		d.power(PowerOff, "found dead")
		d.s.Live = nil
		if err := d.save(); err != nil {
			d.host.log.Error("noting a machine's end", "vm", d.uuid, "error", err)
		}
		return
	}
	d.mon = mon
	d.findNodes()
	if err := d.finishMaking(); err != nil {
		d.host.log.Error("noting a checkpoint", "vm", d.uuid, "error", err)
	}
	if !d.s.Live.Paused {
		d.startGuest(false)
		d.guest.let(true)
	}
	go d.watch(mon)
}

// Kill ends a machine's process as a crash would: bitmaps in use are lost.
func (h *Host) Kill(ctx context.Context, id switchback.VMUUID) error {
	d, err := h.running(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	if err := syscall.Kill(d.s.Live.PID, syscall.SIGKILL); err != nil {
		return err
	}
	<-d.mon.gone
	return d.noteGone(d.mon, "killed")
}

// PowerCut kills every machine and empties the run directory. The daemon itself
// must be ended and started again by the caller: until then nothing starts.
func (h *Host) PowerCut(ctx context.Context) error {
	h.mu.Lock()
	var ids []switchback.VMUUID
	for id := range h.domains {
		ids = append(ids, id)
	}
	h.mu.Unlock()
	for _, id := range ids {
		if err := h.Kill(ctx, id); err != nil {
			switch switchback.CodeOf(err) {
			case switchback.CodeConflict, switchback.CodeNotFound:
			default:
				return err
			}
		}
	}
	return os.RemoveAll(filepath.Join(h.dir, "run"))
}

// measure reads an image's virtual size from its header, and what it occupies.
func measure(path string) (size, allocated int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return 0, 0, err
	}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		allocated = sys.Blocks * 512
	}
	var header [32]byte
	if _, err := io.ReadFull(f, header[:]); err != nil || string(header[:4]) != "QFI\xfb" {
		return st.Size(), allocated, nil // raw
	}
	return int64(binary.BigEndian.Uint64(header[24:])), allocated, nil
}

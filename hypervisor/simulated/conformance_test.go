package simulated_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/conformance"
	"github.com/switchback-dr/switchback/hypervisor/simulated"
	"github.com/switchback-dr/switchback/nbd"
)

// world is a simulated host with its daemon, in this process.
type world struct {
	dir    string
	driver *simulated.Driver
	count  atomic.Int64
	stop   func()
}

func newWorld(t testing.TB) *world {
	t.Helper()
	if _, err := exec.LookPath("qemu-storage-daemon"); err != nil {
		t.Fatal("qemu-storage-daemon is needed (Debian: qemu-system-common)")
	}
	dir, err := os.MkdirTemp("", "sim")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{dir: dir, driver: simulated.New(dir)}
	if err := simulated.Create(dir, simulated.Config{Name: "host"}); err != nil {
		t.Fatal(err)
	}
	w.start(t)
	t.Cleanup(func() {
		if err := w.driver.PowerCut(context.Background()); err != nil {
			t.Error(err)
		}
		w.stop()
		w.driver.Close()
		os.RemoveAll(dir)
	})
	return w
}

// start starts a daemon.
func (w *world) start(t testing.TB) {
	t.Helper()
	h, err := simulated.Open(w.dir, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- h.Serve(ctx) }()
	w.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	for {
		if _, err := w.driver.Host(t.Context()); err == nil {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

func (w *world) path(testing.TB) string {
	return filepath.Join(w.dir, "f"+strconv.FormatInt(w.count.Add(1), 10))
}

func (w *world) image(t testing.TB, backing string) string {
	t.Helper()
	path := w.path(t)
	args := []string{"create", "-q", "-f", "qcow2"}
	if backing != "" {
		args = append(args, "-F", "qcow2", "-b", backing)
	}
	if out, err := exec.Command("qemu-img", append(args, path, strconv.Itoa(conformance.DiskBytes))...).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return path
}

func (w *world) newVM(t testing.TB, vm conformance.VM) switchback.VMUUID {
	t.Helper()
	if len(vm.Disks) == 0 {
		vm.Disks = []string{"vda"}
	}
	return w.define(t, vm, simulated.Program{Reacts: vm.Reacts})
}

func (w *world) define(t testing.TB, vm conformance.VM, p simulated.Program) switchback.VMUUID {
	t.Helper()
	id := switchback.VMUUID(uuid.NewString())
	var devices strings.Builder
	for _, name := range vm.Disks {
		backing := ""
		if vm.Backed {
			backing = w.image(t, "")
		}
		fmt.Fprintf(&devices, "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='%s'/><target dev='%s' bus='virtio'/></disk>\n", w.image(t, backing), name)
	}
	if vm.Network {
		fmt.Fprintf(&devices, "<interface type='network'><source network='%s'/></interface>\n", conformance.Network)
	}
	definition := fmt.Sprintf("<domain type='kvm'><name>vm-%s</name><uuid>%s</uuid><metadata>%s</metadata><memory unit='MiB'>32</memory>\n"+
		"<devices><disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>%s</devices></domain>", id[:8], id, p.Element(), &devices)
	if _, err := w.driver.Define(t.Context(), definition); err != nil {
		t.Fatal(err)
	}
	return id
}

type export struct {
	*nbd.Client
	metaContext string
}

func (w *world) export(t testing.TB, socket, disk, metaContext string) conformance.Export {
	t.Helper()
	o := nbd.Options{Export: disk}
	if metaContext != "" {
		o.MetaContexts = []string{metaContext}
	}
	c, err := nbd.Dial(t.Context(), "unix", socket, o)
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

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	w := newWorld(t)
	conformance.Run(t, w.driver, conformance.Env{
		NewVM: w.newVM,
		Write: func(t testing.TB, id switchback.VMUUID, disk string, off, length int64, pattern byte) {
			t.Helper()
			must(t, w.driver.GuestWrite(context.Background(), id, disk, off, length, pattern))
		},
		Boot:     func(testing.TB, switchback.VMUUID) {}, // it reacts as soon as it is up
		Kill:     func(t testing.TB, id switchback.VMUUID) { t.Helper(); must(t, w.driver.Kill(context.Background(), id)) },
		NewImage: w.image, Path: w.path, Export: w.export,
	})
}

var _ hypervisor.Freezer = (*simulated.Driver)(nil)
var _ hypervisor.Hypervisor = (*simulated.Host)(nil)

func (w *world) console(t testing.TB, id switchback.VMUUID) simulated.Console {
	t.Helper()
	c, err := simulated.ReadConsole(simulated.ConsolePath(w.dir, id))
	must(t, err)
	return c
}

// until polls for 20 s.
func until(t testing.TB, what string, done func() bool) {
	t.Helper()
	for range 4000 {
		if done() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("%s: still waiting", what)
}

// TestRestart restarts the daemon under machines and an open job.
func TestRestart(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	id := w.define(t, conformance.VM{Disks: []string{"vda"}}, simulated.Program{Reacts: true, Agent: true, Rate: 500})
	must(t, w.driver.Start(ctx, id, false))
	must(t, w.driver.CreateCheckpoint(ctx, id, "c0", []string{"vda"}))
	acked := func() uint64 { c := w.console(t, id); return c.Boots[len(c.Boots)-1].Acked }
	until(t, "it writes", func() bool { c := w.console(t, id); return len(c.Boots) == 1 && acked() > 3 })
	socket := w.path(t)
	must(t, w.driver.BeginBackup(ctx, id, hypervisor.BackupSpec{Socket: socket, Checkpoint: "c1",
		Disks: []hypervisor.BackupDisk{{Name: "vda", Scratch: w.image(t, ""), Incremental: "c0"}}}))
	events, err := w.driver.Events(ctx)
	must(t, err)
	w.stop()
	if _, err := w.driver.Domains(ctx); switchback.CodeOf(err) != switchback.CodeUnavailable {
		t.Errorf("Domains with the daemon gone: %v, want CodeUnavailable", err)
	}
	e := w.export(t, socket, "vda", "qemu:dirty-bitmap:backup-vda") // goes on without the daemon
	if dirty, err := e.Dirty(); err != nil || len(dirty) == 0 {
		t.Errorf("dirty ranges with the daemon gone: %v, %v", dirty, err)
	}
	e.Close()
	w.start(t)
	if ev := <-events; ev.Kind != hypervisor.EventLost {
		t.Errorf("the event after the restart is %s", ev.Kind)
	}
	if open, err := w.driver.HasBackup(ctx, id); err != nil || !open {
		t.Errorf("after the restart HasBackup says %v, %v", open, err)
	}
	must(t, w.driver.EndBackup(ctx, id))
	before := acked()
	until(t, "it writes on", func() bool { return acked() > before+3 })
	must(t, w.driver.Shutdown(ctx, id, hypervisor.ShutdownOptions{Deadline: 10 * time.Second}))
	must(t, w.driver.Start(ctx, id, false))
	until(t, "it boots again", func() bool { return len(w.console(t, id).Boots) == 2 })
	c := w.console(t, id)
	if b := c.Boots[0]; !b.Off || b.Acked != c.Boots[1].Found.Highest || c.Boots[1].Found.Damaged != 0 {
		t.Errorf("the second boot found %+v, the first wrote %+v", c.Boots[1].Found, b)
	}
}

// TestPowerCut loses all machines and stored bitmaps; those with autostart
// boot when the host does, unless a hook refuses.
func TestPowerCut(t *testing.T) {
	w := newWorld(t)
	ctx := t.Context()
	var ids []switchback.VMUUID
	for range 3 {
		id := w.define(t, conformance.VM{Disks: []string{"vda"}}, simulated.Program{Rate: 500})
		must(t, w.driver.Start(ctx, id, false))
		must(t, w.driver.CreateCheckpoint(ctx, id, "c0", []string{"vda"}))
		until(t, "it writes", func() bool { c := w.console(t, id); return len(c.Boots) == 1 && c.Boots[0].Acked > 3 })
		ids = append(ids, id)
	}
	must(t, w.driver.SetAutostart(ctx, ids[0], true))
	must(t, w.driver.SetAutostart(ctx, ids[1], true))
	hook := fmt.Sprintf("#!/bin/sh\n[ \"$2 $3\" = 'prepare begin' ] || exit 0\ngrep -q %s || exit 0\necho 'not here' >&2\nexit 1\n", ids[1])
	must(t, os.WriteFile(simulated.HookPath(w.dir), []byte(hook), 0o755))
	must(t, w.driver.PowerCut(ctx))
	w.stop()
	w.start(t)
	for i, want := range []hypervisor.State{hypervisor.StateRunning, hypervisor.StateOff, hypervisor.StateOff} {
		d, err := w.driver.Domain(ctx, ids[i])
		must(t, err)
		if d.State != want {
			t.Errorf("machine %d is %s, want %s", i, d.State, want)
		}
	}
	if err := w.driver.Start(ctx, ids[1], false); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "not here") {
		t.Errorf("a start that the hook refuses: %v", err)
	}
	err := w.driver.BeginBackup(ctx, ids[0], hypervisor.BackupSpec{Socket: w.path(t),
		Disks: []hypervisor.BackupDisk{{Name: "vda", Scratch: w.image(t, ""), Incremental: "c0"}}})
	if switchback.CodeOf(err) != switchback.CodeBitmapLost {
		t.Errorf("a backup from a bitmap that the power cut took: %v", err)
	}
	until(t, "it boots", func() bool { return len(w.console(t, ids[0]).Boots) == 2 })
	c := w.console(t, ids[0])
	if f := c.Boots[1].Found; f.Highest < c.Boots[0].Acked || f.Damaged != 0 {
		t.Errorf("after the power cut %+v is there, record %d was acknowledged", f, c.Boots[0].Acked)
	}
}

func TestOverlaps(t *testing.T) {
	at := func(s int, host string, kind simulated.PowerKind) simulated.PowerEvent {
		return simulated.PowerEvent{Time: time.Unix(int64(s), 0), Host: host, VM: "vm", Kind: kind}
	}
	for name, c := range map[string]struct {
		events []simulated.PowerEvent
		want   int
	}{
		"one after the other": {[]simulated.PowerEvent{at(1, "a", "run"), at(3, "a", "off"), at(2, "b", "start"), at(4, "b", "run")}, 0},
		"paused between":      {[]simulated.PowerEvent{at(1, "a", "run"), at(2, "a", "pause"), at(3, "b", "run"), at(4, "b", "off"), at(5, "a", "run")}, 0},
		"both":                {[]simulated.PowerEvent{at(1, "a", "run"), at(3, "a", "off"), at(2, "b", "run")}, 1},
		"one twice":           {[]simulated.PowerEvent{at(1, "a", "run"), at(2, "a", "run")}, 0},
	} {
		if got := simulated.Overlaps(c.events); len(got) != c.want {
			t.Errorf("%s: %d overlaps, want %d: %+v", name, len(got), c.want, got)
		}
	}
}

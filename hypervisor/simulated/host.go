package simulated

import (
	"context"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
)

// Host is the daemon of one simulated host. It implements hypervisor.Hypervisor
// and hypervisor.Freezer; agents use it through a Driver, from other processes.
type Host struct {
	dir string
	cfg Config
	log *slog.Logger

	mu      sync.Mutex
	domains map[switchback.VMUUID]*domain
	guests  sync.WaitGroup
	closing atomic.Bool

	watching sync.Mutex
	// watchers get every event; see Events.
	watchers map[chan hypervisor.Event]struct{}
}

// domain is one domain; mu is held over every call on it.
type domain struct {
	host *Host
	uuid switchback.VMUUID

	mu      sync.Mutex
	s       saved
	mon     *monitor // nil: off
	guest   *guest   // nil: off, or not let run yet
	forgets bool     // undefined and off: not in the table any more
}

// saved is a domain's file.
type saved struct {
	Definition  string                  `json:"definition"` // "" = transient
	Autostart   bool                    `json:"autostart"`
	Checkpoints []hypervisor.Checkpoint `json:"checkpoints"` // parents first
	Boot        int64                   `json:"boot"`        // of the last start; see PowerEvent
	Live        *live                   `json:"live,omitempty"`
}

// live is what runs.
type live struct {
	Definition string            `json:"definition"`
	PID        int               `json:"pid"`
	Paused     bool              `json:"paused"`
	Ran        bool              `json:"ran"`   // let run at least once
	Nodes      map[string]string `json:"nodes"` // by disk: the node its device is on
	NodeCount  int               `json:"node_count"`
	Backup     *openBackup       `json:"backup,omitempty"`
	// Making is a checkpoint whose bitmaps are being made.
	Making *hypervisor.Checkpoint `json:"making,omitempty"`
	// Jobs by disk: the node that a copy or commit goes to.
	Jobs map[string]blockJob `json:"jobs,omitempty"`
}

// Open reads a host's directory, finds the machines that run and, after a power
// cut, starts those with autostart.
func Open(dir string, log *slog.Logger) (*Host, error) {
	cfg, err := readConfig(dir)
	if err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	h := &Host{dir: dir, cfg: cfg, log: log, domains: map[switchback.VMUUID]*domain{}, watchers: map[chan hypervisor.Event]struct{}{}}
	files, err := filepath.Glob(filepath.Join(dir, "domains", "*.json"))
	if err != nil {
		return nil, err
	}
	_, err = os.Stat(h.runPath("booted"))
	booting := err != nil
	if booting {
		if err := os.RemoveAll(filepath.Join(dir, "run")); err != nil {
			return nil, err
		}
		if err := os.MkdirAll(filepath.Join(dir, "run"), 0o755); err != nil {
			return nil, err
		}
		if err := os.WriteFile(h.runPath("booted"), nil, 0o644); err != nil {
			return nil, err
		}
	}
	for _, f := range files {
		d := &domain{host: h, uuid: switchback.VMUUID(strings.TrimSuffix(filepath.Base(f), ".json"))}
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		if err := json.Unmarshal(b, &d.s); err != nil {
			return nil, err
		}
		h.domains[d.uuid] = d
		d.mu.Lock()
		d.findAgain()
		d.mu.Unlock()
	}
	if booting {
		for _, d := range h.domains {
			if d.s.Autostart && d.mon == nil {
				if err := h.Start(context.Background(), d.uuid, false); err != nil {
					log.Warn("autostart", "vm", d.uuid, "error", err)
				}
			}
		}
	}
	return h, nil
}

func (h *Host) runPath(name string) string { return filepath.Join(h.dir, "run", name) }

// domain returns a domain with its lock held, or CodeNotFound.
func (h *Host) domain(ctx context.Context, id switchback.VMUUID) (*domain, error) {
	if err := ctx.Err(); err != nil {
		return nil, switchback.Flatten(err)
	}
	h.mu.Lock()
	d := h.domains[id]
	h.mu.Unlock()
	if d == nil {
		return nil, switchback.Errorf(switchback.CodeNotFound, "no domain %s", id)
	}
	d.mu.Lock()
	if d.forgets {
		d.mu.Unlock()
		return nil, switchback.Errorf(switchback.CodeNotFound, "no domain %s", id)
	}
	return d, nil
}

// running is domain for calls that need a process.
func (h *Host) running(ctx context.Context, id switchback.VMUUID) (*domain, error) {
	d, err := h.domain(ctx, id)
	if err != nil {
		return nil, err
	}
	if d.mon == nil {
		d.mu.Unlock()
		return nil, switchback.Errorf(switchback.CodeConflict, "domain %s is off", id)
	}
	return d, nil
}

func (d *domain) path() string {
	return filepath.Join(d.host.dir, "domains", string(d.uuid)+".json")
}

func (d *domain) save() error { return writeJSON(d.path(), d.s) }

// definition is the one that counts now.
func (d *domain) definition() string {
	if d.s.Live != nil {
		return d.s.Live.Definition
	}
	return d.s.Definition
}

// Host describes the machine that the daemon runs on.
func (h *Host) Host(ctx context.Context) (hypervisor.Host, error) {
	return hypervisor.Host{Name: h.cfg.Name, Hypervisor: "simulated, with QEMU's block layer", UUID: h.cfg.UUID, MemoryMiB: 1 << 20, CPUs: runtime.NumCPU()}, ctx.Err()
}

// Domains lists all, by UUID.
func (h *Host) Domains(ctx context.Context) ([]hypervisor.Domain, error) {
	h.mu.Lock()
	var ids []switchback.VMUUID
	for id := range h.domains {
		ids = append(ids, id)
	}
	h.mu.Unlock()
	slices.Sort(ids)
	list := []hypervisor.Domain{}
	for _, id := range ids {
		d, err := h.Domain(ctx, id)
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			continue
		}
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	return list, nil
}

// Domain describes one.
func (h *Host) Domain(ctx context.Context, id switchback.VMUUID) (hypervisor.Domain, error) {
	d, err := h.domain(ctx, id)
	if err != nil {
		return hypervisor.Domain{}, err
	}
	defer d.mu.Unlock()
	return d.describe()
}

func (d *domain) describe() (hypervisor.Domain, error) {
	out, err := libvirt.ParseDefinition(d.definition())
	if err != nil {
		return out, err
	}
	out.State, out.Persistent, out.Autostart = hypervisor.StateOff, d.s.Definition != "", d.s.Autostart
	out.GuestAgent = ""
	chains := map[string][]string{}
	if d.mon != nil {
		out.State = hypervisor.StateRunning
		if d.s.Live.Paused {
			out.State, out.PauseReason = hypervisor.StatePaused, hypervisor.PauseUser
		}
		if p := programOf(d.s.Live.Definition); p.Agent {
			out.GuestAgent = hypervisor.AgentDisconnected
			if d.guest != nil && d.guest.booted() {
				out.GuestAgent = hypervisor.AgentConnected
			}
		}
		if chains, err = d.chains(); err != nil {
			return out, err
		}
	}
	for i := range out.Disks {
		disk := &out.Disks[i]
		if disk.Device != "disk" {
			continue
		}
		if d.mon != nil {
			disk.Backing = chains[disk.Name]
		}
		size, allocated, err := measure(disk.Path)
		if err != nil && disk.Unsupported == "" {
			disk.Unsupported = "its size cannot be read: " + err.Error()
		}
		disk.SizeBytes, disk.AllocatedBytes = size, allocated
	}
	return out, nil
}

// Definition returns the persistent definition, or the live one.
func (h *Host) Definition(ctx context.Context, id switchback.VMUUID, live bool) (string, error) {
	d, err := h.domain(ctx, id)
	if err != nil {
		return "", err
	}
	defer d.mu.Unlock()
	if live || d.s.Definition == "" {
		return d.definition(), nil
	}
	return d.s.Definition, nil
}

// Define makes or replaces the persistent definition.
func (h *Host) Define(ctx context.Context, definition string) (hypervisor.Domain, error) {
	if err := ctx.Err(); err != nil {
		return hypervisor.Domain{}, switchback.Flatten(err)
	}
	parsed, err := libvirt.ParseDefinition(definition)
	if err != nil {
		return parsed, err
	}
	if parsed.UUID == "" || parsed.Name == "" {
		return parsed, switchback.Errorf(switchback.CodeInvalid, "a definition needs name and uuid")
	}
	d := h.lockOrMake(parsed.UUID)
	defer d.mu.Unlock()
	d.s.Definition = definition
	if err := d.save(); err != nil {
		return parsed, err
	}
	d.event(hypervisor.EventDefined, "defined")
	out, err := d.describe()
	if err == nil && d.mon != nil { // what was defined, as a restart will find it
		inactive, err := libvirt.ParseDefinition(definition)
		if err != nil {
			return out, err
		}
		for i := range inactive.Disks {
			inactive.Disks[i].SizeBytes, inactive.Disks[i].AllocatedBytes, _ = measure(inactive.Disks[i].Path) // 0 for what is not there
		}
		inactive.State, inactive.PauseReason, inactive.Persistent, inactive.Autostart = out.State, out.PauseReason, true, out.Autostart
		return inactive, nil
	}
	return out, err
}

// lockOrMake returns the domain with its lock held. The table's lock is never
// waited for with a domain's held.
func (h *Host) lockOrMake(id switchback.VMUUID) *domain {
	for {
		h.mu.Lock()
		d := h.domains[id]
		if d == nil {
			d = &domain{host: h, uuid: id}
			h.domains[id] = d
		}
		h.mu.Unlock()
		d.mu.Lock()
		if !d.forgets {
			return d
		}
		d.mu.Unlock()
		time.Sleep(time.Millisecond)
	}
}

// Undefine removes definition and checkpoints; a machine that runs goes on until it is off.
func (h *Host) Undefine(ctx context.Context, id switchback.VMUUID) error {
	d, err := h.domain(ctx, id)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	d.s.Checkpoints, d.s.Autostart = nil, false
	d.event(hypervisor.EventUndefined, "removed")
	d.s.Definition = ""
	if d.mon != nil {
		return d.save()
	}
	return d.forget()
}

// forget removes a domain that is neither defined nor running.
func (d *domain) forget() error {
	if err := os.Remove(d.path()); err != nil && !os.IsNotExist(err) {
		return err
	}
	d.forgets = true
	go func() { // the table's lock comes before the domain's
		d.host.mu.Lock()
		defer d.host.mu.Unlock()
		if d.host.domains[d.uuid] == d {
			delete(d.host.domains, d.uuid)
		}
	}()
	return nil
}

// Translate rewrites a definition as the driver for libvirt does.
func (h *Host) Translate(definition string, t hypervisor.Translation) (string, error) {
	return libvirt.TranslateDefinition(definition, t)
}

// SetAutostart says whether the machine starts with its host.
func (h *Host) SetAutostart(ctx context.Context, id switchback.VMUUID, on bool) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	d.s.Autostart = on
	return d.save()
}

// event tells all watchers. A watcher that lags behind gets EventLost.
func (d *domain) event(kind hypervisor.EventKind, detail string) {
	name := ""
	if parsed, err := libvirt.ParseDefinition(d.definition()); err == nil {
		name = parsed.Name
	}
	h := d.host
	h.watching.Lock()
	defer h.watching.Unlock()
	for w := range h.watchers {
		e := hypervisor.Event{UUID: d.uuid, Name: name, Kind: kind, Time: time.Now(), Detail: detail}
		select {
		case w <- e:
		default:
			for range cap(w) / 2 {
				<-w
			}
			w <- hypervisor.Event{Kind: hypervisor.EventLost, Time: time.Now()}
			w <- e
		}
	}
}

// Events delivers events until ctx ends.
func (h *Host) Events(ctx context.Context) (<-chan hypervisor.Event, error) {
	if err := ctx.Err(); err != nil {
		return nil, switchback.Flatten(err)
	}
	w, out := make(chan hypervisor.Event, 1024), make(chan hypervisor.Event)
	h.watching.Lock()
	h.watchers[w] = struct{}{}
	h.watching.Unlock()
	go func() {
		defer close(out)
		defer func() {
			h.watching.Lock()
			delete(h.watchers, w)
			h.watching.Unlock()
		}()
		for {
			select {
			case e := <-w:
				select {
				case out <- e:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

// Close ends the guests' programs; machines stay.
func (h *Host) Close() error {
	h.closing.Store(true)
	h.mu.Lock()
	list := make([]*domain, 0, len(h.domains))
	for _, d := range h.domains {
		list = append(list, d)
	}
	h.mu.Unlock()
	for _, d := range list {
		d.mu.Lock()
		if d.guest != nil {
			d.guest.stop()
			d.guest = nil
		}
		if d.mon != nil {
			d.mon.conn.Close()
		}
		d.mu.Unlock()
	}
	h.guests.Wait()
	return nil
}

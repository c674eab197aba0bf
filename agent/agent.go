package agent

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/objectstore"
	"github.com/switchback-dr/switchback/seal"
	"github.com/switchback-dr/switchback/transport"
)

// Config is what an agent needs. StateDir, Listen, Address, Credentials and Hypervisor are required.
type Config struct {
	// StateDir keeps assignments, fences and block indexes; default /var/lib/switchback.
	StateDir string
	// RunDir holds sockets and is emptied by a reboot; default /run/switchback. Its path must be short.
	RunDir string
	// StorageDir is where replicas and their disks live; default StateDir/storage.
	StorageDir string
	// ScratchDir is where QEMU keeps overwritten blocks during a cycle; default StateDir/scratch.
	ScratchDir string
	// LogDir receives the logs of export processes; default StateDir/log.
	LogDir string
	// Listen is the address to serve on, "" = none; Address is how peers and the server reach it.
	Listen, Address string
	// Reachable says whether they can; default yes.
	Reachable agentapi.Reachable
	// HookPath is where the hook that refuses fenced starts is installed; default libvirt's.
	HookPath string
	// LibvirtPIDFile is read to tell libvirtd about the hook; default /run/libvirtd.pid.
	LibvirtPIDFile string
	// Executable is the switchback binary that serves views; default this process's own.
	Executable string
	// GuardCommand are the arguments of Executable that run the lease guard
	// (GuardLeases) over the same directories; none = leases end while the agent lives only.
	GuardCommand []string
	Credentials  *transport.Credentials
	Hypervisor   hypervisor.Hypervisor
	// ServerAddress is where the control plane listens; empty = never report.
	ServerAddress string
	// Servers are further addresses of the control plane.
	Servers []string
	// StorageReserveBytes is the free space below which a target takes no more points; default 256 MiB.
	StorageReserveBytes int64
	// MaxDisks bounds the disks that the agent works for, MaxCopies the first copies
	// that are made at the same time; 0 = no limit.
	MaxDisks, MaxCopies int
	// KeySource wraps the data keys of encrypted replicas; nil = none can be kept here.
	KeySource *seal.Source
	// Objects is where old points' data may be moved to; each replica has a folder in it. nil = nowhere.
	Objects *objectstore.Config
	Logger  *slog.Logger
	Version string
}

func (c *Config) setDefaults() error {
	def := func(p *string, v string) {
		if *p == "" {
			*p = v
		}
	}
	def(&c.StateDir, "/var/lib/switchback")
	def(&c.RunDir, "/run/switchback")
	def(&c.StorageDir, filepath.Join(c.StateDir, "storage"))
	def(&c.ScratchDir, filepath.Join(c.StateDir, "scratch"))
	def(&c.LogDir, filepath.Join(c.StateDir, "log"))
	def(&c.LibvirtPIDFile, "/run/libvirtd.pid")
	def(&c.HookPath, hookPath)
	def((*string)(&c.Reachable), string(agentapi.ReachableYes))
	if c.StorageReserveBytes == 0 {
		c.StorageReserveBytes = 256 << 20
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Executable == "" {
		exe, err := os.Executable()
		if err != nil {
			return err
		}
		c.Executable = exe
	}
	if len(c.RunDir) > 60 {
		return switchback.Errorf(switchback.CodeInvalid, "run directory %s is too long for unix sockets", c.RunDir).WithHint("at most 60 characters")
	}
	for _, dir := range []string{c.StateDir, c.RunDir, c.StorageDir, c.ScratchDir, c.LogDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	return nil
}

// Agent is one running agent. Make it with New, run it with Run.
type Agent struct {
	cfg   Config
	log   *slog.Logger
	hv    hypervisor.Hypervisor
	tasks *taskTable
	// servers are the control plane; fences keep out a server that lost its work.
	servers *servers
	fences  fences
	server  *http.Client // of the control plane
	reach   reach
	trust   sync.Mutex // of what replaces the credentials
	revoked atomic.Pointer[[]agentapi.Revocation]

	// records are the server's, kept for the day it is lost. answered is when it
	// last took a report, in Unix nanoseconds; adopt serialises adoptions.
	records  *records
	answered atomic.Int64
	adopt    sync.Mutex

	// own is the agent's site, by its certificate.
	own switchback.SiteID
	// boot names this boot of the host; see grant.go.
	boot bootRecord
	asks asks

	mu  sync.Mutex
	vms map[switchback.ProtectionID]*vm
}

// New loads what the agent was assigned before. It starts nothing.
func New(cfg Config) (*Agent, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, log: cfg.Logger, servers: newServers(cfg.ServerAddress, cfg.Servers), hv: cfg.Hypervisor, vms: map[switchback.ProtectionID]*vm{}}
	a.reach = reach{inbound: transport.NewInbound(cfg.Credentials, a.admitLine), outbound: map[lineTo]*transport.Outbound{}}
	a.server = transport.NewHTTPClient(transport.ClientConfig{Credentials: cfg.Credentials, Want: transport.AnyServer, Inbound: a.reach.inbound})
	if cfg.Credentials != nil {
		a.own = switchback.SiteID(cfg.Credentials.Identity().Site)
	}
	if err := a.loadRevoked(); err != nil {
		return nil, err
	}
	list, err := loadAssignments(a.assignmentDir())
	if err != nil {
		return nil, err
	}
	if a.records, err = loadRecords(filepath.Join(cfg.StateDir, "records")); err != nil {
		return nil, err
	}
	if a.boot, err = loadBoot(cfg.RunDir); err != nil {
		return nil, err
	}
	_, err = os.Stat(filepath.Dir(a.guardPath("x")))
	before := errors.Is(err, fs.ErrNotExist) // an agent of before guards: this need not be a boot
	for _, as := range list {
		if before && as.VM != "" {
			if err := a.markRun("begun", as.VM); err != nil {
				return nil, err
			}
		}
		v := &vm{agent: a, a: as}
		if v.grant, err = a.readGrant(as.VM); err != nil {
			return nil, err
		}
		a.vms[as.Protection] = v
	}
	return a, nil
}

func (a *Agent) assignmentDir() string { return filepath.Join(a.cfg.StateDir, "assignments") }

// Run serves until ctx ends: it installs the hook, takes up what it was
// assigned, answers the server and its peers, and reports.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.installHook(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	a.tasks = &taskTable{ctx: ctx, tasks: map[string]*task{}}
	handler := a.handler()
	srv := transport.NewHTTPServer(a.cfg.Credentials, handler, a.log)
	srv.Handler = a.adoptable(srv.Handler)
	served := make(chan error, 1)
	if a.cfg.Listen != "" {
		ln, err := transport.Listen(ctx, a.cfg.Listen)
		if err != nil {
			return err
		}
		go func() { served <- srv.ServeTLS(ln, "", "") }()
	}
	var wg sync.WaitGroup
	wg.Go(func() { a.keepLines(ctx, handler) })
	wg.Go(func() { a.watchEvents(ctx) })
	wg.Go(func() { a.expireDrills(ctx) })
	wg.Go(func() { a.checkReplicas(ctx) })
	wg.Go(func() { a.describeVMs(ctx) })
	wg.Go(func() { a.watchOwnership(ctx) })
	wg.Go(func() { a.watchLeases(ctx) })
	wg.Go(func() { a.askOwnership(ctx) })
	local, err := a.serveLocal(ctx)
	if err != nil {
		return err
	}
	wg.Go(local)
	if a.cfg.ServerAddress != "" {
		wg.Go(func() { a.report(ctx) })
		wg.Go(func() { a.renewals(ctx) })
	}
	for _, v := range a.all() {
		wg.Go(func() { v.takeUp(ctx) })
	}
	a.log.Info("agent ready", "listen", a.cfg.Listen, "address", a.cfg.Address)
	select {
	case err = <-served:
	case <-ctx.Done():
	}
	cancel()
	srv.Close()
	a.reach.inbound.Close()
	wg.Wait()
	a.tasks.wg.Wait()
	for _, v := range a.all() {
		v.stopEngine()
		v.closeReplica()
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func (a *Agent) all() []*vm {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := make([]*vm, 0, len(a.vms))
	for _, v := range a.vms {
		list = append(list, v)
	}
	return list
}

// vm returns the VM of a protection; CodeNotFound when the agent has no part in it.
func (a *Agent) vm(id switchback.ProtectionID) (*vm, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	v, ok := a.vms[id]
	if !ok {
		return nil, switchback.Errorf(switchback.CodeNotFound, "protection %s is not known to this agent", id)
	}
	return v, nil
}

// ensureVM returns the VM, made anew where it is not known yet.
func (a *Agent) ensureVM(id switchback.ProtectionID) *vm {
	a.mu.Lock()
	defer a.mu.Unlock()
	v, ok := a.vms[id]
	if !ok {
		v = &vm{agent: a, a: Assignment{Protection: id}}
		a.vms[id] = v
	}
	return v
}

func (a *Agent) forget(id switchback.ProtectionID) error {
	if err := durable.Remove(filepath.Join(a.assignmentDir(), string(id)+".json")); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.vms, id)
	return a.records.forget(id)
}

// watchEvents hands I/O errors to the engines, and turns off at once what is
// fenced and started all the same.
func (a *Agent) watchEvents(ctx context.Context) {
	for ctx.Err() == nil {
		events, err := a.hv.Events(ctx)
		if err != nil {
			a.log.Warn("no events from the hypervisor, trying again", "error", err)
			sleep(ctx, 2*time.Second)
			continue
		}
		for ev := range events {
			for _, v := range a.all() {
				v.event(ctx, ev)
			}
		}
	}
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

func (a *Agent) storage() agentapi.Storage {
	s := agentapi.Storage{Path: a.cfg.StorageDir}
	s.FreeBytes, s.SizeBytes = freeBytes(a.cfg.StorageDir)
	return s
}

// Package simlab makes a lab of simulated hypervisors: a server, two agents and
// two simulated hosts as real processes on loopback, up in less than a second,
// without root or namespaces. Everything between the processes is the
// product's own; see hypervisor/simulated for what a simulated machine is.
//
//	DIR/server, DIR/primary, DIR/recovery   state of server and agents
//	DIR/primary/hv, DIR/recovery/hv         simulated hosts
//	DIR/power.log                           power events of both, in one file
//	DIR/log                                 what all processes say
package simlab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor/simulated"
	"github.com/switchback-dr/switchback/lab/process"
)

// The processes of a lab. Sites have the names of their agents.
const (
	Server   = "server"
	Primary  = "primary"
	Recovery = "recovery"
)

// Sites are both.
var Sites = []string{Primary, Recovery}

// Config says what Up makes; both fields are required.
type Config struct {
	// Dir must not exist yet; a short path, at best in memory.
	Dir string
	// Executable is the switchback binary.
	Executable string
	// Environment adds to that of server or agent, "KEY=value"; nil = nothing.
	Environment func(name string) []string
	// Places are where server and agents run; one without runs on loopback.
	Places map[string]Place
}

// Lab is a running lab.
type Lab struct {
	cfg     Config
	ports   map[string]int
	drivers map[string]*simulated.Driver

	mu        sync.Mutex
	processes map[string]process.Process
}

// hostOf names the process of a site's simulated host.
func hostOf(site string) string { return site + "-hypervisor" }

// Up starts everything and returns when both agents are healthy.
func Up(ctx context.Context, cfg Config) (_ *Lab, err error) {
	l := &Lab{cfg: cfg, ports: map[string]int{}, drivers: map[string]*simulated.Driver{}, processes: map[string]process.Process{}}
	if err := os.Mkdir(cfg.Dir, 0o755); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Down(context.WithoutCancel(ctx)))
		}
	}()
	for _, name := range []string{Server, Primary, Recovery} {
		if cfg.Places[name].Enter != nil {
			l.ports[name] = placedPort
		} else if l.ports[name], err = freePort(); err != nil {
			return nil, err
		}
	}
	for _, site := range Sites {
		host := simulated.Config{Name: site, PowerLog: l.PowerLog()}
		if err := os.MkdirAll(filepath.Join(cfg.Dir, site), 0o755); err != nil {
			return nil, err
		}
		if err := simulated.Create(l.HostDir(site), host); err != nil {
			return nil, err
		}
		l.drivers[site] = simulated.New(l.HostDir(site))
		if err := l.Start(ctx, hostOf(site)); err != nil {
			return nil, err
		}
	}
	if err := l.Start(ctx, Server); err != nil {
		return nil, err
	}
	client, err := l.Client()
	if err != nil {
		return nil, err
	}
	for _, site := range Sites {
		if err := client.CreateSite(ctx, switchback.SiteID(site)); err != nil {
			return nil, err
		}
		if err := l.join(ctx, client, site); err != nil {
			return nil, fmt.Errorf("agent of %s cannot join: %w", site, err)
		}
		if err := l.Start(ctx, site); err != nil {
			return nil, err
		}
	}
	for _, site := range Sites {
		if err := l.AwaitAgent(ctx, site, time.Time{}); err != nil {
			return nil, err
		}
	}
	return l, nil
}

func freePort() (int, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).Port, nil
}

func (l *Lab) address(name string) string {
	host := "127.0.0.1"
	if p := l.cfg.Places[name]; p.Host != "" {
		host = p.Host
	}
	return net.JoinHostPort(host, fmt.Sprint(l.ports[name]))
}

// PowerLog is where both hosts note what runs.
func (l *Lab) PowerLog() string { return filepath.Join(l.cfg.Dir, "power.log") }

// HostDir is the directory of a site's simulated host.
func (l *Lab) HostDir(site string) string { return filepath.Join(l.cfg.Dir, site, "hv") }

// StateDir is the state directory of a site's agent.
func (l *Lab) StateDir(site string) string { return filepath.Join(l.cfg.Dir, site, "state") }

// RunDir is where a site's agent makes sockets.
func (l *Lab) RunDir(site string) string { return filepath.Join(l.cfg.Dir, site, "run") }

// ConfigDir holds the administrator's credentials: --config of the command line.
func (l *Lab) ConfigDir() string { return filepath.Join(l.cfg.Dir, "server", "admin") }

// LogDir holds the logs of all processes.
func (l *Lab) LogDir() string { return filepath.Join(l.cfg.Dir, "log") }

// Driver speaks to a site's simulated host.
func (l *Lab) Driver(site string) *simulated.Driver { return l.drivers[site] }

// Client returns a client of the lab's server.
func (l *Lab) Client() (*api.Client, error) { return api.Dial(l.ConfigDir()) }

func (l *Lab) command(name string) *exec.Cmd {
	site, isHost := strings.CutSuffix(name, "-hypervisor")
	var cmd *exec.Cmd
	switch {
	case isHost:
		return exec.Command(l.cfg.Executable, "lab", "simulated-hypervisor", l.HostDir(site))
	case name == Server:
		args := []string{"server", "--state", filepath.Join(l.cfg.Dir, "server"), "--listen", l.address(Server)}
		if l.cfg.Places[Server].Unreachable {
			args = append(args, "--reachable=false")
		} else if l.cfg.Places[Server].Host != "" {
			args = append(args, "--address", l.address(Server))
		}
		cmd = l.cfg.Places[name].command(l.cfg.Executable, args...)
	default:
		args := []string{"agent", "--state", l.StateDir(name), "--run", l.RunDir(name),
			"--storage-reserve", fmt.Sprint(1 << 20), "--hypervisor", "simulated:" + l.HostDir(name)}
		if !l.cfg.Places[name].Unreachable {
			args = append(args, "--listen", l.address(name))
		}
		cmd = l.cfg.Places[name].command(l.cfg.Executable, args...)
	}
	cmd.Env = os.Environ()
	if l.cfg.Environment != nil {
		cmd.Env = append(cmd.Env, l.cfg.Environment(name)...)
	}
	return cmd
}

// Start starts the server, an agent or a simulated host, which is said by its
// name, and waits until it answers.
func (l *Lab) Start(ctx context.Context, name string) error {
	p, err := process.Start(l.command(name), filepath.Join(l.LogDir(), name+".log"))
	if err != nil {
		return err
	}
	l.mu.Lock()
	l.processes[name] = p
	l.mu.Unlock()
	ready := func() error {
		conn, err := net.Dial("tcp", l.address(name))
		if err == nil {
			conn.Close()
		}
		return err
	}
	if name != Server && l.cfg.Places[name].Enter != nil {
		return nil // it cannot be seen from here: AwaitAgent
	}
	if site, ok := strings.CutSuffix(name, "-hypervisor"); ok {
		ready = func() error { _, err := l.drivers[site].Host(ctx); return err }
	}
	return until(ctx, name, func() error {
		err := ready()
		if err != nil && !p.Alive() {
			b, _ := os.ReadFile(filepath.Join(l.LogDir(), name+".log")) // only more detail
			return ended{fmt.Errorf("%s ended: %s", name, b[max(0, len(b)-500):])}
		}
		return err
	})
}

// ended is an error that waiting does not mend.
type ended struct{ error }

// until polls for 30 s.
func until(ctx context.Context, what string, ready func() error) error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := ready()
		if err == nil {
			return nil
		}
		var over ended
		if errors.As(err, &over) {
			return err
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("%s is not ready: %w", what, err)
		}
		time.Sleep(3 * time.Millisecond)
	}
}

// AwaitAgent waits until the server has heard from a site's agent after since.
func (l *Lab) AwaitAgent(ctx context.Context, site string, since time.Time) error {
	client, err := l.Client()
	if err != nil {
		return err
	}
	return until(ctx, "the agent of "+site, func() error {
		agents, err := client.Agents(ctx)
		if err != nil {
			return err
		}
		for _, a := range agents {
			if string(a.Site) == site && a.Healthy && a.LastSeen.After(since) {
				return nil
			}
		}
		return errors.New("the server has not heard from it")
	})
}

// Process is the process of that name that was started last.
func (l *Lab) Process(name string) process.Process {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.processes[name]
}

// Kill sends a signal to a process and waits until it is gone.
func (l *Lab) Kill(name string, sig syscall.Signal) error { return l.Process(name).Kill(sig) }

// PowerCut takes the power from a site: its machines, its agent and the daemon
// die at once. Start both again for it to come back.
func (l *Lab) PowerCut(ctx context.Context, site string) error {
	err := errors.Join(l.Kill(site, syscall.SIGKILL), l.drivers[site].PowerCut(ctx), l.Kill(hostOf(site), syscall.SIGKILL))
	return errors.Join(err, os.RemoveAll(l.RunDir(site)))
}

// RestartHypervisor kills a site's daemon and starts it again; machines go on.
func (l *Lab) RestartHypervisor(ctx context.Context, site string) error {
	if err := l.Kill(hostOf(site), syscall.SIGKILL); err != nil {
		return err
	}
	return l.Start(ctx, hostOf(site))
}

// Machine is a machine to make.
type Machine struct {
	Name string
	// Disks are their sizes in bytes.
	Disks   []int64
	Program simulated.Program
}

// UUID is derived from the name.
func (m Machine) UUID() switchback.VMUUID {
	return switchback.VMUUID(uuid.NewSHA1(uuid.NameSpaceOID, []byte("switchback simlab "+m.Name)).String())
}

// Add makes a machine at a site and starts it.
func (l *Lab) Add(ctx context.Context, site string, m Machine) error {
	var devices strings.Builder
	dir := filepath.Join(l.cfg.Dir, site, "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for i, size := range m.Disks {
		disk := "vd" + string(rune('a'+i))
		path := filepath.Join(dir, m.Name+"-"+disk+".qcow2")
		out, err := exec.CommandContext(ctx, "qemu-img", "create", "-q", "-f", "qcow2", path, fmt.Sprint(size)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("make a disk: %w: %s", err, out)
		}
		fmt.Fprintf(&devices, "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='%s'/><target dev='%s' bus='virtio'/></disk>", path, disk)
	}
	definition := fmt.Sprintf("<domain type='kvm'><name>%s</name><uuid>%s</uuid><metadata>%s</metadata><memory unit='MiB'>32</memory><devices>%s</devices></domain>",
		m.Name, m.UUID(), m.Program.Element(), &devices)
	if _, err := l.drivers[site].Define(ctx, definition); err != nil {
		return err
	}
	return l.drivers[site].Start(ctx, m.UUID(), false)
}

// Down ends every process and machine and removes the directory.
func (l *Lab) Down(ctx context.Context) error {
	var errs []error
	for _, name := range []string{Server, Primary, Recovery} {
		errs = append(errs, l.Kill(name, syscall.SIGKILL))
	}
	for _, site := range Sites {
		if d := l.drivers[site]; d != nil {
			if host := l.Process(hostOf(site)); host.Alive() {
				limited, cancel := context.WithTimeout(ctx, 20*time.Second)
				err := d.PowerCut(limited)
				cancel()
				if err != nil {
					errs = append(errs, err, host.Signal(syscall.SIGQUIT)) // its log says where it is stuck
				}
			}
			d.Close()
		}
		errs = append(errs, l.Kill(hostOf(site), syscall.SIGKILL), l.endViews(site), l.endLeaseGuard(site))
	}
	return errors.Join(append(errs, os.RemoveAll(l.cfg.Dir))...)
}

// endLeaseGuard ends the process that guards a site's leases, which outlives its
// agent: it ends by itself when its run directory is gone.
func (l *Lab) endLeaseGuard(site string) error { return os.RemoveAll(l.RunDir(site)) }

// endViews ends the processes that serve views, which outlive their agents.
func (l *Lab) endViews(site string) error {
	files, err := filepath.Glob(filepath.Join(l.RunDir(site), "*.pid"))
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // it has just ended by itself
		}
		var pid int
		if _, err := fmt.Sscan(string(b), &pid); err != nil {
			errs = append(errs, err)
			continue
		}
		p, err := process.Identify(pid)
		cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)) // gone: empty
		if err == nil && strings.Contains(string(cmdline), l.cfg.Dir) {
			errs = append(errs, p.Kill(syscall.SIGKILL))
		}
	}
	return errors.Join(errs...)
}

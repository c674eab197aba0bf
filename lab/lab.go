package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/lab/network"
	"github.com/switchback-dr/switchback/lab/process"
	"github.com/switchback-dr/switchback/lab/site"
)

// Names of the two sites.
const (
	Primary  = "primary"
	Recovery = "recovery"
)

const agentPort = 7444

// Config says what Up makes. Dir and Executable are required.
type Config struct {
	// Dir holds the whole lab.
	Dir string `json:"dir"`
	// Executable is the switchback binary.
	Executable string `json:"executable"`
	// Guests are made and started at the primary site.
	Guests []Guest `json:"guests"`
	// Log tells what is going on; nil = silent.
	Log func(format string, args ...any) `json:"-"`
}

// Lab is a running lab.
type Lab struct {
	cfg     Config
	state   state
	sites   map[string]*site.Site
	network *network.Network
}

// state is what lab.json holds.
type state struct {
	Config  Config                     `json:"config"`
	Port    int                        `json:"port"`
	Network *network.Network           `json:"network"`
	Server  process.Process            `json:"server"`
	Agents  map[string]process.Process `json:"agents"`
	KVM     bool                       `json:"kvm"`
}

func (c Config) log(format string, args ...any) {
	if c.Log != nil {
		c.Log(format, args...)
	}
}

// Up makes and starts everything and returns when both agents are healthy and
// the guests run. A lab that is up in Dir is an error.
func Up(ctx context.Context, cfg Config) (_ *Lab, err error) {
	if cfg.Dir, err = filepath.Abs(cfg.Dir); err != nil {
		return nil, err
	}
	if _, err := os.Stat(filepath.Join(cfg.Dir, "lab.json")); err == nil {
		return nil, switchback.Errorf(switchback.CodeConflict, "a lab is up in %s", cfg.Dir).WithHint("switchback lab down")
	}
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, err
	}
	l := &Lab{cfg: cfg, sites: map[string]*site.Site{}, state: state{Config: cfg, Agents: map[string]process.Process{}}}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.stop(context.WithoutCancel(ctx)))
		}
	}()
	l.state.KVM = site.KVMWorks(ctx)
	cfg.log("starting the sites %s and %s (%s)", Primary, Recovery, map[bool]string{true: "KVM", false: "emulated processors: KVM does not work here"}[l.state.KVM])
	for _, name := range []string{Primary, Recovery} {
		s, err := site.Start(ctx, site.Config{Name: name, Dir: filepath.Join(cfg.Dir, name), CapabilityCache: filepath.Join(guest.DefaultCacheDir(), "capabilities"),
			KVM: l.state.KVM, Detach: true})
		if err != nil {
			return nil, err
		}
		l.sites[name] = s
		if err := l.save(); err != nil {
			return nil, err
		}
	}
	a, b := l.sites[Primary], l.sites[Recovery]
	if l.network, err = network.Connect(ctx, cfg.Dir, network.End{Name: Primary, PID: a.NamespacePID()}, network.End{Name: Recovery, PID: b.NamespacePID()}); err != nil {
		return nil, err
	}
	l.state.Network = l.network
	for _, end := range []network.End{l.network.A, l.network.B} {
		// The server reaches an agent by the address that its peer uses.
		if out, err := exec.CommandContext(ctx, "ip", "route", "add", end.WANAddr.String()+"/32", "via", end.ManagementAddr.String(), "dev", end.HostLink).CombinedOutput(); err != nil {
			return nil, fmt.Errorf("route to site %s: %w: %s", end.Name, err, out)
		}
	}
	if l.state.Port, err = freePort(); err != nil {
		return nil, err
	}
	if err := l.save(); err != nil {
		return nil, err
	}
	cfg.log("starting server and agents")
	if err := l.StartServer(ctx); err != nil {
		return nil, err
	}
	client, err := l.Client()
	if err != nil {
		return nil, err
	}
	for _, name := range []string{Primary, Recovery} {
		if err := client.CreateSite(ctx, switchback.SiteID(name)); err != nil {
			return nil, err
		}
		token, err := client.MintToken(ctx, switchback.SiteID(name), 10*time.Minute)
		if err != nil {
			return nil, err
		}
		out, err := l.sites[name].Command(ctx, cfg.Executable, "agent", "join", "--address", l.AgentAddress(name), token.Token).CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("agent of %s cannot join: %w: %s", name, err, out)
		}
		if err := l.StartAgent(ctx, name); err != nil {
			return nil, err
		}
	}
	if err := l.waitHealthy(ctx, client); err != nil {
		return nil, err
	}
	for _, g := range cfg.Guests {
		cfg.log("making guest %s", g.Name)
		if err := l.AddGuest(ctx, g); err != nil {
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

func (l *Lab) save() error {
	b, err := json.MarshalIndent(l.state, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(l.cfg.Dir, "lab.json"), b, 0o644)
}

// Attach finds a running lab again.
func Attach(dir string) (*Lab, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, "lab.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, switchback.Errorf(switchback.CodeNotFound, "no lab is up in %s", dir).WithHint("switchback lab up")
	}
	if err != nil {
		return nil, err
	}
	l := &Lab{sites: map[string]*site.Site{}}
	if err := json.Unmarshal(b, &l.state); err != nil {
		return nil, err
	}
	l.cfg, l.network = l.state.Config, l.state.Network
	for _, name := range []string{Primary, Recovery} {
		s, err := site.Attach(filepath.Join(dir, name))
		if err != nil {
			continue // half up, or rebooted: Down clears what is left
		}
		l.sites[name] = s
	}
	return l, nil
}

// Down ends everything in the lab of dir and removes its files.
func Down(ctx context.Context, dir string) error {
	l, err := Attach(dir)
	if err != nil {
		return err
	}
	return l.Down(ctx)
}

// Down ends everything and removes the lab's files.
func (l *Lab) Down(ctx context.Context) error {
	if err := l.stop(ctx); err != nil {
		return err
	}
	return os.RemoveAll(l.cfg.Dir)
}

func (l *Lab) stop(ctx context.Context) error {
	errs := []error{l.state.Server.Kill(syscall.SIGKILL)}
	for _, p := range l.state.Agents {
		errs = append(errs, p.Kill(syscall.SIGKILL))
	}
	if l.network != nil {
		errs = append(errs, l.network.Disconnect(ctx))
	}
	for _, s := range l.sites {
		errs = append(errs, s.Destroy(ctx))
	}
	return errors.Join(errs...)
}

// Site returns a site by name; nil when it does not run.
func (l *Lab) Site(name string) *site.Site { return l.sites[name] }

// Network returns the lab's network.
func (l *Lab) Network() *network.Network { return l.network }

// Dir is the lab's directory.
func (l *Lab) Dir() string { return l.cfg.Dir }

func (l *Lab) end(name string) network.End {
	if name == Primary {
		return l.network.A
	}
	return l.network.B
}

// AgentAddress is how the agent of a site is reached.
func (l *Lab) AgentAddress(name string) string {
	return net.JoinHostPort(l.end(name).WANAddr.String(), fmt.Sprint(agentPort))
}

// ConfigDir holds the administrator's credentials: --config of the command line.
func (l *Lab) ConfigDir() string { return filepath.Join(l.cfg.Dir, "server", "admin") }

// Client returns a client of the lab's server.
func (l *Lab) Client() (*api.Client, error) { return api.Dial(l.ConfigDir()) }

// StartServer starts the server and waits until it answers.
func (l *Lab) StartServer(ctx context.Context) error {
	port := fmt.Sprint(l.state.Port)
	listen := []string{net.JoinHostPort("127.0.0.1", port)}
	for _, end := range []network.End{l.network.A, l.network.B} {
		listen = append(listen, net.JoinHostPort(end.HostAddr.String(), port))
	}
	cmd := exec.Command(l.cfg.Executable, "server", "--state", filepath.Join(l.cfg.Dir, "server"), "--listen", strings.Join(listen, ","))
	p, err := process.Start(cmd, filepath.Join(l.cfg.Dir, "log", "server.log"))
	if err != nil {
		return err
	}
	l.state.Server = p
	if err := l.save(); err != nil {
		return err
	}
	return l.until(ctx, "the server", p, "server.log", func() error {
		c, err := l.Client()
		if err != nil {
			return err
		}
		_, err = c.Sites(ctx)
		return err
	})
}

// KillServer ends the server with a signal.
func (l *Lab) KillServer(sig syscall.Signal) error { return l.state.Server.Kill(sig) }

// StartAgent starts the agent of a site.
func (l *Lab) StartAgent(_ context.Context, name string) error {
	s := l.sites[name]
	cmd := s.Command(context.Background(), l.cfg.Executable, "agent", "--listen", fmt.Sprintf("0.0.0.0:%d", agentPort), "--libvirt-pid", "/run/libvirt/libvirtd.pid")
	p, err := process.Start(cmd, filepath.Join(l.cfg.Dir, "log", "agent-"+name+".log"))
	if err != nil {
		return err
	}
	l.state.Agents[name] = p
	return l.save()
}

// KillAgent ends the agent of a site with a signal.
func (l *Lab) KillAgent(name string, sig syscall.Signal) error { return l.state.Agents[name].Kill(sig) }

// AgentPID is the process of a site's agent.
func (l *Lab) AgentPID(name string) int { return l.state.Agents[name].PID }

func (l *Lab) waitHealthy(ctx context.Context, client *api.Client) error {
	for _, name := range []string{Primary, Recovery} {
		err := l.until(ctx, "the agent of "+name, l.state.Agents[name], "agent-"+name+".log", func() error {
			sites, err := client.Sites(ctx)
			if err != nil {
				return err
			}
			for _, s := range sites {
				if string(s.ID) == name && len(s.Agents) == 1 {
					if s.Agents[0].Healthy {
						return nil
					}
					return errors.New(s.Agents[0].Reason)
				}
			}
			return errors.New("it has not joined")
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// until polls ready while the process lives, for 30 s.
func (l *Lab) until(ctx context.Context, what string, p process.Process, log string, ready func() error) error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := ready()
		if err == nil {
			return nil
		}
		if !p.Alive() {
			b, _ := os.ReadFile(filepath.Join(l.cfg.Dir, "log", log))
			return fmt.Errorf("%s ended: %s", what, lastLines(string(b), 3))
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("%s is not ready: %w", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// ServerAlive reports whether the server runs.
func (l *Lab) ServerAlive() bool { return l.state.Server.Alive() }

// AgentAlive reports whether the agent of a site runs.
func (l *Lab) AgentAlive(name string) bool { return l.state.Agents[name].Alive() }

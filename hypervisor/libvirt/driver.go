package libvirt

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/beevik/etree"
	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// DefaultSocket is where libvirtd listens.
const DefaultSocket = "/run/libvirt/libvirt-sock"

// lanes is the number of connections over which blocking calls are spread.
// lanes × callsPerConn stays below libvirtd's default of 20 workers.
const lanes = 4

// Config configures a Driver. The zero value drives the local libvirtd.
type Config struct {
	// Socket is libvirtd's unix socket; "" = DefaultSocket.
	Socket string
	// URI is what is opened behind the socket; "" = "qemu:///system".
	URI string
	// KeepAliveInterval is the silence after which libvirtd is asked for a sign
	// of life; 0 = 5 s. It is held for dead after KeepAliveCount questions
	// without an answer; 0 = 5.
	KeepAliveInterval time.Duration
	KeepAliveCount    int
	// NoMonitor keeps off QEMU's monitor, to which libvirt passes commands only
	// with a mark on the domain ("tainted: custom-monitor"): no FineTracker then.
	NoMonitor bool
	// Logger tells of connections lost; nil = slog.Default().
	Logger *slog.Logger
}

// Driver drives one libvirtd. It implements hypervisor.Hypervisor.
type Driver struct {
	cfg  Config
	log  *slog.Logger
	ask  *client         // queries, which libvirtd answers at once
	work [lanes]*client  // calls that may wait for a domain's job lock
	stop context.Context // ended by Close
	end  context.CancelFunc

	mu     sync.Mutex // guards closed, and subs against a late Add
	closed bool
	subs   sync.WaitGroup // running Events subscriptions
}

var (
	_ hypervisor.Hypervisor  = (*Driver)(nil)
	_ hypervisor.Freezer     = (*Driver)(nil)
	_ hypervisor.Inspector   = (*Driver)(nil)
	_ hypervisor.FineTracker = (*Driver)(nil)
)

// New makes a driver. Nothing is connected until the first call.
func New(cfg Config) (*Driver, error) {
	if cfg.Socket == "" {
		cfg.Socket = DefaultSocket
	}
	if cfg.URI == "" {
		cfg.URI = "qemu:///system"
	}
	if cfg.KeepAliveInterval == 0 {
		cfg.KeepAliveInterval = 5 * time.Second
	}
	if cfg.KeepAliveCount == 0 {
		cfg.KeepAliveCount = 5
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.Default()
	}
	if len(cfg.Socket) > maxSocketPath {
		return nil, switchback.Errorf(switchback.CodeInvalid, "libvirt's socket path is longer than %d bytes: %s", maxSocketPath, cfg.Socket)
	}
	if cfg.KeepAliveInterval < 0 || cfg.KeepAliveCount < 0 {
		return nil, switchback.Errorf(switchback.CodeInvalid, "keep-alive interval and count cannot be negative")
	}
	d := &Driver{cfg: cfg, log: cfg.Logger.With("socket", cfg.Socket)}
	d.stop, d.end = context.WithCancel(context.Background())
	d.ask = newClient(cfg.Socket, cfg.URI, d.keepAlive())
	for i := range d.work {
		d.work[i] = newClient(cfg.Socket, cfg.URI, d.keepAlive())
	}
	return d, nil
}

// maxSocketPath is what fits sockaddr_un.sun_path with its terminating zero.
const maxSocketPath = 107

func (d *Driver) keepAlive() keepAlive {
	return keepAlive{Interval: d.cfg.KeepAliveInterval, Count: d.cfg.KeepAliveCount}
}

// Close ends all connections and subscriptions. Calls under way fail.
func (d *Driver) Close() error {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.end()
	d.ask.close()
	for _, c := range d.work {
		c.close()
	}
	d.subs.Wait()
	return nil
}

// query makes a call that libvirtd answers without waiting for a job lock.
func (d *Driver) query(ctx context.Context, p procedure, a *args, decode func(*result)) error {
	return d.ask.call(ctx, p, a, decode)
}

// do makes a call that may block, on the domain's lane.
func (d *Driver) do(ctx context.Context, dom domainRef, p procedure, a *args, decode func(*result)) error {
	return d.work[int(dom.uuid[15])%lanes].call(ctx, p, a, decode)
}

// ref makes the wire form of a domain's name.
func ref(id switchback.VMUUID) (domainRef, error) {
	u, err := uuid.Parse(string(id))
	if err != nil {
		return domainRef{}, switchback.Errorf(switchback.CodeInvalid, "%q is not a UUID", string(id))
	}
	return domainRef{uuid: u, id: -1}, nil
}

func (r domainRef) vmUUID() switchback.VMUUID { return switchback.VMUUID(uuid.UUID(r.uuid).String()) }

// Host describes the platform.
func (d *Driver) Host(ctx context.Context) (hypervisor.Host, error) {
	const op = "libvirt.Host"
	var (
		h            hypervisor.Host
		qemu, lib    uint64
		capabilities string
	)
	for _, q := range []struct {
		proc   procedure
		decode func(*result)
	}{
		{procConnectGetHostname, func(r *result) { h.Name = r.str() }},
		{procConnectGetVersion, func(r *result) { qemu = r.u64() }},
		{procConnectGetLibVersion, func(r *result) { lib = r.u64() }},
		{procNodeGetInfo, func(r *result) {
			r.take(32 * 4) // the CPU model: 32 characters, each in a word of its own
			h.MemoryMiB = int64(r.u64() / 1024)
			h.CPUs = int(r.i32())
		}},
		{procConnectGetCapabilities, func(r *result) { capabilities = r.str() }},
	} {
		if err := d.query(ctx, q.proc, newArgs(), q.decode); err != nil {
			return hypervisor.Host{}, wrap(op, err)
		}
	}
	h.Hypervisor = fmt.Sprintf("QEMU %s, libvirt %s", version(qemu), version(lib))
	doc := etree.NewDocument()
	if err := doc.ReadFromString(capabilities); err != nil {
		return hypervisor.Host{}, wrap(op, fmt.Errorf("parse the host's capabilities: %w", err))
	}
	if e := doc.FindElement("/capabilities/host/uuid"); e != nil {
		h.UUID = strings.TrimSpace(e.Text())
	}
	return h, nil
}

// version prints libvirt's packed version numbers, e.g. 7002022 as 7.2.22.
func version(v uint64) string {
	return fmt.Sprintf("%d.%d.%d", v/1000000, v/1000%1000, v%1000)
}

package replicator

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/nbd"
)

// Config is what an Engine works with. All fields but the optional ones are required.
type Config struct {
	Protection switchback.ProtectionID
	VM         switchback.VMUUID
	Epoch      switchback.Epoch
	Disks      []switchback.Disk
	Policy     switchback.Policy
	Hypervisor hypervisor.Hypervisor
	Target     Target
	// Dir keeps the block index; it belongs to this protection and direction.
	Dir string
	// ScratchDir is where QEMU keeps the old content of blocks that are
	// overwritten while a cycle reads; it must have room for what the guest
	// writes meanwhile.
	ScratchDir string
	// MakeScratch makes an empty image of that size at path, replacing what is there.
	MakeScratch func(ctx context.Context, path string, sizeBytes int64) error
	// ScratchReserveBytes is the free space below which a cycle gives up so
	// that the guest is not paused; default 128 MiB.
	ScratchReserveBytes int64
	// SocketDir holds short-lived unix sockets; its path must be short.
	SocketDir string
	// MustSend are ranges that the first point after a base of sequence 0 has
	// to carry beside what the bitmaps say (optional).
	MustSend map[string]extent.Set
	// OpenOffline opens a disk of a domain that is off, and lists what changed
	// since the named checkpoints' bitmaps.
	OpenOffline func(ctx context.Context, d switchback.Disk, bitmaps []string) (DiskReader, extent.Set, error)
	Logger      *slog.Logger
	// Now is the clock; default time.Now.
	Now func() time.Time
}

// Engine runs the cycles of one protected VM. Cycles never overlap.
type Engine struct {
	cfg     Config
	log     *slog.Logger
	now     func() time.Time
	history history
	tuner   tuner

	mu         sync.Mutex // one cycle at a time; guards the following
	index      *Index
	indexReady bool
	jobsClear  bool // no job of ours is left open
	// agentMissed: the guest agent was waited for, and did not connect.
	agentMissed bool
	// appTaken is when the newest application-consistent point was taken by this
	// engine, appTried when one could not be.
	appTaken, appTried time.Time

	ioErrors chan string
	// closed ends what is still thawing the guest.
	closed  chan struct{}
	thawing sync.WaitGroup
	// stuck: a thaw is not confirmed, and tried on.
	stuck    atomic.Bool
	resendMu sync.Mutex // guards the file of Resend
}

// New makes an engine; it opens the block index and starts nothing.
func New(cfg Config) (*Engine, error) {
	if cfg.ScratchReserveBytes == 0 {
		cfg.ScratchReserveBytes = 128 << 20
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	for _, dir := range []string{cfg.Dir, cfg.ScratchDir, cfg.SocketDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	key, err := indexKey(cfg.Dir)
	if err != nil {
		return nil, err
	}
	index, err := OpenIndex(cfg.Dir, cfg.Disks, key)
	if err != nil {
		return nil, err
	}
	return &Engine{cfg: cfg, log: cfg.Logger.With("protection", cfg.Protection), now: cfg.Now, index: index,
		ioErrors: make(chan string, 1), closed: make(chan struct{})}, nil
}

// Close closes the block index. The engine must not be running.
func (e *Engine) Close() error {
	close(e.closed)
	e.thawing.Wait()
	return e.index.Close()
}

// Status is safe to call at any time.
func (e *Engine) Status() Status { return e.history.snapshot(e.now()) }

// IOError tells the engine that the platform reported a disk error of its VM,
// perhaps because the scratch space of an open job ran full.
func (e *Engine) IOError(detail string) {
	select {
	case e.ioErrors <- detail:
	default:
	}
}

// Run takes points at the policy's interval until ctx ends. Errors are kept as
// conditions and tried again; only a newer epoch at the target ends it early.
func (e *Engine) Run(ctx context.Context) error {
	e.history.update(func(s *Status) { s.Running = true; s.Activity = "idle" })
	defer e.history.update(func(s *Status) { s.Running = false; s.Activity = "" })
	next := e.now()
	failures := 0
	for {
		timer := time.NewTimer(max(0, next.Sub(e.now())))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
		start := e.now()
		_, err := e.Cycle(ctx, CycleOptions{})
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
			failures = 0
			next = start.Add(e.cfg.Policy.Interval)
		case switchback.CodeOf(err) == switchback.CodeStaleEpoch:
			return err
		default:
			failures++
			next = e.now().Add(retryDelay(e.cfg.Policy.Interval, failures))
		}
	}
}

// retryDelay grows from the interval (at most 5 s) to 30 s.
func retryDelay(interval time.Duration, failures int) time.Duration {
	d := min(interval, 5*time.Second)
	for i := 1; i < failures && d < 30*time.Second; i++ {
		d = d * 3 / 2
	}
	return min(d, 30*time.Second)
}

// setCondition records what the last cycle met, or clears it, and reports
// whether that is another condition than before.
func (e *Engine) setCondition(err error) (changed bool) {
	now := e.now()
	e.history.update(func(s *Status) {
		old := s.Conditions
		s.Conditions = nil
		if err == nil {
			changed = len(old) > 0
			return
		}
		changed = true
		c := conditionOf(err)
		c.Since = now
		for _, o := range old {
			if o.Name == c.Name {
				changed = false
				c.Since = o.Since
			}
		}
		s.Conditions = []switchback.Condition{c}
	})
	return changed
}

// sourceError marks what went wrong at the source, so that the target is not blamed.
type sourceError struct{ error }

func (e sourceError) Unwrap() error { return e.error }

func atSource(err error) error {
	if err == nil {
		return nil
	}
	return sourceError{err}
}

// conditionOf names what is wrong for the operator.
func conditionOf(err error) switchback.Condition {
	c := switchback.Condition{Name: "replication-failing", Severity: switchback.SeverityWarning, Cause: err.Error(),
		Remedy: "replication tries again by itself; see the agent's log if it persists"}
	var source sourceError
	here := errors.As(err, &source)
	switch code := switchback.CodeOf(err); {
	case code == switchback.CodeNoSpace && here:
		c.Name, c.Severity = "source-scratch-out-of-space", switchback.SeverityCritical
		c.Remedy = "make room in the source agent's scratch directory; the guest goes on, replication tries again by itself"
	case code == switchback.CodeNoSpace:
		c.Name, c.Severity = "target-out-of-space", switchback.SeverityCritical
		c.Remedy = "make room in the target site's storage; replication then goes on by itself, the points there are intact"
	case (code == switchback.CodeUnavailable || code == switchback.CodeTimeout) && here:
		c.Name, c.Remedy = "hypervisor-unreachable", "see to libvirtd at the source; replication goes on by itself"
	case code == switchback.CodeUnavailable || code == switchback.CodeTimeout:
		c.Name = "target-unreachable"
		c.Remedy = "check the other site's agent and the network between the agents; replication goes on by itself"
	case code == switchback.CodeStaleEpoch:
		c.Name, c.Severity = "stale-epoch", switchback.SeverityCritical
		c.Remedy = "this side is no longer the active one; nothing it writes is accepted"
	case code == switchback.CodeConflict && here:
		c.Name = "source-not-running"
		c.Remedy = "points are taken again when the VM runs"
	case code == switchback.CodeCorrupt:
		c.Name, c.Severity = "data-corrupt", switchback.SeverityCritical
		c.Remedy = "verify the replica; the damaged part is named in the cause and is never served"
	}
	return c
}

func (e *Engine) scratch(disk string) string {
	return filepath.Join(e.cfg.ScratchDir, string(e.cfg.Protection)+"."+disk)
}

func (e *Engine) socket() string {
	return filepath.Join(e.cfg.SocketDir, string(e.cfg.Protection)+".backup")
}

func dialDisk(ctx context.Context, socket, export string, contexts []string) (DiskReader, error) {
	return nbd.Dial(ctx, "unix", socket, nbd.Options{Export: export, MetaContexts: contexts})
}

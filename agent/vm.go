package agent

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/nbd"
	"github.com/switchback-dr/switchback/qemu"
	"github.com/switchback-dr/switchback/replicator"
	"github.com/switchback-dr/switchback/transport"
)

// vm is one protected VM at this agent. Actions on it are serialised by act;
// the fields are guarded by mu.
type vm struct {
	agent *Agent
	act   sync.Mutex

	mu      sync.Mutex
	a       Assignment
	replica *journal.Replica
	bases   map[string]*base // open writers while seeding
	engine  *replicator.Engine
	peers   *http.Client // of the engine
	stop    context.CancelFunc
	stopped chan struct{}
	// folded is closed when the retention that runs in the background has ended; nil when none runs.
	folded   chan struct{}
	stopFold context.CancelFunc
	// branched and stopBranch are the same of moving snapshots into the journal,
	// which branching serialises.
	branched   chan struct{}
	stopBranch context.CancelFunc
	branching  sync.Mutex
	// seeding serialises opening the bases.
	seeding sync.Mutex
	checks  checks
	cond    *switchback.Condition // what the agent itself met outside a cycle
	// retained is what there is to report of the replica's retention.
	retained []switchback.Condition
	// grant is what stands under /run; guard what stands in the guard file.
	granting sync.Mutex // of the files
	grant    fencing.Grant
	guard    string
	// confirmed is when ownership was last confirmed to this process, and by whom;
	// autostart what was last seen of libvirt's flag.
	confirmed   time.Time
	confirmedBy string
	autostart   bool
	// powered: the domain was last seen on, be it paused.
	powered bool
	// begun: there is nothing to start in this boot any more; beginAgain is when a
	// start that failed is tried again.
	begun bool
	// beginning keeps the start after a lease was renewed, and the end of one, apart.
	beginning  sync.Mutex
	beginAgain time.Time
	// far says that the object store fails, which is left alone until farAgain.
	far      *switchback.Condition
	farAgain time.Time
}

func (v *vm) assignment() Assignment {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.a
}

// change makes a new assignment durable before it counts.
func (v *vm) change(f func(*Assignment)) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	a := v.a
	f(&a)
	if err := saveAssignment(v.agent.assignmentDir(), a); err != nil {
		return err
	}
	if a.Role != v.a.Role || a.Epoch != v.a.Epoch {
		v.agent.log.Info("assignment changed", "protection", a.Protection, "vm", a.Name, "from", v.a.Role, "to", a.Role, "epoch", a.Epoch)
	}
	v.a = a
	return nil
}

// checkEpoch refuses a command that is older than what the agent knows, and
// makes a newer epoch durable.
func (v *vm) checkEpoch(e switchback.Epoch) error {
	return v.standing().Admit(e)
}

// openReplica returns the replica kept here, opening it if need be.
func (v *vm) openReplica() (*journal.Replica, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.replica != nil {
		return v.replica, nil
	}
	if v.a.ReplicaDir == "" {
		return nil, switchback.Errorf(switchback.CodeNotFound, "no replica of %s is kept at this site", v.a.Name)
	}
	r, err := journal.Options{ReserveBytes: v.agent.cfg.StorageReserveBytes}.Open(v.a.ReplicaDir)
	if err != nil {
		return nil, err
	}
	if err := v.agent.applySealing(r, v.a.Policy); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	if err := dropExportPins(r); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	v.replica = r
	return r, nil
}

func (v *vm) closeReplica() {
	v.stopFolding()
	v.stopBranching()
	v.stopCheck()
	v.closeBases()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.replica != nil {
		v.replica.Close()
		v.replica = nil
	}
}

// startEngine takes points until stopEngine. A running engine is left alone.
func (v *vm) startEngine(ctx context.Context) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.engine != nil {
		return nil
	}
	a := v.a
	if !a.standing(v.agent.site()).SendsPoints() { // contested, or superseded
		return nil
	}
	// Only this one agent is believed to be the peer, whoever answers at its address.
	peers := transport.NewHTTPClient(transport.ClientConfig{Credentials: v.agent.cfg.Credentials, Want: transport.Agent(a.Peer.Agent), Inbound: v.agent.reach.inbound})
	e, err := replicator.New(replicator.Config{
		Protection: a.Protection, VM: a.VM, Epoch: a.Epoch, Disks: a.Disks, Policy: a.Policy,
		Hypervisor: v.agent.hv,
		Target:     &peerTarget{client: peers, peer: a.Peer, protection: a.Protection},
		Dir:        indexDir(v.agent.cfg.StateDir, a.Protection),
		ScratchDir: v.agent.cfg.ScratchDir, SocketDir: v.agent.cfg.RunDir,
		MustSend: a.MustSend, MakeScratch: v.agent.makeScratch, OpenOffline: v.openAtRest, Logger: v.agent.log,
	})
	if err != nil {
		return err
	}
	v.engine, v.peers = e, peers
	if a.Held {
		return nil
	}
	run, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	v.stop, v.stopped = cancel, done
	go func() {
		defer close(done)
		if err := e.Run(run); err != nil && run.Err() == nil {
			v.agent.log.Error("replication ended", "protection", a.Protection, "error", err)
		}
	}()
	return nil
}

// holdEngine stops the cycles but keeps the engine for single points.
func (v *vm) holdEngine() {
	v.mu.Lock()
	stop, done := v.stop, v.stopped
	v.stop, v.stopped = nil, nil
	v.mu.Unlock()
	if stop != nil {
		stop()
		<-done
	}
}

func (v *vm) stopEngine() {
	v.holdEngine()
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.engine != nil {
		v.engine.Close()
		v.peers.CloseIdleConnections()
		v.engine, v.peers = nil, nil
	}
}

func (v *vm) running() *replicator.Engine {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.engine
}

// takeUp continues after a restart of the agent what the assignment says; while
// the hypervisor does not answer yet, again and again.
func (v *vm) takeUp(ctx context.Context) {
	failed := false
	for {
		err := v.takeUpOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			if failed {
				v.setCondition(nil)
			}
			return
		}
		if !failed {
			a := v.assignment()
			v.agent.log.Error("cannot take up where the agent was", "protection", a.Protection, "role", a.Role, "error", err)
			v.setCondition(&switchback.Condition{Name: "agent-cannot-continue", Severity: switchback.SeverityCritical, Cause: err.Error(),
				Remedy: "mend the cause; where the agent does not go on by itself then, restart it", Since: time.Now()})
			failed = true
		}
		if !switchback.IsRetryable(err) {
			return
		}
		sleep(ctx, 2*time.Second)
	}
}

// takeUpOnce holds the VM's lock: the server may ask for the next action at
// once, which must not find half of this done.
func (v *vm) takeUpOnce(ctx context.Context) error {
	v.act.Lock()
	defer v.act.Unlock()
	v.rewrapSnapshots()
	switch v.assignment().Role {
	case agentapi.RoleSource:
		a := v.assignment()
		if err := replicator.ThawLeft(ctx, indexDir(v.agent.cfg.StateDir, a.Protection), v.agent.hv, a.VM); err != nil {
			v.agent.log.Error("a guest that was frozen is not thawed yet", "protection", a.Protection, "error", err)
		}
		return v.startEngine(v.agent.tasks.ctx)
	case agentapi.RoleTarget:
		_, err := v.openReplica()
		v.branchLater()
		return err
	case agentapi.RoleActive:
		if err := v.ensureView(ctx); err != nil {
			return err
		}
		if run := v.assignment().Run; run != nil && run.Started && !run.Viewless {
			v.agent.tasks.wg.Go(func() { v.superviseView(v.agent.tasks.ctx, run.Epoch) })
			v.branchLater()
		}
		return nil
	case agentapi.RoleFenced:
		return v.enforceFence(ctx)
	}
	return nil
}

func (v *vm) setCondition(c *switchback.Condition) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.cond = c
}

// clearCondition clears the condition if it is the one of that name.
func (v *vm) clearCondition(name string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.cond != nil && v.cond.Name == name {
		v.cond = nil
	}
}

// event reacts to what happened to a domain.
func (v *vm) event(ctx context.Context, ev hypervisor.Event) {
	a := v.assignment()
	if ev.UUID != a.VM {
		return
	}
	switch {
	case ev.Kind == hypervisor.EventIOError:
		if e := v.running(); e != nil {
			e.IOError(ev.Disk + " " + ev.Detail)
		}
	case ev.Kind == hypervisor.EventStarted && !a.Role.Owns() && a.Override == nil:
		if err := v.enforceFence(ctx); err != nil {
			v.agent.log.Error("a fenced VM runs and cannot be stopped", "protection", a.Protection, "error", err)
		}
	}
}

// enforceFence stops a fenced domain that runs all the same. Where that fails,
// look tries it again.
func (v *vm) enforceFence(ctx context.Context) error {
	a := v.assignment()
	if a.Override != nil {
		return nil
	}
	dom, err := v.agent.hv.Domain(ctx, a.VM)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return nil
	}
	if err != nil {
		v.notePower(true) // not known: the next look finds out
		return err
	}
	on := dom.State != hypervisor.StateOff
	if on {
		v.notePower(true)
		v.agent.log.Warn("stopping a fenced VM that runs", "protection", a.Protection, "vm", a.Name)
		if err := v.agent.hv.Destroy(ctx, a.VM); err != nil {
			return err
		}
	}
	v.notePower(false)
	return nil
}

// atRest is a reader of a disk of a domain that is off.
type atRest struct {
	*nbd.Client
	server *qemu.NBDServer
}

func (r *atRest) Close() error {
	return errors.Join(r.Client.Close(), r.server.Stop(context.Background()))
}

// openAtRest opens a disk at rest and unites what its bitmaps have marked.
func (v *vm) openAtRest(ctx context.Context, d switchback.Disk, bitmaps []string) (replicator.DiskReader, extent.Set, error) {
	var dirty extent.Set
	a := v.assignment()
	socket := filepath.Join(v.agent.cfg.RunDir, string(a.Protection)+"."+d.Name+".rest")
	open := func(bitmap string) (*atRest, error) {
		os.Remove(socket)
		s, err := qemu.StartNBD(ctx, qemu.NBDOptions{Path: d.Path, Format: "qcow2", Socket: socket, Export: d.Name, Bitmap: bitmap, ReadOnly: true})
		if err != nil {
			return nil, err
		}
		contexts := []string{nbd.ContextAllocation}
		if bitmap != "" {
			contexts = append(contexts, nbd.ContextDirtyPrefix+bitmap)
		}
		c, err := nbd.Dial(ctx, "unix", socket, nbd.Options{Export: d.Name, MetaContexts: contexts})
		if err != nil {
			return nil, errors.Join(err, s.Stop(context.Background()))
		}
		return &atRest{c, s}, nil
	}
	info, err := qemu.Info(ctx, d.Path)
	if err != nil {
		return nil, dirty, err
	}
	for _, name := range bitmaps {
		b, ok := info.Bitmap(name)
		if !ok || b.Inconsistent() {
			return nil, dirty, switchback.Errorf(switchback.CodeBitmapLost, "bitmap %s of %s is missing or inconsistent", name, d.Path)
		}
		r, err := open(name)
		if err != nil {
			return nil, dirty, err
		}
		extents, err := r.BlockStatus(ctx, nbd.ContextDirtyPrefix+name, 0, r.Size())
		if err = errors.Join(err, r.Close()); err != nil {
			return nil, dirty, err
		}
		for _, x := range extents {
			if x.Dirty() {
				dirty.Add(x.Offset, x.Length)
			}
		}
	}
	r, err := open("")
	if err != nil {
		return nil, dirty, err
	}
	return r, dirty, nil
}

func freeBytes(dir string) (free, size int64) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0
	}
	return int64(st.Bavail) * st.Bsize, int64(st.Blocks) * st.Bsize
}

func indexDir(stateDir string, id switchback.ProtectionID) string {
	return filepath.Join(stateDir, "index", string(id))
}

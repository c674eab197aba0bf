package replicator

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/internal/durable"
)

// Application-consistent points: the guest's file systems are frozen through its
// agent right before the instant is fixed, and thawed right after. What must not
// happen is a guest that stays frozen, since it cannot write meanwhile. So
//
//   - a note is durable before the guest is asked to freeze, and goes when the
//     thaw is confirmed: whoever finds one thaws first (ThawLeft), also after a kill -9;
//   - the thaw stands in a defer, and a deadline thaws in spite of whatever the
//     cycle waits for. The point is then only crash-consistent.

const (
	// freezePatience is how long the guest agent may take to freeze.
	freezePatience = 5 * time.Second
	// frozenLimit is when a guest is thawed whatever happens, from the moment
	// it was asked to freeze.
	frozenLimit = 10 * time.Second
	// thawTries of thawPatience each are made before the cycle goes on without a
	// confirmed thaw; it is then tried on beside it.
	thawTries    = 3
	thawPatience = 5 * time.Second
	// appRetry is how soon after a failure the policy's point is tried again, at the earliest.
	appRetry = 30 * time.Second
)

// consistency is what is asked of a point.
type consistency int

const (
	crashWillDo consistency = iota
	appWanted               // by the policy: a crash-consistent one is taken where it cannot be
	appRequired             // by an operator
)

// refusal is an application-consistent point that was required and cannot be.
// It says nothing about replication.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

func frozenNote(dir string) string { return filepath.Join(dir, "frozen") }

// ThawLeft thaws a guest that the note in dir, an engine's, says to be frozen:
// an agent died between freeze and thaw. Without a note it does nothing.
func ThawLeft(ctx context.Context, dir string, hv hypervisor.Hypervisor, vm switchback.VMUUID) error {
	if _, err := os.Stat(frozenNote(dir)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, thawPatience)
	defer cancel()
	return thaw(ctx, dir, hv, vm)
}

// thaw thaws the guest and removes the note. A guest that is off, or has no
// agent to have frozen it, is not frozen.
func thaw(ctx context.Context, dir string, hv hypervisor.Hypervisor, vm switchback.VMUUID) error {
	freezer, ok := hv.(hypervisor.Freezer)
	if ok {
		err := freezer.Thaw(ctx, vm)
		if err != nil && switchback.CodeOf(err) != switchback.CodeUnsupported {
			dom, derr := hv.Domain(ctx, vm)
			gone := switchback.CodeOf(derr) == switchback.CodeNotFound || derr == nil && dom.State == hypervisor.StateOff
			if !gone {
				return err
			}
		}
	}
	if err := os.Remove(frozenNote(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return durable.SyncDir(dir)
}

// writeNote makes the note durable.
func writeNote(dir string, vm switchback.VMUUID) error {
	f, err := os.OpenFile(frozenNote(dir), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(string(vm) + "\n")
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return durable.SyncDir(dir)
}

// guestFreeze is a guest that was asked to freeze and is not confirmed to be thawed.
type guestFreeze struct {
	e     *Engine
	asked time.Time
	limit *time.Timer

	mu    sync.Mutex
	begun bool // a thaw was begun
	early bool // by the deadline
	took  time.Duration
	err   error
}

// freezeGuest freezes the guest's file systems. Where it fails nothing is left frozen.
func (e *Engine) freezeGuest(ctx context.Context) (*guestFreeze, error) {
	freezer, ok := e.cfg.Hypervisor.(hypervisor.Freezer)
	if !ok {
		return nil, switchback.Errorf(switchback.CodeUnsupported, "the hypervisor cannot freeze a guest's file systems")
	}
	if e.stuck.Load() { // what thaws it might thaw this freeze, too
		return nil, switchback.Errorf(switchback.CodeUnavailable, "the thaw of the last freeze is not confirmed yet")
	}
	if err := writeNote(e.cfg.Dir, e.cfg.VM); err != nil {
		return nil, err
	}
	g := &guestFreeze{e: e, asked: time.Now()}
	g.limit = time.AfterFunc(frozenLimit, func() { g.thaw(true) })
	c, cancel := context.WithTimeout(ctx, freezePatience)
	defer cancel()
	if err := freezer.Freeze(c, e.cfg.VM); err != nil {
		_, _, terr := g.thaw(false)
		return nil, errors.Join(err, terr)
	}
	return g, nil
}

// thaw thaws the guest, once; every caller waits for that and learns how long
// the guest was frozen, and whether the deadline came first.
func (g *guestFreeze) thaw(deadline bool) (took time.Duration, early bool, err error) {
	g.limit.Stop()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.begun {
		return g.took, g.early, g.err
	}
	g.begun, g.early = true, deadline
	e := g.e
	for range thawTries {
		// Not the cycle's context: one that was cancelled must thaw, too.
		ctx, cancel := context.WithTimeout(context.Background(), thawPatience)
		g.err = thaw(ctx, e.cfg.Dir, e.cfg.Hypervisor, e.cfg.VM)
		cancel()
		if g.err == nil {
			break
		}
	}
	g.took = time.Since(g.asked)
	if deadline {
		e.log.Warn("the guest was thawed by the deadline", "frozen", g.took)
	}
	e.noteFrozen(g.err)
	if g.err != nil {
		e.stuck.Store(true)
		e.thawing.Go(e.keepThawing)
	}
	return g.took, g.early, g.err
}

// keepThawing thaws until that is confirmed, also where no next cycle would; it
// ends with the engine, and the note stays for the next one.
func (e *Engine) keepThawing() {
	for {
		select {
		case <-e.closed:
			return
		case <-time.After(thawPatience):
		}
		err := ThawLeft(context.Background(), e.cfg.Dir, e.cfg.Hypervisor, e.cfg.VM)
		e.noteFrozen(err)
		if err == nil {
			e.stuck.Store(false)
			return
		}
	}
}

// noteFrozen keeps the condition of a guest that may be frozen.
func (e *Engine) noteFrozen(err error) {
	if err == nil {
		e.history.mark("guest-may-be-frozen", nil)
		return
	}
	e.log.Error("the guest may be frozen", "error", err)
	e.history.mark("guest-may-be-frozen", &switchback.Condition{Severity: switchback.SeverityCritical, Since: e.now(),
		Cause:  "the guest's file systems were frozen, and the thaw is not confirmed: " + err.Error(),
		Remedy: "it is tried again all the time; else thaw by hand (virsh domfsthaw), or reset the guest"})
}

// wants says what the next point is to be. The operator's wish counts, else the policy's time.
func (e *Engine) wants(o CycleOptions) consistency {
	now := e.now()
	switch every := e.cfg.Policy.AppConsistentEvery; {
	case o.ApplicationConsistent:
		return appRequired
	case every > 0 && now.Sub(e.appTaken) >= every && now.Sub(e.appTried) >= min(every, appRetry):
		return appWanted
	}
	return crashWillDo
}

// guestAnswers refuses what needs a guest agent where none answers.
func guestAnswers(dom hypervisor.Domain) error {
	if dom.GuestAgent == hypervisor.AgentConnected {
		return nil
	}
	why := "the guest agent does not answer"
	if dom.GuestAgent == "" {
		why = "the VM has no channel to a guest agent"
	}
	return switchback.Errorf(switchback.CodeRefused, "no application-consistent point of VM %s: %s", dom.Name, why).
		WithHint("install and start qemu-guest-agent in the guest, on a channel org.qemu.guest_agent.0; or take a crash-consistent point")
}

// missedApp notes that the policy's application-consistent point could not be
// taken; a crash-consistent one takes its place.
func (e *Engine) missedApp(err error) {
	e.appTried = e.now()
	c := switchback.Condition{Severity: switchback.SeverityWarning, Since: e.now(), Cause: "application-consistent points are missing: " + err.Error(),
		Remedy: "points are crash-consistent meanwhile; install and start qemu-guest-agent in the guest, or turn the policy off: vm edit --app-consistent-every 0"}
	if e.history.mark("application-consistent-points-missing", &c) {
		e.log.Warn("no application-consistent point", "error", err)
	}
}

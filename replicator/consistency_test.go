package replicator

import (
	"context"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// freezingVM is a fakeVM with a guest agent.
type freezingVM struct {
	*fakeVM
	agent      hypervisor.AgentChannel
	frozen     atomic.Bool
	thaws      atomic.Int32
	freezeErr  error
	thawErr    func() error
	beginFails error
	// atBegin is called when the instant is fixed.
	atBegin func()
}

func (vm *freezingVM) Domain(ctx context.Context, id switchback.VMUUID) (hypervisor.Domain, error) {
	d, err := vm.fakeVM.Domain(ctx, id)
	if d.State == hypervisor.StateRunning {
		d.GuestAgent = vm.agent
	}
	return d, err
}

func (vm *freezingVM) Freeze(context.Context, switchback.VMUUID) error {
	vm.frozen.Store(true) // some file systems are, also where it fails
	return vm.freezeErr
}

func (vm *freezingVM) Thaw(context.Context, switchback.VMUUID) error {
	vm.thaws.Add(1)
	if vm.thawErr != nil {
		if err := vm.thawErr(); err != nil {
			return err
		}
	}
	vm.frozen.Store(false)
	return nil
}

func (vm *freezingVM) BeginBackup(ctx context.Context, id switchback.VMUUID, spec hypervisor.BackupSpec) error {
	if vm.atBegin != nil {
		vm.atBegin()
	}
	if vm.beginFails != nil {
		return vm.beginFails
	}
	return vm.fakeVM.BeginBackup(ctx, id, spec)
}

// newFreezingPair is a seeded pair whose guest has an agent.
func newFreezingPair(t *testing.T, every time.Duration) (*pair, *freezingVM) {
	p := newPair(t, cycleDisks(), nil)
	vm := &freezingVM{fakeVM: p.vm, agent: hypervisor.AgentConnected}
	p.cfg.Hypervisor, p.cfg.Policy.AppConsistentEvery = vm, every
	p.restart()
	p.cycle(ModeSeed)
	return p, vm
}

func (p *pair) condition(name string) *switchback.Condition {
	for _, c := range p.e.Status().Conditions {
		if c.Name == name {
			return &c
		}
	}
	return nil
}

func (p *pair) thawed(vm *freezingVM) {
	p.t.Helper()
	if vm.frozen.Load() {
		p.t.Error("the guest is frozen")
	}
	if _, err := os.Stat(frozenNote(p.cfg.Dir)); !os.IsNotExist(err) {
		p.t.Errorf("the note: %v", err)
	}
}

// TestAppConsistentPoint: the guest is frozen when the instant is fixed, thawed
// before anything is read, and the note stands meanwhile.
func TestAppConsistentPoint(t *testing.T) {
	p, vm := newFreezingPair(t, 0)
	if r := p.cycle(ModeIncremental); r.Point.Kind != switchback.CrashConsistent || vm.thaws.Load() != 0 {
		t.Errorf("%s, %d thaws", r.Point.Kind, vm.thaws.Load())
	}
	atBegin := false
	vm.atBegin = func() {
		_, err := os.Stat(frozenNote(p.cfg.Dir))
		atBegin = vm.frozen.Load() && err == nil
	}
	r, err := p.e.Cycle(context.Background(), CycleOptions{ApplicationConsistent: true})
	if err != nil || r.Point.Kind != switchback.ApplicationConsistent || r.Frozen <= 0 || !atBegin {
		t.Errorf("%s, frozen for %v, at the instant: %v; %v", r.Point.Kind, r.Frozen, atBegin, err)
	}
	p.equal()
	p.thawed(vm)
	if k := p.target.replica.Head().Kind; k != switchback.ApplicationConsistent {
		t.Errorf("the target holds it as %s", k)
	}
}

// TestAppConsistentRefused: what an operator requires is refused without a guest
// agent, and leaves no condition; the policy's falls back, and says so.
func TestAppConsistentRefused(t *testing.T) {
	for name, c := range map[string]struct {
		break_ func(*freezingVM)
		text   string
	}{
		"no channel": {func(vm *freezingVM) { vm.agent = "" }, "no channel"},
		"no agent": {func(vm *freezingVM) {
			vm.agent, vm.freezeErr = hypervisor.AgentConnected, switchback.Errorf(switchback.CodeUnsupported, "no guest agent")
		}, "no guest agent"},
	} {
		t.Run(name, func(t *testing.T) {
			p, vm := newFreezingPair(t, 0)
			c.break_(vm)
			head := p.target.replica.Head().Sequence
			_, err := p.e.Cycle(context.Background(), CycleOptions{ApplicationConsistent: true})
			if err == nil || !strings.Contains(err.Error(), c.text) || p.target.replica.Head().Sequence != head {
				t.Errorf("%v, head %d", err, p.target.replica.Head().Sequence)
			}
			if list := p.e.Status().Conditions; len(list) > 0 {
				t.Errorf("conditions %+v", list)
			}
			p.thawed(vm)
			p.e.cfg.Policy.AppConsistentEvery = time.Hour
			if r := p.cycle(ModeIncremental); r.Point.Kind != switchback.CrashConsistent {
				t.Errorf("the point is %s", r.Point.Kind)
			}
			if x := p.condition("application-consistent-points-missing"); x == nil || !strings.Contains(x.Cause, c.text) || x.Remedy == "" {
				t.Errorf("condition %+v", x)
			}
			// Once it can be, it is, and the condition goes.
			vm.agent, vm.freezeErr, p.e.appTried = hypervisor.AgentConnected, nil, time.Time{}
			if r := p.cycle(ModeIncremental); r.Point.Kind != switchback.ApplicationConsistent {
				t.Errorf("the point is %s", r.Point.Kind)
			}
			if x := p.condition("application-consistent-points-missing"); x != nil {
				t.Errorf("condition %+v", x)
			}
			if r := p.cycle(ModeIncremental); r.Point.Kind != switchback.CrashConsistent {
				t.Errorf("the next one is %s, too", r.Point.Kind)
			}
			p.thawed(vm)
		})
	}
}

// TestThawWhateverHappens: a backup that cannot begin, a thaw that fails at
// first, an agent that died in between.
func TestThawWhateverHappens(t *testing.T) {
	t.Run("BeginFails", func(t *testing.T) {
		p, vm := newFreezingPair(t, 0)
		vm.beginFails = switchback.Errorf(switchback.CodeTimeout, "the test's begin fails")
		if _, err := p.e.Cycle(context.Background(), CycleOptions{ApplicationConsistent: true}); err == nil {
			t.Error("no error")
		}
		p.thawed(vm)
	})
	t.Run("ThawFails", func(t *testing.T) {
		p, vm := newFreezingPair(t, 0)
		vm.thawErr = func() error { return switchback.Errorf(switchback.CodeUnavailable, "the test's agent does not answer") }
		if r, err := p.e.Cycle(context.Background(), CycleOptions{ApplicationConsistent: true}); err != nil || r.Point.Kind != switchback.ApplicationConsistent {
			t.Errorf("%s, %v", r.Point.Kind, err)
		}
		if c := p.condition("guest-may-be-frozen"); c == nil || c.Severity != switchback.SeverityCritical {
			t.Errorf("condition %+v", c)
		}
		vm.thawErr = nil
		p.cycle(ModeIncremental)
		p.thawed(vm)
		if c := p.condition("guest-may-be-frozen"); c != nil {
			t.Errorf("condition %+v", c)
		}
	})
	t.Run("AgentDied", func(t *testing.T) {
		p, vm := newFreezingPair(t, 0)
		if err := writeNote(p.cfg.Dir, p.cfg.VM); err != nil {
			t.Fatal(err)
		}
		vm.frozen.Store(true)
		if err := ThawLeft(context.Background(), p.cfg.Dir, vm, p.cfg.VM); err != nil {
			t.Fatal(err)
		}
		p.thawed(vm)
		before := vm.thaws.Load()
		if err := ThawLeft(context.Background(), p.cfg.Dir, vm, p.cfg.VM); err != nil || vm.thaws.Load() != before {
			t.Errorf("thawed again without a note: %v", err)
		}
	})
	t.Run("Deadline", func(t *testing.T) {
		p, vm := newFreezingPair(t, 0)
		g, err := p.e.freezeGuest(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		g.limit.Reset(time.Millisecond)
		for range 5000 {
			if !vm.frozen.Load() {
				break
			}
			time.Sleep(time.Millisecond)
		}
		p.thawed(vm)
		if _, early, err := g.thaw(false); !early || err != nil || vm.thaws.Load() != 1 {
			t.Errorf("early %v, %v, %d thaws", early, err, vm.thaws.Load())
		}
	})
}

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/hypervisor"
)

// power is a hypervisor with one domain that can be turned on and off.
type power struct {
	hypervisor.Hypervisor
	dom  hypervisor.Domain
	done []string
	// fail is how many times a domain is not turned off when it is asked for.
	fail int
}

func (p *power) Domain(context.Context, switchback.VMUUID) (hypervisor.Domain, error) {
	return p.dom, nil
}
func (p *power) to(s hypervisor.State, what string) error {
	p.dom.State, p.done = s, append(p.done, what)
	return nil
}
func (p *power) Start(context.Context, switchback.VMUUID, bool) error {
	return p.to(hypervisor.StateRunning, "start")
}
func (p *power) Resume(context.Context, switchback.VMUUID) error {
	return p.to(hypervisor.StateRunning, "resume")
}
func (p *power) Suspend(context.Context, switchback.VMUUID) error {
	return p.to(hypervisor.StatePaused, "suspend")
}
func (p *power) Destroy(context.Context, switchback.VMUUID) error {
	if p.fail > 0 {
		p.fail--
		return errors.New("the monitor does not answer")
	}
	return p.to(hypervisor.StateOff, "destroy")
}
func (p *power) SetAutostart(_ context.Context, _ switchback.VMUUID, on bool) error {
	p.dom.Autostart, p.done = on, append(p.done, fmt.Sprint("autostart ", on))
	return nil
}

// TestLook boots an agent with one VM, lets it look, and lets it hear.
func TestLook(t *testing.T) {
	const lease = time.Minute
	stop := func(a *Assignment) { a.Policy.Fencing.Lease = lease }
	suspend := func(a *Assignment) {
		a.Policy.Fencing = switchback.FencingPolicy{Lease: lease, OnLeaseEnd: switchback.LeaseEndSuspend}
	}
	own, other := fencing.Ruling{Epoch: 4, Site: "home"}, fencing.Ruling{Epoch: 5, Site: "riga"}
	for _, c := range []struct {
		name   string
		change func(*Assignment)
		dom    hypervisor.Domain
		// grant that stands when it looks first; nil = none
		until *time.Duration
		hears fencing.Ruling
		first string // what it does before it hears
		then  string // and after
		role  agentapi.Role
	}{
		{"held until confirmed, then started", func(a *Assignment) { a.Autostart = true }, hypervisor.Domain{State: hypervisor.StateOff}, nil, own, "[]", "[start]", agentapi.RoleSource},
		{"libvirt's autostart is taken over", nil, hypervisor.Domain{State: hypervisor.StateOff, Autostart: true}, nil, own, "[]", "[autostart false start]", agentapi.RoleSource},
		{"not to be started", nil, hypervisor.Domain{State: hypervisor.StateOff}, nil, own, "[]", "[]", agentapi.RoleSource},
		{"started unconfirmed", func(a *Assignment) { a.Autostart, a.Policy.Fencing.StartUnconfirmedAfter = true, 1 }, hypervisor.Domain{State: hypervisor.StateOff}, nil, own, "[start]", "[]", agentapi.RoleSource},
		{"an unconfirmed one that runs goes on", nil, hypervisor.Domain{State: hypervisor.StateRunning}, nil, own, "[]", "[]", agentapi.RoleSource},
		{"active elsewhere", nil, hypervisor.Domain{State: hypervisor.StateRunning}, nil, other, "[]", "[destroy]", agentapi.RoleFenced},
		{"active elsewhere, uncommitted", func(a *Assignment) { a.Role = agentapi.RoleActive }, hypervisor.Domain{State: hypervisor.StateRunning}, nil, other, "[]", "[destroy]", agentapi.RoleActive},
		{"an older answer", nil, hypervisor.Domain{State: hypervisor.StateRunning}, nil, fencing.Ruling{Epoch: 3, Site: "riga"}, "[]", "[]", agentapi.RoleSource},
		{"lease ended, renewed", stop, hypervisor.Domain{State: hypervisor.StateRunning}, new(time.Duration), own, "[suspend destroy]", "[start]", agentapi.RoleSource},
		{"the same, paused", suspend, hypervisor.Domain{State: hypervisor.StateRunning}, new(time.Duration), own, "[suspend]", "[resume]", agentapi.RoleSource},
		{"lease ended, active elsewhere", suspend, hypervisor.Domain{State: hypervisor.StateRunning}, new(time.Duration), other, "[suspend]", "[destroy]", agentapi.RoleFenced},
		{"contested", func(a *Assignment) { a.Override = &Override{Reason: "fire"} }, hypervisor.Domain{State: hypervisor.StateRunning}, nil, other, "[]", "[]", agentapi.RoleSource},
	} {
		hv := &power{dom: c.dom}
		a := &Agent{log: slog.New(slog.DiscardHandler), hv: hv, vms: map[switchback.ProtectionID]*vm{}, cfg: Config{StateDir: t.TempDir(), RunDir: t.TempDir()}, own: "home"}
		var err error
		if a.boot, err = loadBoot(a.cfg.RunDir); err != nil {
			t.Fatal(err)
		}
		v := &vm{agent: a, a: Assignment{Protection: "p-1", VM: "u-1", Name: "web", Epoch: 4, Role: agentapi.RoleSource, Peer: agentapi.Peer{Agent: "a-2", Site: "riga"}}}
		a.vms["p-1"] = v
		if c.change != nil {
			c.change(&v.a)
		}
		if c.until != nil {
			v.grant = fencing.Grant{Epoch: 4, Boot: a.boot.name, Until: hostClock().Add(*c.until), By: "server"}
			if err := a.markRun("begun", "u-1"); err != nil {
				t.Fatal(err)
			}
		}
		looks := func(want, when string) {
			t.Helper()
			hv.done = nil
			for range 3 { // what was done once is not done again
				if err := errors.Join(a.endLeases(t.Context(), a.withoutLease(), (*vm).facts), v.look(t.Context())); err != nil {
					t.Errorf("%s, %s: %v", c.name, when, err)
				}
			}
			if got := fmt.Sprint(hv.done); got != want {
				t.Errorf("%s, %s: %s, want %s", c.name, when, got, want)
			}
		}
		looks(c.first, "before it hears")
		if err := v.hear(t.Context(), c.hears, hostClock(), "server"); err != nil {
			t.Fatal(err)
		}
		looks(c.then, "after it has heard")
		if r := v.assignment().Role; r != c.role {
			t.Errorf("%s: its role is %s, want %s", c.name, r, c.role)
		}
	}
}

// lookBed is an agent with one VM on hv, in a boot of its own.
func lookBed(t *testing.T, hv hypervisor.Hypervisor, change func(*Assignment)) *vm {
	t.Helper()
	a := &Agent{log: slog.New(slog.DiscardHandler), hv: hv, vms: map[switchback.ProtectionID]*vm{}, cfg: Config{StateDir: t.TempDir(), RunDir: t.TempDir()}, own: "home"}
	var err error
	if a.boot, err = loadBoot(a.cfg.RunDir); err != nil {
		t.Fatal(err)
	}
	v := &vm{agent: a, a: Assignment{Protection: "p-1", VM: "u-1", Name: "web", Epoch: 4, Role: agentapi.RoleSource, Peer: agentapi.Peer{Agent: "a-2", Site: "riga"}}}
	a.vms["p-1"] = v
	if change != nil {
		change(&v.a)
	}
	return v
}

// TestStopIsTriedAgain: a VM that may not run here is turned off, however often that fails.
func TestStopIsTriedAgain(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Assignment)
		then   agentapi.Role
	}{
		"superseded source":       {func(a *Assignment) { a.Heard = fencing.Ruling{Epoch: 5, Site: "riga"} }, agentapi.RoleFenced},
		"superseded, uncommitted": {func(a *Assignment) { a.Role, a.Heard = agentapi.RoleActive, fencing.Ruling{Epoch: 5, Site: "riga"} }, agentapi.RoleActive},
		"fenced":                  {func(a *Assignment) { a.Role = agentapi.RoleFenced }, agentapi.RoleFenced},
		"target":                  {func(a *Assignment) { a.Role = agentapi.RoleTarget }, agentapi.RoleTarget},
	} {
		hv := &power{dom: hypervisor.Domain{State: hypervisor.StateRunning}, fail: 3}
		v := lookBed(t, hv, c.change)
		v.event(t.Context(), hypervisor.Event{Kind: hypervisor.EventStarted, UUID: "u-1"}) // a fenced one: the first that fails
		for range 5 {
			v.look(t.Context()) // fails as often as the hypervisor
		}
		if hv.dom.State != hypervisor.StateOff || v.assignment().Role != c.then {
			t.Errorf("%s: it is %s, its role %s", name, hv.dom.State, v.assignment().Role)
		}
	}
	hv := &power{dom: hypervisor.Domain{State: hypervisor.StateRunning}}
	v := lookBed(t, hv, func(a *Assignment) { a.Role, a.Override = agentapi.RoleFenced, &Override{Reason: "fire"} })
	v.notePower(true)
	if err := v.look(t.Context()); err != nil || len(hv.done) > 0 {
		t.Errorf("an overridden one: %v, %v", hv.done, err)
	}
}

// TestSettleContestAgain: where the loser is not turned off at once it is asked again.
func TestSettleContestAgain(t *testing.T) {
	for _, role := range []agentapi.Role{agentapi.RoleSource, agentapi.RoleActive, agentapi.RoleFenced} {
		hv := &power{dom: hypervisor.Domain{State: hypervisor.StateRunning}, fail: 1}
		v := lookBed(t, hv, func(a *Assignment) { a.Role, a.Override, a.Rest = role, &Override{Reason: "fire"}, &Rest{} })
		settle := func() error {
			_, err := v.agent.settleContest(t.Context(), nil, v, agentapi.Task{Epoch: 5}, agentapi.SettleContestParams{Winner: "riga"})
			return err
		}
		if err := settle(); err == nil || v.assignment().Override != nil {
			t.Errorf("%s: not turned off: %v, %+v", role, err, v.assignment().Override)
		}
		for range 2 {
			if err := settle(); err != nil || hv.dom.State != hypervisor.StateOff {
				t.Errorf("%s: asked again: %v, it is %s", role, err, hv.dom.State)
			}
		}
		as := v.assignment()
		if owns := as.Role.Owns() && !v.standing().Superseded(); owns || as.Rest.Distrust == "" {
			t.Errorf("%s: the loser is %s, its disks: %q", role, as.Role, as.Rest.Distrust)
		}
	}
	v := lookBed(t, &power{}, func(a *Assignment) { a.Role, a.Override = agentapi.RoleActive, &Override{Reason: "fire"} })
	for range 2 {
		if _, err := v.agent.settleContest(t.Context(), nil, v, agentapi.Task{Epoch: 4}, agentapi.SettleContestParams{Winner: "home"}); err != nil {
			t.Fatal(err)
		}
		if d := fencing.Decide(v.standing(), v.moment(false)); d.State != fencing.StateGranted {
			t.Errorf("the winner is %+v", d)
		}
	}
}

// TestLeaseTurnedOff: a VM that the end of its lease stopped comes back, and one
// that runs goes on wherever the change is cut short.
func TestLeaseTurnedOff(t *testing.T) {
	leased := func(a *Assignment) { a.Policy.Fencing.Lease = time.Minute }
	off := func(v *vm) error {
		_, err := v.agent.setPolicy(t.Context(), nil, v, agentapi.Task{Epoch: 4}, agentapi.SetPolicyParams{})
		return err
	}
	active := func(a *Assignment) { leased(a); a.Role = agentapi.RoleActive }
	hv := &power{dom: hypervisor.Domain{State: hypervisor.StateOff}}
	v := lookBed(t, hv, active)
	for _, kind := range []string{"begun", "ended"} {
		if err := v.agent.markRun(kind, "u-1"); err != nil {
			t.Fatal(err)
		}
	}
	if err := off(v); err != nil {
		t.Fatal(err)
	}
	if err := v.look(t.Context()); err != nil || hv.dom.State != hypervisor.StateRunning {
		t.Errorf("%v, it is %s", err, hv.dom.State)
	}

	hv = &power{dom: hypervisor.Domain{State: hypervisor.StateRunning}}
	v = lookBed(t, hv, active)
	if err := v.setGrant("u-1", fencing.Grant{Epoch: 4, Boot: v.agent.boot.name, Until: hostClock().Add(time.Minute), By: "server"}, true); err != nil {
		t.Fatal(err)
	}
	grants := filepath.Dir(v.agent.runPath("grants", "u-1"))
	if err := errors.Join(os.RemoveAll(grants), os.WriteFile(grants, nil, 0o600)); err != nil { // no grant can be written
		t.Fatal(err)
	}
	if err := off(v); err == nil {
		t.Error("a grant was written where none can be")
	}
	v.grant.Until = 1 // long after
	if d := fencing.Decide(v.standing(), v.moment(true)); d.Act != fencing.ActNone {
		t.Errorf("cut short: %+v", d)
	}
}

// many is a hypervisor with many domains, of which one hangs in everything that is asked of it.
type many struct {
	hypervisor.Hypervisor
	mu    sync.Mutex
	state map[switchback.VMUUID]hypervisor.State
	hangs switchback.VMUUID
	done  []string
}

func (m *many) Domain(_ context.Context, id switchback.VMUUID) (hypervisor.Domain, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return hypervisor.Domain{State: m.state[id]}, nil
}
func (m *many) to(ctx context.Context, id switchback.VMUUID, s hypervisor.State, what string) error {
	if id == m.hangs {
		<-ctx.Done()
		return ctx.Err()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state[id], m.done = s, append(m.done, what)
	return nil
}
func (m *many) Suspend(ctx context.Context, id switchback.VMUUID) error {
	return m.to(ctx, id, hypervisor.StatePaused, "suspend")
}
func (m *many) Destroy(ctx context.Context, id switchback.VMUUID) error {
	return m.to(ctx, id, hypervisor.StateOff, "destroy")
}

// TestLeasesEndTogether: all are paused before one is turned off, and one that
// hangs holds up no other; by the agent and by the guard.
func TestLeasesEndTogether(t *testing.T) {
	const n = 8
	for _, byGuard := range []bool{false, true} {
		dir, run := t.TempDir(), t.TempDir()
		boot, err := loadBoot(run)
		if err != nil {
			t.Fatal(err)
		}
		hv := &many{state: map[switchback.VMUUID]hypervisor.State{}, hangs: "u-3"}
		a := &Agent{log: slog.New(slog.DiscardHandler), hv: hv, vms: map[switchback.ProtectionID]*vm{}, cfg: Config{StateDir: dir, RunDir: run}, own: "home", boot: boot}
		for i := range n {
			as := Assignment{Protection: switchback.ProtectionID(fmt.Sprint("p-", i)), VM: switchback.VMUUID(fmt.Sprint("u-", i)), Epoch: 4, Role: agentapi.RoleSource}
			as.Policy.Fencing.Lease = time.Minute
			if err := saveAssignment(a.assignmentDir(), as); err != nil {
				t.Fatal(err)
			}
			a.vms[as.Protection] = &vm{agent: a, a: as}
			hv.state[as.VM] = hypervisor.StateRunning
		}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond) // the one that hangs need not be waited for
		defer cancel()
		if byGuard {
			_, err = a.guardOnce(ctx)
		} else {
			err = a.endLeases(ctx, a.withoutLease(), (*vm).facts)
		}
		if err == nil {
			t.Error("nothing is said of the one that hangs")
		}
		paused := 0
		for i, what := range hv.done {
			if what == "suspend" {
				paused = i + 1
			}
		}
		if paused != n-1 {
			t.Errorf("by the guard %v: %v", byGuard, hv.done)
		}
	}
}

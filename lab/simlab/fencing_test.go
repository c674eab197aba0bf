package simlab_test

import (
	"fmt"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// alone kills the server and an agent, so that the other agent hears from nobody.
func (b *bed) alone(away string) {
	b.t.Helper()
	b.must(b.Kill(simlab.Server, syscall.SIGKILL))
	b.must(b.Kill(away, syscall.SIGKILL))
}

// boots cuts the power of a site and lets it boot.
func (b *bed) boots(site string) {
	b.t.Helper()
	b.must(b.PowerCut(b.t.Context(), site))
	b.must(b.Start(b.t.Context(), site+"-hypervisor"))
	b.must(b.Start(b.t.Context(), site))
}

// local runs a command of an agent's own host.
func (b *bed) local(site string, args ...string) (string, error) {
	b.t.Helper()
	out, err := exec.CommandContext(b.t.Context(), executable, append(append([]string{"agent"}, args...), "--run", b.RunDir(site))...).CombinedOutput()
	return string(out), err
}

// contest overrides at home while nobody answers there, and brings everybody back.
func (b *bed) contest() {
	b.t.Helper()
	b.alone(simlab.Recovery)
	b.must(b.Kill(simlab.Primary, syscall.SIGKILL)) // one that was just confirmed needs no override
	b.must(b.Start(b.t.Context(), simlab.Primary))
	b.until("the override is taken", func() (bool, string) {
		out, err := b.local(simlab.Primary, "override", b.machine.Name, "--reason", "a test")
		return err == nil, out
	})
	b.must(b.Start(b.t.Context(), simlab.Server))
	b.must(b.Start(b.t.Context(), simlab.Recovery))
	b.until("it is contested", func() (bool, string) {
		v := b.vm()
		return v.AtSource != nil && v.AtSource.Ownership != nil && v.AtSource.Ownership.Override != nil, fmt.Sprint(v.Conditions)
	})
}

// state waits until the machine has this state at a site.
func (b *bed) state(site string, want hypervisor.State) {
	b.t.Helper()
	b.until(fmt.Sprintf("it is %s at %s", want, site), func() (bool, string) {
		d, err := b.domain(site)
		return err == nil && d.State == want, fmt.Sprintf("%v, %v", d.State, err)
	})
}

// TestHold boots a site that hears from nobody: its VM, which is to start with its
// host, is held until the peer confirms it; the server stays away.
func TestHold(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.must(b.Driver(simlab.Primary).SetAutostart(t.Context(), b.machine.UUID(), true))
	b.operate(recovery.Protect, fast())
	if d, err := b.domain(simlab.Primary); err != nil || d.Autostart {
		t.Errorf("the hypervisor's own autostart is on: %+v, %v", d.Autostart, err)
	}
	b.alone(simlab.Recovery)
	b.runsAt(simlab.Primary) // one that runs goes on
	b.boots(simlab.Primary)
	b.until("it is held", func() (bool, string) {
		out, err := b.local(simlab.Primary, "status")
		return err == nil && strings.Contains(out, "start-held") && strings.Contains(out, "agent override"), out
	})
	err := b.Driver(simlab.Primary).Start(t.Context(), b.machine.UUID(), false)
	if switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "held by Switchback") || !strings.Contains(err.Error(), "override") {
		t.Errorf("a start by hand: %v", err)
	}
	// A restart of the agent is no confirmation, and no reboot.
	b.must(b.Kill(simlab.Primary, syscall.SIGKILL))
	b.must(b.Start(t.Context(), simlab.Primary))
	time.Sleep(2 * time.Second)
	b.state(simlab.Primary, hypervisor.StateOff)

	b.must(b.Start(t.Context(), simlab.Recovery))
	b.runsAt(simlab.Primary)
	if out, err := b.local(simlab.Primary, "status"); err != nil || !strings.Contains(out, string(fencing.StateGranted)) {
		t.Errorf("%v: %s", err, out)
	}
	b.must(b.Start(t.Context(), simlab.Server))
	b.replicates()
}

// TestOverride starts a VM with nobody's confirmation. It is contested until a
// winner is named: no points, no operation.
func TestOverride(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	if out, err := b.local(simlab.Primary, "override", b.machine.Name, "--reason", "none"); err == nil {
		t.Errorf("an override of a VM that was just confirmed: %s", out)
	}
	b.alone(simlab.Recovery)
	b.boots(simlab.Primary)
	if out, err := b.local(simlab.Primary, "override", b.machine.Name); err == nil {
		t.Errorf("an override without a reason: %s", out)
	}
	if out, err := b.local(simlab.Primary, "override", b.machine.Name, "--reason", "the other site has burnt down"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.must(b.Driver(simlab.Primary).Start(t.Context(), b.machine.UUID(), false))
	b.runsAt(simlab.Primary)

	b.must(b.Start(t.Context(), simlab.Server))
	b.must(b.Start(t.Context(), simlab.Recovery))
	b.until("the server knows", func() (bool, string) {
		for _, c := range b.vm().Conditions {
			if c.Name == "contested" && strings.Contains(c.Cause, "burnt down") {
				return true, ""
			}
		}
		return false, fmt.Sprintf("%+v", b.vm().Conditions)
	})
	newest := func() switchback.Sequence {
		points, err := b.client.Points(t.Context(), b.machine.Name)
		b.must(err)
		return points[len(points)-1].Sequence
	}
	before := newest()
	for _, kind := range []recovery.Kind{recovery.Failover, recovery.TakePoint, recovery.Unprotect} {
		_, err := b.client.Request(t.Context(), b.machine.Name, kind, api.OperationRequest{})
		if switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "contested") {
			t.Errorf("%s of a contested VM: %v", kind, err)
		}
	}
	if _, err := b.client.Request(t.Context(), b.machine.Name, recovery.Resolve, api.OperationRequest{Winner: simlab.Recovery}); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("a winner that has only points: %v", err)
	}
	time.Sleep(3 * time.Second)
	if now := newest(); now != before {
		t.Errorf("point %d was taken of a contested VM", now)
	}
	b.operate(recovery.Resolve, api.OperationRequest{Winner: simlab.Primary})
	b.replicates()
	b.runsAt(simlab.Primary)
	b.operate(recovery.Failover, api.OperationRequest{})
	b.cutOver(simlab.Primary, simlab.Recovery)
}

// TestLease lets a VM run under a lease: it is paused when nobody renews it, and
// goes on when somebody does. A failover whose old side does not answer any more,
// when it is to be fenced, waits until the lease has ended, and goes on.
func TestLease(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	req := fast()
	req.Policy.Fencing = switchback.FencingPolicy{Lease: 10 * time.Second, OnLeaseEnd: switchback.LeaseEndSuspend}
	b.operate(recovery.Protect, req)
	b.runsAt(simlab.Primary)
	b.alone(simlab.Recovery)
	b.state(simlab.Primary, hypervisor.StatePaused)
	b.must(b.Start(t.Context(), simlab.Recovery))
	b.runsAt(simlab.Primary)

	// The agent dies, too: what guards leases beside it goes on.
	b.must(b.Kill(simlab.Primary, syscall.SIGKILL))
	b.state(simlab.Primary, hypervisor.StatePaused)
	b.must(b.Start(t.Context(), simlab.Primary))
	b.runsAt(simlab.Primary)
	b.must(b.Start(t.Context(), simlab.Server))
	b.replicates()

	hit := b.spec(simlab.Primary, "lease", killpoint.Spec("agent", "*", "fence", killpoint.BeforeEffect))
	id := b.begin(recovery.Failover, api.OperationRequest{})
	b.awaitHit(hit)
	b.awaitGone(simlab.Primary)
	died := time.Now()
	var rec operation.Record
	b.eventually(3*time.Minute, "the failover ends", func() (bool, string) {
		var err error
		rec, err = b.client.Operation(t.Context(), id)
		return err == nil && rec.State.Finished(), fmt.Sprintf("%v %s", err, steps(rec))
	})
	if rec.State != operation.StateSucceeded {
		t.Fatalf("%s is %s: %v; %s", rec.Title, rec.State, rec.Error, steps(rec))
	}
	if wait := fencing.TakeoverWait(req.Policy.Fencing); time.Since(died) < wait {
		t.Errorf("the new side has not waited for %v", wait)
	}
	b.must(b.Start(t.Context(), simlab.Primary))
	b.until("the old side has fenced itself", func() (bool, string) {
		v := b.vm()
		return v.AtTarget != nil && v.AtTarget.Role == "fenced", fmt.Sprintf("%+v", v.AtTarget)
	})
	b.cutOver(simlab.Primary, simlab.Recovery)
	b.runsAt(simlab.Recovery)
}

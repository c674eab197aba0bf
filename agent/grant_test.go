package agent

import (
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/fencing"
)

// TestHookAsksForGrant holds the hook, which is shell and sees files only, to what
// package fencing decides.
func TestHookAsksForGrant(t *testing.T) {
	const uuid = switchback.VMUUID("aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee")
	a := &Agent{log: slog.New(slog.DiscardHandler), cfg: Config{StateDir: t.TempDir(), RunDir: t.TempDir(), HookPath: filepath.Join(t.TempDir(), "hooks", "hook"), LibvirtPIDFile: "/nonexistent"}}
	if err := a.installHook(); err != nil {
		t.Fatal(err)
	}
	var err error
	if a.boot, err = loadBoot(a.cfg.RunDir); err != nil {
		t.Fatal(err)
	}
	hook := func(operation string) (string, bool) {
		cmd := exec.Command("sh", a.cfg.HookPath, "web", operation, "begin", "-")
		cmd.Stdin = strings.NewReader("<domain><uuid>" + string(uuid) + "</uuid></domain>")
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return string(out), err == nil
	}
	now := hostClock()
	mine := fencing.Grant{Epoch: 4, Boot: a.boot.name, By: "server"}
	with := func(f func(*fencing.Grant)) *fencing.Grant { g := mine; f(&g); return &g }
	source := Assignment{Protection: "p-1", VM: uuid, Name: "web", Epoch: 4, Role: agentapi.RoleSource, Peer: agentapi.Peer{Site: "riga"}}
	leased := source
	leased.Policy.Fencing.Lease = time.Minute
	for _, c := range []struct {
		name   string
		a      Assignment
		change func(*Assignment)
		grant  *fencing.Grant
		say    string // empty: it may start
	}{
		{"granted", source, nil, &mine, ""},
		{"no grant", source, nil, nil, "no grant"},
		{"of an older epoch", source, nil, with(func(g *fencing.Grant) { g.Epoch = 3 }), "not of epoch 4"},
		{"of an earlier boot", source, nil, with(func(g *fencing.Grant) { g.Boot = "0-1" }), "earlier boot"},
		{"leased", leased, nil, with(func(g *fencing.Grant) { g.Until = now.Add(time.Minute) }), ""},
		{"lease ended", leased, nil, with(func(g *fencing.Grant) { g.Until = 1 }), "lease has ended"},
		{"active", source, func(x *Assignment) { x.Role = agentapi.RoleActive }, &mine, ""},
		{"leaving", source, func(x *Assignment) { x.Leaving = true }, &mine, "may not be started now"},
		{"superseded", source, func(x *Assignment) { x.Heard = fencing.Ruling{Epoch: 5, Site: "riga"} }, &mine, "may not be started now"},
		{"waiting for a lease", source, func(x *Assignment) {
			x.Takeover = &fencing.Takeover{Epoch: 4, Boot: a.boot.name, Since: now, Wait: time.Hour}
		}, &mine, "may not be started now"},
		{"overridden", source, func(x *Assignment) { x.Override = &Override{Reason: "fire"} }, with(func(g *fencing.Grant) { g.By = fencing.ByOverride }), ""},
	} {
		v := &vm{agent: a, a: c.a}
		if c.change != nil {
			c.change(&v.a)
		}
		if err := a.unguard(uuid); err != nil {
			t.Fatal(err)
		}
		if c.grant != nil {
			if err := v.setGrant(uuid, *c.grant, true); err != nil {
				t.Fatal(err)
			}
		}
		if err := v.writeGuard(); err != nil {
			t.Fatal(err)
		}
		out, starts := hook("prepare")
		if starts != (c.say == "") || !strings.Contains(out, c.say) || !starts && (!strings.HasPrefix(out, "held by Switchback: ") || !strings.Contains(out, "switchback ")) {
			t.Errorf("%s: starts: %v, %q", c.name, starts, out)
		}
		if d := fencing.Decide(v.standing(), v.moment(false)); d.MayStart != starts {
			t.Errorf("%s: the hook lets it start: %v, the decision is %+v", c.name, starts, d)
		}
		if out, ok := hook("reconnect"); !ok || out != "" {
			t.Errorf("%s: a reconnect: %v, %q", c.name, ok, out)
		}
		if read, err := a.readGrant(uuid); err != nil || c.grant != nil && (read.Epoch != c.grant.Epoch || read.By != c.grant.By || read.Boot != c.grant.Boot) {
			t.Errorf("%s: read back: %+v, %v", c.name, read, err)
		}
	}
	v := &vm{agent: a, a: source}
	for range 2 {
		if err := v.dropGrant(); err != nil {
			t.Fatal(err)
		}
	}
	if out, starts := hook("prepare"); !starts || out != "" {
		t.Errorf("a VM that is not guarded: %v, %q", starts, out)
	}
}

// TestBootRecord: an agent that is restarted is in the same boot; what an earlier
// boot has left goes.
func TestBootRecord(t *testing.T) {
	dir := t.TempDir()
	a := &Agent{cfg: Config{RunDir: dir}}
	first, err := loadBoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.writeGrant("vm", fencing.Grant{Epoch: 1, Boot: first.name, By: "server"}); err != nil {
		t.Fatal(err)
	}
	again, err := loadBoot(dir)
	if err != nil || again != first {
		t.Errorf("%+v, then %+v, %v", first, again, err)
	}
	if err := os.WriteFile(filepath.Join(dir, "boot"), []byte("another-boot 5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if next, err := loadBoot(dir); err != nil || next.name == first.name || next.up < first.up {
		t.Errorf("after a reboot: %+v, %v", next, err)
	}
	if g, err := a.readGrant("vm"); err != nil || g != (fencing.Grant{}) {
		t.Errorf("a grant outlives the boot: %+v, %v", g, err)
	}
}

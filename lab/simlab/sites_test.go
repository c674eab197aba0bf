package simlab_test

import (
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab/process"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
)

// TestSites works with sites as files and measures what is between them, by the
// command line.
func TestSites(t *testing.T) {
	b := newBed(t)
	want := func(args []string, has ...string) string {
		t.Helper()
		out, err := b.cli(args...)
		if err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
		for _, h := range has {
			if !strings.Contains(out, h) {
				t.Errorf("%v: no %q in\n%s", args, h, out)
			}
		}
		return out
	}
	refused := func(args []string, status string, has ...string) {
		t.Helper()
		out, err := b.cli(args...)
		if err == nil || err.Error() != "exit status "+status {
			t.Errorf("%v: %v, want exit status %s: %s", args, err, status, out)
		}
		for _, h := range has {
			if !strings.Contains(out, h) {
				t.Errorf("%v: no %q in\n%s", args, h, out)
			}
		}
	}
	file := filepath.Join(t.TempDir(), "config.yaml")
	write := func(text string) {
		t.Helper()
		b.must(os.WriteFile(file, []byte(text), 0o600))
	}
	vm := "kind: VM\nname: vm\nhome: primary\nto: recovery\npolicy:\n  interval: 1s\n  retention: {min_points: 3}\n"
	write("kind: Site\nname: third\n---\n" + vm)
	want([]string{"diff", "-f", file}, "create Site third", "create VM vm", "policy.interval: 1s")
	want([]string{"apply", "-f", file, "--dry-run"}, "VM vm: can be done")
	if sites, err := b.client.Sites(t.Context()); err != nil || len(sites) != 2 {
		t.Errorf("a dry run made a site: %v, %v", sites, err)
	}
	want([]string{"apply", "-f", file}, "VM vm: done", "Site third: done")
	want([]string{"apply", "-f", file}, "everything is as the file says")
	if v := b.vm(); v.Phase != switchback.PhaseProtected || v.Policy.Interval != time.Second || v.Policy.Retention.MinPoints != 3 {
		t.Errorf("%s, %+v", v.Phase, v.Policy)
	}
	written := want([]string{"get", "all", "-o", "yaml"}, "kind: Site", "name: third", "min_points: 3", "tiers:")
	write(written)
	want([]string{"diff", "-f", file}, "everything is as the file says")
	write(strings.Replace(vm, "1s", "2s", 1) + "  drill: {schedule: \"@weekly\", network: isolated}\n  checks: [agent]\nnetworks: {lan: lan-b}\ntags: [gold]\npaused: true\n")
	refused([]string{"diff", "-f", file, "--exit-code"}, "4", "policy.interval: 1s -> 2s", "policy.drill.schedule: (unset) -> @weekly", "paused: false -> true", "tags: (unset) -> gold", "networks.lan: (unset) -> lan-b")
	want([]string{"apply", "-f", file}, "VM vm: done")
	if v := b.vm(); !v.Paused || len(v.Tags) != 1 || v.Policy.Drill == nil || v.Policy.Drill.Network != "isolated" || len(v.Policy.Checks) != 1 || v.Networks["lan"] != "lan-b" {
		t.Errorf("%+v", v.Protection)
	}
	write(vm)
	want([]string{"apply", "-f", file}, "VM vm: done")
	if v := b.vm(); v.Paused || len(v.Tags) != 0 || v.Policy.Drill != nil || len(v.Networks) != 0 {
		t.Errorf("%+v", v.Protection)
	}
	write(vm + "  intervall: 3s\n")
	refused([]string{"apply", "-f", file}, "2", "line 8", `unknown field "intervall"`, "known are: interval")
	write(strings.Replace(vm, "to: recovery", "to: third", 1))
	refused([]string{"apply", "-f", file}, "4", "cannot be changed")

	b.must(b.client.DeleteSite(t.Context(), "third"))
	out := want([]string{"site", "test-connectivity", "-o", "json"})
	var c api.Connectivity
	b.must(json.Unmarshal([]byte(out), &c))
	kinds := map[api.LegKind]int{}
	for _, l := range c.Legs {
		kinds[l.Kind]++
		data := l.Kind == api.LegAgentAgent || l.Kind == api.LegServerAgent || l.Kind == api.LegStorage
		if !l.OK || l.Latency <= 0 || data && l.BytesPerSecond <= 0 {
			t.Errorf("leg %+v", l)
		}
		if l.Kind == api.LegAgentAgent && (l.CertificateExpires.IsZero() || l.Version == "") {
			t.Errorf("leg without certificate or version: %+v", l)
		}
	}
	if !c.OK || kinds[api.LegServerAgent] != 2 || kinds[api.LegAgentServer] != 2 || kinds[api.LegAgentAgent] != 2 || kinds[api.LegHypervisor] != 2 || kinds[api.LegStorage] != 2 {
		t.Errorf("legs %v", kinds)
	}
	want([]string{"site", "test-connectivity", "primary"}, "LATENCY", "server", "storage", "MiB free")
	want([]string{"site", "show", "recovery"}, "site recovery: normal", "disks       2", "storage", "scratch", "vm", "target")

	b.must(b.Kill(simlab.Recovery, syscall.SIGKILL))
	refused([]string{"site", "test-connectivity"}, "5", "FAILED", "cannot reach", "remedy: see that 'switchback agent' runs there")
	b.until("the site is critical", func() (bool, string) {
		s, err := b.client.Site(t.Context(), simlab.Recovery)
		return err == nil && s.Health == "critical" && s.Conditions[0].Name == "agent-down", s.Health
	})
	refused([]string{"site", "show", "nowhere"}, "3", "no site")
}

// TestAdoptWithOneSide loses server and target agent together: the source is
// adopted alone, the target when it is back.
func TestAdoptWithOneSide(t *testing.T) {
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	b.runsAt(simlab.Primary)
	b.replicates()
	b.must(b.Kill(simlab.Recovery, syscall.SIGKILL))
	key := b.loseServer()
	primary, away := b.addressOf(simlab.Primary), b.addressOf(simlab.Recovery)
	out, err := b.cli("site", "adopt", "--take-over", "--recovery-key", key, primary)
	if err != nil || !strings.Contains(out, "missing: cannot reach") || !strings.Contains(out, "did not answer") {
		t.Fatalf("%v: %s", err, out)
	}
	b.must(b.AwaitAgent(t.Context(), simlab.Primary, time.Time{}))
	v := b.vm()
	if v.Phase != switchback.PhaseProtected || v.MintAbove <= v.Epoch || string(v.Target) != simlab.Recovery {
		t.Errorf("%s to %s, epoch %d, the next above %d", v.Phase, v.Target, v.Epoch, v.MintAbove)
	}
	b.must(b.Start(t.Context(), simlab.Recovery))
	if out, err = b.cli("site", "adopt", "--take-over", "--recovery-key", key, away); err != nil || !strings.Contains(out, "adopted") {
		t.Fatalf("%v: %s", err, out)
	}
	b.must(b.AwaitAgent(t.Context(), simlab.Recovery, time.Time{}))
	b.replicates()
	before := b.vm().Epoch
	b.operate(recovery.Failover, api.OperationRequest{})
	b.runsAt(simlab.Recovery)
	if v := b.vm(); v.Epoch <= before {
		t.Errorf("epoch %d after %d", v.Epoch, before)
	}
	// An agent that was killed goes on as what it has become.
	b.must(b.Kill(simlab.Primary, syscall.SIGKILL))
	b.must(b.Start(t.Context(), simlab.Primary))
	b.must(b.AwaitAgent(t.Context(), simlab.Primary, time.Now()))
	b.operate(recovery.Cancel, api.OperationRequest{})
	b.runsAt(simlab.Primary)
}

// TestMoveToAnotherInstallation moves agents out of a living installation: its
// server cannot command them any more.
func TestMoveToAnotherInstallation(t *testing.T) {
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	b.runsAt(simlab.Primary)
	b.replicates()
	key := filepath.Join(filepath.Dir(b.ConfigDir()), "recovery.key")
	dir := filepath.Join(memoryDir(t), "other")
	kept := filepath.Join(t.TempDir(), "other.key")
	if out, err := b.cli("server", "init", "--state", dir, "--recovery-key", kept); err != nil || !strings.Contains(out, kept) {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := os.Stat(filepath.Join(dir, "recovery.key")); !os.IsNotExist(err) {
		t.Errorf("the recovery key lies beside the server: %v", err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	b.must(err)
	address := ln.Addr().String()
	b.must(ln.Close())
	p, err := process.Start(exec.Command(executable, "server", "--state", dir, "--listen", address), filepath.Join(b.LogDir(), "other.log"))
	b.must(err)
	t.Cleanup(func() { p.Kill(syscall.SIGKILL) })
	other, err := api.Dial(filepath.Join(dir, "admin"))
	b.must(err)
	b.until("the other server answers", func() (bool, string) {
		other, err = api.Dial(filepath.Join(dir, "admin"))
		if err == nil {
			_, err = other.Sites(t.Context())
		}
		return err == nil, ""
	})
	b.until("the agent's own server has answered it", func() (bool, string) {
		out, err := b.cli("--config", filepath.Join(dir, "admin"), "site", "adopt", "--recovery-key", key, b.addressOf(simlab.Primary))
		return err != nil && strings.Contains(out, "it is not lost"), out
	})
	if out, err := b.cli("--config", filepath.Join(dir, "admin"), "site", "adopt", "--take-over", "--recovery-key", key, b.addressOf(simlab.Primary)); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.until("the old server is without agents", func() (bool, string) {
		_, err := b.client.Request(t.Context(), "vm", recovery.TakePoint, api.OperationRequest{})
		agents, aerr := b.client.Agents(t.Context())
		return aerr == nil && !agents[0].Healthy && !agents[1].Healthy && err != nil, ""
	})
	b.client = other
	b.replicates()
	b.operate(recovery.Failover, api.OperationRequest{})
	b.runsAt(simlab.Recovery)
}

// TestAdoptEndedCertificate: an agent whose certificate ended while its server was
// away for too long is taken back by the same server, with the recovery key.
func TestAdoptEndedCertificate(t *testing.T) {
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	b.runsAt(simlab.Primary)
	state := filepath.Dir(b.ConfigDir())
	b.must(b.Kill(simlab.Recovery, syscall.SIGKILL))
	ca, err := transport.OpenCA(filepath.Join(state, "ca"))
	b.must(err)
	dir := filepath.Join(b.StateDir(simlab.Recovery), "identity")
	was, err := transport.LoadCredentials(dir)
	b.must(err)
	ended, err := ca.Issue(was.Identity(), -time.Minute)
	b.must(err)
	b.must(transport.SaveCredentials(dir, ended))
	b.must(b.Start(t.Context(), simlab.Recovery))
	if out, err := b.cli("site", "test-connectivity", "recovery"); err == nil || !strings.Contains(out, "expired") {
		t.Errorf("%v: %s", err, out)
	}
	began := time.Now()
	if out, err := b.cli("site", "adopt", "--recovery-key", filepath.Join(state, "recovery.key"), b.addressOf(simlab.Recovery)); err != nil || !strings.Contains(out, "known") {
		t.Fatalf("%v: %s", err, out)
	}
	b.must(b.AwaitAgent(t.Context(), simlab.Recovery, began))
	b.replicates()
}

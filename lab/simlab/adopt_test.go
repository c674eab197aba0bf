package simlab_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"

	switchback "github.com/switchback-dr/switchback"
)

var keyEncoding = base64.RawURLEncoding

var everyLoss = flag.Bool("adopt.all", false, "lose the server after every step of every operation, not after a few")

// cli runs the product's command line.
func (b *bed) cli(args ...string) (string, error) {
	b.t.Helper()
	cmd := exec.CommandContext(b.t.Context(), executable, append([]string{"--config", b.ConfigDir()}, args...)...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (b *bed) addressOf(site string) string {
	b.t.Helper()
	raw, err := os.ReadFile(filepath.Join(b.StateDir(site), "identity", "agent.json"))
	b.must(err)
	var id struct{ Address string }
	b.must(json.Unmarshal(raw, &id))
	return id.Address
}

// loseServer deletes all that the server had, and starts a new installation in
// its place. It returns where the lost one's recovery key was kept.
func (b *bed) loseServer() (key string) {
	b.t.Helper()
	dir := filepath.Dir(b.ConfigDir())
	kept, err := os.ReadFile(filepath.Join(dir, "recovery.key"))
	b.must(err)
	key = filepath.Join(b.t.TempDir(), "recovery.key")
	b.must(os.WriteFile(key, kept, 0o600))
	if b.Process(simlab.Server).Alive() {
		b.must(b.Kill(simlab.Server, syscall.SIGKILL))
	}
	b.must(os.RemoveAll(dir))
	b.must(b.Start(b.t.Context(), simlab.Server))
	b.client, err = b.Client()
	b.must(err)
	return key
}

// adopt adopts both agents by naming one.
func (b *bed) adopt(key string) api.Adoption {
	b.t.Helper()
	// Nobody has to wait before a lost server is replaced but a test that does not
	// want to say --take-over.
	out, err := b.cli("site", "adopt", "-o", "json", "--take-over", "--recovery-key", key, b.addressOf(simlab.Recovery))
	if err != nil {
		b.t.Fatalf("adopt: %v: %s", err, out)
	}
	var a api.Adoption
	if err := json.Unmarshal([]byte(out), &a); err != nil {
		b.t.Fatalf("%v: %s", err, out)
	}
	for _, site := range simlab.Sites {
		b.must(b.AwaitAgent(b.t.Context(), site, time.Time{}))
	}
	for _, vm := range a.VMs {
		if vm.Operation != "" {
			if rec := b.end(vm.Operation); rec.State != operation.StateSucceeded {
				b.t.Fatalf("%s after the adoption is %s: %v", rec.Title, rec.State, rec.Error)
			}
		}
	}
	return a
}

// TestServerLost is the loss of the server while a VM is protected: what agents
// hold is adopted, and goes on.
func TestServerLost(t *testing.T) {
	b := newBed(t)
	req := fast()
	req.Networks = map[string]string{"lan": "lan-b"}
	b.operate(recovery.Protect, req)
	b.runsAt(simlab.Primary)
	b.until("points", func() (bool, string) {
		points, err := b.client.Points(t.Context(), "vm")
		return err == nil && len(points) >= 3, ""
	})
	before := b.vm()
	b.until("both agents keep the record", func() (bool, string) {
		v := b.vm()
		for _, st := range []*agentapi.VMStatus{v.AtSource, v.AtTarget} {
			if st == nil || st.RecordVersion != v.Version {
				return false, ""
			}
		}
		return true, ""
	})
	points, err := b.client.Points(t.Context(), "vm")
	b.must(err)
	key := b.loseServer()
	address := b.addressOf(simlab.Recovery)

	refused := func(why string, args ...string) {
		t.Helper()
		out, err := b.cli(append([]string{"site", "adopt"}, args...)...)
		if err == nil || !strings.Contains(out, why) || !strings.Contains(out, "remedy: ") {
			t.Errorf("adopt %v: %v: %s; want %q with a remedy", args, err, out, why)
		}
	}
	refused("another installation", address)
	foreign := filepath.Join(filepath.Dir(b.ConfigDir()), "recovery.key") // of the new installation itself
	refused("no agent of the installation that the recovery key is of", "--recovery-key", foreign, address)
	forged := filepath.Join(t.TempDir(), "forged.key")
	b.must(os.WriteFile(forged, forgeKey(t, key, foreign), 0o600))
	refused("not made with the recovery key", "--recovery-key", forged, address)

	out, err := b.cli("site", "adopt", "--dry-run", "--recovery-key", key, address)
	if err != nil || !strings.Contains(out, "would be adopted") || !strings.Contains(out, "protected") {
		t.Errorf("dry run: %v: %s", err, out)
	}
	if sites, err := b.client.Sites(t.Context()); err != nil || len(sites) != 0 {
		t.Errorf("after the dry run there are sites: %v, %v", sites, err)
	}

	a := b.adopt(key)
	if len(a.Agents) != 2 || len(a.VMs) != 1 || a.VMs[0].Outcome != api.VMAdopted || a.VMs[0].Next != "" {
		t.Fatalf("adopted: %+v", a)
	}
	after := b.vm()
	if after.Phase != switchback.PhaseProtected || after.Epoch < before.Epoch || after.Home != before.Home || after.Source != before.Source ||
		after.Networks["lan"] != "lan-b" || after.Policy.Commit != before.Policy.Commit || after.CreatedAt != before.CreatedAt || after.ID != before.ID {
		t.Errorf("it was\n%+v\nand is\n%+v", before.Protection, after.Protection)
	}
	have, err := b.client.Points(t.Context(), "vm")
	b.must(err)
	known := map[string]bool{}
	for _, p := range have {
		known[p.Digest] = true
	}
	for _, p := range points[1:] { // the oldest may be folded by now
		if !known[p.Digest] {
			t.Errorf("point %d is lost", p.Sequence)
		}
	}
	newest := have[len(have)-1].Sequence
	b.until("a new point", func() (bool, string) {
		v := b.vm()
		return v.LastPoint != nil && v.LastPoint.Sequence > newest, ""
	})
	out, err = b.cli("site", "adopt", "--recovery-key", key, address)
	if err != nil || !strings.Contains(out, "belongs here already") || !strings.Contains(out, "known") {
		t.Errorf("adopted again: %v: %s", err, out)
	}
	b.operate(recovery.Failover, api.OperationRequest{})
	b.cutOver(simlab.Primary, simlab.Recovery)
	b.runsAt(simlab.Recovery)
	b.operate(recovery.Commit, api.OperationRequest{})
	b.operate(recovery.Reprotect, api.OperationRequest{})
	b.operate(recovery.Failback, api.OperationRequest{})
	b.runsAt(simlab.Primary)
}

// forgeKey is the key of another installation that claims to be of the first.
func forgeKey(t *testing.T, of, with string) []byte {
	t.Helper()
	parts := func(file string) map[string]any {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return decodeKey(t, text)
	}
	real, other := parts(of), parts(with)
	real["seed"] = other["seed"]
	return encodeKey(t, real)
}

// loss is a moment at which the server is lost.
type loss struct {
	Kind recovery.Kind
	Step string
	// Request and the path to where the operation is possible.
	Request api.OperationRequest
	Before  []recovery.Kind
	// Phase and Site are where it ends up, all by itself.
	Phase switchback.Phase
	Site  string
	Often bool
}

var away = []recovery.Kind{recovery.Failover}

var losses = []loss{
	{Kind: recovery.Protect, Step: "replicate", Phase: switchback.PhaseProtected, Site: simlab.Primary, Often: true},
	{Kind: recovery.Failover, Step: "sync", Phase: switchback.PhaseProtected, Site: simlab.Primary},
	{Kind: recovery.Failover, Step: "hold", Phase: switchback.PhaseProtected, Site: simlab.Primary},
	{Kind: recovery.Failover, Step: "shutdown", Phase: switchback.PhaseProtected, Site: simlab.Primary},
	{Kind: recovery.Failover, Step: "final-point", Phase: switchback.PhaseProtected, Site: simlab.Primary},
	{Kind: recovery.Failover, Step: "fence", Phase: switchback.PhaseProtected, Site: simlab.Primary, Often: true},
	{Kind: recovery.Failover, Step: "activate", Phase: switchback.PhaseProtected, Site: simlab.Primary},
	{Kind: recovery.Failover, Step: "start", Phase: switchback.PhaseSwitched, Site: simlab.Recovery},
	{Kind: recovery.Failover, Step: "check", Phase: switchback.PhaseSwitched, Site: simlab.Recovery},
	{Kind: recovery.ChangePoint, Step: "change", Before: away, Request: api.OperationRequest{Point: "latest"}, Phase: switchback.PhaseSwitched, Site: simlab.Recovery},
	{Kind: recovery.Cancel, Step: "undo", Before: away, Phase: switchback.PhaseProtected, Site: simlab.Primary},
	{Kind: recovery.Commit, Step: "fold", Before: away, Phase: switchback.PhaseCommitted, Site: simlab.Recovery},
	{Kind: recovery.Commit, Step: "collapse", Before: away, Phase: switchback.PhaseCommitted, Site: simlab.Recovery, Often: true},
	{Kind: recovery.Commit, Step: "settle", Before: away, Phase: switchback.PhaseCommitted, Site: simlab.Recovery},
	{Kind: recovery.Commit, Step: "retire", Before: away, Phase: switchback.PhaseCommitted, Site: simlab.Recovery},
	{Kind: recovery.Reprotect, Step: "replica", Before: []recovery.Kind{recovery.Failover, recovery.Commit}, Phase: switchback.PhaseProtected, Site: simlab.Recovery},
	{Kind: recovery.Reprotect, Step: "replicate", Before: []recovery.Kind{recovery.Failover, recovery.Commit}, Phase: switchback.PhaseProtected, Site: simlab.Recovery},
}

// TestServerLostUnderWay loses the server after the effect of a step, before its
// outcome is known to anybody: the new one leads on or takes back.
func TestServerLostUnderWay(t *testing.T) {
	b := newBed(t)
	for _, l := range losses {
		if !l.Often && !*everyLoss {
			continue
		}
		ok := t.Run(string(l.Kind)+"/"+l.Step, func(t *testing.T) {
			was := b.t
			b.t = t
			defer func() { b.t = was }()
			if l.Kind == recovery.Protect {
				l.Request = fast()
			} else if b.vm().ID == "" {
				b.operate(recovery.Protect, fast())
				b.runsAt(simlab.Primary)
			}
			for _, k := range l.Before {
				b.operate(k, api.OperationRequest{})
			}
			// The intention is what the agents' copy of the record has; the rest are facts.
			waits := b.spec(simlab.Server, "wait", "hold "+killpoint.Spec("server", string(l.Kind), l.Step, killpoint.BeforeEffect))
			id := b.begin(l.Kind, l.Request)
			b.awaitHit(waits)
			epoch := b.vm().Epoch
			time.Sleep(2500 * time.Millisecond) // a report
			hit := b.spec(simlab.Server, "loss", killpoint.Spec("server", string(l.Kind), l.Step, killpoint.AfterEffect))
			b.must(os.Remove(waits))
			b.awaitHit(hit)
			t.Logf("lost in %s, %s", id, l.Step)
			b.must(os.Remove(hit))
			a := b.adopt(b.loseServer())
			v := b.vm()
			t.Logf("%s: next %s (%s), phase %s, epoch %d to %d", a.VMs[0].Outcome, a.VMs[0].Next, a.VMs[0].Why, v.Phase, epoch, v.Epoch)
			if v.Phase != l.Phase || string(v.Source) != l.Site || v.Epoch < epoch {
				t.Errorf("it is %s at %s under epoch %d, want %s at %s, from %d on", v.Phase, v.Source, v.Epoch, l.Phase, l.Site, epoch)
			}
			b.runsAt(l.Site)
			if l.Phase == switchback.PhaseProtected {
				b.replicates()
			}
			b.home()
		})
		if !ok {
			return
		}
	}
}

// home brings the VM back to being protected at its home, whatever it takes: the
// adopted state is one that everything can go on from.
func (b *bed) home() {
	b.t.Helper()
	for range 6 {
		v := b.vm()
		switch {
		case v.Phase == switchback.PhaseSwitched && string(v.Source) == simlab.Recovery:
			b.operate(recovery.Cancel, api.OperationRequest{})
		case v.Phase == switchback.PhaseSwitched:
			b.operate(recovery.Commit, api.OperationRequest{Snapshots: "drop"})
		case v.Phase == switchback.PhaseCommitted:
			b.operate(recovery.Reprotect, api.OperationRequest{})
		case v.Phase == switchback.PhaseProtected && string(v.Source) == simlab.Recovery:
			b.operate(recovery.Failback, api.OperationRequest{})
		case v.Phase == switchback.PhaseProtected:
			b.runsAt(simlab.Primary)
			for _, st := range []*agentapi.VMStatus{v.AtSource, v.AtTarget} {
				for _, s := range st.Snapshots {
					b.operate(recovery.DropSnapshot, api.OperationRequest{Snapshot: s.Name})
				}
			}
			return
		default:
			b.t.Fatalf("it is %s at %s", v.Phase, v.Source)
		}
	}
	b.t.Fatal("it does not come home")
}

// TestRestoredServerLearns restores a backup of before a failover: the server
// finds out from its agents where the VM is now.
func TestRestoredServerLearns(t *testing.T) {
	b := newBed(t)
	b.operate(recovery.Protect, fast())
	b.runsAt(simlab.Primary)
	state := filepath.Dir(b.ConfigDir())
	backup := filepath.Join(t.TempDir(), "backup")
	if out, err := b.cli("server", "backup", "--state", state, backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.operate(recovery.Failover, api.OperationRequest{})
	b.operate(recovery.Commit, api.OperationRequest{})
	now := b.vm()
	b.until("the agents keep the record", func() (bool, string) {
		v := b.vm()
		return v.AtSource.RecordVersion == v.Version, ""
	})
	b.must(b.Kill(simlab.Server, syscall.SIGKILL))
	b.must(os.RemoveAll(state))
	if out, err := b.cli("server", "restore", "--state", state, backup); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.must(b.Start(t.Context(), simlab.Server))
	var err error
	b.client, err = b.Client()
	b.must(err)
	b.until("the server learns", func() (bool, string) {
		v := b.vm()
		return v.Phase == switchback.PhaseCommitted && v.Epoch == now.Epoch && v.Source == now.Source, string(v.Phase)
	})
	b.home()
}

func decodeKey(t *testing.T, text []byte) map[string]any {
	t.Helper()
	for line := range bytes.Lines(text) {
		if body, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "sbrecovery1."); ok {
			raw, err := keyEncoding.DecodeString(body)
			if err != nil {
				t.Fatal(err)
			}
			var m map[string]any
			if err := json.Unmarshal(raw, &m); err != nil {
				t.Fatal(err)
			}
			return m
		}
	}
	t.Fatal("no key")
	return nil
}

func encodeKey(t *testing.T, m map[string]any) []byte {
	t.Helper()
	raw, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return []byte("sbrecovery1." + keyEncoding.EncodeToString(raw) + "\n")
}

package lab

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/recovery"
)

// TestServerLost loses the server with all that it had, while a guest is
// switched and another protected: a new one adopts both from the agents, points
// included, without their guests noticing, and leads on.
func TestServerLost(t *testing.T) {
	f := addGuest(t, Guest{Name: "adopted"})
	g := addGuest(t, Guest{Name: "away"})
	f.protect()
	g.protect()
	g.operate(recovery.Failover, api.OperationRequest{})
	g.writes(Recovery)
	f.morePoints(2)
	points, before := f.points(), [2]api.VM{f.vm(), g.vm()}
	qemus := [2]int{f.qemu(), g.qemu()}
	f.eventually(15e9, "the agents keep the records", func() (bool, string) {
		a, b := f.vm(), g.vm()
		return a.AtTarget.RecordVersion == a.Version && b.AtSource.RecordVersion == b.Version, ""
	})

	state := filepath.Dir(f.ConfigDir())
	key := filepath.Join(t.TempDir(), "recovery.key")
	text, err := os.ReadFile(filepath.Join(state, "recovery.key"))
	f.must(err)
	f.must(os.WriteFile(key, text, 0o600))
	f.must(f.KillServer(syscall.SIGKILL))
	f.must(os.RemoveAll(state))
	f.must(f.StartServer(t.Context()))
	f.bed.client, err = f.Client()
	f.must(err)

	adopt := func(args ...string) (string, error) {
		args = append([]string{"--config", f.ConfigDir(), "site", "adopt", "--take-over", f.AgentAddress(Recovery)}, args...)
		out, err := exec.CommandContext(t.Context(), f.cfg.Executable, args...).CombinedOutput()
		return string(out), err
	}
	if out, err := adopt(); err == nil || !strings.Contains(out, "recovery key") {
		t.Errorf("adopted without a proof: %v: %s", err, out)
	}
	out, err := adopt("--recovery-key", key)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("\n%s", out)
	f.must(f.waitHealthy(t.Context(), f.client))
	for i, v := range []api.VM{f.vm(), g.vm()} {
		was := before[i]
		if v.Phase != was.Phase || v.Source != was.Source || v.Home != was.Home || v.Epoch < was.Epoch || v.ID != was.ID {
			t.Errorf("%s is %s at %s under epoch %d, it was %s at %s under %d", v.Name, v.Phase, v.Source, v.Epoch, was.Phase, was.Source, was.Epoch)
		}
	}
	have, now := map[string]bool{}, f.points()
	for _, p := range now {
		have[p.Digest] = true
	}
	for _, p := range points { // older ones are folded meanwhile, by the policy
		if p.Sequence > now[0].Sequence && !have[p.Digest] {
			t.Errorf("point %d is lost", p.Sequence)
		}
	}
	if !have[points[len(points)-1].Digest] {
		t.Error("the newest point is lost")
	}
	f.incremental(f.morePoints(2))
	if is := [2]int{f.qemu(), g.qemu()}; is != qemus {
		t.Errorf("the guests' processes were %v and are %v", qemus, is)
	}
	f.operate(recovery.Failover, api.OperationRequest{})
	f.cutOver(Primary, Recovery)
	f.writes(Recovery)
	g.operate(recovery.Commit, api.OperationRequest{})
	g.plain(Recovery)
	g.writes(Recovery)
	if v := g.vm(); v.Phase != switchback.PhaseCommitted || len(v.Seeds[Primary]) != 1 {
		t.Errorf("%s, seeds %v", v.Phase, v.Seeds)
	}
}

package agent

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/internal/durable"
)

func TestAssignments(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "assignments")
	if list, err := loadAssignments(dir); err != nil || list != nil {
		t.Fatalf("before the first one: %v, %v", list, err)
	}
	full := Assignment{Protection: "p-1", VM: "uuid", Name: "web", Epoch: 7, Role: agentapi.RoleActive,
		Peer: agentapi.Peer{Agent: "a-2", Site: "riga", Address: "riga:1"}, Policy: switchback.DefaultPolicy(), Held: true,
		Disks: []switchback.Disk{{Name: "vda", SizeBytes: 1 << 30, Path: "vda.qcow2", Format: "qcow2"}},
		Dir:   "dir", ReplicaDir: "dir/journal-7", BaseCheckpoint: "sb-6-0", Session: "session",
		MustSend: map[string]extent.Set{"vda": extent.NewSet(extent.Range{Offset: 4096, Length: 8192})},
		Run: &Run{Epoch: 7, Sequence: 3, Socket: "sock", Pin: "run-7", Overlays: map[string]string{"vda": "overlay"}, Checkpoint: "sb-7-0",
			Started: true, StartedAt: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), CopiedBytes: map[string]int64{"vda": 9}, Folded: true,
			Abandoned: map[string]extent.Set{"vda": extent.NewSet(extent.Range{Length: 512})}},
		Rest: &Rest{Point: switchback.Point{Sequence: 2}, Files: map[string]FileIdentity{"vda": {Inode: 1, SizeBytes: 2, ModTimeNs: 3}}}, Autostart: true}
	other := Assignment{Protection: "p-2", Role: agentapi.RoleTarget, Disks: []switchback.Disk{}}
	for _, a := range []Assignment{full, other, full} { // replacing one is no trouble
		if err := saveAssignment(dir, a); err != nil {
			t.Fatal(err)
		}
	}
	// What a crash may leave does not count.
	if err := os.WriteFile(filepath.Join(dir, "p-3.json.tmp"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := loadAssignments(dir)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]Assignment{full, other}, got); d != "" {
		t.Error(d)
	}
	if st, err := os.Stat(filepath.Join(dir, "p-1.json")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	// Guessing is worse than stopping.
	if err := os.WriteFile(filepath.Join(dir, "p-2.json"), []byte(`{"protection":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadAssignments(dir); switchback.CodeOf(err) != switchback.CodeCorrupt || !strings.Contains(err.Error(), "p-2.json") {
		t.Errorf("a damaged assignment: %v", err)
	}
	for range 2 { // removing what is gone is no error
		if err := durable.Remove(filepath.Join(dir, "p-2.json")); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
}

func TestFileIdentity(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	old := time.Unix(1000, 5)
	write := func(b string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	write("content")
	first, err := identify(path)
	if err != nil {
		t.Fatal(err)
	}
	if first.SizeBytes != 7 || first.ModTimeNs != old.UnixNano() || first.Inode == 0 {
		t.Errorf("identity %+v", first)
	}
	for _, c := range []struct {
		name string
		do   func() error
		same bool
	}{
		{"reading", func() error { _, err := os.ReadFile(path); return err }, true},
		{"changing its mode", func() error { return os.Chmod(path, 0o640) }, true},
		{"writing", func() error { return os.WriteFile(path, []byte("CONTENT"), 0o600) }, false},
		{"growing", func() error { err := os.Truncate(path, 8); return errors.Join(err, os.Chtimes(path, old, old)) }, false},
		{"replacing by an equal file", func() error {
			other := path + ".new"
			return errors.Join(os.WriteFile(other, []byte("content"), 0o600), os.Chtimes(other, old, old), os.Rename(other, path))
		}, false},
	} {
		if c.name != "replacing by an equal file" {
			write("content")
		}
		before, err := identify(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.do(); err != nil {
			t.Fatal(err)
		}
		if now, err := identify(path); err != nil || (now == before) != c.same {
			t.Errorf("%s: %+v, then %+v (%v)", c.name, before, now, err)
		}
	}
	if _, err := identify(path + ".gone"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
}

// TestHook runs the hook as libvirtd does: NAME OPERATION SUB-OPERATION EXTRA,
// the definition on standard input.
func TestHook(t *testing.T) {
	const fenced, free = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee", "11111111-bbbb-cccc-dddd-eeeeeeeeeeee"
	a := &Agent{cfg: Config{StateDir: t.TempDir()}}
	if err := a.setFence(fenced, "VM web is active at site riga (epoch 2)"); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "hook")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(hookScript, "@FENCE_DIR@", a.fenceDir())), 0o700); err != nil {
		t.Fatal(err)
	}
	xml := func(uuid string) string {
		return "<domain type='kvm'>\n  <name>web</name>\n  <uuid>" + uuid + "</uuid>\n  <metadata><uuid>" + free + "</uuid></metadata>\n</domain>\n"
	}
	run := func(stdin string, args ...string) (int, string) {
		t.Helper()
		cmd := exec.Command("sh", append([]string{path, "web"}, args...)...)
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return cmd.ProcessState.ExitCode(), string(out)
	}
	for _, c := range []struct {
		name   string
		stdin  string
		args   []string
		refuse bool
	}{
		{"start of a fenced VM", xml(fenced), []string{"prepare", "begin", "-"}, true},
		{"the same in capitals", xml(strings.ToUpper(fenced)), []string{"prepare", "begin", "-"}, true},
		{"start of another VM", xml(free), []string{"prepare", "begin", "-"}, false},
		{"reconnect of a fenced VM", xml(fenced), []string{"reconnect", "begin", "-"}, false},
		{"start stage of a fenced VM", xml(fenced), []string{"start", "begin", "-"}, false},
		{"started", xml(fenced), []string{"started", "begin", "-"}, false},
		{"release", xml(fenced), []string{"release", "end", "-"}, false},
		{"stopped", xml(fenced), []string{"stopped", "end", "-"}, false},
		{"migrate", xml(fenced), []string{"migrate", "begin", "-"}, false},
		{"prepare end", xml(fenced), []string{"prepare", "end", "-"}, false},
		{"no definition", "", []string{"prepare", "begin", "-"}, false},
		{"no arguments", xml(fenced), nil, false},
		{"a name that wants to be a path", "<uuid>../../etc/passwd</uuid>", []string{"prepare", "begin", "-"}, false},
	} {
		status, out := run(c.stdin, c.args...)
		if c.refuse && (status == 0 || out != "fenced by Switchback: VM web is active at site riga (epoch 2)\n") {
			t.Errorf("%s: status %d, %q", c.name, status, out)
		}
		if !c.refuse && (status != 0 || out != "") {
			t.Errorf("%s: status %d, %q; want silence", c.name, status, out)
		}
	}
	for range 2 {
		if err := a.clearFence(fenced); err != nil {
			t.Fatal(err)
		}
	}
	if status, out := run(xml(fenced), "prepare", "begin", "-"); status != 0 || out != "" {
		t.Errorf("after the fence is gone: status %d, %q", status, out)
	}
}

func TestCheckEpoch(t *testing.T) {
	v := &vm{agent: &Agent{}, a: Assignment{Epoch: 5}}
	for epoch, code := range map[switchback.Epoch]switchback.Code{0: switchback.CodeInvalid, 4: switchback.CodeStaleEpoch, 5: "", 6: ""} {
		if err := v.checkEpoch(epoch); switchback.CodeOf(err) != code {
			t.Errorf("epoch %d: %v, want %q", epoch, err, code)
		}
	}
}

func TestSafeName(t *testing.T) {
	for name, want := range map[string]string{"web-1_A": "web-1_A", "../etc": "___etc", "a b/c": "a_b_c", "wäb": "w_b"} {
		if got := safeName(name); got != want {
			t.Errorf("safeName(%q) = %q, want %q", name, got, want)
		}
	}
}

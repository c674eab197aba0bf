// Package scripts tests the shell scripts of this folder.
package scripts

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// machine is a pretended Debian machine: a package database, and an apt-get
// that writes down what it is asked and whether services could have started.
type machine struct {
	dir string
}

func newMachine(t *testing.T, installed ...string) machine {
	t.Helper()
	m := machine{t.TempDir()}
	var status strings.Builder
	for _, p := range installed {
		status.WriteString("Package: " + p + "\nStatus: install ok installed\nPriority: optional\n\n")
	}
	status.WriteString("Package: nbdkit\nStatus: deinstall ok config-files\n\n")
	m.write(t, "status", status.String(), 0o644)
	m.write(t, "bin/apt-get", `#!/bin/sh
cd "$(dirname "$0")/.."
policy=none; if [ -x policy ]; then ./policy && policy=allow || policy=$?; fi
echo "$1 policy=$policy $*" >> log
if [ -e fail-once ]; then rm fail-once; exit 100; fi
`, 0o755)
	return m
}

func (m machine) write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	p := filepath.Join(m.dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func (m machine) run(args ...string) (out string, exit int) {
	cmd := exec.Command("./install-packages.sh", args...)
	cmd.Env = []string{"PATH=" + filepath.Join(m.dir, "bin") + ":" + os.Getenv("PATH"),
		"DPKG_STATUS=" + filepath.Join(m.dir, "status"), "POLICY_RC_D=" + filepath.Join(m.dir, "policy")}
	b, _ := cmd.CombinedOutput()
	return string(b), cmd.ProcessState.ExitCode()
}

func (m machine) log(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(m.dir, "log"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}

// missing asks an empty machine for a group, and so learns the group.
func missing(t *testing.T, group string) []string {
	t.Helper()
	out, exit := newMachine(t).run("--check", group)
	if exit != 1 {
		t.Fatalf("--check %s on an empty machine: exit %d: %s", group, exit, out)
	}
	return strings.Fields(out)
}

func TestNothingMissing(t *testing.T) {
	m := newMachine(t, missing(t, "bench")...)
	for _, args := range [][]string{{}, {"demo"}, {"test"}, {"demo", "bench"}, {"--check"}, {"--check", "bench"}} {
		begin := time.Now()
		if out, exit := m.run(args...); exit != 0 || out != "" {
			t.Errorf("%v: exit %d: %s", args, exit, out)
		}
		if d := time.Since(begin); d > 500*time.Millisecond {
			t.Errorf("%v took %v", args, d)
		}
	}
	if got := m.log(t); got != "" {
		t.Errorf("apt-get was called: %s", got)
	}
}

func TestCheckInstallsNothing(t *testing.T) {
	m := newMachine(t, "qemu-utils", "git")
	out, exit := m.run("--check")
	if exit != 1 || strings.Contains(out, "qemu-utils") || !strings.Contains(out, "libvirt-daemon-system\n") {
		t.Errorf("exit %d: %s", exit, out)
	}
	if !strings.Contains(out, "nbdkit\n") {
		t.Error("a removed package whose configuration stayed counts as installed")
	}
	if strings.Count(out, "qemu-system-x86\n") != 1 {
		t.Errorf("a package of two groups is not listed once: %s", out)
	}
	if got := m.log(t); got != "" {
		t.Errorf("apt-get was called: %s", got)
	}
	if bench := missing(t, "bench"); !strings.Contains(strings.Join(bench, " "), "virtnbdbackup") {
		t.Errorf("bench lacks its peer: %v", bench)
	}
	if test := missing(t, "test"); strings.Contains(strings.Join(test, " "), "virtnbdbackup") {
		t.Errorf("test has the benchmarks' peer: %v", test)
	}
}

func TestInstall(t *testing.T) {
	demo := missing(t, "demo")
	m := newMachine(t, demo[1:]...)
	if out, exit := m.run("demo"); exit != 0 {
		t.Fatalf("exit %d: %s", exit, out)
	}
	want := "install policy=101 install -y -q --no-install-recommends " + demo[0] + "\n"
	if got := m.log(t); got != want {
		t.Errorf("apt-get was asked %q, want %q", got, want)
	}
	if _, err := os.Stat(filepath.Join(m.dir, "policy")); err == nil {
		t.Error("the policy that forbids services stayed")
	}
}

func TestInstallWithStaleLists(t *testing.T) {
	m := newMachine(t)
	m.write(t, "fail-once", "", 0o644)
	m.write(t, "policy", "#!/bin/sh\nexit 7\n", 0o755)
	if out, exit := m.run("demo"); exit != 0 {
		t.Fatalf("exit %d: %s", exit, out)
	}
	var verbs []string
	for line := range strings.Lines(m.log(t)) {
		verbs = append(verbs, strings.Fields(line)[0])
	}
	if got := strings.Join(verbs, " "); got != "install update install" {
		t.Errorf("apt-get was asked to %q", got)
	}
	if b, err := os.ReadFile(filepath.Join(m.dir, "policy")); err != nil || !strings.Contains(string(b), "exit 7") {
		t.Errorf("the machine's own policy was not put back: %q %v", b, err)
	}
}

func TestBadArgument(t *testing.T) {
	if out, exit := newMachine(t).run("everything"); exit != 2 || !strings.Contains(out, "usage") {
		t.Errorf("exit %d: %s", exit, out)
	}
}

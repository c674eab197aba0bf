package site

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/switchback-dr/switchback/lab/process"
)

func virsh(t *testing.T, s *Site, args ...string) string {
	t.Helper()
	out, err := exec.Command("virsh", append([]string{"-c", s.URI(), "-q"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("virsh %s at %s: %v: %s", strings.Join(args, " "), s.Name(), err, out)
	}
	return strings.TrimSpace(string(out))
}

func start(t *testing.T, cfg Config) *Site {
	t.Helper()
	begin := time.Now()
	s, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	t.Logf("site %s up in %v", cfg.Name, time.Since(begin).Round(time.Millisecond))
	return s
}

// A guest without disk or kernel: its firmware runs, which is enough of a life.
const domainXML = `<domain type='qemu'><name>vm</name><uuid>11111111-2222-4333-8444-555555555555</uuid>
<memory unit='MiB'>32</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<serial type='file'><source path='/var/log/libvirt/qemu/vm.console'/></serial><memballoon model='none'/></devices></domain>`

func startGuest(t *testing.T, s *Site) {
	t.Helper()
	xml := filepath.Join(t.TempDir(), "vm.xml")
	if err := os.WriteFile(xml, []byte(domainXML), 0o644); err != nil {
		t.Fatal(err)
	}
	virsh(t, s, "define", xml)
	virsh(t, s, "start", "vm")
}

func TestTwoSitesSideBySide(t *testing.T) {
	dir, caps := t.TempDir(), t.TempDir()
	a := start(t, Config{Name: "a", Dir: filepath.Join(dir, "a"), CapabilityCache: caps})
	b := start(t, Config{Name: "b", Dir: filepath.Join(dir, "b"), CapabilityCache: caps, Detach: true})

	// One VM of one name at both: neither sees the other's.
	startGuest(t, a)
	if got := virsh(t, b, "list", "--all", "--name"); got != "" {
		t.Errorf("site b lists %q, want none", got)
	}
	startGuest(t, b)
	for _, s := range []*Site{a, b} {
		if _, err := os.Stat(s.HostPath("/var/log/libvirt/qemu/vm.console")); err != nil {
			t.Error(err)
		}
	}
	if virsh(t, a, "capabilities") == virsh(t, b, "capabilities") {
		t.Error("both sites have one host UUID")
	}

	t.Run("Namespaces", func(t *testing.T) {
		out, err := a.Command(t.Context(), "sh", "-c", "ls /sys/class/net >/dev/null; cat /proc/net/dev; echo hello > /run/switchback/x; readlink /proc/self/ns/net").CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if strings.Contains(string(out), "eth0") {
			t.Errorf("site sees the machine's network:\n%s", out)
		}
		if b, err := os.ReadFile(a.HostPath("/run/switchback/x")); err != nil || string(b) != "hello\n" {
			t.Errorf("file written inside: %q, %v", b, err)
		}
		if _, err := os.Stat(b.HostPath("/run/switchback/x")); err == nil {
			t.Error("site b has a's file")
		}
		if !a.cfg.KVM {
			if err := a.Command(t.Context(), "sh", "-c", "test ! -w /dev/kvm").Run(); err != nil {
				t.Error("/dev/kvm is writable in the site")
			}
		}
	})

	t.Run("GuestSurvivesLibvirtd", func(t *testing.T) {
		guest := virsh(t, a, "domstate", "vm")
		pid := a.PID()
		if err := a.Kill(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a.PID() != 0 {
			t.Error("libvirtd has a PID after Kill")
		}
		if err := a.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		if a.PID() == pid {
			t.Error("libvirtd kept its PID")
		}
		if got := virsh(t, a, "domstate", "vm"); got != guest || got != "running" {
			t.Errorf("guest is %q after a restart of libvirtd, was %q", got, guest)
		}
		begin := time.Now()
		if err := a.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Logf("warm restart in %v", time.Since(begin).Round(time.Millisecond))
		if got := virsh(t, a, "domstate", "vm"); got != "running" {
			t.Errorf("guest is %q after a second restart", got)
		}
	})

	t.Run("Attach", func(t *testing.T) {
		if _, err := Start(t.Context(), b.cfg); err == nil || !strings.Contains(err.Error(), "runs already") {
			t.Errorf("second Start: %v, want a refusal", err)
		}
		again, err := Attach(filepath.Join(dir, "b"))
		if err != nil {
			t.Fatal(err)
		}
		if got := virsh(t, again, "list", "--name"); got != "vm" {
			t.Errorf("attached site lists %q", got)
		}
		if again.PID() != b.PID() || again.NamespacePID() != b.NamespacePID() || again.LibvirtSocket() != b.LibvirtSocket() {
			t.Errorf("attached site differs: %+v, want %+v", again, b)
		}
		pids, err := again.Processes()
		if err != nil || len(pids) != 3 {
			t.Errorf("processes %v, %v: want holder, libvirtd and guest", pids, err)
		}
		if err := again.Destroy(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, pid := range pids {
			if p, err := process.Identify(pid); err == nil && p.Alive() {
				t.Errorf("process %d lives after Destroy", pid)
			}
		}
		if _, err := os.Stat(again.cfg.RunDir); err == nil {
			t.Error("run directory is still there")
		}
		if _, err := Attach(filepath.Join(dir, "b")); err == nil {
			t.Error("attached to a destroyed site")
		}
	})

	t.Run("StartAgain", func(t *testing.T) { // as after a reboot: definitions are there, guests are off
		cfg := b.cfg
		cfg.Detach = false
		b := start(t, cfg)
		if got := virsh(t, b, "domstate", "vm"); got != "shut off" {
			t.Errorf("guest is %q, want shut off", got)
		}
	})
}

func TestStartRefuses(t *testing.T) {
	for name, cfg := range map[string]Config{
		"no name":     {Dir: "x"},
		"upper case":  {Name: "A", Dir: "x"},
		"no dir":      {Name: "a"},
		"long socket": {Name: "a", Dir: t.TempDir(), RunDir: "/dev/shm/" + strings.Repeat("x", 90)},
	} {
		if s, err := Start(t.Context(), cfg); err == nil {
			s.Destroy(t.Context())
			t.Errorf("%s: started", name)
		}
	}
}

func TestStartLeavesNothingBehind(t *testing.T) {
	cfg, err := Config{Name: "a", Dir: t.TempDir(), QEMUConf: "no such setting\n"}.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	s, err := Start(t.Context(), cfg)
	if err == nil {
		s.Destroy(t.Context())
		t.Fatal("libvirtd started with a broken qemu.conf")
	}
	t.Log(err)
	if _, err := os.Stat(cfg.RunDir); err == nil {
		t.Error("run directory is still there")
	}
	if st, err := readState(cfg.Dir); err != nil || st.Holder.Alive() || st.Libvirtd.Alive() {
		t.Errorf("state %+v, %v: something still runs", st, err)
	}
}

func TestProbe(t *testing.T) {
	// The ROM is sound: QEMU's own translator runs it to the end.
	if ok, err := probe(t.Context(), "tcg", 1000); err != nil || !ok {
		t.Errorf("probe under TCG: %v, %v", ok, err)
	}
	begin := time.Now()
	works := KVMWorks(t.Context())
	t.Logf("KVM works: %v, found in %v", works, time.Since(begin).Round(time.Millisecond))
	if time.Since(begin) > probeLimit+2*time.Second {
		t.Error("the probe overran its limit")
	}
}

package guest

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/switchback-dr/switchback/lab/site"
	"github.com/switchback-dr/switchback/witness"
)

// lab is one site with an image and a way to start guests; made once for all
// tests of the package.
type lab struct {
	site  *site.Site
	image Image
}

func newLab(t *testing.T) *lab {
	t.Helper()
	cache := DefaultCacheDir()
	begin := time.Now()
	bin, err := BuildWorkload(t.Context(), "", cache)
	if err != nil {
		t.Fatal(err)
	}
	l := &lab{}
	if l.image, err = Build(t.Context(), cache, bin); err != nil {
		t.Fatal(err)
	}
	t.Logf("image in %v", time.Since(begin).Round(time.Millisecond))
	if l.site, err = site.Start(t.Context(), site.Config{Name: "a", Dir: t.TempDir(), CapabilityCache: filepath.Join(cache, "capabilities")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			cs, _ := filepath.Glob(l.site.HostPath(consoleDir) + "/*")
			for _, c := range cs {
				b, _ := os.ReadFile(c)
				t.Logf("%s:\n%s", c, b[max(0, len(b)-3000):])
			}
		}
		if err := l.site.Destroy(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return l
}

func (l *lab) virsh(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("virsh", append([]string{"-c", l.site.URI(), "-q"}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("virsh %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func (l *lab) define(t *testing.T, s Spec) {
	t.Helper()
	s.Image, s.Type = l.image, l.site.DomainType()
	xml, err := DomainXML(s)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "vm.xml")
	if err := os.WriteFile(path, []byte(xml), 0o644); err != nil {
		t.Fatal(err)
	}
	l.virsh(t, "define", path, "--validate")
}

func (l *lab) console(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(l.site.HostPath(ConsolePath(name)))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return string(b)
}

func (l *lab) await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	begin := time.Now()
	for !cond() {
		if time.Since(begin) > 90*time.Second {
			t.Fatalf("no %s after 90 s", what)
		}
		time.Sleep(30 * time.Millisecond)
	}
	t.Logf("%s after %v", what, time.Since(begin).Round(time.Millisecond))
}

func (l *lab) off(t *testing.T, name string) func() bool {
	return func() bool { return l.virsh(t, "domstate", name) == "shut off" }
}

const uuid = "0d5e7f2a-4a57-4b6b-9b1e-0123456789ab"

func TestGuest(t *testing.T) {
	l := newLab(t)
	log, data := l.site.HostPath(ImageDir+"/log.qcow2"), l.site.HostPath(ImageDir+"/data.qcow2")
	begin := time.Now()
	if err := MakeDisk(t.Context(), log, MinDiskBytes, Content{Bytes: 80 << 20, Seed: 1}); err != nil {
		t.Fatal(err)
	}
	if err := MakeDisk(t.Context(), data, MinDiskBytes, Content{}); err != nil {
		t.Fatal(err)
	}
	t.Logf("disks in %v", time.Since(begin).Round(time.Millisecond))
	w := Workload{MountDisk: "vda", CheckBytes: 64 << 20, RecordDisks: []string{"vda", "vdb"}, Pace: time.Millisecond}
	l.define(t, Spec{Name: "vm1", UUID: uuid, Cmdline: w.Cmdline(), Disks: []SpecDisk{
		{Path: ImageDir + "/log.qcow2", Target: "vda"}, {Path: ImageDir + "/data.qcow2", Target: "vdb"}}})

	begin = time.Now()
	l.virsh(t, "start", "vm1")
	t.Logf("virsh start took %v", time.Since(begin).Round(time.Millisecond))
	l.await(t, "BOOT", func() bool { return strings.Contains(l.console(t, "vm1"), "\nSB BOOT ") })
	l.await(t, "CHECKED", func() bool { return strings.Contains(l.console(t, "vm1"), "\nSB CHECKED ") })
	if c := l.console(t, "vm1"); !strings.Contains(c, " ok ms=") || !strings.Contains(c, "vm="+uuid) {
		t.Error("disk is not right, or not this VM's console")
	}
	c, err := Dial(t.Context(), l.site.HostPath(ControlPath("vm1")))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()

	t.Run("Commands", func(t *testing.T) {
		begin := time.Now()
		n, err := c.Dirty(t.Context(), Changes{Disk: "vdb", Bytes: 16 << 20, Seed: 7})
		if err != nil || n < 16<<20 || n > 17<<20 {
			t.Errorf("dirty: %d bytes, %v", n, err)
		}
		t.Logf("16 MiB of changes in %v", time.Since(begin).Round(time.Millisecond))
		lat, err := c.Latency(t.Context(), "vdb", 50, DirtyOffset, 64<<20)
		if err != nil || lat.P50 <= 0 || lat.P99 < lat.P50 || lat.Max < lat.P99 {
			t.Errorf("latency: %+v, %v", lat, err)
		}
		t.Logf("%+v", lat)
		s1, err1 := c.Read(t.Context(), "vdb", DirtyOffset, 8<<20, 0)
		s2, err2 := c.Read(t.Context(), "vdb", DirtyOffset, 8<<20, 4096)
		if err1 != nil || err2 != nil || s1 != s2 {
			t.Errorf("read: %s %v, in small pieces %s %v", s1, err1, s2, err2)
		}
		if err := c.Check(t.Context(), 8<<20); err != nil {
			t.Error(err)
		}
		for _, bad := range []string{"frob", "dirty disk=vda span=0", "check bytes=999999999"} {
			if v, err := c.Do(t.Context(), bad); err == nil {
				t.Errorf("%q was accepted: %v", bad, v)
			}
		}
	})

	t.Run("Hold", func(t *testing.T) {
		held, err := c.Hold(t.Context())
		if err != nil || !held.Hold || held.Seq == 0 {
			t.Fatalf("hold: %+v, %v", held, err)
		}
		if !strings.Contains(l.console(t, "vm1"), fmt.Sprintf("-%d t=", held.Seq)) {
			// The line is sent before the answer, but by another device.
			l.await(t, "acknowledgement", func() bool { return strings.Contains(l.console(t, "vm1"), fmt.Sprintf("-%d t=", held.Seq)) })
		}
		if st, err := c.State(t.Context()); err != nil || st.Seq > held.Seq+1 {
			t.Errorf("state %+v, %v: the writer went on", st, err)
		}
		if err := c.Go(t.Context()); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		l.await(t, "300 more records", func() bool { st, err := c.State(t.Context()); return err == nil && st.Seq >= held.Seq+300 })
		t.Logf("%.0f records a second", 300/time.Since(begin).Seconds())
	})

	t.Run("Button", func(t *testing.T) {
		l.virsh(t, "shutdown", "vm1", "--mode", "acpi")
		l.await(t, "power-off", l.off(t, "vm1"))
		if con := l.console(t, "vm1"); !strings.Contains(con, "\nSB POWEROFF seq=") || !strings.Contains(con, "cause=button") {
			t.Error("no last words")
		}
		// What the witness reads of format and console is what the guest wrote.
		con, err := witness.ParseConsole(l.site.HostPath(ConsolePath("vm1")))
		if err != nil {
			t.Fatal(err)
		}
		r, err := witness.VerifyRecords(t.Context(), witness.Ring{Offset: RecordOffset, Slots: Slots}, log, data)
		if err != nil {
			t.Fatal(err)
		}
		boot := con.Last()
		if !r.OK() || r.VM != uuid || boot.PowerOff == nil || r.Max < boot.PowerOff.Seq {
			t.Errorf("records %+v, last words %+v", r, boot.PowerOff)
		}
		if lost := witness.AcknowledgedLost(boot, r); lost.Lost != 0 || lost.Acknowledged < 300 {
			t.Errorf("%+v", lost)
		}
		if age, ok := boot.AckAge(); !ok || age > 500*time.Millisecond {
			t.Errorf("the last acknowledgement came %v before power-off", age)
		} else {
			t.Logf("last acknowledgement %v before power-off", age)
		}
		if len(boot.EIO)+len(boot.Failures) > 0 {
			t.Errorf("%v %v", boot.EIO, boot.Failures)
		}
	})

	t.Run("AgentAndResume", func(t *testing.T) {
		l.virsh(t, "start", "vm1")
		l.await(t, "agent", func() bool {
			// Asking the agent itself would block for 5 s where it is not up yet.
			return strings.Contains(l.virsh(t, "dumpxml", "vm1"), "name='org.qemu.guest_agent.0' state='connected'")
		})
		l.await(t, "resume", func() bool { return strings.Count(l.console(t, "vm1"), "\nSB RESUME ") == 2 })
		con := l.console(t, "vm1")
		var resumed, last uint64
		fmt.Sscanf(con[strings.LastIndex(con, "RESUME seq="):], "RESUME seq=%d", &resumed)
		fmt.Sscanf(con[strings.Index(con, "POWEROFF seq="):], "POWEROFF seq=%d", &last)
		if last < 300 || resumed < last {
			t.Errorf("resumed at %d, the last words were %d", resumed, last)
		}
		l.virsh(t, "domfsfreeze", "vm1")
		l.virsh(t, "domfsthaw", "vm1")
		l.virsh(t, "shutdown", "vm1", "--mode", "agent")
		l.await(t, "power-off", l.off(t, "vm1"))
		if !strings.Contains(l.console(t, "vm1"), "cause=agent") {
			t.Error("no last words")
		}
	})
}

func TestMakeDisk(t *testing.T) {
	dir := t.TempDir()
	sum := func(name string, c Content) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := MakeDisk(t.Context(), p, MinDiskBytes, c); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("sha256sum", p).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(string(out))[0]
	}
	a := sum("a", Content{Bytes: 12 << 20, Seed: 5})
	if b := sum("b", Content{Bytes: 12 << 20, Seed: 5}); a != b {
		t.Error("one seed, two disks")
	}
	if b := sum("c", Content{Bytes: 12 << 20, Seed: 6}); a == b {
		t.Error("two seeds, one disk")
	}
	for name, c := range map[string]Content{"too much": {Bytes: 2 << 30}} {
		if err := MakeDisk(t.Context(), filepath.Join(dir, "x"), MinDiskBytes, c); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := MakeDisk(t.Context(), filepath.Join(dir, "x"), 1<<30, Content{}); err == nil {
		t.Error("too small: accepted")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".makedisk*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

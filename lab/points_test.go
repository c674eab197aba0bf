package lab

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/recovery"
)

// cli runs the command line, which must end with a status, and returns what it said.
func (f *fixture) cli(status int, args ...string) string {
	f.t.Helper()
	cmd := exec.CommandContext(f.t.Context(), f.cfg.Executable, append([]string{"--config", f.ConfigDir()}, args...)...)
	return f.ended(cmd, status)
}

// at runs the command line at a site, with neither server nor agent.
func (f *fixture) at(site string, status int, args ...string) string {
	f.t.Helper()
	return f.ended(f.Site(site).Command(f.t.Context(), f.cfg.Executable, args...), status)
}

func (f *fixture) ended(cmd *exec.Cmd, status int) string {
	f.t.Helper()
	var out, said strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != status {
		f.t.Fatalf("%v: %v, expected status %d\n%s%s", cmd.Args[1:], err, status, &out, &said)
	}
	return out.String() + said.String()
}

func (f *fixture) says(text string, parts ...string) {
	f.t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			f.t.Errorf("%q is not in:\n%s", p, text)
		}
	}
}

// flipBit changes one bit of a file, and returns what changes it back.
func flipBit(t *testing.T, path string, at int64) (mend func()) {
	t.Helper()
	file, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	b := make([]byte, 1)
	if _, err := file.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	if _, err := file.WriteAt([]byte{b[0] ^ 0x10}, at); err != nil {
		t.Fatal(err)
	}
	return func() {
		file, err := os.OpenFile(path, os.O_RDWR, 0)
		if err == nil {
			_, err = file.WriteAt(b, at)
			file.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// hostOffset finds a place in an image's file that holds data of the guest.
func (f *fixture) hostOffset(image string) int64 {
	f.t.Helper()
	out, err := exec.CommandContext(f.t.Context(), "qemu-img", "map", "-U", "--output=json", image).Output()
	f.must(err)
	var list []struct {
		Length, Offset int64
		Data           bool
	}
	f.must(json.Unmarshal(out, &list))
	var best, at int64
	for _, e := range list {
		if e.Data && e.Length > best {
			best, at = e.Length, e.Offset+e.Length/2
		}
	}
	if best == 0 {
		f.t.Fatal("the base holds nothing")
	}
	return at
}

// TestPoints is an operator's day with recovery points: marks, verification,
// exports, damage of every file of a replica, repair, and a suspicious change.
func TestPoints(t *testing.T) {
	t.Parallel()
	f := addGuest(t, Guest{Name: "points", ContentBytes: 32 << 20})
	f.protect()
	f.morePoints(14) // so that it is known what is usual

	// Marks.
	f.says(f.cli(0, "points", "tag", f.Name, "latest", "gold"), `"gold"`)
	f.says(f.cli(0, "points", "lock", f.Name, "gold"), "locked")
	f.says(f.cli(0, "points", "list", f.Name), `"gold", locked`)
	var gold journal.PointDetail
	f.must(json.Unmarshal([]byte(f.cli(0, "points", "show", f.Name, "gold", "-o", "json")), &gold))
	if gold.Mark.Tag != "gold" || gold.Digest == "" || gold.Parent == "" || len(gold.Disks) != 1 || gold.Disks[0].Name != "vda" {
		t.Errorf("%+v", gold)
	}
	f.says(f.cli(4, "points", "delete", f.Name, "gold"), "locked", "points unlock")
	f.says(f.cli(4, "vm", "unprotect", f.Name, "--remove-data"), "locked", "points unlock")
	oldest := f.points()[0].Sequence
	f.cli(0, "points", "delete", f.Name, fmt.Sprint(oldest))
	if p := f.points()[0].Sequence; p <= oldest {
		t.Errorf("point %d was deleted, the oldest is %d", oldest, p)
	}

	// A burst of what does not compress, in one point.
	f.operate(recovery.Pause, api.OperationRequest{})
	f.dirty(Primary, "vda", 96<<20)
	before := f.newest()
	f.operate(recovery.Resume, api.OperationRequest{})
	burst := f.pointsAfter(before, 1)[0]
	f.eventually(30*time.Second, "the suspicion", func() (bool, string) {
		for _, c := range f.vm().Conditions {
			if c.Name == "suspicious-change" {
				return true, ""
			}
		}
		return false, fmt.Sprintf("%+v", f.points())
	})
	f.says(f.cli(0, "points", "show", f.Name, fmt.Sprint(burst.Sequence)), "suspicious", "do not compress")
	f.cli(0, "points", "dismiss", f.Name, fmt.Sprint(burst.Sequence))

	// Nothing moves from here on.
	f.morePoints(1)
	f.operate(recovery.Pause, api.OperationRequest{})
	points := f.points()
	newest := points[len(points)-1].Sequence
	f.says(f.cli(4, "points", "delete", f.Name, "latest"), "newest")
	f.cli(0, "points", "delete", f.Name, fmt.Sprint(points[1].Sequence)) // in the middle: it is merged away
	points = f.points()
	f.says(f.cli(0, "points", "verify", f.Name), "damage         none")
	f.says(f.cli(0, "vm", "show", f.Name), "no damage")

	// What is inside, with neither server nor agent asked.
	dir := f.vm().AtTarget.Replica.Dir
	var seen struct {
		journal.Inspection
		Check *journal.CheckState
	}
	f.must(json.Unmarshal([]byte(f.at(Recovery, 0, "replica", "inspect", dir, "--verify", "-o", "json")), &seen))
	if len(seen.Points) != len(points) || seen.Open == "" || len(seen.Damage) > 0 || seen.Check.UnprovenBytes > 0 || seen.Check.BaseBytes == 0 {
		t.Errorf("%+v", seen)
	}

	f.exports(dir, gold.Sequence)
	f.damages(dir, gold.Sequence, newest)

	// The cut-over is proved, and the proof is kept.
	f.operate(recovery.Resume, api.OperationRequest{})
	f.morePoints(2)
	sum := f.operate(recovery.Failover, api.OperationRequest{})
	if p := sum.Proof; p == nil || !p.Equal || p.Point != sum.Switch.Last.Sequence || len(p.Disks) != 1 || len(p.Disks[0].Old) != 64 {
		t.Errorf("proof %+v", p)
	}
	f.cutOver(Primary, Recovery)
	f.operate(recovery.Cancel, api.OperationRequest{})
}

// exports copies a point out in each format and holds it against the view.
func (f *fixture) exports(dir string, point switchback.Sequence) {
	f.t.Helper()
	to := f.t.TempDir()
	path := func(name string) string { return filepath.Join(to, name) }
	for _, format := range []string{"raw", "qcow2", "dir"} {
		f.says(f.cli(0, "points", "export", f.Name, "gold", "--format", format, "--to", path(format)), "exported")
	}
	f.at(Recovery, 0, "replica", "export", dir, "--point", fmt.Sprint(point), "--format", "qcow2", "--to", path("tool"))
	f.export(Recovery, dir, point, func(uris []string) {
		for _, x := range [][2]string{{"raw", path("raw")}, {"qcow2", path("qcow2")}, {"qcow2", path("dir/vda.qcow2")}, {"qcow2", path("tool")}} {
			out, err := exec.CommandContext(f.t.Context(), "qemu-img", "compare", "-s", "-f", x[0], "-F", "raw", x[1], uris[0]).CombinedOutput()
			if err != nil && !strings.Contains(string(out), "Images are identical") {
				// -s also tells apart holes from stored zeros, which an export may change.
				out, err = exec.CommandContext(f.t.Context(), "qemu-img", "compare", "-f", x[0], "-F", "raw", x[1], uris[0]).CombinedOutput()
			}
			if err != nil {
				f.t.Errorf("%s is not point %d: %v: %s", x[1], point, err, out)
			}
		}
	})
	if _, err := os.Stat(path("raw.partial")); err == nil {
		f.t.Error("raw.partial is left")
	}
	f.says(f.cli(0, "points", "export", f.Name, "gold", "--format", "raw", "--to", path("raw")), "it was there")
	f.says(f.cli(4, "points", "export", f.Name, "latest", "--format", "raw", "--to", path("raw")), "exists and is not this point")

	// Any QEMU starts from the directory.
	console := path("console")
	run := exec.CommandContext(f.t.Context(), path("dir/run.sh"), "-snapshot", "-display", "none", "-serial", "file:"+console, "-no-reboot")
	run.Env = append(os.Environ(), "VM_UUID=8e0ad9f5-6a2c-4b53-9d0e-3c7a51b2e64f") // or the witness takes it for the VM itself
	var said strings.Builder
	run.Stdout, run.Stderr = io.Discard, &said
	f.must(run.Start())
	defer func() {
		run.Process.Kill()
		run.Wait()
	}()
	f.poll(500*time.Millisecond, 120*time.Second, "the exported VM boots", func() (bool, string) {
		b, _ := os.ReadFile(console)
		return strings.Contains(string(b), "SB "), said.String() + string(b)
	})
}

// damages flips a bit in each sort of file. It must be found and named, and
// never be served silently.
func (f *fixture) damages(dir string, gold, newest switchback.Sequence) {
	f.t.Helper()
	host := func(name string) string { return f.Site(Recovery).HostPath(name) }
	segment := filepath.Join(dir, "segments", fmt.Sprintf("%016d.seg", newest))
	st, err := os.Stat(host(segment))
	f.must(err)
	base := filepath.Join(filepath.Dir(dir), "vda.qcow2")
	baseAt := f.hostOffset(host(base))
	for _, x := range []struct {
		what, file string
		at         int64
		named      []string // in the finding
		served     []switchback.Sequence
	}{
		{"segment", segment, st.Size() / 4, []string{fmt.Sprintf("segment %d", newest), "disk vda", fmt.Sprintf("points from %d on", newest)}, []switchback.Sequence{gold}},
		{"index", segment, st.Size() - 150, []string{fmt.Sprintf("segment %d", newest), fmt.Sprintf("points from %d on", newest)}, []switchback.Sequence{gold}},
		{"base", base, baseAt, []string{"disk vda", "the content of the base does not match its checksum"}, nil},
		{"checksums", filepath.Join(dir, "sums", "vda.sum"), 9, []string{"disk vda", "checksums of the base"}, nil},
		{"manifest", filepath.Join(dir, "manifest.json"), 200, []string{"manifest.json", "all points"}, nil},
	} {
		mend := flipBit(f.t, host(x.file), x.at)
		f.says(f.cli(1, "points", "verify", f.Name), x.named...)
		if x.what != "manifest" { // which tells all there is to say of the replica
			f.says(f.at(Recovery, 1, "replica", "inspect", dir, "--verify"), x.named...)
		} else {
			f.says(f.at(Recovery, 1, "replica", "inspect", dir), "manifest.json")
		}
		to := filepath.Join(f.t.TempDir(), "damaged")
		f.says(f.at(Recovery, 1, "replica", "export", dir, "--point", fmt.Sprint(newest), "--format", "raw", "--to", to), "error")
		if _, err := os.Stat(to); err == nil {
			f.t.Errorf("%s: the damaged point was exported", x.what)
		}
		for _, p := range x.served {
			f.says(f.cli(0, "points", "verify", f.Name, fmt.Sprint(p)), "damage         none")
		}
		mend()
	}
	f.says(f.cli(0, "points", "verify", f.Name), "damage         none")

	// The source still has what the base has lost: old points are mended, too.
	flipBit(f.t, host(base), baseAt)
	f.says(f.cli(1, "points", "verify", f.Name), "the content of the base does not match its checksum")
	f.eventually(30*time.Second, "the condition", func() (bool, string) {
		for _, c := range f.vm().Conditions {
			if c.Name == "replica-damaged" && strings.Contains(c.Cause, "disk vda") && strings.Contains(c.Remedy, "points repair") {
				return true, ""
			}
		}
		return false, fmt.Sprintf("%+v", f.vm().Conditions)
	})
	f.cli(0, "points", "repair", f.Name)
	f.says(f.cli(0, "points", "verify", f.Name, "latest"), "damage         none")
	f.says(f.cli(0, "points", "verify", f.Name), "damage         none")
}

package export

import (
	"bytes"
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/journal"
)

// makeReplica has one point of these disks over raw bases.
func makeReplica(t *testing.T, disks map[string][]byte) string {
	t.Helper()
	bases := t.TempDir()
	dir := filepath.Join(t.TempDir(), "replica")
	spec := journal.Spec{Protection: "p-1", Epoch: 1, BaseIsOriginal: true, Name: "vm"}
	h := journal.Header{Protection: "p-1", Epoch: 1, Sequence: 1, Time: time.Unix(1, 0)}
	for _, name := range []string{"vda", "vdb"} {
		content, ok := disks[name]
		if !ok {
			continue
		}
		base := filepath.Join(bases, name)
		if err := os.WriteFile(base, make([]byte, len(content)), 0o600); err != nil {
			t.Fatal(err)
		}
		spec.Disks = append(spec.Disks, journal.ReplicaDisk{Name: name, SizeBytes: int64(len(content)), BasePath: base, BaseFormat: "raw"})
		h.Disks = append(h.Disks, journal.DiskGeometry{Name: name, SizeBytes: int64(len(content))})
	}
	r, err := journal.Create(dir, spec)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var b bytes.Buffer
	w, err := journal.NewSegmentWriter(&b, h, journal.CodecZstd)
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range h.Disks {
		for off := 0; off < len(disks[d.Name]); off += 64 << 10 {
			p := disks[d.Name][off:min(len(disks[d.Name]), off+64<<10)]
			if bytes.Count(p, []byte{0}) < len(p) {
				if err := w.Data(i, int64(off), p); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if _, err := w.Finish(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Receive(context.Background(), 1, &b); err != nil {
		t.Fatal(err)
	}
	return dir
}

func disk(size int, seed byte) []byte {
	p := make([]byte, size)
	rand.NewChaCha8([32]byte{seed}).Read(p[:size/4])
	rand.NewChaCha8([32]byte{seed + 1}).Read(p[size-700:])
	return p
}

func sockets(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "x")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func rawOf(t *testing.T, path, format string) []byte {
	t.Helper()
	out := filepath.Join(t.TempDir(), "raw")
	if b, err := exec.Command("qemu-img", "convert", "-f", format, "-O", "raw", path, out).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v: %s", err, b)
	}
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestFormats(t *testing.T) {
	if _, err := exec.LookPath("qemu-nbd"); err != nil {
		t.Fatal(err)
	}
	one := map[string][]byte{"vda": disk(5<<20, 1)}
	two := map[string][]byte{"vda": disk(3<<20, 1), "vdb": disk(2<<20, 9)}
	for _, c := range []struct {
		format Format
		disks  map[string][]byte
		files  map[string]string // by disk, below To
	}{
		{Raw, one, map[string]string{"vda": ""}},
		{QCOW2, one, map[string]string{"vda": ""}},
		{Dir, one, map[string]string{"vda": "vda.qcow2"}},
		{Raw, two, map[string]string{"vda": "vda.raw", "vdb": "vdb.raw"}},
		{Dir, two, map[string]string{"vda": "vda.qcow2", "vdb": "vdb.qcow2"}},
	} {
		to := filepath.Join(t.TempDir(), "out")
		req := Request{Replica: makeReplica(t, c.disks), Point: 1, Format: c.format, To: to, SocketDir: sockets(t)}
		var last, total int64
		req.Progress = func(done, all int64) { last, total = done, all }
		res, err := Run(t.Context(), req)
		if err != nil {
			t.Fatalf("%s: %v", c.format, err)
		}
		if last != total || total == 0 || res.Bytes != total || res.Existed || len(res.Files) != len(c.disks) {
			t.Errorf("%s: %d of %d, %+v", c.format, last, total, res)
		}
		format := "qcow2"
		if c.format == Raw {
			format = "raw"
		}
		for name, file := range c.files {
			if !bytes.Equal(rawOf(t, filepath.Join(to, file), format), c.disks[name]) {
				t.Errorf("%s: disk %s differs", c.format, name)
			}
		}
		if _, err := os.Stat(to + ".partial"); err == nil {
			t.Errorf("%s: the partial is left", c.format)
		}
		// Again: it is there. Another point: it is not overwritten.
		if res, err := Run(t.Context(), req); err != nil || !res.Existed {
			t.Errorf("%s again: %+v, %v", c.format, res, err)
		}
		other := map[string][]byte{}
		for name, p := range c.disks {
			other[name] = bytes.Clone(p)
			other[name][100] ^= 1
		}
		req.Replica = makeReplica(t, other)
		if _, err := Run(t.Context(), req); switchback.CodeOf(err) != switchback.CodeConflict || !strings.Contains(err.Error(), "differs at 0") {
			t.Errorf("%s over another: %v", c.format, err)
		}
	}
}

func TestInterrupted(t *testing.T) {
	to := filepath.Join(t.TempDir(), "out")
	ctx, cancel := context.WithCancel(t.Context())
	req := Request{Replica: makeReplica(t, map[string][]byte{"vda": disk(40<<20, 1)}), Point: 1, Format: Raw, To: to, Progress: func(int64, int64) { cancel() }}
	if _, err := Run(ctx, req); switchback.CodeOf(err) != switchback.CodeCancelled {
		t.Errorf("cancelled: %v", err)
	}
	for _, p := range []string{to, to + ".partial"} {
		if _, err := os.Lstat(p); err == nil {
			t.Errorf("%s is left", p)
		}
	}
	// What a killed process left is no obstacle.
	if err := os.WriteFile(to+".partial", []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	req.Progress = nil
	if _, err := Run(t.Context(), req); err != nil {
		t.Error(err)
	}
	req.To, req.ReserveBytes = to+"2", 1<<60
	if _, err := Run(t.Context(), req); switchback.CodeOf(err) != switchback.CodeNoSpace {
		t.Errorf("no room: %v", err)
	}
	req.To = "out"
	if _, err := Run(t.Context(), req); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("relative path: %v", err)
	}
}

func TestScript(t *testing.T) {
	const definition = `<domain type='kvm'><name>it's web</name><uuid>1-2</uuid><memory unit='KiB'>524288</memory><vcpu placement='static'>3</vcpu>
<os firmware='efi'><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
<devices><disk type='file' device='disk'><target dev='vda' bus='virtio'/></disk><disk device='disk'><target dev='sda' bus='sata'/></disk>
<interface type='network'><mac address='52:54:00:01:02:03'/><model type='e1000e'/></interface></devices></domain>`
	s, err := Script(definition, []string{"vda", "sda"})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"-m 512 -smp 3", `-name 'it'\''s web'`, "-machine 'pc-q35-7.2'", `file="$here"/'sda.qcow2'`, "ide-hd,drive=sda", "virtio-blk-pci,drive=vda",
		"model=e1000e,mac=52:54:00:01:02:03", "if=pflash", `-uuid "${VM_UUID:-1-2}"`} {
		if !strings.Contains(s, want) {
			t.Errorf("%q is not in\n%s", want, s)
		}
	}
	path := filepath.Join(t.TempDir(), "run.sh")
	os.WriteFile(path, []byte(s), 0o755)
	if out, err := exec.Command("sh", "-n", path).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if s, err := Script("", []string{"vda"}); err != nil || !strings.Contains(s, "-m 1024") || !strings.Contains(s, "-nic none") {
		t.Errorf("without a definition: %v\n%s", err, s)
	}
	if _, err := Script("<domain", nil); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("a broken definition: %v", err)
	}
}

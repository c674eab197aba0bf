package agent

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/qemu"
)

// pointOf receives the next point of a replica of one disk, which changes pieces of it.
func pointOf(t *testing.T, r *journal.Replica, size int64, pieces map[int64][]byte) switchback.Point {
	t.Helper()
	head := r.Head()
	h := journal.Header{Protection: r.Manifest().Protection, Epoch: 1, Sequence: head.Sequence + 1, Kind: switchback.CrashConsistent, Time: time.Now(),
		Parent: head.Digest, Disks: []journal.DiskGeometry{{Name: "vda", SizeBytes: size}}}
	read, write := io.Pipe()
	go func() {
		w, err := journal.NewSegmentWriter(write, h, journal.CodecZstd)
		for _, off := range slices.Sorted(maps.Keys(pieces)) {
			if err == nil {
				err = w.Data(0, off, pieces[off])
			}
		}
		if err == nil {
			_, err = w.Finish()
		}
		write.CloseWithError(err)
	}()
	p, err := r.Receive(t.Context(), 1, read)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestRepairOldPoints: an old segment and a qcow2 base that are damaged are whole
// again once the source has sent what it still has.
func TestRepairOldPoints(t *testing.T) {
	const size = 8 << 20
	dir := t.TempDir()
	base := filepath.Join(dir, "vda.qcow2")
	if err := qemu.Create(t.Context(), base, qemu.CreateOptions{Format: "qcow2", SizeBytes: size}); err != nil {
		t.Fatal(err)
	}
	a := &Agent{cfg: Config{StateDir: dir, RunDir: dir, LogDir: dir}, log: slog.New(slog.DiscardHandler), vms: map[switchback.ProtectionID]*vm{}}
	v := &vm{agent: a, a: Assignment{Protection: "p-0123456789ab", Name: "web", Role: agentapi.RoleTarget, Epoch: 1, Dir: dir, ReplicaDir: filepath.Join(dir, "journal-1"),
		Disks: []switchback.Disk{{Name: "vda", SizeBytes: size, Path: base, Format: "qcow2"}}}}
	a.vms[v.a.Protection] = v
	replica, err := journal.Options{ReserveBytes: 1}.Create(v.a.ReplicaDir, journal.Spec{Protection: v.a.Protection, Epoch: 1, Name: "web", BaseIsOriginal: true,
		Disks: []journal.ReplicaDisk{{Name: "vda", SizeBytes: size, BasePath: base}}})
	if err != nil {
		t.Fatal(err)
	}
	v.replica = replica
	defer v.closeReplica()

	block := func(c byte) []byte { return bytes.Repeat([]byte{c, c + 1, 7, 0}, 16<<10) }
	first := map[int64][]byte{0: block('a')}
	pointOf(t, replica, size, first)
	second := pointOf(t, replica, size, map[int64][]byte{1 << 20: block('b'), 2 << 20: block('c')})
	pointOf(t, replica, size, map[int64][]byte{2 << 20: block('d')}) // 'c' is gone from the source
	if err := replica.Fold(t.Context(), 1, v.openFoldWriter); err != nil {
		t.Fatal(err)
	}
	find := func() agentapi.FindDamageResult {
		t.Helper()
		r, err := a.findDamage(t.Context(), &task{}, v, replica, agentapi.Task{}, agentapi.FindDamageParams{})
		if err != nil {
			t.Fatal(err)
		}
		return r.(agentapi.FindDamageResult)
	}
	if r := find(); len(r.Damage) > 0 {
		t.Fatalf("damaged before: %+v", r)
	}
	spoil := func(path string, what []byte, behind int) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		at := bytes.Index(b, what)
		if at < 0 {
			t.Fatalf("%s does not hold it", path)
		}
		b[at+behind] ^= 0x20
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	spoil(base, block('a')[:512], 1)
	segment := filepath.Join(v.a.ReplicaDir, "segments", "0000000000000002.seg")
	spoil(segment, []byte{'F', byte(journal.CodecZstd)}, 16+12) // in what is stored of 'b'

	found := find()
	if len(found.Damage) < 2 || found.Ranges["vda"].IsEmpty() || len(found.Hopeless) > 0 {
		t.Fatalf("found %+v", found)
	}
	again := map[int64][]byte{}
	for _, x := range found.Ranges["vda"].Ranges() {
		if x.Offset < 64<<10 {
			again[0] = block('a')
		} else {
			again[1<<20] = block('b')
		}
	}
	newest := pointOf(t, replica, size, again)
	out, err := a.mend(context.Background(), &task{}, v, agentapi.Task{}, agentapi.MendParams{Damage: found.Damage})
	if err != nil {
		t.Fatal(err)
	}
	r := out.(journal.MendResult)
	if len(r.Mended) == 0 || r.Bytes == 0 {
		t.Errorf("%+v", r)
	}
	for _, seq := range []switchback.Sequence{1, second.Sequence, newest.Sequence} {
		st, err := replica.Check(t.Context(), journal.CheckOptions{Point: seq})
		if err != nil || len(st.Damage) > 0 {
			t.Errorf("point %d: %v, %v", seq, st.Damage, err)
		}
	}
}

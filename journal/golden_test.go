package journal

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// TestGoldenSegments: segments written by earlier builds stay readable, and
// what this build writes does not change where compression does not decide.
func TestGoldenSegments(t *testing.T) {
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		path := filepath.Join("testdata", "segment-v1-"+c.String()+".seg")
		fresh := sampleSegment(t, c)
		if *update {
			if err := os.WriteFile(path, fresh, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		golden, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		want, got := [][]byte{make([]byte, 1<<20), make([]byte, 1<<20)}, [][]byte{make([]byte, 1<<20), make([]byte, 1<<20)}
		for i := range want {
			for at := range want[i] {
				want[i][at], got[i][at] = 0xee, 0xee
			}
		}
		b := make([]byte, 80<<10)
		content(b, 5)
		copy(want[0][8192:], b)
		copy(want[1][512:], b[:4096])
		copy(want[0][512<<10:], b[4096:9216])
		clear(want[0][768<<10:][:64<<10])
		clear(want[1][64<<10:][:512])
		h, err := replay(golden, got)
		if err != nil {
			t.Fatalf("%v: %v", c, err)
		}
		if diff := cmp.Diff(testHeader(7, "0011", 1<<20, 1<<20), h); diff != "" {
			t.Error(diff)
		}
		for i := range want {
			if at := firstDifference(want[i], got[i]); at >= 0 {
				t.Errorf("%v: disk %d differs at %d", c, i, at)
			}
		}
		// Header and frames of the uncompressed one are determined byte by byte.
		if n := len(golden) - 512; c == CodecNone && (len(fresh) < n || !bytes.Equal(golden[:n], fresh[:n])) {
			t.Error("the format has changed: raise its version and keep reading this one")
		}
	}
}

// TestGoldenIndex fixes the index before compression.
func TestGoldenIndex(t *testing.T) {
	ix := index{
		frames: []frame{{stored: 1000, disk: 1, sectors: 7, codec: CodecZstd}, {stored: 512, disk: 0, sectors: 0}},
		disks: []diskIndex{
			{data: []extent.Range{{Offset: 1024, Length: 512}}, zero: []extent.Range{{Offset: 65536, Length: 65536}}},
			{data: []extent.Range{{Offset: 8192, Length: 2048}, {Offset: 0, Length: 2048}}},
		},
	}
	want := []byte{
		2,          // disks
		1, 0, 0, 0, // disk of each frame
		2, 0, // codecs
		7, 0, // sectors less 1
		0xe8, 3, 0, 0, 2, 0, // stored lengths
		1, 4, 1, // disk 0: one data extent at sector +2, 1 sector
		1, 0x80, 2, 0x80, 1, // one zero extent at sector +128, 128 sectors
		2, 32, 4, 39, 4, // disk 1: +16, 4 sectors; -20, 4 sectors
		0,
	}
	if diff := cmp.Diff(want, ix.plain()); diff != "" {
		t.Error(diff)
	}
}

func TestGoldenManifest(t *testing.T) {
	want := Manifest{
		Spec: Spec{Protection: "p-0123456789ab", VM: "9a3c7f2e-0000-4000-8000-000000000001", Name: "web", Epoch: 4,
			Disks: []ReplicaDisk{{Name: "vda", SizeBytes: 1 << 30, BasePath: "/var/lib/switchback/vda.qcow2"}}},
		Base:            switchback.Point{Protection: "p-0123456789ab", Sequence: 9, Epoch: 4, Digest: "ab", Time: testHeader(9, "").Time},
		Folding:         11,
		RetentionFrozen: true,
	}
	path := filepath.Join("testdata", "manifest-v1.json")
	if *update {
		if err := writeDocument(osFileSystem{}, path, want); err != nil {
			t.Fatal(err)
		}
	}
	var got Manifest
	if err := readDocument(path, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty(), cmp.AllowUnexported(extent.Set{})); diff != "" {
		t.Error(diff)
	}
	b, _ := os.ReadFile(path)
	var e envelope
	json.Unmarshal(b, &e)
	for _, bad := range [][]byte{
		bytes.Replace(b, []byte(`"epoch": 4`), []byte(`"epoch": 5`), 1),
		bytes.Replace(b, []byte(e.Checksum), []byte("00"), 1),
		b[:len(b)/2], nil,
	} {
		other := filepath.Join(t.TempDir(), "manifest.json")
		os.WriteFile(other, bad, 0o600)
		if err := readDocument(other, &got); switchback.CodeOf(err) != switchback.CodeCorrupt {
			t.Errorf("%.40q: %v", bad, err)
		}
	}
}

// TestGoldenMerged: so does a merged segment.
func TestGoldenMerged(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "replica")
	r, _, want := mergeSample(t, dir, CodecNone)
	if err := r.Merge(t.Context(), 2, 3, 0); err != nil {
		t.Fatal(err)
	}
	fresh, err := os.ReadFile(segmentPath(dir, 3))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join("testdata", "segment-v1-merged.seg")
	if *update {
		if err := os.WriteFile(path, fresh, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	golden, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	got := [][]byte{readPoint(t, dir, 1, "vda")}
	h, err := replay(golden, got)
	if err != nil {
		t.Fatal(err)
	}
	if at := firstDifference(got[0], want); at >= 0 {
		t.Errorf("differs at %d", at)
	}
	// The digests are those of indexes, whose compression is free to change.
	header := testHeader(3, h.Parent, 1<<20)
	header.Merged = &Merged{Digest: h.Merged.Digest, Continues: 1, ContinuesDigest: h.Merged.ContinuesDigest}
	if diff := cmp.Diff(header, h); diff != "" || len(h.Merged.Digest) != 64 || len(h.Merged.ContinuesDigest) != 64 {
		t.Error(diff)
	}
	from, err := headerLength(golden)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(golden) - 512; len(fresh) < n || !bytes.Equal(golden[from:n], fresh[from:n]) {
		t.Error("the format has changed: raise its version and keep reading this one")
	}
}

package witness

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func hashOf(t *testing.T, disk string, holes ReadHoles) DiskHash {
	t.Helper()
	h, err := SHA256OfDisk(t.Context(), disk, holes)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestHashDependsOnContentOnly(t *testing.T) {
	raw := rawDisk(t, "disk", 1)
	want := hashOf(t, raw, SkipHoles)
	if want.SizeBytes != 64*MiB || want.NonZeroBytes != 4*MiB || want.ReadBytes >= 64*MiB {
		t.Errorf("hash of a sparse disk: %+v", want)
	}
	full := raw + ".full"
	sh(t, "cp", "--sparse=never", raw, full)
	q := qcow2(t, raw)
	small := raw + ".4k"
	sh(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "-c", raw, small)
	overlay := filepath.Join(t.TempDir(), "over,lay=1.qcow2")
	sh(t, "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", q, overlay)
	s1, s2 := socket(t), socket(t)
	for name, d := range map[string]string{
		"raw without holes": full, "qcow2": q, "compressed": small, "overlay": overlay,
		"qemu-nbd": serve(t, s1, "qemu-nbd", "-r", "-t", "-e", "8", "-f", "qcow2", "-k", s1, q),
		"nbdkit":   serve(t, s2, "nbdkit", "-f", "-r", "-U", s2, "file", raw),
	} {
		for _, holes := range []ReadHoles{SkipHoles, AllBytes} {
			if got := hashOf(t, d, holes); got.SHA256 != want.SHA256 || got.NonZeroBytes != want.NonZeroBytes {
				t.Errorf("%s (all bytes %v): %+v, want %+v", name, holes, got, want)
			}
		}
		if ch, err := ChangedBlocks(t.Context(), raw, d, 64<<10); err != nil || ch.Blocks != 0 {
			t.Errorf("%s: %+v, %v", name, ch, err)
		}
		if c, err := CompareDisks(t.Context(), raw, d); err != nil || !c.Identical {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
		plain, err := PlainSHA256OfDisk(t.Context(), d)
		if sum := strings.Fields(sh(t, "sha256sum", full))[0]; err != nil || plain != sum {
			t.Errorf("%s: plain hash %s, %v, sha256sum says %s", name, plain, err, sum)
		}
	}
}

// Whatever is done to a copy, each of the three judges notices.
func TestSabotagedCopy(t *testing.T) {
	for name, tt := range map[string]struct {
		off, n  int64
		pattern string
		blocks  int64 // of 64 KiB
	}{
		"flipped block":         {17*MiB + 4096, 4096, "-P 0x5a", 1},
		"one sector":            {512, 512, "-P 1", 1},
		"skipped extent":        {3*MiB + 8192, 65536, "-z", 2},
		"data where holes were": {40 * MiB, 128 << 10, "-P 7", 2},
		"last sector":           {64*MiB - 512, 512, "-z", 1},
		"straddles two blocks":  {20*MiB + 65536 - 512, 1024, "-P 3", 2},
		"straddles two MiB":     {21*MiB - 512, 1024, "-P 3", 2},
		"many":                  {24 * MiB, 4 * MiB, "-P 9", 64},
	} {
		t.Run(name, func(t *testing.T) {
			raw := rawDisk(t, "disk", 1)
			q := qcow2(t, raw)
			patch(t, q, tt.off, tt.n, tt.pattern)
			if a, b := hashOf(t, raw, SkipHoles), hashOf(t, q, SkipHoles); a.SHA256 == b.SHA256 {
				t.Error("the hash is the same")
			}
			c, err := CompareDisks(t.Context(), raw, q)
			if err != nil || c.Identical || c.Offset() < 0 {
				t.Errorf("compare: %+v at %d, %v", c, c.Offset(), err)
			}
			for _, pair := range [][2]string{{raw, q}, {q, raw}} {
				ch, err := ChangedBlocks(t.Context(), pair[0], pair[1], 64<<10)
				if err != nil || ch.Blocks != tt.blocks || ch.First != tt.off/65536*65536 {
					t.Errorf("changed: %+v, %v, want %d blocks", ch, err, tt.blocks)
				}
			}
		})
	}
}

func TestChangedBlockSizes(t *testing.T) {
	raw := rawDisk(t, "disk", 1)
	q := qcow2(t, raw)
	for _, at := range []int64{0, 8192, 5 * MiB} {
		patch(t, q, at, 4096, "-P 0xee")
	}
	for block, want := range map[int64]int64{4096: 3, 65536: 2, MiB: 2} {
		if ch, err := ChangedBlocks(t.Context(), raw, q, block); err != nil || ch.Blocks != want || ch.Bytes != want*block {
			t.Errorf("blocks of %d: %+v, %v", block, ch, err)
		}
	}
	if _, err := ChangedBlocks(t.Context(), raw, q, 3000); err == nil {
		t.Error("a block size that does not divide was taken")
	}
}

func TestSizeIsContent(t *testing.T) {
	raw := rawDisk(t, "disk", 1)
	longer := qcow2(t, raw)
	sh(t, "qemu-img", "resize", "-q", longer, "65M")
	if hashOf(t, raw, SkipHoles).SHA256 == hashOf(t, longer, SkipHoles).SHA256 {
		t.Error("a longer disk has the same hash")
	}
	if c, err := CompareDisks(t.Context(), raw, longer); err != nil || c.Identical {
		t.Errorf("compare: %+v, %v", c, err)
	}
	if ch, err := ChangedBlocks(t.Context(), raw, longer, 65536); err == nil {
		t.Errorf("changed blocks of disks of two sizes: %+v", ch)
	}
}

func TestOddSize(t *testing.T) {
	raw := rawDisk(t, "disk", 1)
	if err := os.Truncate(raw, 64*MiB-1024); err != nil {
		t.Fatal(err)
	}
	q := qcow2(t, raw)
	if hashOf(t, raw, SkipHoles).SHA256 != hashOf(t, q, AllBytes).SHA256 {
		t.Error("hashes differ")
	}
	patch(t, q, 64*MiB-1536, 512, "-P 1")
	if ch, err := ChangedBlocks(t.Context(), raw, q, 65536); err != nil || ch.Blocks != 1 || ch.Bytes != 65536-1024 {
		t.Errorf("%+v, %v", ch, err)
	}
}

// A server that hides data under a hole is noticed by the hash, and one whose
// reads fail is an error, never a hash.
func TestLyingServer(t *testing.T) {
	raw := rawDisk(t, "disk", 1)
	s := socket(t)
	uri := serve(t, s, "nbdkit", "-f", "-r", "-U", s, "--filter=error", "file", raw, "error-pread-rate=100%")
	if h, err := SHA256OfDisk(t.Context(), uri, SkipHoles); err == nil {
		t.Errorf("hash of what cannot be read: %+v", h)
	}
	if _, err := ChangedBlocks(t.Context(), raw, uri, 65536); err == nil {
		t.Error("compared what cannot be read")
	}
	// qemu-nbd on an image in which the first extent was made a hole.
	q := qcow2(t, raw)
	patch(t, q, 0, 65536, "-z")
	if hashOf(t, q, SkipHoles).SHA256 == hashOf(t, raw, SkipHoles).SHA256 {
		t.Error("data under a hole went unnoticed")
	}
}

func TestMissingDisk(t *testing.T) {
	if h, err := SHA256OfDisk(t.Context(), filepath.Join(t.TempDir(), "none"), SkipHoles); err == nil {
		t.Errorf("hash of nothing: %+v", h)
	}
	if h, err := SHA256OfDisk(t.Context(), "nbd+unix:///?socket=/nonexistent", SkipHoles); err == nil {
		t.Errorf("hash of nothing: %+v", h)
	}
}

package witness

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"

	"golang.org/x/sync/errgroup"
)

// chunkSize is what is read and hashed at once.
const chunkSize = 1 << 20

// DiskHash identifies the guest-visible content of a disk.
type DiskHash struct {
	// SHA256 depends on content and size alone, not on where the image has holes.
	// See SHA256OfDisk for what it is taken of.
	SHA256 string `json:"sha256"`
	// SizeBytes is the disk's size as the guest sees it.
	SizeBytes int64 `json:"size_bytes"`
	// NonZeroBytes are in 1 MiB chunks that hold anything but zeros.
	NonZeroBytes int64 `json:"nonzero_bytes"`
	// ReadBytes were read; the rest the server called a hole.
	ReadBytes int64 `json:"read_bytes"`
}

// ReadHoles says what to do about ranges that are holes by the server's word.
type ReadHoles bool

const (
	// SkipHoles takes them for zeros. A server that calls data a hole is
	// noticed, as the hash differs; one that serves data from what it calls a
	// hole is not.
	SkipHoles ReadHoles = false
	// AllBytes reads them, too. Takes as long as the disk is large.
	AllBytes ReadHoles = true
)

// SHA256OfDisk hashes what a guest would read from the disk: the SHA-256 of the
// list of (offset, length, SHA-256 of the bytes) of all 1 MiB chunks that are not
// all zeros, with the disk's size after it; offset, length and size are 8 bytes,
// little endian. Two disks have one hash if and only if they have one size and
// one content. Chunks of zeros take no time in it, which matters since disks are
// mostly empty; PlainSHA256OfDisk is the hash sha256sum would print.
func SHA256OfDisk(ctx context.Context, name string, holes ReadHoles) (DiskHash, error) {
	d, err := openDisk(ctx, name)
	if err != nil {
		return DiskHash{}, err
	}
	defer d.close()
	h := DiskHash{SizeBytes: d.size}
	todo, err := d.chunks(holes)
	if err != nil {
		return h, fmt.Errorf("map disk %s: %w", name, err)
	}
	sums := make([][]byte, len(todo)) // nil for zeros
	err = parallel(ctx, d.uri, len(todo), func(d *disk, buf []byte, i int) error {
		b := buf[:todo[i].n]
		if err := d.read(b, todo[i].off); err != nil {
			return err
		}
		if !isZero(b) {
			s := sha256.Sum256(b)
			sums[i] = s[:]
		}
		return nil
	})
	if err != nil {
		return h, fmt.Errorf("read disk %s: %w", name, err)
	}
	all := sha256.New()
	for i, s := range sums {
		h.ReadBytes += todo[i].n
		if s != nil {
			h.NonZeroBytes += todo[i].n
			all.Write(binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint64(nil, uint64(todo[i].off)), uint64(todo[i].n)))
			all.Write(s)
		}
	}
	all.Write(binary.LittleEndian.AppendUint64(nil, uint64(d.size)))
	h.SHA256 = hex.EncodeToString(all.Sum(nil))
	return h, nil
}

// PlainSHA256OfDisk is what `sha256sum` prints for a raw copy of the disk. Zeros
// are hashed as well: some three seconds for 4 GiB.
func PlainSHA256OfDisk(ctx context.Context, name string) (string, error) {
	d, err := openDisk(ctx, name)
	if err != nil {
		return "", err
	}
	defer d.close()
	es, err := d.extents()
	if err != nil {
		return "", fmt.Errorf("map disk %s: %w", name, err)
	}
	h, buf, zeros := sha256.New(), make([]byte, chunkSize), make([]byte, chunkSize)
	for _, e := range es {
		for at := int64(0); at < e.n; at += chunkSize {
			b := zeros[:min(chunkSize, e.n-at)]
			if !e.zero {
				b = buf[:len(b)]
				if err := d.read(b, e.off+at); err != nil {
					return "", fmt.Errorf("read disk %s at %d: %w", name, e.off+at, err)
				}
			}
			h.Write(b)
		}
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Comparison is the answer of CompareDisks.
type Comparison struct {
	Identical bool `json:"identical"`
	// Detail is what qemu-img said.
	Detail string `json:"detail"`
}

// CompareDisks lets `qemu-img compare` compare the guest-visible content. Disks
// of different sizes are not identical, even if the longer one ends in zeros.
func CompareDisks(ctx context.Context, a, b string) (Comparison, error) {
	// Strict mode (-s) would compare allocation as well; sizes are compared here.
	out, err := exec.CommandContext(ctx, "qemu-img", "compare", "-U", a, b).CombinedOutput()
	c := Comparison{Identical: err == nil, Detail: string(bytes.TrimSpace(out))}
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 1) {
		return c, fmt.Errorf("qemu-img compare: %w: %s", err, c.Detail)
	}
	if c.Identical && bytes.Contains(out, []byte("size mismatch")) {
		c.Identical = false
	}
	return c, nil
}

var mismatch = regexp.MustCompile(`at offset (\d+)`)

// Offset is where the first difference lies, -1 if that is unknown.
func (c Comparison) Offset() int64 {
	if m := mismatch.FindStringSubmatch(c.Detail); m != nil {
		if n, err := strconv.ParseInt(m[1], 10, 64); err == nil {
			return n
		}
	}
	return -1
}

// Changes is the answer of ChangedBlocks.
type Changes struct {
	BlockBytes int64 `json:"block_bytes"`
	Blocks     int64 `json:"blocks"`
	// Bytes of blocks that differ; the last block of a disk may be short.
	Bytes int64 `json:"bytes"`
	// First is the offset of the first one, -1 if there is none.
	First int64 `json:"first"`
	// ComparedBytes were read from both disks; the rest is holes in both.
	ComparedBytes int64 `json:"compared_bytes"`
}

// ChangedBlocks counts the blocks, of a size that divides 1 MiB, in which two
// disks of one size differ. Ranges that both servers call holes are not read.
func ChangedBlocks(ctx context.Context, a, b string, blockBytes int64) (Changes, error) {
	r := Changes{BlockBytes: blockBytes, First: -1}
	if blockBytes < 1 || chunkSize%blockBytes != 0 {
		return r, fmt.Errorf("block size %d does not divide 1 MiB", blockBytes)
	}
	da, err := openDisk(ctx, a)
	if err != nil {
		return r, err
	}
	defer da.close()
	db, err := openDisk(ctx, b)
	if err != nil {
		return r, err
	}
	defer db.close()
	if da.size != db.size {
		return r, fmt.Errorf("disks have %d and %d bytes", da.size, db.size)
	}
	ca, err := da.chunks(SkipHoles)
	if err != nil {
		return r, fmt.Errorf("map disk %s: %w", a, err)
	}
	cb, err := db.chunks(SkipHoles)
	if err != nil {
		return r, fmt.Errorf("map disk %s: %w", b, err)
	}
	bufA, bufB := make([]byte, chunkSize), make([]byte, chunkSize)
	for _, c := range union(ca, cb) {
		pa, pb := bufA[:c.n], bufB[:c.n]
		var g errgroup.Group
		g.Go(func() error { return da.read(pa, c.off) })
		if err := db.read(pb, c.off); err != nil {
			return r, errors.Join(fmt.Errorf("read disk %s at %d: %w", b, c.off, err), g.Wait())
		}
		if err := g.Wait(); err != nil {
			return r, fmt.Errorf("read disk %s at %d: %w", a, c.off, err)
		}
		r.ComparedBytes += c.n
		for at := int64(0); at < c.n; at += blockBytes {
			end := min(at+blockBytes, c.n)
			if !bytes.Equal(pa[at:end], pb[at:end]) {
				r.Blocks++
				r.Bytes += end - at
				if r.First < 0 {
					r.First = c.off + at
				}
			}
		}
	}
	return r, nil
}

// chunk is an aligned piece of chunkSize, shorter only at the disk's end.
type chunk struct{ off, n int64 }

// chunks lists, in order, those that hold something else than holes.
func (d *disk) chunks(holes ReadHoles) ([]chunk, error) {
	es := []extent{{0, d.size, false}}
	if !holes {
		var err error
		if es, err = d.extents(); err != nil {
			return nil, err
		}
	}
	var cs []chunk
	next := int64(0)
	for _, e := range es {
		if e.zero {
			continue
		}
		for at := max(next, e.off/chunkSize*chunkSize); at < e.off+e.n; at += chunkSize {
			cs = append(cs, chunk{at, min(chunkSize, d.size-at)})
			next = at + chunkSize
		}
	}
	return cs, nil
}

func union(a, b []chunk) []chunk {
	var cs []chunk
	for len(a) > 0 || len(b) > 0 {
		switch {
		case len(b) == 0 || len(a) > 0 && a[0].off < b[0].off:
			cs, a = append(cs, a[0]), a[1:]
		case len(a) == 0 || b[0].off < a[0].off:
			cs, b = append(cs, b[0]), b[1:]
		default:
			cs, a, b = append(cs, a[0]), a[1:], b[1:]
		}
	}
	return cs
}

// parallel calls do for each index, each caller with a connection of its own.
func parallel(ctx context.Context, uri string, n int, do func(d *disk, buf []byte, i int) error) error {
	g, ctx := errgroup.WithContext(ctx)
	const workers = 2
	for w := range workers {
		g.Go(func() error {
			d, err := openDisk(ctx, uri)
			if err != nil {
				return err
			}
			defer d.close()
			buf := make([]byte, chunkSize)
			for i := w; i < n; i += workers {
				if err := do(d, buf, i); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

var zeros [4096]byte

func isZero(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}

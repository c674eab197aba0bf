// Package qcow2 reads qcow2 images by mapping guest ranges to ranges of the
// file. It never writes, takes no image lock, and is made for one purpose:
// to serve the base of a replica while a QEMU tool may be writing to it.
//
// It reads versions 2 and 3, all cluster sizes, zero clusters and compressed
// clusters (zlib and zstd). Whatever else an image may have (backing file,
// encryption, external data file, extended L2 entries, unknown features) gives an
// error with CodeUnsupported at Open, so that the caller can go through
// qemu-nbd instead. Snapshots, bitmaps and the dirty and corrupt marks do not
// matter to a reader. Numbers in brackets below are sections of
// docs/interop/qcow2.txt in QEMU's source.
//
// # Reading while QEMU writes
//
// Open reads the L1 table once; L2 tables are read when needed and cached. A
// writer may therefore change what this package has seen. A range that is not written
// after Open reads right whether its L2 table was cached before or after the
// writer touched it for the sake of other ranges: the writer never moves a
// cluster that it does not write, puts data before the entry that points
// to it, and an L2 table that did not exist at Open maps no cluster that was
// not written since. A range that is written after Open may read as old, new or
// unrelated bytes; the caller must not ask for it (in a view the segments that
// were folded cover it).
package qcow2

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
	"os"
	"sync"

	"github.com/switchback-dr/switchback"
)

const (
	magic = 0x514649fb // "QFI\xfb"

	maxL1Bytes = 32 << 20 // QEMU's own limit

	// incompatible features [header]
	featureDirty       = 1 << 0
	featureCorrupt     = 1 << 1
	featureData        = 1 << 2
	featureCompression = 1 << 3
	featureExtendedL2  = 1 << 4

	offsetMask     = 0x00fffffffffffe00
	flagCompressed = 1 << 62
	flagZero       = 1 << 0

	l2CacheBytes = 64 << 20
)

// Image is an open image. Its methods may be called concurrently.
type Image struct {
	f           *os.File
	size        int64
	version     uint32
	clusterBits uint
	zstd        bool // compressed clusters are zstd, not zlib
	l1          []uint64

	mu       sync.Mutex
	l2       map[int][]byte // by L1 index
	order    []int          // keys of l2, oldest first
	inflated inflatedCache
}

// Open opens the image at path for reading. An image that this package cannot
// serve gives CodeUnsupported, one that is damaged or no qcow2 CodeCorrupt.
func Open(path string) (*Image, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, switchback.Errorf(switchback.CodeNotFound, "open image: %w", err)
	} else if err != nil {
		return nil, switchback.Errorf(switchback.CodeInternal, "open image: %w", err)
	}
	im := &Image{f: f, l2: map[int][]byte{}}
	if err := im.readHeader(path); err != nil {
		f.Close()
		return nil, err
	}
	return im, nil
}

func corrupt(format string, args ...any) error {
	return switchback.Errorf(switchback.CodeCorrupt, format, args...)
}

func unsupported(path, what string) error {
	return switchback.Errorf(switchback.CodeUnsupported, "image %s has %s", path, what).
		WithHint("serve it through qemu-nbd")
}

func (im *Image) readHeader(path string) error {
	h := make([]byte, 112)
	if n, err := im.f.ReadAt(h, 0); n < 72 {
		return corrupt("image %s: header: %w", path, err)
	}
	be := binary.BigEndian
	if be.Uint32(h) != magic {
		return corrupt("image %s is no qcow2", path)
	}
	im.version = be.Uint32(h[4:])
	if im.version != 2 && im.version != 3 {
		return unsupported(path, "an unknown version")
	}
	if be.Uint64(h[8:]) != 0 || be.Uint32(h[16:]) != 0 {
		return unsupported(path, "a backing file")
	}
	im.clusterBits = uint(be.Uint32(h[20:]))
	size := be.Uint64(h[24:])
	if im.clusterBits < 9 || im.clusterBits > 21 {
		return corrupt("image %s: clusters of 2^%d bytes", path, im.clusterBits)
	}
	if size > math.MaxInt64>>1 {
		return corrupt("image %s: size %d", path, size)
	}
	im.size = int64(size)
	if be.Uint32(h[32:]) != 0 {
		return unsupported(path, "encryption")
	}
	if im.version == 3 {
		features := be.Uint64(h[72:])
		switch {
		case features&featureData != 0:
			return unsupported(path, "an external data file")
		case features&featureExtendedL2 != 0:
			return unsupported(path, "extended L2 entries")
		case features&^(featureDirty|featureCorrupt|featureCompression) != 0:
			return unsupported(path, "unknown features")
		}
		length := be.Uint32(h[100:])
		if features&featureCompression != 0 {
			if length < 105 || h[104] != 1 {
				return unsupported(path, "an unknown compression type")
			}
			im.zstd = true
		}
	}

	// L1 [active L1 table]
	entries, at := int64(be.Uint32(h[36:])), be.Uint64(h[40:])
	covered := int64(1) << (2*im.clusterBits - 3) // bytes that one L2 table maps
	need := im.size / covered
	if im.size%covered != 0 {
		need++
	}
	if need > entries || need*8 > maxL1Bytes {
		return corrupt("image %s: L1 table of %d entries for %d bytes", path, entries, im.size)
	}
	st, err := im.f.Stat()
	if err != nil {
		return switchback.Errorf(switchback.CodeInternal, "open image: %w", err)
	}
	// A table is never longer than the file: what is allocated is bounded by that.
	if need > 0 && (at%(1<<im.clusterBits) != 0 || at > math.MaxInt64-maxL1Bytes || st.Mode().IsRegular() && int64(at)+8*need > st.Size()) {
		return corrupt("image %s: L1 table is outside of the file", path)
	}
	table := make([]byte, 8*need)
	if n, err := im.f.ReadAt(table, int64(at)); n < len(table) {
		return corrupt("image %s: L1 table: %w", path, err)
	}
	im.l1 = make([]uint64, need)
	for i := range im.l1 {
		im.l1[i] = be.Uint64(table[8*i:])
	}
	return nil
}

// Size returns the virtual size in bytes.
func (im *Image) Size() int64 { return im.size }

// Close closes the file.
func (im *Image) Close() error { return im.f.Close() }

// table returns the L2 table of L1 entry i, or nil when there is none.
func (im *Image) table(i int) ([]byte, error) {
	entry := im.l1[i]
	at := int64(entry & offsetMask)
	if at == 0 {
		return nil, nil
	}
	im.mu.Lock()
	t := im.l2[i]
	im.mu.Unlock()
	if t != nil {
		return t, nil
	}
	cluster := 1 << im.clusterBits
	if at%int64(cluster) != 0 {
		return nil, corrupt("L1 entry %d is %#x", i, entry)
	}
	t = make([]byte, cluster)
	if n, err := im.f.ReadAt(t, at); n < cluster {
		if err != io.EOF {
			return nil, corrupt("L2 table %d at %d: %w", i, at, err)
		}
		return nil, corrupt("L2 table %d at %d is outside of the file", i, at)
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	if _, ok := im.l2[i]; !ok {
		if len(im.order) >= max(16, l2CacheBytes/cluster) {
			delete(im.l2, im.order[0])
			im.order = im.order[1:]
		}
		im.order = append(im.order, i)
		im.l2[i] = t
	}
	return t, nil
}

// kind says where a run of clusters has its bytes.
type kind int

const (
	zero       kind = iota // no bytes: all zero
	plain                  // in the file, from host on
	compressed             // one cluster; entry describes it
)

// run is a guest range whose bytes are in one place.
type run struct {
	kind   kind
	offset int64 // guest
	length int64
	host   int64  // for plain
	entry  uint64 // for compressed
}

// run returns the longest run from off on, no longer than length; off+length
// must lie in the image.
func (im *Image) run(off, length int64) (run, error) {
	cluster := int64(1) << im.clusterBits
	r, err := im.cluster(off)
	if err != nil {
		return run{}, err
	}
	inside := off & (cluster - 1)
	r.offset, r.length = off, min(length, cluster-inside)
	if r.kind == plain {
		r.host += inside
	}
	if r.kind == compressed {
		return r, nil
	}
	for r.length < length {
		pos := off + r.length
		if r.kind == zero {
			// A missing L2 table is skipped as a whole.
			covered := cluster << (im.clusterBits - 3)
			if pos%covered == 0 && im.l1[pos/covered]&offsetMask == 0 {
				r.length = min(length, r.length+covered)
				continue
			}
		}
		next, err := im.cluster(pos)
		if err != nil {
			break // whoever gets there reports it
		}
		if next.kind != r.kind || next.kind == plain && next.host != r.host+r.length {
			break
		}
		r.length = min(length, r.length+cluster)
	}
	return r, nil
}

// cluster looks up the cluster that holds guest offset off [L2 table entry].
func (im *Image) cluster(off int64) (run, error) {
	perTable := im.clusterBits - 3
	n := off >> im.clusterBits
	t, err := im.table(int(n >> perTable))
	if err != nil || t == nil {
		return run{}, err
	}
	entry := binary.BigEndian.Uint64(t[8*(n&(1<<perTable-1)):])
	host := int64(entry & offsetMask)
	switch {
	case entry&flagCompressed != 0:
		return run{kind: compressed, entry: entry}, nil
	case im.version >= 3 && entry&flagZero != 0, host == 0:
		return run{}, nil
	case host&(1<<im.clusterBits-1) != 0:
		return run{}, corrupt("L2 entry of guest offset %d is %#x", off, entry)
	}
	return run{kind: plain, host: host}, nil
}

// ReadAt implements io.ReaderAt on the guest's bytes.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, switchback.Errorf(switchback.CodeInvalid, "negative offset %d", off)
	}
	want := len(p)
	if off >= im.size {
		p = nil
	} else if int64(want) > im.size-off {
		p = p[:im.size-off]
	}
	done := 0
	for done < len(p) {
		r, err := im.run(off+int64(done), int64(len(p)-done))
		if err != nil {
			return done, err
		}
		part := p[done : done+int(r.length)]
		switch r.kind {
		case zero:
			clear(part)
		case plain:
			err = im.readPlain(part, r)
		case compressed:
			err = im.readCompressed(part, r)
		}
		if err != nil {
			return done, err
		}
		done += len(part)
	}
	if done < want {
		return done, io.EOF
	}
	return done, nil
}

// readPlain reads from the file; the last cluster may be cut short there.
func (im *Image) readPlain(p []byte, r run) error {
	n, err := im.f.ReadAt(p, r.host)
	if n == len(p) {
		return nil
	}
	if err != io.EOF {
		return switchback.Errorf(switchback.CodeInternal, "read image at %d: %w", r.host, err)
	}
	if end := r.host + int64(n); end <= (r.host+int64(len(p))-1)&^(1<<im.clusterBits-1) {
		return corrupt("cluster of guest offset %d is outside of the file", r.offset+int64(n))
	}
	clear(p[n:])
	return nil
}

// Extent is a part of the image that is all zero without being stored, or not
// known to be.
type Extent struct {
	Offset, Length int64
	Zero           bool
}

// Extents describes [off, off+length), clipped to the image, in order and
// without gaps; neighbours differ in Zero.
func (im *Image) Extents(off, length int64) ([]Extent, error) {
	if off < 0 || length < 0 {
		return nil, switchback.Errorf(switchback.CodeInvalid, "extents of offset %d, length %d", off, length)
	}
	end := im.size
	if off < end && length < end-off {
		end = off + length
	}
	var out []Extent
	for off < end {
		r, err := im.run(off, end-off)
		if err != nil {
			return nil, err
		}
		if n := len(out); n > 0 && out[n-1].Zero == (r.kind == zero) {
			out[n-1].Length += r.length
		} else {
			out = append(out, Extent{off, r.length, r.kind == zero})
		}
		off += r.length
	}
	return out, nil
}

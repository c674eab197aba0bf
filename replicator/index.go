package replicator

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"github.com/zeebo/xxh3"

	switchback "github.com/switchback-dr/switchback"
)

// BlockSize is the granularity of the block index in bytes.
const BlockSize = 4096

// Hash is the keyed 128-bit hash of one block, big-endian.
type Hash [16]byte

var (
	// unknown: the target's content of the block is not known, or, in an index
	// of a replica that began as zeros, is still zero.
	unknown = Hash{}
	// invalid: the target may hold either of two contents; never equal to anything.
	invalid = Hash{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
)

// Layout of an index file, all integers little-endian:
//
//	0     8   magic "SBINDEX\x01"
//	8     8   size of the disk in bytes
//	16    8   key of the hash (seed of XXH3-128)
//	24    4   flags: bit 0 = an unknown block is zero at the target
//	28    64  stamp: digest of the point the entries stand for, or the name of
//	          the seeding session, padded with zero bytes
//	92    4   CRC-32C of bytes 0..91
//	4096  16  per block of 4 KiB: its hash; all zero = unknown
const (
	indexMagic      = "SBINDEX\x01"
	indexHeaderSize = 4096
	indexHeaderUsed = 96
	flagUnknownZero = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// diskIndex is the index of one disk: what the target acknowledged, per block.
// It is not safe for concurrent writers.
type diskIndex struct {
	f             *os.File
	size          int64
	key           uint64
	unknownIsZero bool
	stamp         string
	distrusted    bool // invalid entries were written and not synced
	zero          Hash // hash of a full block of zeros
	zeroTail      Hash // hash of the last block of zeros, where it is short
}

// openDiskIndex opens or creates the index of a disk. A file of another size,
// or with a damaged header, is replaced by an empty one with stamp "".
func openDiskIndex(path string, size int64, key uint64) (*diskIndex, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("block index: %w", err)
	}
	x := &diskIndex{f: f, size: size, key: key}
	if !x.readHeader() {
		if err := x.reset(false); err != nil {
			f.Close()
			return nil, err
		}
	}
	x.zero = x.hash(make([]byte, BlockSize))
	x.zeroTail = x.hash(make([]byte, size%BlockSize))
	return x, nil
}

func (x *diskIndex) readHeader() bool {
	var h [indexHeaderUsed]byte
	if _, err := x.f.ReadAt(h[:], 0); err != nil {
		return false
	}
	if string(h[:8]) != indexMagic || binary.LittleEndian.Uint32(h[92:]) != crc32.Checksum(h[:92], castagnoli) {
		return false
	}
	if int64(binary.LittleEndian.Uint64(h[8:])) != x.size {
		return false
	}
	x.key = binary.LittleEndian.Uint64(h[16:])
	x.unknownIsZero = binary.LittleEndian.Uint32(h[24:])&flagUnknownZero != 0
	n := 28
	for n < 92 && h[n] != 0 {
		n++
	}
	x.stamp = string(h[28:n])
	return true
}

// setStamp makes the entries durable, then the stamp.
func (x *diskIndex) setStamp(stamp string) error {
	if len(stamp) > 64 {
		return switchback.Errorf(switchback.CodeInternal, "index stamp %q is longer than 64 bytes", stamp)
	}
	if err := x.f.Sync(); err != nil {
		return fmt.Errorf("sync block index: %w", err)
	}
	var h [indexHeaderUsed]byte
	copy(h[:], indexMagic)
	binary.LittleEndian.PutUint64(h[8:], uint64(x.size))
	binary.LittleEndian.PutUint64(h[16:], x.key)
	if x.unknownIsZero {
		binary.LittleEndian.PutUint32(h[24:], flagUnknownZero)
	}
	copy(h[28:92], stamp)
	binary.LittleEndian.PutUint32(h[92:], crc32.Checksum(h[:92], castagnoli))
	if _, err := x.f.WriteAt(h[:], 0); err != nil {
		return fmt.Errorf("stamp block index: %w", err)
	}
	if err := x.f.Sync(); err != nil {
		return fmt.Errorf("sync block index: %w", err)
	}
	x.stamp = stamp
	return nil
}

// reset forgets everything: every block unknown, stamp "".
func (x *diskIndex) reset(unknownIsZero bool) error {
	if err := x.f.Truncate(0); err != nil {
		return fmt.Errorf("reset block index: %w", err)
	}
	blocks := (x.size + BlockSize - 1) / BlockSize
	if err := x.f.Truncate(indexHeaderSize + 16*blocks); err != nil {
		return fmt.Errorf("reset block index: %w", err)
	}
	x.unknownIsZero = unknownIsZero
	return x.setStamp("")
}

// hash returns the keyed hash of a block; never unknown or invalid.
func (x *diskIndex) hash(p []byte) Hash {
	u := xxh3.Hash128Seed(p, x.key)
	h := Hash(u.Bytes())
	if h == unknown || h == invalid {
		h[0] ^= 1
	}
	return h
}

// entries reads the hashes of count blocks from first into buf and returns it.
func (x *diskIndex) entries(first, count int64, buf []byte) ([]byte, error) {
	n := int(16 * count)
	if cap(buf) < n {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := x.f.ReadAt(buf, indexHeaderSize+16*first); err != nil && err != io.EOF {
		return nil, fmt.Errorf("read block index: %w", err)
	}
	return buf, nil
}

func (x *diskIndex) write(first int64, hashes []byte) error {
	if _, err := x.f.WriteAt(hashes, indexHeaderSize+16*first); err != nil {
		return fmt.Errorf("write block index: %w", err)
	}
	return nil
}

// zeroOf is the hash of a block of zeros.
func (x *diskIndex) zeroOf(block int64) Hash {
	if (block+1)*BlockSize > x.size {
		return x.zeroTail
	}
	return x.zero
}

// holds reports whether the target is known to hold content with hash h in a
// block for which the index has entry e.
func (x *diskIndex) holds(block int64, e, h Hash) bool {
	return e == h || (e == unknown && x.unknownIsZero && h == x.zeroOf(block))
}

// Index is the block index of one protected VM: per disk what the target has
// acknowledged, valid as of one stamp, and a write-ahead log of what later
// points change.
//
// A record is logged and made durable before the last byte of its segment
// leaves (Log), applied after the target's answer (Commit). After a crash
// Recover asks which of the logged points the target holds: records up to it
// are applied, the blocks of later ones become invalid, and an index that
// knows nothing of the target's point is void.
type Index struct {
	dir   string
	disks []*diskIndex
	wal   *wal
	stamp string
}

// OpenIndex opens the index in dir (created if missing) for the given disks.
// Call Recover before using it.
func OpenIndex(dir string, disks []switchback.Disk, key uint64) (*Index, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("block index: %w", err)
	}
	x := &Index{dir: dir}
	for _, d := range disks {
		di, err := openDiskIndex(filepath.Join(dir, d.Name+".index"), d.SizeBytes, key)
		if err != nil {
			x.Close()
			return nil, err
		}
		x.disks = append(x.disks, di)
	}
	w, err := openWAL(filepath.Join(dir, "index.log"))
	if err != nil {
		x.Close()
		return nil, err
	}
	x.wal = w
	return x, nil
}

// Close closes the files.
func (x *Index) Close() error {
	for _, d := range x.disks {
		d.f.Close()
	}
	if x.wal != nil {
		x.wal.close()
	}
	return nil
}

// Stamp is what the entries stand for: a point's digest, a seeding session, or "" (void).
func (x *Index) Stamp() string { return x.stamp }

// Recover brings the index to the state that the target holds, named by its
// last point's digest (or the seeding session). It reports whether the index is
// valid for it; a void index is reset and must not suppress anything.
func (x *Index) Recover(held string) (bool, error) {
	records, err := x.wal.read(len(x.disks))
	if err != nil {
		return false, err
	}
	stamp := x.disks[0].stamp
	for _, d := range x.disks {
		if d.stamp != stamp {
			// A crash between the stamps of two disks: the older one counts,
			// the log still has the records that lead to the newer.
			stamp = olderStamp(stamp, d.stamp, records)
		}
	}
	have, at := held == stamp && held != "", 0
	parent := stamp
	for i, r := range records {
		if r.parent != parent {
			records = records[:i]
			break
		}
		parent = r.digest
		if r.digest == held {
			have, at = true, i+1
		}
	}
	if !have {
		return false, x.Reset(false)
	}
	for i, r := range records {
		if err := x.apply(r, i >= at); err != nil {
			return false, err
		}
	}
	return true, x.SetStamp(held)
}

func olderStamp(a, b string, records []record) string {
	for _, r := range records {
		if r.parent == a {
			return a
		}
		if r.parent == b {
			return b
		}
	}
	return ""
}

// Reset makes every block unknown and the index void until SetStamp.
// unknownIsZero says that the target's copy begins as all zeros.
func (x *Index) Reset(unknownIsZero bool) error {
	for _, d := range x.disks {
		if err := d.reset(unknownIsZero); err != nil {
			return err
		}
	}
	x.stamp = ""
	return x.wal.truncate()
}

// SetStamp makes all entries durable as those of stamp and empties the log.
func (x *Index) SetStamp(stamp string) error {
	for _, d := range x.disks {
		if err := d.setStamp(stamp); err != nil {
			return err
		}
	}
	x.stamp = stamp
	return x.wal.truncate()
}

// walLimit is the size of the log past which Commit folds it into the index files.
const walLimit = 4 << 20

// Begin starts an index for a seeding session into a base of zeros. Until the
// copy is complete the file does not say that unknown blocks are zero: after an
// interruption the target may hold what was sent but not acknowledged.
func (x *Index) Begin(session string) error {
	if err := x.Reset(false); err != nil {
		return err
	}
	if err := x.SetStamp(session); err != nil {
		return err
	}
	for _, d := range x.disks {
		d.unknownIsZero = true
	}
	return nil
}

// Resume reports whether the index belongs to the seeding session.
func (x *Index) Resume(session string) bool {
	for _, d := range x.disks {
		if d.stamp != session {
			return false
		}
	}
	x.stamp = session
	for _, d := range x.disks {
		d.unknownIsZero = false
	}
	return session != ""
}

// Log makes the pending changes durable as those of the point digest, which
// continues from the present stamp.
func (x *Index) Log(p *Pending, digest string) error {
	return x.wal.append(record{parent: x.stamp, digest: digest, runs: p.runs})
}

// Commit applies what Log recorded, after the target has acknowledged digest.
func (x *Index) Commit(p *Pending, digest string) error {
	if err := x.apply(record{runs: p.runs}, false); err != nil {
		return err
	}
	if x.wal.size > walLimit {
		return x.SetStamp(digest)
	}
	x.stamp = digest
	return nil
}

// Apply writes pending changes without the log: for seeding, whose stamp is
// the session and whose unwritten tail is simply sent again.
func (x *Index) Apply(p *Pending) error { return x.apply(record{runs: p.runs}, false) }

func (x *Index) apply(r record, invalidate bool) error {
	for _, run := range r.runs {
		if run.disk >= len(x.disks) {
			return switchback.Errorf(switchback.CodeCorrupt, "block index log names disk %d of %d", run.disk, len(x.disks))
		}
		hashes := run.hashes
		if invalidate {
			hashes = make([]byte, len(run.hashes))
			for i := range hashes {
				hashes[i] = 0xff
			}
		}
		if err := x.disks[run.disk].write(run.first, hashes); err != nil {
			return err
		}
	}
	return nil
}

// Distrust marks blocks that are about to be overwritten at the target without
// the log: until they are acknowledged it may hold either content. Blocks of
// which nothing is known stay so. SyncDistrust makes it durable before sending.
func (x *Index) Distrust(disk int, off, length int64) error {
	d := x.disks[disk]
	first := off / BlockSize
	count := (length + BlockSize - 1) / BlockSize
	for count > 0 {
		n := min(count, 1<<14)
		entries, err := d.entries(first, n, nil)
		if err != nil {
			return err
		}
		changed := false
		for i := 0; i < len(entries); i += 16 {
			if h := Hash(entries[i:]); h != unknown && h != invalid {
				copy(entries[i:], invalid[:])
				changed = true
			}
		}
		if changed {
			if err := d.write(first, entries); err != nil {
				return err
			}
			d.distrusted = true
		}
		first, count = first+n, count-n
	}
	return nil
}

// SyncDistrust makes what Distrust marked durable.
func (x *Index) SyncDistrust() error {
	for _, d := range x.disks {
		if d.distrusted {
			if err := d.f.Sync(); err != nil {
				return fmt.Errorf("sync block index: %w", err)
			}
			d.distrusted = false
		}
	}
	return nil
}

// Pending gathers the entries that a point will change, in memory.
type Pending struct{ runs []run }

type run struct {
	disk   int
	first  int64
	hashes []byte
}

func (p *Pending) add(disk int, block int64, h Hash) {
	if n := len(p.runs); n > 0 {
		r := &p.runs[n-1]
		if r.disk == disk && r.first+int64(len(r.hashes)/16) == block {
			r.hashes = append(r.hashes, h[:]...)
			return
		}
	}
	p.runs = append(p.runs, run{disk: disk, first: block, hashes: append([]byte(nil), h[:]...)})
}

package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"sync"

	"github.com/zeebo/xxh3"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// Checksums of the bases, beside them: sums/DISK.sum, integers little-endian.
//
//	   0  8  magic "SBBASSUM"
//	   8  4  version, 1
//	  12  4  flags: bit 0 = an entry of 0 stands for a block of zeros
//	  16  8  xxh3-64 of the 16 bytes before
//	4096  8  for each block of 4 KiB of the disk: xxh3-64 of its content (the
//	         last one filled up with zeros), or
//	         0: zeros, or without the flag nothing is known
//	         1: nothing is known
//
// Whoever writes a base writes the sums with it, and makes both durable before
// what makes readers rely on them: the answer to a flush while seeding, the
// manifest after a fold. While a fold is under way nobody reads what it writes
// from the base, so that neither order nor tearing matters.
const (
	sumDir       = "sums"
	sumSuffix    = ".sum"
	sumMagic     = "SBBASSUM"
	sumBlock     = 4096
	sumHead      = 4096
	sumZeros     = 1 // flag
	sumUnknown   = 0
	sumUnproven  = 1
	sumReadTries = 3
)

func sumPath(dir, disk string) string { return filepath.Join(dir, sumDir, disk+sumSuffix) }

// baseSums is the open checksum file of one base. Its methods may be called
// concurrently, recording ones for disjoint ranges.
type baseSums struct {
	f     *os.File
	zeros bool // sumUnknown means zeros
}

// createSums makes the file for a base of size bytes, durably, unless it is there.
func createSums(dir, disk string, size int64, zeros bool) error {
	path := sumPath(dir, disk)
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fault(err, "create %s", path)
	}
	head := make([]byte, 0, 24)
	head = append(head, sumMagic...)
	head = binary.LittleEndian.AppendUint32(head, 1)
	var flags uint32
	if zeros {
		flags = sumZeros
	}
	head = binary.LittleEndian.AppendUint32(head, flags)
	head = binary.LittleEndian.AppendUint64(head, xxh3.Hash(head))
	temp := path + tempSuffix
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_TRUNC|os.O_RDWR, 0o600)
	if err != nil {
		return fault(err, "create %s", path)
	}
	_, err = f.Write(head)
	if err == nil {
		err = f.Truncate(sumHead + 8*blocksOf(size))
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	for _, d := range []string{filepath.Dir(path), dir} {
		if err == nil {
			err = osFileSystem{}.syncDir(d)
		}
	}
	return fault(err, "create %s", path)
}

func blocksOf(size int64) int64 { return (size + sumBlock - 1) / sumBlock }

// openSums opens the checksums of a base of size bytes; nil when there are none.
func openSums(dir, disk string, size int64, write bool) (*baseSums, error) {
	path := sumPath(dir, disk)
	mode := os.O_RDONLY
	if write {
		mode = os.O_RDWR
	}
	f, err := os.OpenFile(path, mode, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fault(err, "checksums of disk %s", disk)
	}
	bad := func(reason string) (*baseSums, error) {
		f.Close()
		return nil, &switchback.Error{Code: switchback.CodeCorrupt,
			Err:  Damage{File: path, Disk: disk, Reason: "checksums of the base: " + reason, To: NewestPoint},
			Hint: "remove the file to go on: what the base holds then counts as unproven"}
	}
	var head [24]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		return bad("the header cannot be read: " + err.Error())
	}
	if string(head[:8]) != sumMagic || binary.LittleEndian.Uint64(head[16:]) != xxh3.Hash(head[:16]) || binary.LittleEndian.Uint32(head[8:]) != 1 {
		return bad("the header is damaged")
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fault(err, "checksums of disk %s", disk)
	}
	if need := sumHead + 8*blocksOf(size); st.Size() < need {
		if !write {
			return bad("the file is cut short")
		}
		if err := f.Truncate(need); err != nil { // the disk has grown
			f.Close()
			return nil, fault(err, "checksums of disk %s", disk)
		}
	}
	return &baseSums{f: f, zeros: binary.LittleEndian.Uint32(head[12:])&sumZeros != 0}, nil
}

func (s *baseSums) close() error { return s.f.Close() }

func sumOf(block []byte) uint64 {
	v := xxh3.Hash(block)
	if v <= sumUnproven {
		v += 2
	}
	return v
}

var (
	zeroBlock [sumBlock]byte
	zeroSum   = sumOf(zeroBlock[:])
	sumPool   = sync.Pool{New: func() any { return new([sumBlock]byte) }}
)

// paddedSum is the sum of a block of which p is what is on the disk.
func paddedSum(p []byte) uint64 {
	if len(p) == sumBlock {
		return sumOf(p)
	}
	b := sumPool.Get().(*[sumBlock]byte)
	defer sumPool.Put(b)
	clear(b[copy(b[:], p):])
	return sumOf(b[:])
}

// entries reads the entries of count blocks.
func (s *baseSums) entries(first, count int64) ([]byte, error) {
	return s.entriesTo(make([]byte, 8*count), first)
}

// entriesTo is entries into b, as many as fit.
func (s *baseSums) entriesTo(b []byte, first int64) ([]byte, error) {
	n, err := s.f.ReadAt(b, sumHead+8*first)
	if err != nil && err != io.EOF {
		return nil, fault(err, "read %s", s.f.Name())
	}
	clear(b[n:])
	return b, nil
}

func (s *baseSums) put(first int64, entries []byte) error {
	_, err := s.f.WriteAt(entries, sumHead+8*first)
	return fault(err, "write %s", s.f.Name())
}

// record notes that p is what the base is about to hold at off. size is that of
// the disk. Of blocks that p covers in part nothing is known from then on.
func (s *baseSums) record(p []byte, off, size int64) error {
	return s.set(off, int64(len(p)), size, func(b []byte, at int64) []byte {
		if p == nil {
			return binary.LittleEndian.AppendUint64(b, zeroSum)
		}
		return binary.LittleEndian.AppendUint64(b, paddedSum(p[at-off:min(at-off+sumBlock, int64(len(p)))]))
	})
}

// recordZeroes is record for zeros.
func (s *baseSums) recordZeroes(off, length, size int64) error {
	v := zeroSum
	if s.zeros {
		v = sumUnknown
	}
	return s.set(off, length, size, func(b []byte, _ int64) []byte { return binary.LittleEndian.AppendUint64(b, v) })
}

func (s *baseSums) set(off, length, size int64, entry func(b []byte, at int64) []byte) error {
	end := off + length
	first, last := off/sumBlock, blocksOf(end)
	const most = 1 << 15 // blocks at once
	for first < last {
		n := min(last-first, most)
		b := make([]byte, 0, 8*n)
		for k := first; k < first+n; k++ {
			at := k * sumBlock
			if at < off || at+sumBlock > end && end < size {
				b = binary.LittleEndian.AppendUint64(b, sumUnproven)
			} else {
				b = entry(b, at)
			}
		}
		if err := s.put(first, b); err != nil {
			return err
		}
		first += n
	}
	return nil
}

// compare checks p, the content of the base from off on, a multiple of
// sumBlock; a last block that is short ends the base. It returns the ranges that
// do not match and how many bytes there is nothing to compare with.
func (s *baseSums) compare(p []byte, off int64) (bad []extent.Range, unproven int64, err error) {
	var entries []byte
	if count := blocksOf(int64(len(p))); 8*count <= sumBlock { // the reads of a view
		buf := sumPool.Get().(*[sumBlock]byte)
		defer sumPool.Put(buf)
		entries, err = s.entriesTo(buf[:8*count], off/sumBlock)
	} else {
		entries, err = s.entries(off/sumBlock, count)
	}
	if err != nil {
		return nil, 0, err
	}
	for at := 0; at < len(p); at += sumBlock {
		block := p[at:min(at+sumBlock, len(p))]
		e := binary.LittleEndian.Uint64(entries[at/sumBlock*8:])
		ok := true
		switch {
		case e == sumUnproven || e == sumUnknown && !s.zeros:
			unproven += int64(len(block))
		case e == sumUnknown:
			ok = bytes.Equal(block, zeroBlock[:len(block)])
		default:
			ok = paddedSum(block) == e
		}
		if !ok {
			bad = appendExtent(bad, extent.Range{Offset: off + int64(at), Length: int64(len(block))})
		}
	}
	return bad, unproven, nil
}

// compareZeros is compare for p that is all zeros.
func (s *baseSums) compareZeros(p []byte, off int64) (bad []extent.Range, unproven int64, err error) {
	entries, err := s.entries(off/sumBlock, blocksOf(int64(len(p))))
	if err != nil {
		return nil, 0, err
	}
	for i := 0; i < len(entries); i += 8 {
		at := int64(i) / 8 * sumBlock
		n := min(sumBlock, int64(len(p))-at)
		switch e := binary.LittleEndian.Uint64(entries[i:]); {
		case e == sumUnproven || e == sumUnknown && !s.zeros:
			unproven += n
		case e != sumUnknown && e != zeroSum:
			bad = appendExtent(bad, extent.Range{Offset: off + at, Length: n})
		}
	}
	return bad, unproven, nil
}

// zero reports whether nothing speaks against all of the blocks being zeros.
func (s *baseSums) zero(off, length int64) (bool, error) {
	for end := blocksOf(off + length); off/sumBlock < end; {
		first := off / sumBlock
		n := min(end-first, 1<<13)
		entries, err := s.entries(first, n)
		if err != nil {
			return false, err
		}
		for i := 0; i < len(entries); i += 8 {
			if e := binary.LittleEndian.Uint64(entries[i:]); e > sumUnproven && e != zeroSum {
				return false, nil
			}
		}
		off = (first + n) * sumBlock
	}
	return true, nil
}

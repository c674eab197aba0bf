package replicator

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
)

// The log of the block index is a sequence of records, little-endian:
//
//	4   length of the payload
//	4   CRC-32C of the payload
//	    payload: 1+n parent digest, 1+n digest, then runs:
//	             2 disk, 8 first block, 4 number of blocks, 16 per block
//
// A record that is cut short or damaged ends the log: it was never durable, so
// its segment was never complete.
type wal struct {
	f    *os.File
	size int64
}

type record struct {
	parent, digest string
	runs           []run
}

func openWAL(path string) (*wal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("block index log: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("block index log: %w", err)
	}
	return &wal{f: f, size: st.Size()}, nil
}

func (w *wal) close() error { return w.f.Close() }

func (w *wal) truncate() error {
	if w.size == 0 {
		return nil
	}
	if err := w.f.Truncate(0); err != nil {
		return fmt.Errorf("truncate block index log: %w", err)
	}
	w.size = 0
	return nil
}

func (w *wal) append(r record) error {
	n := 8 + 2 + len(r.parent) + len(r.digest)
	for _, run := range r.runs {
		n += 14 + len(run.hashes)
	}
	b := make([]byte, 8, n)
	b = append(b, byte(len(r.parent)))
	b = append(b, r.parent...)
	b = append(b, byte(len(r.digest)))
	b = append(b, r.digest...)
	for _, run := range r.runs {
		b = binary.LittleEndian.AppendUint16(b, uint16(run.disk))
		b = binary.LittleEndian.AppendUint64(b, uint64(run.first))
		b = binary.LittleEndian.AppendUint32(b, uint32(len(run.hashes)/16))
		b = append(b, run.hashes...)
	}
	binary.LittleEndian.PutUint32(b, uint32(len(b)-8))
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	if _, err := w.f.WriteAt(b, w.size); err != nil {
		return fmt.Errorf("append to block index log: %w", err)
	}
	if err := w.f.Sync(); err != nil {
		return fmt.Errorf("sync block index log: %w", err)
	}
	w.size += int64(len(b))
	return nil
}

// read returns the intact records from the start.
func (w *wal) read(disks int) ([]record, error) {
	b := make([]byte, w.size)
	if n, err := w.f.ReadAt(b, 0); err != nil && int64(n) < w.size {
		return nil, fmt.Errorf("read block index log: %w", err)
	}
	var records []record
	for len(b) >= 8 {
		n, sum := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
		if uint64(n) > uint64(len(b)-8) || crc32.Checksum(b[8:8+n], castagnoli) != sum {
			break
		}
		r, ok := decodeRecord(b[8:8+n], disks)
		if !ok {
			break
		}
		records = append(records, r)
		b = b[8+n:]
	}
	return records, nil
}

func decodeRecord(b []byte, disks int) (r record, ok bool) {
	text := func() (string, bool) {
		if len(b) < 1 || len(b) < 1+int(b[0]) {
			return "", false
		}
		s := string(b[1 : 1+int(b[0])])
		b = b[1+int(b[0]):]
		return s, true
	}
	if r.parent, ok = text(); !ok {
		return r, false
	}
	if r.digest, ok = text(); !ok {
		return r, false
	}
	for len(b) > 0 {
		if len(b) < 14 {
			return r, false
		}
		d, first, n := int(binary.LittleEndian.Uint16(b)), int64(binary.LittleEndian.Uint64(b[2:])), uint64(binary.LittleEndian.Uint32(b[10:]))
		b = b[14:]
		if d >= disks || first < 0 || n*16 > uint64(len(b)) {
			return r, false
		}
		r.runs = append(r.runs, run{disk: d, first: first, hashes: b[:n*16]})
		b = b[n*16:]
	}
	return r, true
}

package simulated

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
)

// Disk is what records are written to.
type Disk interface {
	Size() int64
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
}

type flusher interface {
	Flush(ctx context.Context) error
}

const (
	recordBytes  = 4096
	recordMagic  = "SWBKSIM1"
	recordStride = 64 << 10
	ringSlots    = 64 // per disk, at most
)

// Ring is where a guest's program writes numbered records: number n goes to
// disk n mod the number of disks, round and round through its slots. Record n is
// on its disk before n+1 is begun. A record of 4 KiB is
//
//	0   magic   8
//	8   number  8, big endian
//	16  noise of seed and number
//	4064 SHA-256 of all before
type Ring struct {
	Seed  uint64
	Disks []Disk
}

// Found is what a ring holds.
type Found struct {
	// Highest number of an intact record; 0 = none.
	Highest uint64
	// Records that are intact.
	Records int
	// Damaged counts slots that hold neither the record that belongs there nor
	// zeros, and records below Highest that are missing.
	Damaged int
}

func (r Ring) place(n uint64) (disk int, off int64) {
	disk = int(n % uint64(len(r.Disks)))
	return disk, int64(n/uint64(len(r.Disks))%r.slots(disk)) * recordStride
}

func (r Ring) slots(disk int) uint64 {
	return uint64(max(1, min(ringSlots, r.Disks[disk].Size()/recordStride)))
}

func (r Ring) record(n uint64) []byte {
	b := make([]byte, recordBytes)
	copy(b, recordMagic)
	binary.BigEndian.PutUint64(b[8:], n)
	x := r.Seed ^ n*0x9e3779b97f4a7c15
	for i := 16; i < recordBytes-sha256.Size; i += 8 {
		x ^= x << 13 // xorshift64
		x ^= x >> 7
		x ^= x << 17
		binary.BigEndian.PutUint64(b[i:], x)
	}
	sum := sha256.Sum256(b[:recordBytes-sha256.Size])
	copy(b[recordBytes-sha256.Size:], sum[:])
	return b
}

// Write writes record n; when it returns the record is on its disk.
func (r Ring) Write(n uint64) error {
	disk, off := r.place(n)
	if _, err := r.Disks[disk].WriteAt(r.record(n), off); err != nil {
		return err
	}
	if f, ok := r.Disks[disk].(flusher); ok {
		return f.Flush(context.Background())
	}
	return nil
}

// Read looks at all slots.
func (r Ring) Read() (Found, error) {
	var f Found
	have := map[uint64]bool{}
	zero := make([]byte, recordBytes)
	b := make([]byte, recordBytes)
	total := uint64(0)
	for disk := range r.Disks {
		for slot := range r.slots(disk) {
			total++
			off := int64(slot) * recordStride
			if _, err := r.Disks[disk].ReadAt(b, off); err != nil {
				return f, fmt.Errorf("read disk %d at %d: %w", disk, off, err)
			}
			if bytes.Equal(b, zero) {
				continue
			}
			n := binary.BigEndian.Uint64(b[8:])
			at, place := r.place(n)
			if n == 0 || at != disk || place != off || !bytes.Equal(b, r.record(n)) {
				f.Damaged++
				continue
			}
			f.Records++
			f.Highest = max(f.Highest, n)
			have[n] = true
		}
	}
	// One round back everything must be there.
	round := uint64(len(r.Disks)) * r.slots(0)
	for n := f.Highest; n > 0 && f.Highest-n < min(round, total); n-- {
		if !have[n] {
			f.Damaged++
		}
	}
	return f, nil
}

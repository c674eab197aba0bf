// Package record is the format of the lab guest's records: 4 KiB blocks that
// carry a sequence number, written strictly in order, record n+1 issued only
// after n is durable. Record n (the first is 1) lies on disk n mod D in slot
// (n/D) mod S of that disk's ring, at Offset + slot*Size. So on any
// crash-consistent copy of all disks, taken at one instant, the newest record
// and every one before it within the last D*S are present; a copy torn within a
// disk or between disks has a gap.
//
// Bytes of a record, little endian:
//
//	   0  8  magic "SWBREC01"
//	   8  8  sequence number
//	  16  8  guest's clock, nanoseconds since 1970 (set from the RTC: ±0.5 s of the host's)
//	  24 16  boot id, another in each boot of the guest
//	  40 16  UUID of the VM
//	  56  2  index of the disk among the D
//	  58  2  D, the number of disks
//	  60  4  S, the number of slots on each disk
//	  64     payload: xorshift64 from (sequence number, boot id)
//	4092  4  CRC-32C of the bytes before
package record

import (
	"encoding/binary"
	"hash/crc32"
)

const (
	Magic = "SWBREC01"
	Size  = 4096
)

var table = crc32.MakeTable(crc32.Castagnoli)

// Header is what a record says beside its payload.
type Header struct {
	Seq         uint64
	TimeNanos   uint64
	Boot        [16]byte
	VM          [16]byte
	Disk, Disks uint16
	Slots       uint32
}

// Slot is where record seq lies on its disk.
func (h Header) Slot() uint64 { return h.Seq / uint64(h.Disks) % uint64(h.Slots) }

// Encode fills b, Size bytes, with the record.
func (h Header) Encode(b []byte) {
	copy(b, Magic)
	le := binary.LittleEndian
	le.PutUint64(b[8:], h.Seq)
	le.PutUint64(b[16:], h.TimeNanos)
	copy(b[24:40], h.Boot[:])
	copy(b[40:56], h.VM[:])
	le.PutUint16(b[56:], h.Disk)
	le.PutUint16(b[58:], h.Disks)
	le.PutUint32(b[60:], h.Slots)
	x := h.Seq*0x9e3779b97f4a7c15 ^ le.Uint64(h.Boot[:]) | 1
	for i := 64; i+8 <= Size-4; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		le.PutUint64(b[i:], x)
	}
	le.PutUint32(b[Size-8:], 0)
	le.PutUint32(b[Size-4:], crc32.Checksum(b[:Size-4], table))
}

// Peek reads a header without looking at the CRC; false if there is no magic.
func Peek(b []byte) (Header, bool) {
	var h Header
	if len(b) < Size || string(b[:8]) != Magic {
		return h, false
	}
	le := binary.LittleEndian
	h.Seq = le.Uint64(b[8:])
	h.TimeNanos = le.Uint64(b[16:])
	copy(h.Boot[:], b[24:40])
	copy(h.VM[:], b[40:56])
	h.Disk, h.Disks = le.Uint16(b[56:]), le.Uint16(b[58:])
	h.Slots = le.Uint32(b[60:])
	return h, true
}

// Valid reports whether the CRC of a record is right.
func Valid(b []byte) bool {
	return crc32.Checksum(b[:Size-4], table) == binary.LittleEndian.Uint32(b[Size-4:Size])
}

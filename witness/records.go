package witness

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
)

// Ring says where the records of a VM lie on each of its disks. The lab's
// defaults are in lab/guest; the witness is told.
type Ring struct {
	Offset int64 `json:"offset"`
	Slots  int64 `json:"slots"`
}

const recordSize = 4096

// Records is what lies in the rings of all disks of one VM.
type Records struct {
	// Max is the highest sequence number of a valid record; 0 if there is none.
	Max uint64 `json:"max"`
	// MaxTimeNanos is the guest's clock when it wrote that record.
	MaxTimeNanos uint64 `json:"max_time_nanos"`
	// Found counts valid records in their right places.
	Found int64 `json:"found"`
	// Missing counts the numbers up to Max, within what the rings can hold, that
	// are not there.
	Missing int64 `json:"missing"`
	// OrderViolations counts records that are there although the one before them,
	// which was durable when they were issued, is not.
	OrderViolations int64 `json:"order_violations"`
	// Bad counts blocks that are neither a valid record nor all zeros: a wrong
	// checksum, a record in a wrong place, of another ring, or something else.
	Bad int64 `json:"bad"`
	// VM is the UUID of the VM that wrote the records, "" if none is there. Records
	// of a second VM are bad.
	VM string `json:"vm"`
	// Boots lists the boots that wrote records, by first record.
	Boots []RecordBoot `json:"boots"`
	// FirstProblem describes one of the above.
	FirstProblem string `json:"first_problem,omitempty"`

	boot  map[uint64]string // by sequence number
	lower uint64            // numbers below have been overwritten, by design
}

// RecordBoot is the part of the records that one boot of the guest wrote.
type RecordBoot struct {
	ID    string `json:"id"`
	First uint64 `json:"first"`
	Last  uint64 `json:"last"`
}

// OK reports whether the disks are what an orderly or crashed guest can have left.
func (r *Records) OK() bool {
	return r.Missing == 0 && r.OrderViolations == 0 && r.Bad == 0
}

// Has reports whether the record of that number and boot is on the disks.
func (r *Records) Has(seq uint64, boot string) bool { return r.boot[seq] == boot && boot != "" }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// VerifyRecords reads the rings of all disks of a VM, given in the writer's order.
func VerifyRecords(ctx context.Context, ring Ring, disks ...string) (*Records, error) {
	if len(disks) == 0 || ring.Slots < 1 || ring.Offset < 0 {
		return nil, errors.New("verify records: no disks or no ring")
	}
	r := &Records{boot: map[uint64]string{}}
	for i, name := range disks {
		if err := r.scan(ctx, ring, name, i, len(disks)); err != nil {
			return nil, err
		}
	}
	if r.Max > uint64(ring.Slots)*uint64(len(disks)) {
		r.lower = r.Max - uint64(ring.Slots)*uint64(len(disks))
	}
	for seq := r.lower + 1; seq <= r.Max; seq++ {
		id, ok := r.boot[seq]
		if !ok {
			r.Missing++
			r.problem("record %d is missing, the highest is %d", seq, r.Max)
			if _, next := r.boot[seq+1]; next {
				r.OrderViolations++
			}
			continue
		}
		if k := len(r.Boots) - 1; k >= 0 && r.Boots[k].ID == id {
			r.Boots[k].Last = seq
		} else {
			r.Boots = append(r.Boots, RecordBoot{ID: id, First: seq, Last: seq})
		}
	}
	return r, nil
}

func (r *Records) scan(ctx context.Context, ring Ring, name string, index, count int) error {
	d, err := openDisk(ctx, name)
	if err != nil {
		return err
	}
	defer d.close()
	if ring.Offset+ring.Slots*recordSize > d.size {
		return fmt.Errorf("disk %s has %d bytes and no room for the ring", name, d.size)
	}
	buf := make([]byte, chunkSize)
	for slot := int64(0); slot < ring.Slots; {
		b := buf[:min(chunkSize, (ring.Slots-slot)*recordSize)]
		if err := d.read(b, ring.Offset+slot*recordSize); err != nil {
			return fmt.Errorf("read disk %s: %w", name, err)
		}
		for ; len(b) > 0; b, slot = b[recordSize:], slot+1 {
			r.judge(b[:recordSize], name, slot, ring, index, count)
		}
	}
	return nil
}

// judge looks at one slot. The format is that of the guest, read anew here:
// magic[8] seq[8] time[8] boot[16] vm[16] disk[2] disks[2] slots[4] … crc32c[4].
func (r *Records) judge(b []byte, name string, slot int64, ring Ring, index, count int) {
	if isZero(b) {
		return
	}
	le := binary.LittleEndian
	bad := func(format string, args ...any) {
		r.Bad++
		r.problem("disk %s, slot %d: "+format, append([]any{name, slot}, args...)...)
	}
	if string(b[:8]) != "SWBREC01" {
		bad("not a record")
		return
	}
	if crc32.Checksum(b[:recordSize-4], castagnoli) != le.Uint32(b[recordSize-4:]) {
		bad("wrong checksum")
		return
	}
	seq := le.Uint64(b[8:])
	vm := uuid(b[40:56])
	switch {
	case int(le.Uint16(b[56:])) != index || int(le.Uint16(b[58:])) != count || int64(le.Uint32(b[60:])) != ring.Slots:
		bad("record %d is of disk %d of %d with %d slots", seq, le.Uint16(b[56:]), le.Uint16(b[58:]), le.Uint32(b[60:]))
		return
	case seq%uint64(count) != uint64(index) || seq/uint64(count)%uint64(ring.Slots) != uint64(slot):
		bad("record %d is in a wrong place", seq)
		return
	case r.VM != "" && r.VM != vm:
		bad("record %d is of VM %s, others of %s", seq, vm, r.VM)
		return
	}
	r.VM = vm
	r.boot[seq] = hex.EncodeToString(b[24:40])
	r.Found++
	if seq > r.Max {
		r.Max, r.MaxTimeNanos = seq, le.Uint64(b[16:])
	}
}

func (r *Records) problem(format string, args ...any) {
	if r.FirstProblem == "" {
		r.FirstProblem = fmt.Sprintf(format, args...)
	}
}

func uuid(b []byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

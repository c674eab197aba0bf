package witness

import (
	"strings"
	"testing"
)

func verify(t *testing.T, disks ...string) *Records {
	t.Helper()
	r, err := VerifyRecords(t.Context(), ring, disks...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRecordsInOrder(t *testing.T) {
	for name, n := range map[string]uint64{"none": 0, "one": 1, "few": 50, "ring just full": 128, "wrapped": 1000} {
		t.Run(name, func(t *testing.T) {
			v := newVM(t, 2)
			for seq := uint64(1); seq <= n; seq++ {
				v.write(seq, byte(1+seq/100))
			}
			r := verify(t, v.images()...)
			if !r.OK() || r.Max != n || r.Found != int64(min(n, 128)) {
				t.Errorf("%+v", r)
			}
			if n > 0 && (r.VM != "aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa" || r.Boots[len(r.Boots)-1].Last != n) {
				t.Errorf("VM %s, boots %+v", r.VM, r.Boots)
			}
		})
	}
}

func TestSabotagedRecords(t *testing.T) {
	const n = 300
	for name, tt := range map[string]struct {
		do                  func(v vm)
		missing, order, bad int64
		problem             string
	}{
		"removed record": {func(v vm) { v.put(make([]byte, 4096), 0, 260/2%64) }, 1, 1, 0, "record 260 is missing"},
		"removed newest": {func(v vm) { v.put(make([]byte, 4096), 0, 300/2%64) }, 0, 0, 0, ""}, // a crash looks the same; AcknowledgedLost tells
		"flipped bit":    {func(v vm) { b := rec{261, 3, 0xaa, 1, 2, 64}.encode(); b[999] ^= 1; v.put(b, 1, 261/2%64) }, 1, 1, 1, "wrong checksum"},
		"older disk":     {func(v vm) { old(v, 1, 280) }, 10, 10, 0, "record 281 is missing"},
		"swapped disk":   {func(v vm) { v.disks[0], v.disks[1] = v.disks[1], v.disks[0] }, 0, 0, 128, "of disk"},
		"record moved":   {func(v vm) { v.put(rec{262, 3, 0xaa, 0, 2, 64}.encode(), 0, 5) }, 1, 1, 1, "wrong place"},
		"another VM's":   {func(v vm) { v.put(rec{262, 3, 0xbb, 0, 2, 64}.encode(), 0, 262/2%64) }, 1, 1, 1, "of VM"},
		"not a record":   {func(v vm) { v.put([]byte("garbage"), 0, 262/2%64) }, 1, 1, 1, ""},
		"skipped ring":   {func(v vm) { v.put(make([]byte, 64*4096), 1, 0) }, 64, 64, 0, "is missing"},
		"one boot back":  {func(v vm) { old(v, 0, 299); old(v, 1, 299) }, 0, 0, 0, ""}, // a consistent earlier point
	} {
		t.Run(name, func(t *testing.T) {
			v := newVM(t, 2)
			for seq := uint64(1); seq <= n; seq++ {
				v.write(seq, 3)
			}
			tt.do(v)
			r := verify(t, v.images()...)
			if name == "removed newest" {
				if r.Max != 299 {
					t.Errorf("max %d", r.Max)
				}
				// Record 172 was overwritten by 300, so the ring is one short at its old end.
				r.Missing--
				r.OrderViolations--
				r.FirstProblem = ""
			}
			if r.Missing != tt.missing || r.OrderViolations != tt.order || r.Bad != tt.bad || !strings.Contains(r.FirstProblem, tt.problem) {
				t.Errorf("%+v", r)
			}
			if bad := tt.missing+tt.order+tt.bad > 0; r.OK() == bad {
				t.Errorf("OK is %v: %+v", r.OK(), r)
			}
		})
	}
}

// old puts the ring of one disk back to what it was when seq was the newest.
func old(v vm, disk int, newest uint64) {
	for seq := newest - 127; seq <= newest; seq++ {
		if int(seq%2) == disk {
			v.write(seq, 3)
		}
	}
}

func TestAcknowledgedLost(t *testing.T) {
	v := newVM(t, 2)
	for seq := uint64(1); seq <= 300; seq++ {
		v.write(seq, 0xcc)
	}
	images := v.images()
	boot := &Boot{ID: strings.Repeat("cc", 16), Acks: []Ack{{First: 1, Last: 250}, {First: 251, Last: 299}}}
	l := AcknowledgedLost(boot, verify(t, images...))
	if want := (Loss{Acknowledged: 299, Overwritten: 172}); l != want {
		t.Errorf("%+v, want %+v", l, want)
	}

	// The guest acknowledged more than the copy has.
	boot.Acks = append(boot.Acks, Ack{First: 300, Last: 310})
	l = AcknowledgedLost(boot, verify(t, images...))
	if l.Lost != 10 || l.FirstLost != 301 {
		t.Errorf("%+v, want 10 lost from 301", l)
	}

	// An acknowledged number was given to a record of another boot.
	v.write(290, 0xdd)
	l = AcknowledgedLost(boot, verify(t, v.images()...))
	if l.Lost != 11 || l.FirstLost != 290 {
		t.Errorf("%+v, want 11 lost from 290", l)
	}

	// Nothing is left at all.
	empty := newVM(t, 2)
	l = AcknowledgedLost(boot, verify(t, empty.images()...))
	if l.Lost != 310 || l.Acknowledged != 310 {
		t.Errorf("%+v, want all lost", l)
	}
}

func TestRecordsRefuses(t *testing.T) {
	if r, err := VerifyRecords(t.Context(), ring); err == nil {
		t.Errorf("no disks: %+v", r)
	}
	if r, err := VerifyRecords(t.Context(), Ring{Offset: 64 * MiB, Slots: 4}, rawDisk(t, "d", 1)); err == nil {
		t.Errorf("ring behind the end: %+v", r)
	}
}

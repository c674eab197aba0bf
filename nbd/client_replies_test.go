package nbd

import (
	"bytes"
	"errors"
	"io"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestReplies judges what the client makes of answers that no real server
// gives, to a read of 100 bytes at 512 or to a block status of that range.
func TestReplies(t *testing.T) {
	const h = 1<<32 | 1<<31 // handle of the first request
	u64 := func(v uint64) []byte { return be.AppendUint64(nil, v) }
	part := func(off uint64, n int, b byte) []byte { return append(u64(off), bytes.Repeat([]byte{b}, n)...) }
	hole := func(off uint64, n uint32) []byte { return be.AppendUint32(u64(off), n) }
	chunks := func(b ...[]byte) []byte { return bytes.Join(b, nil) }
	fill := func(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }
	simple := func(errno uint32, handle uint64) []byte {
		b := make([]byte, simpleSize)
		putSimple(b, errno, handle)
		return b
	}
	var protocol protocolError
	isProtocol := func(err error) bool { return errors.As(err, &protocol) }
	isErrno := func(e syscall.Errno) func(error) bool {
		return func(err error) bool { return errors.Is(err, e) }
	}
	isCut := func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }
	tests := []struct {
		name    string
		answer  []byte
		want    []byte           // if the read succeeds
		wantErr func(error) bool // if not
	}{
		{"in one", chunkBytes(1, chunkOffsetData, h, part(512, 100, 7)), fill(100, 7), nil},
		{"hole and data", chunks(chunkBytes(0, chunkOffsetHole, h, hole(512, 40)), chunkBytes(1, chunkOffsetData, h, part(552, 60, 7))),
			append(fill(40, 0), fill(60, 7)...), nil},
		{"backwards", chunks(chunkBytes(0, chunkOffsetData, h, part(592, 20, 3)), chunkBytes(0, chunkOffsetData, h, part(562, 30, 2)),
			chunkBytes(0, chunkOffsetData, h, part(512, 50, 1)), chunkBytes(1, chunkNone, h, nil)),
			append(append(fill(50, 1), fill(30, 2)...), fill(20, 3)...), nil},
		{"a part is missing", chunkBytes(1, chunkOffsetData, h, part(512, 99, 7)), nil, isProtocol},
		{"nothing is there", chunkBytes(1, chunkNone, h, nil), nil, isProtocol},
		{"middle is missing", chunks(chunkBytes(0, chunkOffsetData, h, part(512, 40, 1)), chunkBytes(1, chunkOffsetData, h, part(562, 50, 2))), nil, isProtocol},
		{"twice", chunks(chunkBytes(0, chunkOffsetData, h, part(512, 100, 1)), chunkBytes(1, chunkOffsetData, h, part(512, 1, 2))), nil, isProtocol},
		{"overlapping", chunks(chunkBytes(0, chunkOffsetData, h, part(552, 60, 1)), chunkBytes(1, chunkOffsetData, h, part(512, 50, 2))), nil, isProtocol},
		{"before the range", chunkBytes(1, chunkOffsetData, h, part(511, 100, 7)), nil, isProtocol},
		{"over the range", chunkBytes(1, chunkOffsetData, h, part(512, 101, 7)), nil, isProtocol},
		{"offset overflows", chunkBytes(1, chunkOffsetHole, h, hole(1<<64-1, 100)), nil, isProtocol},
		{"empty hole", chunkBytes(1, chunkOffsetHole, h, hole(512, 0)), nil, isProtocol},
		{"error after data", chunks(chunkBytes(0, chunkOffsetData, h, part(512, 50, 1)),
			chunkBytes(1, chunkErrorOffset, h, append([]byte{0, 0, 0, 5, 0, 1, 'x'}, u64(562)...))), nil, isErrno(syscall.EIO)},
		{"first error counts", chunks(chunkBytes(0, chunkError, h, []byte{0, 0, 0, 28, 0, 0}),
			chunkBytes(1, chunkError, h, []byte{0, 0, 0, 5, 0, 0})), nil, isErrno(syscall.ENOSPC)},
		{"error of an unknown type", chunkBytes(1, chunkErrBit|99, h, []byte{0, 0, 0, 12, 0, 0, 1, 2, 3}), nil, isErrno(syscall.ENOMEM)},
		{"error without a code", chunkBytes(1, chunkError, h, []byte{0, 0, 0, 0, 0, 0}), nil, isProtocol},
		{"error message is cut", chunkBytes(1, chunkError, h, []byte{0, 0, 0, 5, 0, 9}), nil, isProtocol},
		{"unknown type", chunkBytes(1, 77, h, nil), nil, isProtocol},
		{"unknown handle", chunkBytes(1, chunkOffsetData, h+1, part(512, 100, 7)), nil, isProtocol},
		{"handle out of range", simple(5, 1<<32|maxInFlight|1<<31), nil, isProtocol},
		{"simple data", simple(0, h), nil, isProtocol},
		{"simple error", simple(errnoInval, h), nil, isErrno(syscall.EINVAL)},
		{"block status", chunkBytes(1, chunkBlockStatus, h, []byte{0, 0, 0, 5, 0, 0, 0, 50, 0, 0, 0, 3}), nil, isProtocol},
		{"no magic", fill(100, 9), nil, isProtocol},
		{"end in a header", chunkBytes(1, chunkOffsetData, h, nil)[:10], nil, isCut},
		{"end in a payload", chunkBytes(1, chunkOffsetData, h, part(512, 100, 7))[:60], nil, isCut},
		{"nothing", nil, nil, isCut},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, _, err := askScripted(t, request{command: cmdRead, offset: 512, length: 100}, tt.answer)
			if tt.wantErr == nil {
				if err != nil || !bytes.Equal(got, tt.want) {
					t.Errorf("got %x, %v", got, err)
				}
			} else if err == nil || !tt.wantErr(err) {
				t.Errorf("got error %v", err)
			}
		})
	}

	status := func(context uint32, pairs ...uint32) []byte {
		b := be.AppendUint32(nil, context)
		for _, p := range pairs {
			b = be.AppendUint32(b, p)
		}
		return b
	}
	statusTests := []struct {
		name    string
		answer  []byte
		want    []Extent
		wantErr bool
	}{
		{"more than asked", chunkBytes(1, chunkBlockStatus, h, status(5, 50, 3, 80, 0)), []Extent{{512, 50, 3}, {562, 50, 0}}, false},
		{"less than asked", chunkBytes(1, chunkBlockStatus, h, status(5, 50, 3)), []Extent{{512, 50, 3}}, false},
		{"merged", chunkBytes(1, chunkBlockStatus, h, status(5, 50, 3, 10, 3)), []Extent{{512, 60, 3}}, false},
		{"other context too", chunks(chunkBytes(0, chunkBlockStatus, h, status(6, 100, 0)), chunkBytes(0, chunkBlockStatus, h, status(5, 50, 3)),
			chunkBytes(1, chunkBlockStatus, h, status(7, 1, 1))), []Extent{{512, 50, 3}}, false},
		{"only other contexts", chunkBytes(1, chunkBlockStatus, h, status(6, 100, 0)), nil, true},
		{"twice", chunks(chunkBytes(0, chunkBlockStatus, h, status(5, 50, 3)), chunkBytes(1, chunkBlockStatus, h, status(5, 50, 3))), nil, true},
		{"empty extent", chunkBytes(1, chunkBlockStatus, h, status(5, 0, 3)), nil, true},
		{"no extent", chunkBytes(1, chunkBlockStatus, h, status(5)), nil, true},
		{"done without", chunkBytes(1, chunkNone, h, nil), nil, true},
		{"data", chunkBytes(1, chunkOffsetData, h, part(512, 100, 7)), nil, true},
	}
	for _, tt := range statusTests {
		t.Run("status "+tt.name, func(t *testing.T) {
			_, got, err := askScripted(t, request{command: cmdBlockStatus, offset: 512, length: 100}, tt.answer)
			if d := cmp.Diff(tt.want, got); d != "" || (err != nil) != tt.wantErr {
				t.Errorf("%v (-want +got):\n%s", err, d)
			}
		})
	}
}

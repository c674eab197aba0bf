package libvirt

import (
	"encoding/binary"
	"fmt"
)

// Limits of remote_protocol.x; what exceeds them is not a valid message.
const (
	maxString      = 4 << 20
	maxDomains     = 16384
	maxCheckpoints = 16384
	maxAuthTypes   = 20
	maxDiskErrors  = 256
)

// domainRef is remote_nonnull_domain. libvirtd looks a domain up by its UUID
// alone; name and id only decorate messages, so calls send neither.
type domainRef struct {
	name string
	uuid [16]byte
	id   int32
}

// args builds the XDR form of a call's arguments, field by field.
type args struct{ b []byte }

func newArgs() *args { return &args{} }

func (a *args) u32(v uint32) *args {
	a.b = binary.BigEndian.AppendUint32(a.b, v)
	return a
}

func (a *args) i32(v int32) *args { return a.u32(uint32(v)) }

func (a *args) u64(v uint64) *args {
	a.b = binary.BigEndian.AppendUint64(a.b, v)
	return a
}

func (a *args) flag(v bool) *args {
	if v {
		return a.u32(1)
	}
	return a.u32(0)
}

func (a *args) opaque(p []byte) *args {
	a.b = append(a.b, p...)
	for len(a.b)%4 != 0 {
		a.b = append(a.b, 0)
	}
	return a
}

func (a *args) str(s string) *args { return a.u32(uint32(len(s))).opaque([]byte(s)) }

// optional writes a string that may be NULL; "" is sent as NULL.
func (a *args) optional(s string) *args {
	if s == "" {
		return a.u32(0)
	}
	return a.u32(1).str(s)
}

func (a *args) domain(d domainRef) *args { return a.str(d.name).opaque(d.uuid[:]).i32(d.id) }

func (a *args) checkpoint(d domainRef, name string) *args { return a.str(name).domain(d) }

// result reads the XDR form of a reply. The first fault sticks: every later
// read returns zero and err says what was wrong. It never reads past its
// bytes and never allocates more than they hold.
type result struct {
	b   []byte
	err error
}

func (r *result) fail(format string, a ...any) {
	if r.err == nil {
		r.err = fmt.Errorf(format, a...)
		r.b = nil
	}
}

func (r *result) take(n int) []byte {
	if r.err != nil {
		return nil
	}
	if n > len(r.b) {
		r.fail("message ends %d bytes early", n-len(r.b))
		return nil
	}
	p := r.b[:n]
	r.b = r.b[n:]
	return p
}

func (r *result) u32() uint32 {
	if p := r.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (r *result) i32() int32 { return int32(r.u32()) }

func (r *result) u64() uint64 {
	if p := r.take(8); p != nil {
		return binary.BigEndian.Uint64(p)
	}
	return 0
}

func (r *result) str() string {
	n := r.u32()
	if n > maxString {
		r.fail("string of %d bytes exceeds the limit of %d", n, maxString)
		return ""
	}
	padded := (int(n) + 3) &^ 3
	p := r.take(padded)
	if p == nil {
		return ""
	}
	return string(p[:n])
}

// optional reads a string that may be NULL; NULL is returned as "".
func (r *result) optional() string {
	if r.present() {
		return r.str()
	}
	return ""
}

// present reads the discriminant of an optional value.
func (r *result) present() bool {
	switch v := r.u32(); v {
	case 0:
		return false
	case 1:
		return true
	default:
		r.fail("pointer discriminant is %d", v)
		return false
	}
}

// count reads an array's length; each element takes at least elemBytes.
func (r *result) count(limit, elemBytes int) int {
	n := r.u32()
	if int64(n) > int64(limit) || int64(n)*int64(elemBytes) > int64(len(r.b)) {
		r.fail("array of %d elements does not fit", n)
		return 0
	}
	return int(n)
}

func (r *result) domain() domainRef {
	d := domainRef{name: r.str()}
	copy(d.uuid[:], r.take(16))
	d.id = r.i32()
	return d
}

package journal

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/switchback-dr/switchback"
)

var update = flag.Bool("update", false, "rewrite the golden vectors")

// testHeader is a header with fixed values and disks of the given sizes, named
// vda, vdb, and so on.
func testHeader(seq switchback.Sequence, parent string, sizes ...int64) Header {
	h := Header{
		Protection: "p-0123456789ab", Epoch: 3, Sequence: seq, Kind: switchback.CrashConsistent,
		Time:       time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC).Add(time.Duration(seq) * time.Second),
		Checkpoint: fmt.Sprintf("sb-3-%d", seq), Parent: parent,
	}
	for i, size := range sizes {
		h.Disks = append(h.Disks, DiskGeometry{Name: "vd" + string(rune('a'+i)), SizeBytes: size})
	}
	return h
}

// content fills p with bytes that compress about 2:1 and depend on seed.
func content(p []byte, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 7))
	for i := 0; i < len(p); i += 16 {
		v := rng.Uint64()
		for j := i; j < min(i+8, len(p)); j++ {
			p[j] = byte(v)
			v >>= 8
		}
	}
}

// buildSegment makes a segment and returns its bytes.
func buildSegment(t testing.TB, h Header, c Codec, fill func(*SegmentWriter) error) ([]byte, Summary) {
	t.Helper()
	var buf bytes.Buffer
	w, err := NewSegmentWriter(&buf, h, c)
	if err != nil {
		t.Fatal(err)
	}
	if err := fill(w); err != nil {
		t.Fatal(err)
	}
	sum, err := w.Finish()
	if err != nil {
		t.Fatal(err)
	}
	if sum.StoredBytes != int64(buf.Len()) {
		t.Fatalf("summary says %d bytes, %d were written", sum.StoredBytes, buf.Len())
	}
	return buf.Bytes(), sum
}

// replay applies a segment to disks and verifies it on the way.
func replay(seg []byte, disks [][]byte) (Header, error) {
	s, err := openStream(bytes.NewReader(seg))
	if err != nil {
		return Header{}, err
	}
	ix, _, _, err := s.copyTo(context.Background(), io.Discard)
	if err != nil {
		return Header{}, err
	}
	for d := range ix.disks {
		var stream []byte
		for _, n := range ix.disks[d].frames {
			f := ix.frames[n]
			raw := make([]byte, f.rawLength())
			if err := decompress(raw, seg[f.offset:f.offset+int64(f.stored)], f.codec); err != nil {
				return Header{}, err
			}
			stream = append(stream, raw...)
		}
		for _, r := range ix.disks[d].data {
			copy(disks[d][r.Offset:r.End()], stream)
			stream = stream[r.Length:]
		}
		for _, r := range ix.disks[d].zero {
			clear(disks[d][r.Offset:r.End()])
		}
	}
	return s.header, nil
}

func TestSegmentRoundTrip(t *testing.T) {
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		t.Run(c.String(), func(t *testing.T) {
			h := testHeader(5, "abcd", 4<<20, 1<<20)
			want := [][]byte{make([]byte, 4<<20), make([]byte, 1<<20)}
			got := [][]byte{make([]byte, 4<<20), make([]byte, 1<<20)}
			for _, d := range got {
				content(d, 99)
			}
			for i, d := range want {
				copy(d, got[i])
			}
			seg, sum := buildSegment(t, h, c, func(w *SegmentWriter) error {
				// one large extent, scattered blocks, incompressible ones, zeros
				content(want[0][:777*512], 1)
				w.Data(0, 0, want[0][:777*512])
				rng := rand.New(rand.NewPCG(3, uint64(c)))
				for at := int64(0); at < 2<<20; at += 16384 {
					disk, at := rng.IntN(2), at
					if disk == 0 {
						at += 1 << 20
					} else {
						at /= 2
					}
					block := want[disk][at : at+int64(1+rng.IntN(16))*512]
					content(block, rng.Uint64())
					if rng.IntN(4) == 0 {
						for i := range block {
							block[i] = byte(rng.Uint32())
						}
					}
					w.Data(disk, at, block)
				}
				clear(want[0][3<<20 : 4<<20])
				return w.Zero(0, 3<<20, 1<<20)
			})
			h2, err := replay(seg, got)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(h, h2); diff != "" {
				t.Error(diff)
			}
			for i := range want {
				if !bytes.Equal(got[i], want[i]) {
					t.Errorf("disk %d differs", i)
				}
			}
			if sum.ZeroBytes != 1<<20 || sum.ChangedBytes != sum.DataBytes+sum.ZeroBytes {
				t.Errorf("summary %+v", sum)
			}
			if overhead := float64(sum.StoredBytes) / float64(sum.PayloadBytes); overhead > 1.02 {
				t.Errorf("overhead %.4f", overhead)
			}
		})
	}
}

func TestSegmentWriterRefuses(t *testing.T) {
	open := func(w io.Writer) *SegmentWriter {
		s, err := NewSegmentWriter(w, testHeader(1, "", 1<<20), CodecNone)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	block := make([]byte, 4096)
	for _, c := range []struct {
		name string
		do   func(*SegmentWriter) error
	}{
		{"twice", func(w *SegmentWriter) error {
			w.Data(0, 0, block)
			w.Zero(0, 4096-512, 512)
			_, err := w.Seal()
			return err
		}},
		{"past the end", func(w *SegmentWriter) error { return w.Data(0, 1<<20-512, block) }},
		{"negative", func(w *SegmentWriter) error { return w.Zero(0, -512, 512) }},
		{"odd offset", func(w *SegmentWriter) error { return w.Data(0, 1, block) }},
		{"odd length", func(w *SegmentWriter) error { return w.Data(0, 0, block[:100]) }},
		{"no such disk", func(w *SegmentWriter) error { return w.Data(1, 0, block) }},
	} {
		w := open(io.Discard)
		if err := c.do(w); switchback.CodeOf(err) != switchback.CodeInvalid {
			t.Errorf("%s: %v", c.name, err)
		}
		w.Abort()
		w.Abort()
	}
	w := open(failingWriter{})
	for range 1000 {
		w.Data(0, 0, block)
	}
	if _, err := w.Finish(); err == nil {
		t.Error("a failed write was not reported")
	}
	for _, h := range []Header{{}, testHeader(0, "", 512), testHeader(1, "", 100), testHeader(1, "", 0)} {
		if _, err := NewSegmentWriter(io.Discard, h, CodecNone); switchback.CodeOf(err) != switchback.CodeInvalid {
			t.Errorf("header %+v: %v", h, err)
		}
	}
}

type failingWriter struct{}

func (failingWriter) Write(p []byte) (int, error) { return len(p) / 2, io.ErrClosedPipe }

// sampleSegment is a small segment with every feature.
func sampleSegment(t testing.TB, c Codec) []byte {
	seg, _ := buildSegment(t, testHeader(7, "0011", 1<<20, 1<<20), c, func(w *SegmentWriter) error {
		b := make([]byte, 80<<10)
		content(b, 5)
		w.Data(0, 8192, b)
		w.Data(1, 512, b[:4096])
		w.Data(0, 512<<10, b[4096:9216])
		w.Zero(0, 768<<10, 64<<10)
		return w.Zero(1, 64<<10, 512)
	})
	return seg
}

func TestDamagedStream(t *testing.T) {
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		seg := sampleSegment(t, c)
		want := [][]byte{make([]byte, 1<<20), make([]byte, 1<<20)}
		if _, err := replay(seg, want); err != nil {
			t.Fatal(err)
		}
		check := func(what string, b []byte) {
			t.Helper()
			got := [][]byte{make([]byte, 1<<20), make([]byte, 1<<20)}
			_, err := replay(b, got)
			if err == nil && bytes.Equal(got[0], want[0]) && bytes.Equal(got[1], want[1]) {
				return // another spelling of the same content
			}
			if code := switchback.CodeOf(err); code != switchback.CodeCorrupt && code != switchback.CodeUnsupported {
				t.Fatalf("%v, %s: %v", c, what, err)
			}
		}
		rng := rand.New(rand.NewPCG(1, 1))
		for range 1500 {
			at := rng.IntN(len(seg))
			b := bytes.Clone(seg)
			b[at] ^= 1 << rng.IntN(8)
			check(fmt.Sprintf("byte %d of %d flipped", at, len(seg)), b)
		}
		for range 200 {
			check("cut", seg[:rng.IntN(len(seg))])
		}
		if _, err := replay(append(bytes.Clone(seg), 0), want); switchback.CodeOf(err) != switchback.CodeCorrupt {
			t.Errorf("a byte after the end: %v", err)
		}
	}
}

func FuzzStream(f *testing.F) {
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		f.Add(sampleSegment(f, c))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := openStream(bytes.NewReader(b))
		if err == nil {
			s.copyTo(context.Background(), io.Discard)
		}
	})
}

func FuzzIndex(f *testing.F) {
	s, _ := openStream(bytes.NewReader(sampleSegment(f, CodecZstd)))
	ix, foot, _, err := s.copyTo(context.Background(), io.Discard)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(ix.plain(), uint16(len(ix.frames)))
	f.Fuzz(func(t *testing.T, plain []byte, frames uint16) {
		b := make([]byte, indexHeadSize)
		b[0] = indexTag
		b = indexEncoder().EncodeAll(plain, b)
		packed := len(b) - indexHeadSize
		for i, n := range []int{packed, len(plain), int(frames)} {
			for j := range 8 {
				b[8+8*i+j] = byte(n >> (8 * j))
			}
		}
		b = append(b, make([]byte, sumSize*int(frames))...)
		decodeIndex(b, int64(len(s.head)), foot.indexOffset, s.header.Disks)
	})
}

func BenchmarkSegmentWriter(b *testing.B) {
	const size = 64 << 20
	disk := make([]byte, size)
	content(disk, 1)
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		for _, block := range []int{4 << 10, 1 << 20} {
			b.Run(fmt.Sprintf("%v/%dK", c, block>>10), func(b *testing.B) {
				b.SetBytes(size)
				var sum Summary
				for b.Loop() {
					w, err := NewSegmentWriter(io.Discard, testHeader(1, "", 2*size), c)
					if err != nil {
						b.Fatal(err)
					}
					for at := 0; at < size; at += block {
						w.Data(0, int64(2*at), disk[at:at+block])
					}
					if sum, err = w.Finish(); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(sum.StoredBytes)/float64(sum.PayloadBytes), "overhead")
				b.ReportMetric(float64(size)/float64(sum.StoredBytes), "ratio")
			})
		}
	}
}

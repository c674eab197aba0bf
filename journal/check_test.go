package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// seeded is a replica that was filled by a first copy, with points after it.
type seeded struct {
	t      *testing.T
	dir    string
	base   string
	r      *Replica
	parent string
	states map[switchback.Sequence][]byte
}

const seededSize = 1<<20 + 512 // the last block is cut short

func newSeeded(t *testing.T) *seeded {
	t.Helper()
	s := &seeded{t: t, dir: tempDir(t), states: map[switchback.Sequence][]byte{}, parent: "5eed"}
	s.base = filepath.Join(t.TempDir(), "vda.raw")
	if err := os.WriteFile(s.base, make([]byte, seededSize), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	s.r, err = Options{ReserveBytes: 1}.Create(s.dir, Spec{Protection: "p-0123456789ab", Epoch: 3, Name: "vm",
		Disks: []ReplicaDisk{{Name: "vda", SizeBytes: seededSize, BasePath: s.base, BaseFormat: "raw"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.r.Close() })
	state := make([]byte, seededSize)
	content(state[:seededSize/2], 3)
	content(state[seededSize-512:], 4)
	h := testHeader(0, "", seededSize)
	h.Seed = true
	seg, _ := buildSegment(t, h, CodecZstd, func(w *SegmentWriter) error {
		w.Data(0, 0, state[:512<<10])
		w.Zero(0, 512<<10, 512<<10)
		return w.Data(0, 1<<20, state[1<<20:])
	})
	copy(state[seededSize/2:], make([]byte, 512<<10-seededSize/2+512))
	state = slices.Concat(state[:512<<10], make([]byte, 512<<10), state[1<<20:])
	f, done := s.open()
	if err := s.r.ApplySeed(context.Background(), bytes.NewReader(seg), map[string]BaseWriter{"vda": f}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.r.SyncSums(), done()); err != nil {
		t.Fatal(err)
	}
	if err := s.r.FinishSeed(switchback.Point{Protection: "p-0123456789ab", Sequence: 1, Epoch: 3, Digest: s.parent}); err != nil {
		t.Fatal(err)
	}
	s.states[1] = state
	return s
}

func (s *seeded) open() (BaseWriter, func() error) {
	f, err := os.OpenFile(s.base, os.O_RDWR, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	return plainBase{f}, f.Close
}

// receive adds a point that writes length bytes at off.
func (s *seeded) receive(off, length int64) {
	s.t.Helper()
	seq := s.r.Head().Sequence + 1
	state := bytes.Clone(s.states[seq-1])
	content(state[off:off+length], uint64(seq))
	seg, sum := buildSegment(s.t, testHeader(seq, s.parent, seededSize), CodecS2, func(w *SegmentWriter) error {
		return w.Data(0, off, state[off:off+length])
	})
	if _, err := s.r.Receive(context.Background(), 3, bytes.NewReader(seg)); err != nil {
		s.t.Fatal(err)
	}
	s.parent, s.states[seq] = sum.Digest, state
}

func (s *seeded) fold(upTo switchback.Sequence) {
	s.t.Helper()
	err := s.r.Fold(context.Background(), upTo, func(DiskGeometry) (BaseWriter, func() error, error) {
		w, done := s.open()
		return w, done, nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// compare reads every point: the content is right, or the error names disk and range.
func (s *seeded) compare(what string) (damaged []switchback.Sequence) {
	s.t.Helper()
	for _, p := range s.r.Points() {
		v, err := OpenView(s.dir, p.Sequence)
		if err != nil {
			wantDamage(s.t, what, err)
			damaged = append(damaged, p.Sequence)
			continue
		}
		d := v.Disk("vda")
		got := make([]byte, d.Size())
		if _, err = d.ReadAt(got, 0); err != nil {
			wantDamage(s.t, what, err)
			var damage Damage
			if !errors.As(err, &damage) || damage.Disk != "vda" {
				s.t.Fatalf("%s: %v does not name the disk", what, err)
			}
			damaged = append(damaged, p.Sequence)
		} else if !bytes.Equal(got, s.states[p.Sequence]) {
			s.t.Fatalf("%s: wrong data of point %d at %d", what, p.Sequence, firstDifference(got, s.states[p.Sequence]))
		}
		v.Close()
	}
	return damaged
}

func (s *seeded) check(o CheckOptions) CheckState {
	s.t.Helper()
	st, err := Check(context.Background(), s.dir, o)
	if err != nil {
		s.t.Fatal(err)
	}
	return st
}

func flip(t *testing.T, path string, at int64) func() {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	f.WriteAt([]byte{b[0] ^ 4}, at)
	return func() {
		f, _ := os.OpenFile(path, os.O_RDWR, 0)
		f.WriteAt(b, at)
		f.Close()
	}
}

// TestCheckNames shows that damage is found, named with the points that read
// it, and met by readers of just these.
func TestCheckNames(t *testing.T) {
	s := newSeeded(t)
	s.receive(64<<10, 8<<10) // 2
	s.receive(4096, 4096)    // 3
	s.fold(3)
	s.receive(64<<10, 8<<10) // 4, hides what 2 wrote
	s.receive(128<<10, 4096) // 5
	s.receive(64<<10, 4096)  // 6, hides half of 4
	if st := s.check(CheckOptions{}); len(st.Damage) > 0 || st.Points != 4 || st.Segments != 3 || st.UnprovenBytes != 0 || st.DoneBytes != st.TotalBytes {
		t.Fatalf("undamaged: %+v", st)
	}
	if d := s.compare("undamaged"); len(d) > 0 {
		t.Fatalf("undamaged: %v", d)
	}
	seg := func(n switchback.Sequence) string { return segmentPath(s.dir, n) }
	size := func(path string) int64 {
		st, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	for _, c := range []struct {
		name, file string
		at         int64
		points     string
		readers    []switchback.Sequence
		ranges     []extent.Range
	}{
		{"base, read by all", s.base, 300 << 10, "points from 3 on", []switchback.Sequence{3, 4, 5, 6}, []extent.Range{{Offset: 300 << 10, Length: 4096}}},
		{"base, hidden by 4", s.base, 70 << 10, "point 3", []switchback.Sequence{3}, []extent.Range{{Offset: 68 << 10, Length: 4096}}},
		{"base, zeros", s.base, 700 << 10, "points from 3 on", []switchback.Sequence{3, 4, 5, 6}, []extent.Range{{Offset: 700 << 10, Length: 4096}}},
		{"base, short last block", s.base, 1<<20 + 100, "points from 3 on", []switchback.Sequence{3, 4, 5, 6}, []extent.Range{{Offset: 1 << 20, Length: 512}}},
		{"sums", sumPath(s.dir, "vda"), sumHead + 8*2, "points from 3 on", []switchback.Sequence{3, 4, 5, 6}, []extent.Range{{Offset: 8192, Length: 4096}}},
		{"sums' header", sumPath(s.dir, "vda"), 3, "points from 3 on", []switchback.Sequence{3, 4, 5, 6}, nil},
		{"segment's content", seg(5), size(seg(5)) - 300, "points from 5 on", []switchback.Sequence{5, 6}, nil},
		{"segment's header", seg(4), 40, "points from 4 on", []switchback.Sequence{4, 5, 6}, nil},
		{"manifest", manifestPath(s.dir), 120, "all points", []switchback.Sequence{3, 4, 5, 6}, nil},
	} {
		mend := flip(t, c.file, c.at)
		st, err := Check(context.Background(), s.dir, CheckOptions{})
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if len(st.Damage) == 0 {
			t.Errorf("%s: not found", c.name)
		} else if d := st.Damage[0]; d.Points() != c.points || c.ranges != nil && !slices.Equal(d.Ranges, c.ranges) {
			t.Errorf("%s: found as %v of %s", c.name, d, d.Points())
		}
		if got := s.compare(c.name); !slices.Equal(got, c.readers) {
			t.Errorf("%s: met by readers of %v, want %v", c.name, got, c.readers)
		}
		for _, p := range s.r.Points() {
			st, err := Check(context.Background(), s.dir, CheckOptions{Point: p.Sequence})
			if err != nil {
				t.Fatalf("%s: %v", c.name, err)
			}
			if got, want := len(st.Damage) > 0, slices.Contains(c.readers, p.Sequence); got != want {
				t.Errorf("%s: check of point %d: %+v, want damage: %v", c.name, p.Sequence, st.Damage, want)
			}
		}
		mend()
	}
}

// TestFlippedBase flips bits anywhere in base and checksums.
func TestFlippedBase(t *testing.T) {
	s := newSeeded(t)
	rng := rand.New(rand.NewPCG(5, 5))
	for range 6 {
		s.receive(rng.Int64N(200)*4096, (1+rng.Int64N(4))*4096)
	}
	s.fold(4)
	for i := range 90 {
		path, room := s.base, int64(seededSize)
		if i%3 == 0 {
			path, room = sumPath(s.dir, "vda"), sumHead+8*blocksOf(seededSize)
		}
		at := rng.Int64N(room)
		what := fmt.Sprintf("%s at %d", path, at)
		mend := flip(t, path, at)
		hit := s.compare(what)
		if st := s.check(CheckOptions{}); len(hit) > 0 && len(st.Damage) == 0 {
			t.Errorf("%s: met by readers of %v, not by check", what, hit)
		} else if path == s.base && len(st.Damage) == 0 {
			t.Errorf("%s: not found", what)
		}
		mend()
	}
}

// TestUnproven is about a base of which nothing is known: it is said so, and
// known from the first check on.
func TestUnproven(t *testing.T) {
	s := newSeeded(t)
	s.receive(0, 8192)
	os.RemoveAll(filepath.Join(s.dir, sumDir))
	if st := s.check(CheckOptions{}); st.UnprovenBytes != seededSize || len(st.Damage) > 0 {
		t.Errorf("%+v", st)
	}
	st, err := s.r.Check(context.Background(), CheckOptions{})
	if err != nil || st.UnprovenBytes != seededSize || len(st.Damage) > 0 {
		t.Errorf("%+v, %v", st, err)
	}
	if st := s.check(CheckOptions{}); st.UnprovenBytes != 0 || len(st.Damage) > 0 {
		t.Errorf("afterwards %+v", st)
	}
	s.fold(2)
	mend := flip(t, s.base, 100)
	if st := s.check(CheckOptions{}); len(st.Damage) != 1 {
		t.Errorf("a flipped bit: %+v", st)
	}
	mend()
	s.compare("mended")
}

// TestCheckResumes goes on from every state that was told.
func TestCheckResumes(t *testing.T) {
	s := newSeeded(t)
	s.receive(0, 8192)
	s.receive(4096, 8192)
	defer flip(t, s.base, 300<<10)()
	var states []CheckState
	whole := s.check(CheckOptions{Progress: func(st CheckState) { states = append(states, st) }})
	if len(states) < 3 || len(whole.Damage) != 1 {
		t.Fatalf("%d states, %+v", len(states), whole)
	}
	for _, st := range states {
		again := s.check(CheckOptions{State: st})
		if len(again.Damage) != 1 || again.Segments != whole.Segments || again.BaseBytes != whole.BaseBytes || again.DoneBytes != whole.DoneBytes {
			t.Errorf("from %+v: %+v, want %+v", st, again, whole)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Check(ctx, s.dir, CheckOptions{})
	wantCode(t, "cancelled", err, switchback.CodeCancelled)
}

// TestInterruptedFold: what a fold was writing when it was cut off is no damage.
func TestInterruptedFold(t *testing.T) {
	s := newSeeded(t)
	s.receive(64<<10, 64<<10)
	s.receive(256<<10, 64<<10)
	// Everything of the fold up to 3 happened in part: sums and base disagree.
	if err := s.r.update(func(m *Manifest) { m.Folding = 3 }); err != nil {
		t.Fatal(err)
	}
	w, done := s.open()
	w.WriteAt(s.states[3][64<<10:80<<10], 64<<10)
	done()
	sums, err := openSums(s.dir, "vda", seededSize, true)
	if err != nil {
		t.Fatal(err)
	}
	sums.record(s.states[3][256<<10:300<<10], 256<<10, seededSize)
	sums.close()
	for _, st := range []CheckState{s.check(CheckOptions{}), func() CheckState {
		st, err := s.r.Check(context.Background(), CheckOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return st
	}()} {
		if len(st.Damage) > 0 {
			t.Errorf("%+v", st.Damage)
		}
	}
	if d := s.compare("cut off"); len(d) > 0 {
		t.Errorf("readers of %v meet damage", d)
	}
	s.fold(3)
	if st := s.check(CheckOptions{}); len(st.Damage) > 0 || st.UnprovenBytes > 0 {
		t.Errorf("folded: %+v", st)
	}
	s.compare("folded")
}

// TestSamples: random content is told from other, whatever the codec, and what
// is known outlives a restart.
func TestSamples(t *testing.T) {
	s := newSeeded(t)
	text := bytes.Repeat([]byte("the quick brown fox jumps over the lazy dog 0123456789\n"), 10000)[:256<<10]
	noise := make([]byte, 256<<10)
	rand.NewChaCha8([32]byte{1}).Read(noise)
	for i, c := range []Codec{CodecNone, CodecZstd} {
		for k, p := range [][]byte{text, noise} {
			seq := s.r.Head().Sequence + 1
			seg, sum := buildSegment(t, testHeader(seq, s.parent, seededSize), c, func(w *SegmentWriter) error { return w.Data(0, int64(i)*256<<10, p) })
			if _, err := s.r.Receive(context.Background(), 3, bytes.NewReader(seg)); err != nil {
				t.Fatal(err)
			}
			s.parent = sum.Digest
			list := s.r.Samples()
			if last := list[len(list)-1]; last.Sequence != seq || last.DataBytes != 256<<10 || last.DenseBytes != int64(k)*256<<10 {
				t.Errorf("codec %v: %+v", c, last)
			}
		}
	}
	list := s.r.Samples()
	s.r.MarkSample(list[1], true)
	s.r.Close()
	var err error
	if s.r, err = Open(s.dir); err != nil {
		t.Fatal(err)
	}
	list[1].Suspicious = true
	if got := s.r.Samples(); len(got) != 4 || got[1] != list[1] || got[3].Digest != list[3].Digest {
		t.Errorf("after a restart %+v", got)
	}
}

// BenchmarkBase reads a base with and without checksums.
func BenchmarkBase(b *testing.B) {
	const size = 64 << 20
	dir := tempDir(b)
	path := filepath.Join(dir, "vda.raw")
	all := make([]byte, size)
	content(all, 1)
	os.WriteFile(path, all, 0o600)
	d := ReplicaDisk{Name: "vda", SizeBytes: size, BasePath: path, BaseFormat: "raw"}
	for _, summed := range []bool{false, true} {
		if summed {
			createSums(dir, "vda", size, true)
			s, err := openSums(dir, "vda", size, true)
			if err != nil {
				b.Fatal(err)
			}
			s.record(all, 0, size)
			s.close()
		}
		base, err := openProven(dir, d)
		if err != nil {
			b.Fatal(err)
		}
		for _, n := range []int64{4 << 10, 64 << 10, 256 << 10} {
			b.Run(fmt.Sprintf("summed=%v/%dKiB", summed, n>>10), func(b *testing.B) {
				p := make([]byte, n)
				b.SetBytes(n)
				rng := rand.New(rand.NewPCG(1, 1))
				for b.Loop() {
					if _, err := base.ReadAt(p, rng.Int64N((size-n)/4096)*4096); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
		base.Close()
	}
}

// TestSeedCrash: a power failure while seeding keeps any mixture of what was
// written to base and checksums since the last flush. What was acknowledged is
// whole; the rest comes again, perhaps with other content.
func TestSeedCrash(t *testing.T) {
	for seed := range uint64(12) {
		rng := rand.New(rand.NewPCG(seed, 9))
		dir, ctx := tempDir(t), context.Background()
		const size = 512 << 10
		base := filepath.Join(t.TempDir(), "vda.raw")
		os.WriteFile(base, make([]byte, size), 0o600)
		r, err := Options{ReserveBytes: 1}.Create(dir, Spec{Protection: "p-0123456789ab", Epoch: 3, Name: "vm",
			Disks: []ReplicaDisk{{Name: "vda", SizeBytes: size, BasePath: base, BaseFormat: "raw"}}})
		if err != nil {
			t.Fatal(err)
		}
		want := make([]byte, size)
		apply := func(off, n int, zero bool, version uint64) {
			t.Helper()
			h := testHeader(0, "", size)
			h.Seed = true
			if zero {
				clear(want[off : off+n])
			} else {
				content(want[off:off+n], version)
			}
			seg, _ := buildSegment(t, h, CodecNone, func(w *SegmentWriter) error {
				if zero {
					return w.Zero(0, int64(off), int64(n))
				}
				return w.Data(0, int64(off), want[off:off+n])
			})
			f, err := os.OpenFile(base, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := r.ApplySeed(ctx, bytes.NewReader(seg), map[string]BaseWriter{"vda": plainBase{f}}); err != nil {
				t.Fatal(err)
			}
		}
		apply(0, 128<<10, false, seed+1)
		apply(256<<10, 64<<10, false, seed+2)
		if err := r.SyncSums(); err != nil {
			t.Fatal(err)
		}
		files := []string{base, sumPath(dir, "vda")}
		durable := map[string][]byte{}
		for _, f := range files {
			durable[f], _ = os.ReadFile(f)
		}
		apply(128<<10, 128<<10, false, seed+3)
		apply(320<<10, 64<<10, false, seed+4)
		r.Close()
		for _, f := range files { // pages of 4 KiB got there, or not
			now, _ := os.ReadFile(f)
			for at := 0; at < len(now); at += 4096 {
				if rng.IntN(2) == 0 {
					copy(now[at:min(at+4096, len(now))], durable[f][at:])
				}
			}
			os.WriteFile(f, now, 0o600)
		}
		if r, err = Open(dir); err != nil {
			t.Fatal(err)
		}
		apply(128<<10, 128<<10, seed%2 == 0, seed+5)
		apply(320<<10, 64<<10, false, seed+6)
		apply(384<<10, 128<<10, true, 0)
		if err := r.FinishSeed(switchback.Point{Protection: "p-0123456789ab", Sequence: 1, Epoch: 3, Digest: "5eed"}); err != nil {
			t.Fatal(err)
		}
		if st, err := Check(ctx, dir, CheckOptions{}); err != nil || len(st.Damage) > 0 || st.UnprovenBytes > 0 {
			t.Errorf("seed %d: %+v, %v", seed, st, err)
		}
		v, err := OpenView(dir, 1)
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if _, err := v.Disk("vda").ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("seed %d: %v, differs at %d", seed, err, firstDifference(got, want))
		}
		v.Close()
		r.Close()
	}
}

package replicator

import (
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/journal"
)

func TestCodec(t *testing.T) {
	for _, c := range []struct {
		policy string
		dirty  int64
		want   journal.Codec
	}{
		{"none", 1, journal.CodecNone},
		{"s2", 1, journal.CodecS2},
		{"zstd", 1 << 40, journal.CodecZstd},
		{"auto", smallPoint, journal.CodecZstd},
		{"auto", smallPoint + 1, journal.CodecS2}, // nothing is measured yet
	} {
		e := &Engine{cfg: Config{Policy: switchback.Policy{Compression: c.policy}}}
		if got := e.codec(c.dirty); got != c.want {
			t.Errorf("%s, %d dirty: %v, want %v", c.policy, c.dirty, got, c.want)
		}
	}
}

// pipeline says how fast raw bytes pass with each codec.
type pipeline map[journal.Codec]float64

// run lets the tuner choose n times and counts.
func (p pipeline) run(t *tuner, weakest journal.Codec, n int) map[journal.Codec]int {
	used := map[journal.Codec]int{}
	for range n {
		c := t.choose(weakest)
		used[c]++
		t.observe(c, 64<<20, time.Duration(float64(64<<20)/p[c]*float64(time.Second)))
	}
	return used
}

// TestTuner: whatever limits the pipeline, the tuner ends at what is fastest,
// and a fast link is never made to wait for the slowest codec.
func TestTuner(t *testing.T) {
	const n = 300
	const none, s2, zstd = journal.CodecNone, journal.CodecS2, journal.CodecZstd
	for name, c := range map[string]struct {
		p       pipeline
		weakest journal.Codec
		want    journal.Codec
		never   []journal.Codec
	}{
		"fast link":              {pipeline{none: 800e6, s2: 500e6, zstd: 150e6}, none, none, []journal.Codec{zstd}},
		"link of 1 Gbit/s":       {pipeline{none: 120e6, s2: 200e6, zstd: 150e6}, none, s2, nil},
		"slow link":              {pipeline{none: 10e6, s2: 16e6, zstd: 22e6}, none, zstd, nil},
		"fast link, points only": {pipeline{s2: 500e6, zstd: 150e6}, s2, s2, []journal.Codec{none}},
		"slow link, points only": {pipeline{s2: 16e6, zstd: 22e6}, s2, zstd, []journal.Codec{none}},
	} {
		used := c.p.run(&tuner{}, c.weakest, n)
		if used[c.want] < n*9/10 {
			t.Errorf("%s: %v, want mostly %v", name, used, c.want)
		}
		for _, x := range c.never {
			if used[x] > 0 {
				t.Errorf("%s: %v was used %d times", name, x, used[x])
			}
		}
	}
}

// TestTunerFollows: a link that becomes slow is noticed.
func TestTunerFollows(t *testing.T) {
	tn := &tuner{}
	pipeline{journal.CodecNone: 800e6, journal.CodecS2: 500e6, journal.CodecZstd: 150e6}.run(tn, journal.CodecNone, 100)
	used := pipeline{journal.CodecNone: 10e6, journal.CodecS2: 16e6, journal.CodecZstd: 22e6}.run(tn, journal.CodecNone, 300)
	if used[journal.CodecZstd] < 150 {
		t.Errorf("on the slow link: %v", used)
	}
}

func TestTunerIgnoresLittle(t *testing.T) {
	tn := &tuner{}
	tn.observe(journal.CodecNone, 1<<20-1, time.Hour)
	if len(tn.rate) != 0 {
		t.Errorf("rates %v", tn.rate)
	}
}

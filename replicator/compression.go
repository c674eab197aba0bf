package replicator

import (
	"io"
	"slices"
	"sync"
	"time"

	"github.com/switchback-dr/switchback/journal"
)

// smallPoint is the volume up to which a point costs its latency whatever the
// codec: the strongest one is free.
const smallPoint = 8 << 20

// fixedCodec returns the codec that a policy names; false for "auto".
func fixedCodec(policy string) (journal.Codec, bool) {
	switch policy {
	case "none":
		return journal.CodecNone, true
	case "s2":
		return journal.CodecS2, true
	case "zstd":
		return journal.CodecZstd, true
	}
	return journal.CodecNone, false
}

// codec chooses the compression of a point that has to look at dirty bytes.
func (e *Engine) codec(dirty int64) journal.Codec {
	if fixed, ok := fixedCodec(e.cfg.Policy.Compression); ok {
		return fixed
	}
	if dirty <= smallPoint {
		return journal.CodecZstd
	}
	return e.tuner.choose(journal.CodecS2)
}

// retryCodec is after how many choices another codec than the best is tried again.
const retryCodec = 32

// tuner finds which codec carries most raw bytes per second from end to end, by
// measuring. That settles by itself whether the link, a processor or a disk is
// what a copy waits for: where the link is fast the lightest codec wins, where
// it is slow the strongest. It is safe for concurrent use.
type tuner struct {
	mu      sync.Mutex
	rate    map[journal.Codec]float64 // raw bytes per second, moving average
	choices int
}

// choose returns the codec for the next piece of work. weakest is the lightest
// one to consider. A stronger one is tried only when the next lighter one beat
// the one before it, so that a fast link never sees the slow codecs.
func (t *tuner) choose(weakest journal.Codec) journal.Codec {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.choices++
	ladder := []journal.Codec{journal.CodecNone, journal.CodecS2, journal.CodecZstd}
	ladder = ladder[slices.Index(ladder, weakest):]
	best := 0
	for i, c := range ladder {
		r, known := t.rate[c]
		if !known {
			if i == 0 || best == i-1 {
				return c
			}
			break
		}
		if r > t.rate[ladder[best]] {
			best = i
		}
	}
	if t.choices%retryCodec == 0 { // conditions change: look at a neighbour again
		if best+1 < len(ladder) && t.choices/retryCodec%2 == 0 {
			return ladder[best+1]
		}
		if best > 0 {
			return ladder[best-1]
		}
	}
	return ladder[best]
}

// observe notes that codec carried so many raw bytes in that time.
func (t *tuner) observe(c journal.Codec, raw int64, took time.Duration) {
	if raw < 1<<20 {
		return // too little to tell anything
	}
	r := float64(raw) / max(took.Seconds(), 1e-6)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.rate == nil {
		t.rate = map[journal.Codec]float64{}
	}
	if old, known := t.rate[c]; known {
		r = 0.6*old + 0.4*r
	}
	t.rate[c] = r
}

// countingWriter counts what passes.
type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

package replicator

import (
	"io"
	"sync"
	"time"

	"github.com/switchback-dr/switchback/journal"
)

// Rates of one core for mixed content, bytes per second, measured on the
// machines this was written on (docs/benchmarks.md): above them the codec, not
// the link, would be what a copy waits for.
const (
	zstdRate = 200 << 20
	s2Rate   = 1 << 30
	// smallPoint is the volume below which a point costs less than its
	// latency whatever the codec: the strongest one is free.
	smallPoint = 8 << 20
)

// chooseCodec decides the compression of one segment. dirty is the number of
// bytes that may have to be sent, link the measured rate of the link in bytes
// per second (0 = not known yet).
func chooseCodec(policy string, mode Mode, dirty int64, link float64) journal.Codec {
	switch policy {
	case "none":
		return journal.CodecNone
	case "s2":
		return journal.CodecS2
	case "zstd":
		return journal.CodecZstd
	}
	switch {
	case mode == ModeSeed && (link == 0 || link > zstdRate):
		return journal.CodecNone
	case link > 0 && link <= zstdRate:
		return journal.CodecZstd
	case dirty <= smallPoint:
		return journal.CodecZstd
	}
	return journal.CodecS2
}

// linkMeter measures what the link takes, from the time that writes to it block.
type linkMeter struct {
	mu   sync.Mutex
	rate float64 // bytes per second, moving average; 0 = unknown
}

func (m *linkMeter) observe(n int64, blocked time.Duration) {
	if n < 1<<20 {
		return // too little to tell the link from its buffers
	}
	r := float64(n) / max(blocked.Seconds(), 1e-6)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.rate == 0 {
		m.rate = r
		return
	}
	m.rate = 0.7*m.rate + 0.3*r
}

func (m *linkMeter) Rate() float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rate
}

// meteredWriter counts bytes and the time that writing them blocked.
type meteredWriter struct {
	w       io.Writer
	n       int64
	blocked time.Duration
	now     func() time.Time
}

func (m *meteredWriter) Write(p []byte) (int, error) {
	t := m.now()
	n, err := m.w.Write(p)
	m.blocked += m.now().Sub(t)
	m.n += int64(n)
	return n, err
}

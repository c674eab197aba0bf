package journal

import (
	"bufio"
	"encoding/json"
	"math"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/switchback-dr/switchback"
)

// Sample is what the content of a point looks like from outside: how much has
// changed, and how much of that cannot be compressed, whatever codec carried it.
type Sample struct {
	Sequence switchback.Sequence `json:"sequence"`
	Digest   string              `json:"digest"`
	Time     time.Time           `json:"time"`
	Resync   bool                `json:"resync,omitempty"`
	// DataBytes and ZeroBytes make the point's ChangedBytes.
	DataBytes   int64 `json:"data_bytes"`
	ZeroBytes   int64 `json:"zero_bytes"`
	StoredBytes int64 `json:"stored_bytes"`
	// DenseBytes is what of DataBytes is in frames that look random: by the
	// order-0 entropy of bytes picked from them.
	DenseBytes int64 `json:"dense_bytes"`
	// Suspicious: it was judged to stand out, and is no measure for others.
	Suspicious bool `json:"suspicious,omitempty"`
}

const (
	samplesFile = "samples.log"
	maxSamples  = 2048
	// sampleStep: one byte in this many of a frame is looked at.
	sampleStep = 16
	// denseEntropy is the entropy, in bits for each byte, from which on content
	// counts as random. Compressed and encrypted data have more than 7.9, most
	// other data less than 7.
	denseEntropy = 7.7
)

// samples are those of the newest points, as far as they are known. They are
// statistics: the log is not synced, and what a crash takes of it is missed by nobody.
type samples struct {
	mu     sync.Mutex
	loaded bool
	list   []Sample
	lines  int // in the file
}

// dense reports whether the content of a frame looks random.
func dense(raw []byte) bool {
	step := sampleStep
	if len(raw) < 16<<10 {
		step = max(1, len(raw)/1024)
	}
	var count [256]int32
	n := 0
	for i := 0; i < len(raw); i += step {
		count[raw[i]]++
		n++
	}
	if n < 512 {
		return false // too little to say
	}
	var sum float64
	symbols := 0
	for _, c := range count {
		if c > 0 {
			symbols++
			sum += float64(c) * math.Log2(float64(c))
		}
	}
	// Few picks make random data look less random than it is (Miller and Madow).
	entropy := math.Log2(float64(n)) - sum/float64(n) + float64(symbols-1)/(2*math.Ln2*float64(n))
	return entropy >= denseEntropy
}

// note adds the sample of a point that was just received.
func (r *Replica) note(p switchback.Point, f footer, denseBytes int64) {
	r.addSample(Sample{Sequence: p.Sequence, Digest: p.Digest, Time: p.Time, Resync: p.Resync,
		DataBytes: f.dataBytes, ZeroBytes: f.zeroBytes, StoredBytes: p.StoredBytes, DenseBytes: denseBytes})
}

func (r *Replica) samplesPath() string { return filepath.Join(r.dir, samplesFile) }

// Samples returns what is known of the newest points, oldest first; also of
// points that are gone.
func (r *Replica) Samples() []Sample {
	r.samples.mu.Lock()
	defer r.samples.mu.Unlock()
	r.loadSamples()
	return append([]Sample(nil), r.samples.list...)
}

// MarkSample notes that a sample stands out, or that it does not.
func (r *Replica) MarkSample(s Sample, suspicious bool) {
	s.Suspicious = suspicious
	r.addSample(s)
}

// addSample appends, or replaces the one of the same point.
func (r *Replica) addSample(s Sample) {
	r.samples.mu.Lock()
	defer r.samples.mu.Unlock()
	r.loadSamples()
	r.samples.put(s)
	if r.samples.lines > 2*maxSamples {
		r.rewriteSamples()
		return
	}
	if f, err := os.OpenFile(r.samplesPath(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err == nil {
		if b, err := json.Marshal(s); err == nil {
			f.Write(append(b, '\n'))
			r.samples.lines++
		}
		f.Close()
	}
}

func (x *samples) put(s Sample) {
	for i := len(x.list) - 1; i >= 0 && i >= len(x.list)-64; i-- {
		if x.list[i].Digest == s.Digest {
			x.list[i] = s
			return
		}
	}
	x.list = append(x.list, s)
	if n := len(x.list) - maxSamples; n > 0 {
		x.list = append(x.list[:0], x.list[n:]...)
	}
}

func (r *Replica) rewriteSamples() {
	var b []byte
	for _, s := range r.samples.list {
		line, err := json.Marshal(s)
		if err != nil {
			return
		}
		b = append(append(b, line...), '\n')
	}
	temp := r.samplesPath() + tempSuffix
	if os.WriteFile(temp, b, 0o600) == nil && os.Rename(temp, r.samplesPath()) == nil {
		r.samples.lines = len(r.samples.list)
	}
}

func (r *Replica) loadSamples() {
	if r.samples.loaded {
		return
	}
	r.samples.loaded = true
	f, err := os.Open(r.samplesPath())
	if err != nil {
		return
	}
	defer f.Close()
	for in := bufio.NewScanner(f); in.Scan(); {
		var s Sample
		r.samples.lines++
		if json.Unmarshal(in.Bytes(), &s) == nil && s.Digest != "" {
			r.samples.put(s)
		}
	}
}

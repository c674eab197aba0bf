package replicator

import (
	"maps"
	"slices"
	"sort"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// CycleReport is the record of one cycle.
type CycleReport struct {
	Point  switchback.Point `json:"point"`
	Mode   Mode             `json:"mode"`
	Reason string           `json:"reason,omitempty"`
	// DirtyBytes is what the bitmaps (or the allocation map) named, ReadBytes
	// what was read for it, ChangedBytes what differed from the index, and
	// SentBytes the size of the bodies sent.
	DirtyBytes   int64 `json:"dirty_bytes"`
	ReadBytes    int64 `json:"read_bytes"`
	ChangedBytes int64 `json:"changed_bytes"`
	SentBytes    int64 `json:"sent_bytes"`
	// Codec is the compression that was chosen, and Ratio raw data ÷ sent.
	Codec string `json:"codec"`
	// Frozen is how long the guest's file systems were held for an
	// application-consistent point, at most; 0 for any other.
	Frozen time.Duration `json:"frozen,omitempty"`

	StartedAt time.Time     `json:"started_at"`
	Begin     time.Duration `json:"begin"`
	Transfer  time.Duration `json:"transfer"`
	End       time.Duration `json:"end"`
	Total     time.Duration `json:"total"`
	// RPO is the age of the previous point at the moment this one became
	// durable: the most that could have been lost until then. 0 for the first.
	RPO time.Duration `json:"rpo"`
}

// Progress of a copy that is under way.
type Progress struct {
	TotalBytes int64   `json:"total_bytes"`
	DoneBytes  int64   `json:"done_bytes"`
	SentBytes  int64   `json:"sent_bytes"`
	Percent    float64 `json:"percent"`
	// RateBytesPerSecond counts disk bytes done, over the whole copy.
	RateBytesPerSecond float64       `json:"rate_bytes_per_second"`
	ETA                time.Duration `json:"eta"`
}

// Status is the state of one VM's replication, as the operator sees it.
type Status struct {
	Running bool `json:"running"`
	Paused  bool `json:"paused"`
	// Activity is what is going on right now: "idle", "seed", "incremental", "resync".
	Activity string    `json:"activity"`
	Progress *Progress `json:"progress,omitempty"`
	// LastPoint is the newest point known to be durable at the target.
	LastPoint *switchback.Point `json:"last_point,omitempty"`
	LastCycle *CycleReport      `json:"last_cycle,omitempty"`
	Cycles    int64             `json:"cycles"`
	// RPOSeconds over the most recent cycles (at most 1000).
	RPOP50Seconds float64 `json:"rpo_p50_seconds"`
	RPOP99Seconds float64 `json:"rpo_p99_seconds"`
	RPOMaxSeconds float64 `json:"rpo_max_seconds"`
	// Totals since the agent started.
	SentBytes    int64                  `json:"sent_bytes"`
	ChangedBytes int64                  `json:"changed_bytes"`
	Conditions   []switchback.Condition `json:"conditions,omitempty"`
}

// history keeps what Status reports; safe for concurrent use.
type history struct {
	mu       sync.Mutex
	status   Status
	rpo      []time.Duration // ring of the last 1000
	rpoNext  int
	started  time.Time // of the copy under way
	progress Progress
	// marks are conditions that outlive a cycle, by name.
	marks map[string]switchback.Condition
}

// mark sets a condition that stays until it is cleared (nil), and reports
// whether it is new. One that stands keeps its time.
func (h *history) mark(name string, c *switchback.Condition) (changed bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, stood := h.marks[name]
	if c == nil {
		delete(h.marks, name)
		return stood
	}
	if h.marks == nil {
		h.marks = map[string]switchback.Condition{}
	}
	x := *c
	if x.Name = name; stood {
		x.Since = old.Since
	}
	h.marks[name] = x
	return !stood
}

func (h *history) update(f func(*Status)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(&h.status)
}

func (h *history) begin(activity string, now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.status.Activity = activity
	h.started = now
	h.progress = Progress{}
}

func (h *history) advance(total, done, sent int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.progress.TotalBytes += total
	h.progress.DoneBytes += done
	h.progress.SentBytes += sent
}

func (h *history) finish(r *CycleReport) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.status.Activity = "idle"
	if r == nil {
		return
	}
	h.status.LastCycle = r
	p := r.Point
	h.status.LastPoint = &p
	h.status.Cycles++
	h.status.SentBytes += r.SentBytes
	h.status.ChangedBytes += r.ChangedBytes
	if r.RPO > 0 {
		if len(h.rpo) < 1000 {
			h.rpo = append(h.rpo, r.RPO)
		} else {
			h.rpo[h.rpoNext%1000] = r.RPO
		}
		h.rpoNext++
	}
}

func (h *history) snapshot(now time.Time) Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.status
	s.Conditions = append([]switchback.Condition(nil), s.Conditions...)
	for _, name := range slices.Sorted(maps.Keys(h.marks)) {
		s.Conditions = append(s.Conditions, h.marks[name])
	}
	if s.Activity != "" && s.Activity != "idle" && h.progress.TotalBytes > 0 {
		p := h.progress
		p.Percent = 100 * float64(p.DoneBytes) / float64(p.TotalBytes)
		if el := now.Sub(h.started).Seconds(); el > 0 {
			p.RateBytesPerSecond = float64(p.DoneBytes) / el
		}
		if p.RateBytesPerSecond > 0 {
			p.ETA = time.Duration(float64(p.TotalBytes-p.DoneBytes) / p.RateBytesPerSecond * float64(time.Second))
		}
		s.Progress = &p
	}
	if n := len(h.rpo); n > 0 {
		sorted := append([]time.Duration(nil), h.rpo...)
		sort.Slice(sorted, func(i, j int) bool { return sorted[i] < sorted[j] })
		s.RPOP50Seconds = sorted[n/2].Seconds()
		s.RPOP99Seconds = sorted[min(n-1, n*99/100)].Seconds()
		s.RPOMaxSeconds = sorted[n-1].Seconds()
	}
	return s
}

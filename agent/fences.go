package agent

import (
	"strings"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
)

// fences refuses what a server asks that has lost the operation to another
// server without knowing it yet: one that was stopped or cut off for a while.
// They are kept in memory: a server that slept through the restart of an agent
// as well is stopped by its lease, a moment after it wakes up.
type fences struct {
	mu   sync.Mutex
	seen map[string]seenFence // by operation
}

type seenFence struct {
	fence int64
	at    time.Time
}

// keepFence is how long an operation's fence is remembered after its last task.
const keepFence = 24 * time.Hour

// admit remembers the task's fence. CodeConflict: a server with a newer one has
// asked for something of the same operation before.
func (f *fences) admit(t agentapi.Task, now time.Time) error {
	if t.Fence == 0 { // not of an operation
		return nil
	}
	operation, _, _ := strings.Cut(t.Key, "/")
	f.mu.Lock()
	defer f.mu.Unlock()
	for k, s := range f.seen {
		if now.Sub(s.at) > keepFence {
			delete(f.seen, k)
		}
	}
	if known := f.seen[operation].fence; t.Fence < known {
		return switchback.Errorf(switchback.CodeConflict, "another server has taken operation %s over (lease %d, this is of %d)", operation, known, t.Fence)
	}
	if f.seen == nil {
		f.seen = map[string]seenFence{}
	}
	f.seen[operation] = seenFence{t.Fence, now}
	return nil
}

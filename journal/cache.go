package journal

import (
	"container/list"
	"sync"
)

// frameKey names a frame of an open segment.
type frameKey struct {
	segment *segment
	frame   uint32
}

// frameCache keeps the decompressed, verified frames used last. Readers that
// want the same frame at once load it once.
type frameCache struct {
	mu      sync.Mutex
	room    int // frames
	entries map[frameKey]*cachedFrame
	recent  *list.List // of *cachedFrame, newest first
	spare   [][]byte   // buffers of maxFrame bytes that nobody reads any more
}

// cachedFrame must be released after use: its buffer is used again.
type cachedFrame struct {
	key   frameKey
	data  []byte
	err   error
	ready chan struct{} // closed when data and err are set
	users int           // guarded by frameCache.mu
	where *list.Element // nil once evicted
}

func newFrameCache(bytes int64) *frameCache {
	return &frameCache{room: max(8, int(bytes/maxFrame)), entries: map[frameKey]*cachedFrame{}, recent: list.New()}
}

func (c *frameCache) has(key frameKey) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[key] != nil
}

// get returns the frame, of length raw bytes, loading it if necessary.
func (c *frameCache) get(key frameKey, length int) (*cachedFrame, error) {
	c.mu.Lock()
	e := c.entries[key]
	if e != nil {
		e.users++
		c.recent.MoveToFront(e.where)
		c.mu.Unlock()
		<-e.ready
	} else {
		e = &cachedFrame{key: key, users: 1, ready: make(chan struct{})}
		var buffer []byte
		if n := len(c.spare); n > 0 {
			buffer, c.spare = c.spare[n-1], c.spare[:n-1]
		}
		c.entries[key] = e
		e.where = c.recent.PushFront(e)
		if c.recent.Len() > c.room {
			c.evict(c.recent.Back().Value.(*cachedFrame))
		}
		c.mu.Unlock()
		if buffer == nil {
			buffer = make([]byte, maxFrame)
		}
		e.data = buffer[:length]
		e.err = key.segment.load(key.frame, e.data)
		close(e.ready)
	}
	if e.err != nil { // not kept: the next reader tries again
		c.mu.Lock()
		c.evict(e)
		c.mu.Unlock()
		c.release(e)
		return nil, e.err
	}
	return e, nil
}

func (c *frameCache) release(e *cachedFrame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.users--
	c.recycle(e)
}

// evict and recycle are called with c.mu held.
func (c *frameCache) evict(e *cachedFrame) {
	if e.where == nil {
		return
	}
	c.recent.Remove(e.where)
	e.where = nil
	delete(c.entries, e.key)
	c.recycle(e)
}

func (c *frameCache) recycle(e *cachedFrame) {
	if e.where == nil && e.users == 0 && e.data != nil {
		if len(c.spare) < 16 {
			c.spare = append(c.spare, e.data[:maxFrame])
		}
		e.data = nil
	}
}

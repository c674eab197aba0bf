package journal

import (
	"context"
	"sync"
	"time"
)

// pacer holds work in the background to a rate.
type pacer struct {
	rate  int64 // bytes a second
	mu    sync.Mutex
	ready time.Time // when what was asked for so far is due
}

type paceKey struct{}

// withPace makes pace hold what runs under the result to bytesPerSecond; 0 is no limit.
func withPace(ctx context.Context, bytesPerSecond int64) context.Context {
	if bytesPerSecond <= 0 {
		return ctx
	}
	return context.WithValue(ctx, paceKey{}, &pacer{rate: bytesPerSecond})
}

// pace waits until n more bytes may be moved, or for the end of ctx, whose error
// it returns.
func pace(ctx context.Context, n int64) error {
	p, _ := ctx.Value(paceKey{}).(*pacer)
	if p == nil {
		return ctx.Err()
	}
	p.mu.Lock()
	now := time.Now()
	if p.ready.Before(now) {
		p.ready = now
	}
	wait := p.ready.Sub(now)
	p.ready = p.ready.Add(time.Duration(float64(n) / float64(p.rate) * float64(time.Second)))
	p.mu.Unlock()
	if wait < 5*time.Millisecond { // shorter sleeps cost more than they give
		return ctx.Err()
	}
	t := time.NewTimer(wait)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
	return ctx.Err()
}

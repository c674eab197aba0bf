package store

import (
	"context"
	"sync"
	"time"
)

// clock is the database's, as seen from here: what it said, and how long ago by
// this machine's monotonic clock. So servers whose own clocks differ, or jump,
// agree on when a lease ends, up to half a round trip.
type clock struct {
	mu sync.Mutex
	// at is the database's time when this machine's was measured.
	at, measured time.Time
}

// clockAge is how old a measurement may become before it is renewed: clocks
// drift by less than a millisecond in it.
const clockAge = 10 * time.Second

// slowAnswer is the round trip from which on a measurement is worse than an old one.
const slowAnswer = time.Second

// Now is the time that all servers on this store share: PostgreSQL's, or this
// machine's where the store is a file. Leases are written and judged by it.
func (s *Store) Now() time.Time {
	if s.clock == nil {
		return time.Now()
	}
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()
	return s.clock.at.Add(time.Since(s.clock.measured)).UTC()
}

// refreshClock measures again where the last measurement is old.
func (s *Store) refreshClock(ctx context.Context) error {
	if s.clock == nil {
		return nil
	}
	s.clock.mu.Lock()
	age := time.Since(s.clock.measured)
	s.clock.mu.Unlock()
	if age < clockAge {
		return nil
	}
	return s.measureClock(ctx)
}

func (s *Store) measureClock(ctx context.Context) error {
	begin := time.Now()
	var us int64
	if err := s.read.NewRaw("SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)").Scan(ctx, &us); err != nil {
		return err
	}
	end := time.Now()
	s.clock.mu.Lock()
	defer s.clock.mu.Unlock()
	if trip := end.Sub(begin); trip < slowAnswer || s.clock.measured.IsZero() {
		s.clock.at, s.clock.measured = instant(us).Add(trip/2), end
	}
	return nil
}

package agent

import (
	"slices"
	"sync"

	switchback "github.com/switchback-dr/switchback"
)

// servers are the addresses of the control plane: one of them is used until it
// does not answer, then the next.
type servers struct {
	mu   sync.Mutex
	list []string
	at   int
}

func newServers(first string, others []string) *servers {
	s := &servers{list: []string{first}}
	s.learn(others)
	return s
}

// address is the one to use now.
func (s *servers) address() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list[s.at]
}

// answered notes how a call to an address ended: where there was no answer, or
// none that helps, the next address is used.
func (s *servers) answered(address string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if switchback.IsRetryable(err) && s.list[s.at] == address {
		s.at = (s.at + 1) % len(s.list)
	}
}

// learn replaces the addresses by what the control plane says of itself, apart
// from the one in use, which stays. It reports whether that was new.
func (s *servers) learn(list []string) bool {
	if len(list) == 0 {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	current := s.list[s.at]
	next := []string{current}
	for _, a := range list {
		if !slices.Contains(next, a) {
			next = append(next, a)
		}
	}
	was := slices.Sorted(slices.Values(s.list))
	s.list, s.at = next, 0
	return !slices.Equal(was, slices.Sorted(slices.Values(next)))
}

// replace forgets the addresses known so far: the agent belongs to other servers now.
func (s *servers) replace(list []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list, s.at = slices.Clone(list), 0
}

func (s *servers) all() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.list)
}

// learnServers keeps what the control plane says of its addresses, also across a restart.
func (a *Agent) learnServers(list []string) {
	if !a.servers.learn(list) {
		return
	}
	all := a.servers.all()
	if err := saveIdentity(a.cfg.StateDir, Identity{Address: a.cfg.Address, Reachable: a.cfg.Reachable, Server: all[0], Servers: all[1:]}); err != nil {
		a.log.Warn("addresses of the servers not stored", "error", err)
		return
	}
	a.log.Info("addresses of the servers", "servers", all)
}

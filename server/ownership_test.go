package server

import (
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/fencing"
)

// TestRuling: who is active is not said by a server that does not know it.
func TestRuling(t *testing.T) {
	for name, c := range map[string]struct {
		p      switchback.Protection
		held   switchback.Epoch
		want   fencing.Ruling
		ok     bool
		wanted bool
	}{
		"same":              {switchback.Protection{Source: "a", Epoch: 2}, 2, fencing.Ruling{Epoch: 2, Site: "a"}, true, false},
		"older":             {switchback.Protection{Source: "a", Epoch: 2}, 1, fencing.Ruling{Epoch: 2, Site: "a"}, true, false},
		"the agent's newer": {switchback.Protection{Source: "a", Epoch: 2}, 3, fencing.Ruling{}, false, true},
		"one was not heard": {switchback.Protection{Source: "a", Epoch: 2, MintAbove: 18}, 2, fencing.Ruling{}, false, false},
		"minted since":      {switchback.Protection{Source: "a", Epoch: 19, MintAbove: 18}, 2, fencing.Ruling{Epoch: 19, Site: "a"}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := &Server{}
			r, ok := s.ruling(c.p, c.held)
			if ok != c.ok || ok && r != c.want || s.learning.wanted.Load() != c.wanted {
				t.Errorf("%+v, %v, learns %v", r, ok, s.learning.wanted.Load())
			}
		})
	}
}

package agent

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
)

func TestServers(t *testing.T) {
	s := newServers("a", nil)
	s.answered("a", switchback.Errorf(switchback.CodeUnavailable, "down"))
	if got := s.address(); got != "a" {
		t.Errorf("of one server the other one is %s", got)
	}
	if !s.learn([]string{"b", "a", "c"}) {
		t.Error("nothing new in new addresses")
	}
	if d := cmp.Diff([]string{"a", "b", "c"}, s.all()); d != "" {
		t.Error(d)
	}
	for _, c := range []struct {
		of   string
		err  error
		want string
	}{
		{"a", nil, "a"},
		{"a", switchback.Errorf(switchback.CodeUnauthorized, "no"), "a"}, // another server says the same
		{"a", switchback.Errorf(switchback.CodeUnavailable, "down"), "b"},
		{"a", switchback.Errorf(switchback.CodeTimeout, "an old call"), "b"},
		{"b", switchback.Errorf(switchback.CodeTimeout, "slow"), "c"},
		{"c", switchback.Errorf(switchback.CodeUnavailable, "down"), "a"},
		{"a", switchback.Errorf(switchback.CodeUnavailable, "down"), "b"},
	} {
		s.answered(c.of, c.err)
		if got := s.address(); got != c.want {
			t.Errorf("after %s: %v the next is %s, want %s", c.of, c.err, got, c.want)
		}
	}
	if s.learn([]string{"a", "b", "c"}) || s.learn(nil) || s.address() != "b" {
		t.Error("the same addresses are news")
	}
	if !s.learn([]string{"d"}) || s.address() != "b" {
		t.Error("the server in use was dropped, or the others were not")
	}
	if d := cmp.Diff([]string{"b", "d"}, s.all()); d != "" {
		t.Error(d)
	}
}

func TestFences(t *testing.T) {
	var f fences
	now := time.Now()
	for _, c := range []struct {
		key   string
		fence int64
		after time.Duration
		want  switchback.Code
	}{
		{"op-1/start/start", 1, 0, ""},
		{"op-1/start/start", 1, 0, ""},
		{"op-1/check/check", 3, 0, ""},
		{"op-1/start/start", 2, 0, switchback.CodeConflict},
		{"op-1/undo/abandon", 1, 0, switchback.CodeConflict},
		{"op-2/start/start", 1, 0, ""},
		{"plan/p-1/7", 0, 0, ""},
		{"op-1/undo/abandon", 3, 0, ""},
		{"op-1/start/start", 1, keepFence + time.Minute, ""}, // forgotten
	} {
		now = now.Add(c.after)
		if err := f.admit(agentapi.Task{Key: c.key, Fence: c.fence}, now); switchback.CodeOf(err) != c.want {
			t.Errorf("%s under %d: %v, want %q", c.key, c.fence, err, c.want)
		}
	}
}

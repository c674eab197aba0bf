package server

import (
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
)

func TestMostRoom(t *testing.T) {
	agent := func(id switchback.AgentID, healthy bool, free int64) api.Agent {
		return api.Agent{ID: id, Healthy: healthy, Reason: "silent", Status: &agentapi.AgentStatus{Storage: agentapi.Storage{FreeBytes: free}}}
	}
	for _, c := range []struct {
		name  string
		views []api.Agent
		want  switchback.AgentID
		why   string
	}{
		{"none", nil, "", "it has no agent"},
		{"all down", []api.Agent{agent("a", false, 1), agent("b", false, 2)}, "", "agent b: silent"},
		{"one up", []api.Agent{agent("a", false, 9), agent("b", true, 2)}, "b", ""},
		{"the most room", []api.Agent{agent("a", true, 2), agent("b", true, 9), agent("c", true, 3)}, "b", ""},
		{"equals", []api.Agent{agent("a", true, 2), agent("b", true, 2)}, "a", ""},
		{"no report yet", []api.Agent{{ID: "a", Healthy: true}, agent("b", true, 1)}, "b", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			best, why := mostRoom(c.views)
			switch {
			case best == nil && c.want != "", best != nil && best.ID != c.want:
				t.Errorf("got %+v, want %q", best, c.want)
			case best == nil && why != c.why:
				t.Errorf("why is %q, want %q", why, c.why)
			}
		})
	}
}

package server

import "github.com/switchback-dr/switchback/api"

// mostRoom returns of several agents the healthy one with the most free storage;
// of equals the first. nil: none is, and why.
func mostRoom(views []api.Agent) (best *api.Agent, why string) {
	why = "it has no agent"
	free := func(a *api.Agent) int64 {
		if a.Status == nil {
			return 0
		}
		return a.Status.Storage.FreeBytes
	}
	for i := range views {
		v := &views[i]
		if !v.Healthy {
			why = "agent " + string(v.ID) + ": " + v.Reason
		} else if best == nil || free(v) > free(best) {
			best = v
		}
	}
	return best, why
}

package server

import (
	"encoding/json"
	"net/http"
	"strconv"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

func (s *Server) handler() http.Handler {
	mux := http.NewServeMux()
	admin := func(pattern string, f func(r *http.Request) (any, error)) {
		mux.Handle(pattern, transport.RequireRole(answer(f), transport.RoleAdmin))
	}
	mux.Handle("POST "+transport.JoinPath, answer(s.join))
	mux.Handle("POST /v1/agents/report", transport.RequireRole(answer(s.takeReport), transport.RoleAgent))
	mux.Handle("POST /v1/agents/ownership", transport.RequireRole(answer(s.answerOwnership), transport.RoleAgent))
	mux.Handle("POST /v1/agents/renew", transport.RequireRole(answer(s.renew), transport.RoleAgent))

	admin("GET /v1/sites", s.listSites)
	admin("POST /v1/sites", func(r *http.Request) (any, error) {
		var req api.CreateSiteRequest
		if err := transport.ReadJSON(r, &req); err != nil {
			return nil, err
		}
		if err := validSite(req.ID); err != nil {
			return nil, err
		}
		return api.Site{ID: req.ID}, s.store.CreateSite(r.Context(), store.Site{ID: req.ID, Name: string(req.ID), CreatedAt: s.store.Now()})
	})
	admin("DELETE /v1/sites/{site}", func(r *http.Request) (any, error) {
		return struct{}{}, s.store.DeleteSite(r.Context(), switchback.SiteID(r.PathValue("site")))
	})
	admin("POST /v1/sites/{site}/tokens", s.mintToken)
	admin("GET /v1/agents", func(r *http.Request) (any, error) { return s.agentViews(r.Context(), "") })
	admin("GET /v1/machines", func(r *http.Request) (any, error) {
		return s.machines(r.Context(), switchback.SiteID(r.URL.Query().Get("site")))
	})

	admin("GET /v1/vms", func(r *http.Request) (any, error) {
		list, err := s.store.Protections(r.Context())
		if err != nil {
			return nil, err
		}
		views := []api.VM{}
		for _, p := range list {
			v, err := s.view(r.Context(), p, false)
			if err != nil {
				return nil, err
			}
			views = append(views, v)
		}
		return views, nil
	})
	admin("GET /v1/vms/{vm}", func(r *http.Request) (any, error) {
		p, err := s.find(r.Context(), r.PathValue("vm"))
		if err != nil {
			return nil, err
		}
		return s.view(r.Context(), p, true)
	})
	admin("GET /v1/vms/{vm}/points", func(r *http.Request) (any, error) {
		p, err := s.find(r.Context(), r.PathValue("vm"))
		if err != nil {
			return nil, err
		}
		return s.points(r.Context(), p)
	})
	admin("POST /v1/vms/{vm}/operations/{kind}", func(r *http.Request) (any, error) {
		var req api.OperationRequest
		if err := transport.ReadJSON(r, &req); err != nil {
			return nil, err
		}
		id, err := transport.PeerIdentity(r)
		if err != nil {
			return nil, err
		}
		return s.request(r.Context(), id.ID, r.PathValue("vm"), recovery.Kind(r.PathValue("kind")), req)
	})

	s.routePoints(admin)
	admin("GET /v1/operations", func(r *http.Request) (any, error) {
		q := r.URL.Query()
		limit, _ := strconv.Atoi(q.Get("limit"))
		f := operation.Filter{Kind: q.Get("kind"), Unfinished: q.Get("unfinished") == "true", Limit: limit, Before: switchback.OperationID(q.Get("before"))}
		if vm := q.Get("vm"); vm != "" {
			p, err := s.find(r.Context(), vm)
			if err != nil {
				return nil, err
			}
			f.Protection = p.ID
		}
		list, err := s.store.Operations(r.Context(), f)
		if list == nil {
			list = []operation.Record{}
		}
		return list, err
	})
	admin("GET /v1/operations/{id}", func(r *http.Request) (any, error) {
		return s.runner.Get(r.Context(), switchback.OperationID(r.PathValue("id")))
	})
	admin("GET /v1/operations/{id}/log", func(r *http.Request) (any, error) {
		after, _ := strconv.ParseInt(r.URL.Query().Get("after"), 10, 64)
		lines, err := s.store.OperationLog(r.Context(), switchback.OperationID(r.PathValue("id")), after)
		return api.OperationLog{Lines: lines}, err
	})
	admin("POST /v1/operations/{id}/cancel", func(r *http.Request) (any, error) {
		return struct{}{}, s.runner.Cancel(r.Context(), switchback.OperationID(r.PathValue("id")))
	})
	admin("POST /v1/operations/{id}/retry", func(r *http.Request) (any, error) {
		return struct{}{}, s.runner.Retry(r.Context(), switchback.OperationID(r.PathValue("id")))
	})
	admin("GET /v1/vms/{vm}/drills", s.listDrills)
	admin("GET /v1/operations/{id}/screenshot", s.drillPicture)
	mux.Handle("GET /v1/operations/{id}/watch", transport.RequireRole(http.HandlerFunc(s.watch), transport.RoleAdmin))
	return mux
}

// answer adapts a function to an HTTP handler.
func answer(f func(r *http.Request) (any, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := f(r)
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, v)
	})
}

// watch streams an operation as one JSON record per line until it ends.
func (s *Server) watch(w http.ResponseWriter, r *http.Request) {
	records, err := s.runner.Watch(r.Context(), switchback.OperationID(r.PathValue("id")))
	if err != nil {
		transport.WriteError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	for rec := range records {
		if enc.Encode(rec) != nil {
			return // the watcher left
		}
		http.NewResponseController(w).Flush()
	}
}

func validSite(id switchback.SiteID) error {
	if id == "" || len(id) > 40 {
		return switchback.Errorf(switchback.CodeInvalid, "a site's name has 1 to 40 characters")
	}
	for _, c := range id {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-') {
			return switchback.Errorf(switchback.CodeInvalid, "site name %q: only letters, digits and dashes", id)
		}
	}
	return nil
}

func (s *Server) listSites(r *http.Request) (any, error) {
	sites, err := s.store.Sites(r.Context())
	if err != nil {
		return nil, err
	}
	out := []api.Site{}
	for _, x := range sites {
		agents, err := s.agentViews(r.Context(), x.ID)
		if err != nil {
			return nil, err
		}
		out = append(out, api.Site{ID: x.ID, Agents: agents})
	}
	return out, nil
}

func (s *Server) takeReport(r *http.Request) (any, error) {
	id, err := transport.PeerIdentity(r)
	if err != nil {
		return nil, err
	}
	var st agentapi.AgentStatus
	if err := transport.ReadJSON(r, &st); err != nil {
		return nil, err
	}
	raw, err := json.Marshal(st)
	if err != nil {
		return nil, err
	}
	return agentapi.ReportAnswer{Servers: s.announced}, s.store.TouchAgent(r.Context(), switchback.AgentID(id.ID), st.Address, st.Version, s.store.Now(), raw)
}

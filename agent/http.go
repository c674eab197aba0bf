package agent

import (
	"maps"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/transport"
)

// actions is the table of what the server can ask for.
func (a *Agent) actions() map[string]action {
	m := map[string]action{
		agentapi.ActionDescribe:        handle(a.describe),
		agentapi.ActionPrepareReplica:  handle(a.prepareReplica),
		agentapi.ActionReplicate:       handle(a.replicate),
		agentapi.ActionAwaitPoint:      handle(a.awaitPoint),
		agentapi.ActionTakePoint:       onVM(a, a.takePoint, agentapi.RoleSource),
		agentapi.ActionHold:            onVM(a, a.hold, agentapi.RoleSource),
		agentapi.ActionFreeze:          onVM(a, a.freeze, agentapi.RoleTarget),
		agentapi.ActionShutdown:        onVM(a, a.shutdown, agentapi.RoleSource),
		agentapi.ActionFinalPoint:      onVM(a, a.finalPoint, agentapi.RoleSource),
		agentapi.ActionFence:           onVM(a, a.fence, agentapi.RoleSource, agentapi.RoleFenced),
		agentapi.ActionReinstate:       onVM(a, a.reinstate, agentapi.RoleFenced, agentapi.RoleSource),
		agentapi.ActionActivate:        onVM(a, a.activate, agentapi.RoleTarget, agentapi.RoleActive),
		agentapi.ActionStart:           onVM(a, a.start, agentapi.RoleActive),
		agentapi.ActionCheck:           onVM(a, a.check, agentapi.RoleActive),
		agentapi.ActionAbandon:         onVM(a, a.abandon, agentapi.RoleActive, agentapi.RoleTarget),
		agentapi.ActionFold:            onVM(a, a.fold, agentapi.RoleActive),
		agentapi.ActionCollapse:        onVM(a, a.collapse, agentapi.RoleActive),
		agentapi.ActionSettle:          onVM(a, a.settle, agentapi.RoleActive),
		agentapi.ActionRetire:          onVM(a, a.retire, agentapi.RoleFenced),
		agentapi.ActionVerifyReplica:   onVM(a, a.verifyReplica, agentapi.RoleTarget),
		agentapi.ActionDrillPreflight:  onVM(a, a.drillPreflight, agentapi.RoleTarget),
		agentapi.ActionDrillOpen:       onVM(a, a.drillOpen, agentapi.RoleTarget),
		agentapi.ActionDrillStart:      onVM(a, a.drillStart, agentapi.RoleTarget),
		agentapi.ActionDrillMark:       onVM(a, a.drillMark, agentapi.RoleTarget, agentapi.RoleActive),
		agentapi.ActionDrillScreen:     handle(a.drillScreen),
		agentapi.ActionDrillClean:      handle(a.drillClean),
		agentapi.ActionGuestChecks:     handle(a.guestChecks),
		agentapi.ActionSetPolicy:       onVM(a, a.setPolicy),
		agentapi.ActionRelease:         handle(a.release),
		agentapi.ActionChangePoint:     onVM(a, a.changePoint, agentapi.RoleActive),
		agentapi.ActionDropSnapshot:    onVM(a, a.dropSnapshot),
		agentapi.ActionSettleSnapshots: onVM(a, a.settleSnapshots, agentapi.RoleActive),
		agentapi.ActionKeepPoints:      onVM(a, a.keepPoints, agentapi.RoleActive),
		agentapi.ActionDropKept:        onVM(a, a.dropKept),
	}
	m[agentapi.ActionSettleContest] = onVM(a, a.settleContest)
	maps.Copy(m, a.pointActions())
	return m
}

func (a *Agent) handler() http.Handler {
	mux := http.NewServeMux()
	server := func(h http.Handler) http.Handler { return transport.RequireRole(h, transport.RoleServer) }
	actions := a.actions()

	mux.Handle("GET /v1/inventory", server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		host, err := a.hv.Host(r.Context())
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		domains, err := a.hv.Domains(r.Context())
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, agentapi.Inventory{Host: host, Domains: domains, Storage: a.storage()})
	})))
	mux.Handle("GET /v1/status", server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		transport.WriteJSON(w, http.StatusOK, a.Status(r.Context()))
	})))
	mux.Handle("GET /v1/holdings", server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		transport.WriteJSON(w, http.StatusOK, a.holdings(r.Context()))
	})))
	mux.Handle("GET /v1/points/{protection}", server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v, err := a.vm(switchback.ProtectionID(r.PathValue("protection")))
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		if as := v.assignment(); as.ReplicaDir == "" && as.Kept != nil {
			transport.WriteJSON(w, http.StatusOK, as.Kept.Points)
			return
		}
		replica, err := v.openReplica()
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, replica.MarkedPoints())
	})))
	mux.Handle("POST /v1/tasks", server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req agentapi.Task
		if err := transport.ReadJSON(r, &req); err != nil {
			transport.WriteError(w, err)
			return
		}
		act, ok := actions[req.Action]
		if !ok || req.Key == "" {
			transport.WriteError(w, switchback.Errorf(switchback.CodeInvalid, "unknown action %q or no key", req.Action))
			return
		}
		if err := a.fences.admit(req, time.Now()); err != nil {
			transport.WriteError(w, err)
			return
		}
		t := a.tasks.start(req, act)
		wait := time.NewTimer(agentapi.PollWait)
		defer wait.Stop()
		select {
		case <-t.done:
		case <-wait.C:
		case <-r.Context().Done():
		}
		state := t.snapshot()
		transport.WriteJSON(w, http.StatusOK, state)
		if state.Done && killpoint.Armed() {
			_ = http.NewResponseController(w).Flush() // told, as far as it is in our hands
			taskLine(req, killpoint.AfterOutcome)
		}
	})))
	mux.Handle("DELETE /v1/tasks/{key...}", server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.tasks.cancel(r.PathValue("key"))
		w.WriteHeader(http.StatusNoContent)
	})))
	a.routePoints(func(pattern string, f func(r *http.Request) (any, error)) {
		mux.Handle(pattern, server(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			answer, err := f(r)
			if err != nil {
				transport.WriteError(w, err)
				return
			}
			transport.WriteJSON(w, http.StatusOK, answer)
		})))
	})
	a.routePeers(mux)
	mux.Handle("POST "+transport.DialInPath, transport.RequireRole(a.reach.inbound, transport.RoleServer, transport.RoleAgent))
	a.routeConnectivity(mux)
	return mux
}

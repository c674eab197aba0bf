package agent

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/transport"
)

// LocalSocket is where an agent answers on its host, to whoever may open it: root.
func LocalSocket(runDir string) string { return filepath.Join(runDir, "agent.sock") }

// serveLocal opens the local socket and returns what serves on it until ctx ends.
func (a *Agent) serveLocal(ctx context.Context) (func(), error) {
	path := LocalSocket(a.cfg.RunDir)
	os.Remove(path) // of an earlier process
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		ln.Close()
		return nil, err
	}
	mux := http.NewServeMux()
	route := func(pattern string, f func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			answer, err := f(r)
			if err != nil {
				transport.WriteError(w, err)
				return
			}
			transport.WriteJSON(w, http.StatusOK, answer)
		})
	}
	route("GET /v1/local", func(r *http.Request) (any, error) { return a.localStatus(r.Context()), nil })
	route("POST /v1/local/override", func(r *http.Request) (any, error) {
		var req agentapi.OverrideRequest
		if err := transport.ReadJSON(r, &req); err != nil {
			return nil, err
		}
		return a.override(r.Context(), req)
	})
	srv := &http.Server{Handler: mux, BaseContext: func(net.Listener) context.Context { return ctx }}
	return func() {
		stop := context.AfterFunc(ctx, func() { srv.Close() })
		defer stop()
		if err := srv.Serve(ln); err != nil && ctx.Err() == nil {
			a.log.Error("the local socket is not served any more", "error", err)
		}
	}, nil
}

// localStatus is what 'switchback agent status' shows.
func (a *Agent) localStatus(ctx context.Context) agentapi.LocalStatus {
	s := agentapi.LocalStatus{Site: a.site(), Server: a.servers.address()}
	if a.cfg.Credentials != nil {
		s.Agent = switchback.AgentID(a.cfg.Credentials.Identity().ID)
	}
	if err := a.serverError(); err != nil {
		s.ServerError = err.Error()
	}
	status := map[switchback.ProtectionID]agentapi.VMStatus{}
	for _, st := range a.Status(ctx).VMs {
		status[st.Protection] = st
	}
	for _, v := range a.all() {
		as := v.assignment()
		s.VMs = append(s.VMs, agentapi.LocalVMStatus{Name: as.Name, VM: as.VM, VMStatus: status[as.Protection]})
	}
	return s
}

// recently is how fresh an answer is that an override does not go against.
const recently = 15 * time.Second

// override lets a VM start with nobody's confirmation, and makes it contested.
// Asked for again it says the same.
func (a *Agent) override(ctx context.Context, req agentapi.OverrideRequest) (agentapi.Ownership, error) {
	var none agentapi.Ownership
	if req.Reason == "" {
		return none, switchback.Errorf(switchback.CodeInvalid, "an override needs a reason").WithHint("--reason WHY")
	}
	v, err := a.named(req.VM)
	if err != nil {
		return none, err
	}
	if v.standing().Role.Owns() {
		a.ask(ctx, []*vm{v}) // once more, now
	}
	v.act.Lock()
	defer v.act.Unlock()
	as, s := v.assignment(), v.standing()
	if _, err := a.hv.Domain(ctx, as.VM); err != nil {
		return none, err
	}
	if as.Role == agentapi.RoleTarget && as.ReplicaDir != "" {
		return none, switchback.Errorf(switchback.CodeRefused, "site %s is the recovery target of %s: it has points, not the VM's present disks", a.site(), as.Name).
			WithHint("'switchback replica export' makes a copy of a point that starts without Switchback")
	}
	v.mu.Lock()
	confirmed := v.confirmed
	v.mu.Unlock()
	if as.Override == nil && s.Role.Owns() && !s.Superseded() && time.Since(confirmed) < recently {
		return none, switchback.Errorf(switchback.CodeRefused, "VM %s needs no override: %s has just confirmed that it is active here", as.Name, v.confirmer()).WithHint("start it with virsh")
	}
	if as.Override == nil && !(s.Role.Owns() && !s.Superseded()) && a.serverAnswers() {
		return none, switchback.Errorf(switchback.CodeRefused, "the server answers, and VM %s is active at another site", as.Name).
			WithHint("move it with 'switchback vm failback %s' or 'vm cancel'", as.Name)
	}
	v.stopEngine() // no points until a winner is named
	if as.Override == nil {
		err := v.change(func(x *Assignment) {
			x.Override = &Override{Reason: req.Reason, At: time.Now(), Epoch: x.Epoch, By: req.By}
		})
		if err != nil {
			return none, err
		}
		a.log.Warn("override: the VM may start with nobody's confirmation, and is contested", "vm", as.Name, "reason", req.Reason, "by", req.By, "epoch", as.Epoch)
	}
	if err := v.grantContested(); err != nil {
		return none, err
	}
	o, _ := v.ownership()
	return *o, nil
}

func (v *vm) confirmer() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.confirmedBy
}

// serverAnswers: the control plane is there to be asked.
func (a *Agent) serverAnswers() bool {
	return a.cfg.ServerAddress != "" && a.serverReached()
}

// settleContest ends a contest. The side that has lost is turned off and fenced.
// What comes after the override is cleared is done again when it is asked again.
func (a *Agent) settleContest(ctx context.Context, _ *task, v *vm, req agentapi.Task, p agentapi.SettleContestParams) (any, error) {
	as := v.assignment()
	if p.Winner == a.site() && !as.Role.Owns() {
		return nil, switchback.Errorf(switchback.CodeConflict, "VM %s is not active at site %s by the record: its role there is %s", as.Name, a.site(), as.Role)
	}
	if p.Winner != a.site() && as.Role.Owns() {
		if err := v.hear(ctx, ruling(req.Epoch, p.Winner), 0, "command"); err != nil {
			return nil, err
		}
	}
	if p.Winner != a.site() {
		message := fmt.Sprintf("VM %s is active at site %s (epoch %d), which won a contest", as.Name, p.Winner, req.Epoch)
		if err := a.setFence(as.VM, message); err != nil {
			return nil, err
		}
	}
	if p.Winner == a.site() && as.Override != nil {
		next := v.standing()
		next.Contested = false
		if err := v.allow(ctx, as.VM, next); err != nil {
			return nil, err
		}
	}
	err := v.change(func(x *Assignment) {
		if p.Winner != a.site() && x.Override != nil && x.Rest != nil {
			rest := *x.Rest // what it wrote is not what the winner has
			rest.Distrust = "a contested copy of the VM ran here"
			x.Rest = &rest
		}
		x.Override = nil
	})
	if err != nil {
		return nil, err
	}
	if p.Winner == a.site() {
		if as.Role == agentapi.RoleSource {
			return nil, v.startEngine(a.tasks.ctx)
		}
		return nil, nil
	}
	if err := v.enforceFence(ctx); err != nil {
		return nil, err
	}
	if v.assignment().Role == agentapi.RoleSource {
		return nil, v.fenceHere(ctx, req.Epoch, p.Winner, true)
	}
	return nil, nil
}

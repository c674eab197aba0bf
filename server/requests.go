package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

const defaultShutdownDeadline = 90 * time.Second

// request handles an operation asked for a VM, by name.
func (s *Server) request(ctx context.Context, who, name string, kind recovery.Kind, req api.OperationRequest) (api.OperationAnswer, error) {
	if kind == recovery.Protect {
		return s.requestProtect(ctx, who, name, req)
	}
	p, err := s.find(ctx, name)
	if err != nil {
		return api.OperationAnswer{}, err
	}
	v, err := s.view(ctx, p, true)
	if err != nil {
		return api.OperationAnswer{}, err
	}
	for _, a := range v.Allowed {
		if a.Kind != kind {
			continue
		}
		if !a.Allowed {
			return api.OperationAnswer{}, refusal(a)
		}
		if kind == recovery.TestFailover || kind == recovery.CleanDrill {
			return s.requestDrill(ctx, who, v, kind, req)
		}
		return s.requestAllowed(ctx, who, v, kind, req)
	}
	return api.OperationAnswer{}, switchback.Errorf(switchback.CodeInvalid, "unknown operation %q", kind)
}

func (s *Server) requestAllowed(ctx context.Context, who string, v api.VM, kind recovery.Kind, req api.OperationRequest) (api.OperationAnswer, error) {
	p := v.Protection
	var params any
	switch kind {
	case recovery.Cancel:
		if v.Current != nil && !v.Current.State.Finished() {
			if req.DryRun {
				return api.OperationAnswer{Plan: s.planCancelRunning(v)}, nil
			}
			if err := s.runner.Cancel(ctx, v.Current.ID); err != nil {
				return api.OperationAnswer{}, err
			}
			rec, err := s.runner.Get(ctx, v.Current.ID)
			return api.OperationAnswer{Operation: &rec}, err
		}
	case recovery.Retry:
		if req.DryRun {
			return api.OperationAnswer{}, switchback.Errorf(switchback.CodeInvalid, "retry has no dry run: it goes on with what was planned")
		}
		if err := s.retryOperation(ctx, p.Operation); err != nil {
			return api.OperationAnswer{}, err
		}
		rec, err := s.runner.Get(ctx, p.Operation)
		return api.OperationAnswer{Operation: &rec}, err
	case recovery.Failover, recovery.Failback:
		sp := switchParams{Point: req.Point, AcceptLoss: req.AcceptLoss, ShutdownDeadline: req.ShutdownDeadline, ForceOff: req.ForceOff, NoProof: req.NoProof,
			FromCommitted: kind == recovery.Failback && p.Phase == switchback.PhaseCommitted,
			AndCommit:     req.AndCommit, AndReprotect: req.AndReprotect, Snapshots: req.Snapshots, Points: req.Points}
		if sp.ShutdownDeadline == 0 {
			sp.ShutdownDeadline = defaultShutdownDeadline
		}
		if sp.AndReprotect && !sp.AndCommit {
			return api.OperationAnswer{}, switchback.Errorf(switchback.CodeInvalid, "to protect again the switch must be committed").WithHint("add --commit")
		}
		if kind == recovery.Failover && (sp.AndCommit || sp.AndReprotect) {
			return api.OperationAnswer{}, switchback.Errorf(switchback.CodeInvalid, "failover does not commit by itself").WithHint("check the VM, then commit it")
		}
		if err := checkPoints(sp.Points); err != nil {
			return api.OperationAnswer{}, err
		}
		if sp.AndCommit {
			if err := checkSnapshots(sp.Snapshots, v.AtTarget); err != nil {
				return api.OperationAnswer{}, err
			}
			if sp.Points != "keep" && !sp.FromCommitted {
				if err := s.locksAllow(ctx, p, 0); err != nil {
					return api.OperationAnswer{}, err
				}
			}
		}
		asked := sp
		asked.AcceptLoss = sp.AcceptLoss || req.DryRun // a dry run shows the loss
		if _, err := s.checkChoice(ctx, v, asked); err != nil {
			return api.OperationAnswer{}, err
		}
		params = sp
	case recovery.TakePoint:
		params = agentapi.TakePointParams{ApplicationConsistent: req.ApplicationConsistent}
	case recovery.ChangePoint:
		cp := changeParams{Point: req.Point, Snapshot: req.Snapshot, ShutdownDeadline: req.ShutdownDeadline}
		if cp.ShutdownDeadline == 0 {
			cp.ShutdownDeadline = changeShutdownDeadline
		}
		if req.ForceOff {
			cp.ShutdownDeadline = 0
		}
		if cp.Snapshot != "" && cp.Point != "" {
			return api.OperationAnswer{}, switchback.Errorf(switchback.CodeInvalid, "a snapshot has its own point").WithHint("name --point or --snapshot, not both")
		}
		if cp.Snapshot == "" && cp.Point == "" {
			return api.OperationAnswer{}, switchback.Errorf(switchback.CodeInvalid, "no point to change to").WithHint("--point: %s; or --snapshot", recovery.ChoiceHelp)
		}
		if _, err := s.changeTarget(ctx, p, cp, time.Now()); err != nil {
			return api.OperationAnswer{}, err
		}
		params = cp
	case recovery.Extend:
		ep, err := extension(p, req.ExtendBy, req.Stop, time.Now())
		if err != nil {
			return api.OperationAnswer{}, err
		}
		params = ep
	case recovery.DropSnapshot:
		agent, kept, err := snapshotKeeper(v, req.Snapshot)
		if err == nil && kept.InUse {
			err = switchback.Errorf(switchback.CodeRefused, "%s runs from snapshot %s", v.Name, kept.Name).WithHint("change to another point first; a commit takes the snapshot in, and nothing of it is left")
		}
		if err != nil {
			return api.OperationAnswer{}, err
		}
		params = dropSnapshotParams{Snapshot: req.Snapshot, Agent: agent}
	case recovery.Resolve:
		if err := checkWinner(p, req.Winner); err != nil {
			return api.OperationAnswer{}, err
		}
		params = resolveParams{Winner: req.Winner}
	case recovery.Commit:
		if err := proofAllows(p, req.AcceptMismatch); err != nil {
			return api.OperationAnswer{}, err
		}
		choice := req.Snapshots
		if choice == "" && req.DryRun {
			choice = "keep" // a dry run shows what that would cost
		}
		if err := checkSnapshots(choice, v.AtSource); err != nil {
			return api.OperationAnswer{}, err
		}
		if err := checkPoints(req.Points); err != nil {
			return api.OperationAnswer{}, err
		}
		upTo := switchback.Sequence(0)
		if req.Points == "keep" {
			upTo = p.Switch.Point.Sequence
		}
		if err := s.locksAllow(ctx, p, upTo); err != nil {
			return api.OperationAnswer{}, err
		}
		params = commitParams{Snapshots: req.Snapshots, Points: req.Points}
	case recovery.Unprotect:
		if req.RemoveData && v.AtTarget != nil && v.AtTarget.Replica != nil && v.AtTarget.Replica.Points > 0 {
			if err := s.locksAllow(ctx, p, 0); err != nil {
				return api.OperationAnswer{}, err
			}
		}
		params = unprotectParams{RemoveData: req.RemoveData}
	case recovery.Edit, recovery.Pause, recovery.Resume:
		e := editParams{Policy: p.Policy, Paused: p.Paused}
		if kind == recovery.Edit && req.Policy != nil {
			e.Policy = *req.Policy
		}
		if kind == recovery.Edit {
			e.Networks = req.Networks
		}
		if kind != recovery.Edit {
			e.Paused = kind == recovery.Pause
		}
		if err := e.Policy.Validate(); err != nil {
			return api.OperationAnswer{}, err
		}
		if err := validateGuestPolicy(e.Policy); err != nil {
			return api.OperationAnswer{}, err
		}
		params = e
	}
	title := string(kind)
	if kind == recovery.Pause || kind == recovery.Resume {
		kind = recovery.Edit
	}
	if req.DryRun {
		plan, err := s.plan(ctx, v, kind, params)
		return api.OperationAnswer{Plan: plan}, err
	}
	rec, err := s.submit(ctx, who, p, string(kind), title, params)
	return api.OperationAnswer{Operation: &rec}, err
}

// submit makes the operation durable and links it to the VM.
func (s *Server) submit(ctx context.Context, who string, p switchback.Protection, kind, title string, params any) (operation.Record, error) {
	raw, err := json.Marshal(params)
	if err != nil {
		return operation.Record{}, err
	}
	if params == nil {
		raw = nil
	}
	rec, err := s.begin(ctx, operation.Record{Kind: kind, Protection: p.ID, Title: title + " " + p.Name, Params: raw, RequestedBy: who})
	if err != nil {
		return rec, err
	}
	_, err = s.update(ctx, p.ID, func(x *switchback.Protection) error {
		// The operation may have ended already and said so.
		if x.Ended != rec.ID {
			x.Operation = rec.ID
		}
		return nil
	})
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		err = nil // a quick unprotect
	}
	return rec, err
}

// requestProtect checks everything that can be checked before anything is made.
func (s *Server) requestProtect(ctx context.Context, who, name string, req api.OperationRequest) (api.OperationAnswer, error) {
	var none api.OperationAnswer
	policy := switchback.DefaultPolicy()
	if req.Policy != nil {
		policy = *req.Policy
	}
	if err := policy.Validate(); err != nil {
		return none, err
	}
	if err := validateGuestPolicy(policy); err != nil {
		return none, err
	}
	if req.To == "" {
		return none, switchback.Errorf(switchback.CodeInvalid, "no target site").WithHint("--to SITE")
	}
	machines, err := s.machines(ctx, req.From)
	if err != nil {
		return none, err
	}
	var found []api.Machine
	for _, m := range machines {
		if m.Domain.Name == name || string(m.Domain.UUID) == name {
			found = append(found, m)
		}
	}
	if len(found) > 1 {
		var active []api.Machine
		for _, m := range found {
			if m.Domain.State != hypervisor.StateOff && m.Role != "fenced" {
				active = append(active, m)
			}
		}
		found = active
	}
	if len(found) != 1 {
		where := "any site"
		if req.From != "" {
			where = "site " + string(req.From)
		}
		if len(found) == 0 {
			return none, switchback.Errorf(switchback.CodeNotFound, "no VM %q at %s", name, where).WithHint("'switchback vm list --all' shows every VM of the sites")
		}
		return none, switchback.Errorf(switchback.CodeConflict, "%d VMs match %q", len(found), name).WithHint("name the source site with --from, or use the UUID")
	}
	m := found[0]
	if m.Protection != "" {
		return none, switchback.Errorf(switchback.CodeConflict, "VM %s is protected already (%s)", name, m.Protection).WithHint("see 'switchback vm show %s'", name)
	}
	if err := mayProtect(ctx, m.Site); err != nil {
		return none, err
	}
	if m.Site == req.To {
		return none, switchback.Errorf(switchback.CodeInvalid, "VM %s is at site %s: the target must be another site", name, req.To)
	}
	at, err := s.store.Agent(ctx, m.Agent) // it is up: it has just named the VM
	if err != nil {
		return none, err
	}
	source := s.agentView(at)
	target, err := s.healthyAgent(ctx, req.To)
	if err != nil {
		return none, err
	}
	if err := pairReachable(source, target); err != nil {
		return none, err
	}
	// What would never do comes before what a start of the VM would mend.
	if !m.Domain.Persistent {
		return none, switchback.Errorf(switchback.CodeUnsupported, "VM %s is transient: it has no definition that outlives it", name).WithHint("define it")
	}
	disks, err := hypervisor.Protectable(m.Domain)
	if err != nil {
		return none, err
	}
	if m.Domain.State != hypervisor.StateRunning && m.Domain.State != hypervisor.StatePaused {
		return none, switchback.Errorf(switchback.CodeRefused, "VM %s is %s", name, m.Domain.State).WithHint("start it: changes are tracked while it runs")
	}
	if err := diskRoom(source, len(disks)); err != nil {
		return none, err
	}
	var id [6]byte
	rand.Read(id[:])
	p := switchback.Protection{ID: switchback.ProtectionID("p-" + hex.EncodeToString(id[:])), VM: m.Domain.UUID, Name: m.Domain.Name,
		Home: m.Site, Source: m.Site, Target: req.To, SourceAgent: source.ID, TargetAgent: target.ID, Phase: switchback.PhaseUnprotected,
		Epoch: 1, Policy: policy, Disks: disks, Networks: req.Networks, CreatedAt: time.Now()}
	var prepared agentapi.PrepareReplicaResult
	t := agentapi.Task{Key: "preflight/" + string(p.ID), Action: agentapi.ActionPrepareReplica, Protection: p.ID, Epoch: 1}
	err = s.agentClient(target.ID).Run(ctx, t, agentapi.PrepareReplicaParams{VM: p.VM, Name: p.Name, Disks: disks, Policy: policy, DryRun: true}, &prepared, nil)
	if err != nil {
		return none, err
	}
	if req.DryRun {
		plan, err := s.plan(ctx, api.VM{Protection: p}, recovery.Protect, nil)
		return api.OperationAnswer{Plan: plan}, err
	}
	if p, err = s.store.CreateProtection(ctx, p); err != nil {
		return none, err
	}
	rec, err := s.submit(ctx, who, p, string(recovery.Protect), string(recovery.Protect), nil)
	if err != nil {
		if derr := s.store.DeleteProtection(ctx, p.ID, p.Version); derr != nil {
			s.log.Error("a protection without operation is left", "protection", p.ID, "error", derr)
		}
		return none, err
	}
	return api.OperationAnswer{Operation: &rec}, nil
}

package server

import (
	"context"
	"encoding/json"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/replicator"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// silentAfter is how long an agent may be silent before it counts as down.
const silentAfter = 10 * time.Second

func runCheckpoint(e switchback.Epoch) string { return replicator.CheckpointName(e, 0) }

func (s *Server) agentClient(id switchback.AgentID) *agentapi.Client {
	return &agentapi.Client{HTTP: s.agents, Address: transport.AgentName(id)}
}

func (s *Server) agentView(a store.Agent) api.Agent {
	v := api.Agent{ID: a.ID, Site: a.Site, Address: a.Address, Version: a.Version, LastSeen: a.LastSeen}
	if len(a.Status) > 0 {
		var st agentapi.AgentStatus
		if err := json.Unmarshal(a.Status, &st); err == nil {
			v.Status = &st
		}
	}
	switch {
	case a.LastSeen.IsZero():
		v.Reason = "it has not reported yet"
	case s.store.Now().Sub(a.LastSeen) > silentAfter:
		v.Reason = "silent since " + a.LastSeen.UTC().Format(time.RFC3339)
	case v.Status != nil && v.Status.HypervisorError != "":
		v.Reason = "its hypervisor does not answer: " + v.Status.HypervisorError
	default:
		v.Healthy = true
	}
	return v
}

func (s *Server) agentViews(ctx context.Context, site switchback.SiteID) ([]api.Agent, error) {
	list, err := s.store.Agents(ctx, site)
	if err != nil {
		return nil, err
	}
	views := make([]api.Agent, len(list))
	for i, a := range list {
		views[i] = s.agentView(a)
	}
	return views, nil
}

// healthyAgent chooses the agent of a site that keeps a replica: of those that
// are up, the one with the most room.
func (s *Server) healthyAgent(ctx context.Context, site switchback.SiteID) (api.Agent, error) {
	if _, err := s.store.Site(ctx, site); switchback.CodeOf(err) == switchback.CodeNotFound {
		return api.Agent{}, switchback.Errorf(switchback.CodeNotFound, "there is no site %q", site).WithHint("'switchback site list' shows them, 'switchback site add' makes one")
	} else if err != nil {
		return api.Agent{}, err
	}
	views, err := s.agentViews(ctx, site)
	if err != nil {
		return api.Agent{}, err
	}
	best, why := mostRoom(views)
	if best != nil {
		return *best, nil
	}
	return api.Agent{}, switchback.Errorf(switchback.CodeUnavailable, "site %s has no healthy agent: %s", site, why).
		WithHint("start 'switchback agent' there, or join one: switchback site add / agent join")
}

// ask replaces an agent's last report by how it stands now, if it answers quickly.
func (s *Server) ask(ctx context.Context, a store.Agent) store.Agent {
	ctx, cancel := context.WithTimeout(ctx, 1500*time.Millisecond)
	defer cancel()
	st, err := s.agentClient(a.ID).Status(ctx)
	if err != nil {
		return a
	}
	if raw, err := json.Marshal(st); err == nil {
		a.Status, a.LastSeen = raw, s.store.Now()
	}
	return a
}

// view gathers everything about one protected VM. With now the agents are asked
// how they stand; otherwise their last reports count, seconds old.
func (s *Server) view(ctx context.Context, p switchback.Protection, now bool) (api.VM, error) {
	v, _, err := s.viewFacts(ctx, p, now)
	return v, err
}

// viewFacts is view, with what is allowed rests on.
func (s *Server) viewFacts(ctx context.Context, p switchback.Protection, now bool) (v api.VM, facts recovery.Facts, err error) {
	v = api.VM{Protection: p, Health: "normal"}
	facts = recovery.Facts{KeptDisks: len(p.Seeds[p.Target]) > 0}
	for _, side := range []struct {
		agent  switchback.AgentID
		status **agentapi.VMStatus
		up     *bool
	}{{p.SourceAgent, &v.AtSource, &facts.SourceUp}, {p.TargetAgent, &v.AtTarget, &facts.TargetUp}} {
		a, err := s.store.Agent(ctx, side.agent)
		if err != nil {
			return v, facts, err
		}
		if now {
			a = s.ask(ctx, a)
		}
		av := s.agentView(a)
		*side.up = av.Healthy
		if !av.Healthy {
			v.Conditions = append(v.Conditions, switchback.Condition{Name: "agent-down", Severity: switchback.SeverityWarning,
				Cause: "agent " + string(a.ID) + " of site " + string(a.Site) + ": " + av.Reason, Remedy: "start the agent, or mend the network to it", Since: a.LastSeen})
			s.cutOff(&v, a)
		}
		if av.Status == nil {
			continue
		}
		for i := range av.Status.VMs {
			if st := &av.Status.VMs[i]; st.Protection == p.ID {
				*side.status = st
				v.Conditions = append(v.Conditions, st.Conditions...)
				facts.Snapshots += len(st.Snapshots)
			}
		}
	}
	if st := v.AtSource; st != nil && st.Replication != nil {
		v.LastPoint = st.Replication.LastPoint
		if pr := st.Replication.Progress; pr != nil {
			facts.SeedPercent = pr.Percent
		}
	}
	facts.Contested = contested(v)
	if st := v.AtTarget; st != nil && st.Replica != nil {
		facts.Points, facts.Drill.Described = st.Replica.Points, st.Replica.Described
		if v.LastPoint == nil {
			v.LastPoint = st.Replica.Newest
		}
	}
	if p.Phase == switchback.PhaseProtected && v.LastPoint != nil {
		v.RPOSeconds = time.Since(v.LastPoint.Time).Seconds()
		if late := 3*p.Policy.Interval + 5*time.Second; !p.Paused && v.RPOSeconds > late.Seconds() && v.AtSource != nil && v.AtSource.Power != "off" {
			v.Conditions = append(v.Conditions, switchback.Condition{Name: "rpo-exceeded", Severity: switchback.SeverityCritical, Since: v.LastPoint.Time,
				Cause: "the newest point is older than three intervals", Remedy: "see the other conditions and the source agent's log"})
		}
	}
	if p.Operation != "" {
		rec, err := s.runner.Get(ctx, p.Operation)
		if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
			return v, facts, err
		}
		if err == nil {
			v.Current = &rec
			viewApproval(&v, rec)
			if rec.State.Finished() {
				facts.Failed, facts.FailedKind = rec.State == operation.StateFailed, rec.Kind
				if facts.Failed {
					v.Conditions = append(v.Conditions, switchback.Condition{Name: "operation-failed", Severity: switchback.SeverityCritical, Since: rec.EndedAt,
						Cause: rec.Kind + ": " + rec.Error.Error(), Remedy: "switchback operation retry " + string(rec.ID)})
				}
			} else {
				facts.Running, facts.RunningID = rec.Kind, rec.ID
				err := rec.CanCancel()
				facts.Cancellable = err == nil
				if err != nil {
					facts.NotCancellable = err.Error()
				}
			}
		}
	}
	if err := s.viewDrill(ctx, &v, &facts); err != nil {
		return v, facts, err
	}
	countdown(&v, time.Now())
	v.Conditions = append(v.Conditions, proofConditions(p)...)
	v.Health = healthOf(v.Conditions)
	v.Allowed = recovery.AllowedOperations(p, facts)
	return v, facts, nil
}

// find resolves a name, UUID or protection ID to a protected VM.
func (s *Server) find(ctx context.Context, name string) (switchback.Protection, error) {
	list, err := s.store.Protections(ctx)
	if err != nil {
		return switchback.Protection{}, err
	}
	var found []switchback.Protection
	for _, p := range list {
		if p.Name == name || string(p.VM) == name || string(p.ID) == name {
			found = append(found, p)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return switchback.Protection{}, switchback.Errorf(switchback.CodeNotFound, "no protected VM %q", name).WithHint("'switchback vm list --all' shows every VM of the sites")
	}
	return switchback.Protection{}, switchback.Errorf(switchback.CodeConflict, "%d protected VMs are named %q", len(found), name).WithHint("use the UUID")
}

// points asks the agent that keeps the replica.
func (s *Server) points(ctx context.Context, p switchback.Protection) ([]switchback.MarkedPoint, error) {
	a, err := s.store.Agent(ctx, s.keeper(p))
	if err != nil {
		return nil, err
	}
	return s.agentClient(a.ID).Points(ctx, p.ID)
}

// machines lists the VMs of all sites whose agents answer.
func (s *Server) machines(ctx context.Context, site switchback.SiteID) ([]api.Machine, error) {
	agents, err := s.store.Agents(ctx, site)
	if err != nil {
		return nil, err
	}
	protections, err := s.store.Protections(ctx)
	if err != nil {
		return nil, err
	}
	var list []api.Machine
	for _, a := range agents {
		if !s.agentView(a).Healthy {
			continue
		}
		inv, err := s.agentClient(a.ID).Inventory(ctx)
		if err != nil {
			return nil, err
		}
		for _, d := range inv.Domains {
			if slices.ContainsFunc(list, func(m api.Machine) bool { return m.Site == a.Site && m.Domain.UUID == d.UUID }) {
				continue // two agents on one hypervisor
			}
			m := api.Machine{Site: a.Site, Agent: a.ID, Domain: d}
			for _, p := range protections {
				if p.VM == d.UUID {
					m.Protection, m.Role = p.ID, "active"
					if a.Site != p.Source {
						m.Role = "fenced"
					}
				}
			}
			list = append(list, m)
		}
	}
	return list, nil
}

package server

import (
	"context"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
)

// nearlyFull is the share of a limit from which a condition says that it is near.
const nearlyFull = 0.85

// siteConditions are what is wrong at a site, by name. Pure.
func siteConditions(agents []api.Agent, expires map[switchback.AgentID]time.Time, version string, now time.Time) []switchback.Condition {
	var list []switchback.Condition
	add := func(name string, severity switchback.Severity, since time.Time, remedy, cause string, args ...any) {
		list = append(list, switchback.Condition{Name: name, Severity: severity, Since: since, Remedy: remedy, Cause: fmt.Sprintf(cause, args...)})
	}
	if len(agents) == 0 {
		add("no-agent", switchback.SeverityCritical, now, "switchback site add SITE prints a token; join an agent with it", "no agent has joined")
	}
	healthy := 0
	for _, a := range agents {
		if a.Healthy {
			healthy++
		}
	}
	alone := switchback.SeverityCritical
	if healthy > 0 {
		alone = switchback.SeverityWarning
	}
	for _, a := range agents {
		st := a.Status
		if !a.Healthy && (st == nil || st.HypervisorError == "") {
			add("agent-down", alone, a.LastSeen, "start the agent, or mend the network to it: switchback site test-connectivity", "agent %s: %s", a.ID, a.Reason)
		}
		if left := expires[a.ID].Sub(now); !expires[a.ID].IsZero() && left < expiryNear {
			severity := switchback.SeverityWarning
			if left <= 0 {
				severity = switchback.SeverityCritical
			}
			add("certificate-ending", severity, expires[a.ID].Add(-expiryNear), "see the agent's log for why it is not renewed; join it again if it has ended", "the certificate of agent %s ends at %s", a.ID, expires[a.ID].UTC().Format(time.RFC3339))
		}
		if st == nil {
			continue
		}
		if st.HypervisorError != "" {
			add("hypervisor-down", alone, a.LastSeen, "start the hypervisor's daemon at that host", "agent %s: %s", a.ID, st.HypervisorError)
		}
		if skew := st.Time.Sub(a.LastSeen).Abs(); !st.Time.IsZero() && skew > skewWarning {
			add("clock-differs", switchback.SeverityWarning, a.LastSeen, "let server and agents keep time by NTP", "the clock of agent %s differs from the server's by about %s", a.ID, skew.Round(100*time.Millisecond))
		}
		if a.Version != version {
			add("version-differs", switchback.SeverityNotice, a.LastSeen, "bring both to one version", "agent %s runs version %s, the server %s", a.ID, a.Version, version)
		}
		capacityConditions(a, st, add)
	}
	return list
}

// capacityConditions say which limits are near, before they are hit.
func capacityConditions(a api.Agent, st *agentapi.AgentStatus, add func(name string, severity switchback.Severity, since time.Time, remedy, cause string, args ...any)) {
	c := st.Capacity
	space := func(name string, s agentapi.Storage, reserve int64, remedy string) {
		switch usable := s.FreeBytes - reserve; {
		case s.SizeBytes == 0:
		case usable <= 0:
			add(name+"-full", switchback.SeverityCritical, a.LastSeen, remedy, "agent %s: %s has %d MiB left, %d MiB are kept in reserve", a.ID, s.Path, s.FreeBytes>>20, reserve>>20)
		case float64(usable) < (1-nearlyFull)*float64(s.SizeBytes):
			add(name+"-low", switchback.SeverityWarning, a.LastSeen, remedy, "agent %s: %s has %d of %d MiB left above its reserve", a.ID, s.Path, usable>>20, s.SizeBytes>>20)
		}
	}
	space("storage", st.Storage, c.StorageReserveBytes, "make room there, let replicas keep less, or move old points to an object store")
	if c.Scratch.Path != "" {
		space("scratch", c.Scratch, 0, "make room there: what running guests overwrite during a cycle is kept in it")
	}
	count := func(name, what string, used, limit int, remedy string) {
		switch {
		case limit <= 0 || float64(used) < nearlyFull*float64(limit):
		case used >= limit:
			add(name+"-full", switchback.SeverityWarning, a.LastSeen, remedy, "agent %s has %d of %d %s: no more are taken", a.ID, used, limit, what)
		default:
			add(name+"-near", switchback.SeverityNotice, a.LastSeen, remedy, "agent %s has %d of %d %s", a.ID, used, limit, what)
		}
	}
	count("disks", "disks", c.Disks, c.MaxDisks, "protect further VMs by another agent, or raise --max-disks")
	count("open-files", "open files", c.OpenFiles, c.MaxOpenFiles, "raise the limit of open files of the agent's unit (LimitNOFILE)")
}

// healthOf is the gravest of conditions.
func healthOf(list []switchback.Condition) string {
	health := "normal"
	for _, c := range list {
		if c.Severity == switchback.SeverityCritical {
			return "critical"
		}
		if c.Severity == switchback.SeverityWarning {
			health = "warning"
		}
	}
	return health
}

// siteView is a site with its agents and health.
func (s *Server) siteView(ctx context.Context, id switchback.SiteID) (api.Site, error) {
	agents, err := s.store.Agents(ctx, id)
	if err != nil {
		return api.Site{}, err
	}
	v := api.Site{ID: id, Agents: []api.Agent{}}
	expires := map[switchback.AgentID]time.Time{}
	for _, a := range agents {
		v.Agents = append(v.Agents, s.agentView(a))
		expires[a.ID] = a.CertificateExpires
	}
	v.Conditions = siteConditions(v.Agents, expires, s.cfg.Version, s.store.Now())
	v.Health = healthOf(v.Conditions)
	return v, nil
}

// showSite adds what the site's agents work for.
func (s *Server) showSite(ctx context.Context, id switchback.SiteID) (v api.SiteDetail, err error) {
	if _, err := s.store.Site(ctx, id); err != nil {
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			err = switchback.Errorf(switchback.CodeNotFound, "there is no site %q", id).WithHint("'switchback site list' shows them")
		}
		return v, err
	}
	site, err := s.siteView(ctx, id)
	if err != nil {
		return v, err
	}
	v = api.SiteDetail{Site: site, VMs: []api.SiteVM{}}
	list, err := s.store.Protections(ctx)
	if err != nil {
		return v, err
	}
	for _, p := range list {
		if p.Source != id && p.Target != id {
			continue
		}
		x := api.SiteVM{Name: p.Name, ID: p.ID, Phase: p.Phase, Disks: len(p.Disks), Part: "active"}
		agent := p.SourceAgent
		if p.Target == id {
			x.Part, agent = "target", p.TargetAgent
		}
		x.Agent = agent
		for _, a := range site.Agents {
			if a.ID != agent || a.Status == nil {
				continue
			}
			for _, st := range a.Status.VMs {
				if st.Protection == p.ID && st.Replica != nil {
					x.Points, x.JournalBytes = st.Replica.Points, st.Replica.JournalBytes
				}
			}
		}
		if p.Phase == switchback.PhaseSeeding || p.Phase == switchback.PhaseReprotecting {
			v.Copies++
		}
		v.VMs = append(v.VMs, x)
	}
	return v, nil
}

func maxCopies(a api.Agent) int {
	if a.Status == nil {
		return 0
	}
	return a.Status.Capacity.MaxCopies
}

// diskRoom refuses what an agent's limit of disks does not allow.
func diskRoom(a api.Agent, disks int) error {
	if a.Status == nil {
		return nil
	}
	if c := a.Status.Capacity; c.MaxDisks > 0 && c.Disks+disks > c.MaxDisks {
		return switchback.Errorf(switchback.CodeRefused, "agent %s of site %s works for %d disks, %d more are above its limit of %d", a.ID, a.Site, c.Disks, disks, c.MaxDisks).
			WithHint("unprotect a VM there, or raise the agent's --max-disks")
	}
	return nil
}

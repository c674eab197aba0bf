package server

import (
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/transport"
)

func TestSiteConditions(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	well := func() api.Agent {
		return api.Agent{ID: "a", Version: "1", LastSeen: now, Healthy: true, Status: &agentapi.AgentStatus{Time: now,
			Storage:  agentapi.Storage{Path: "/s", FreeBytes: 50 << 30, SizeBytes: 100 << 30},
			Capacity: agentapi.Capacity{Disks: 2, MaxDisks: 10, OpenFiles: 50, MaxOpenFiles: 1024, StorageReserveBytes: 1 << 30, Scratch: agentapi.Storage{Path: "/c", FreeBytes: 50 << 30, SizeBytes: 100 << 30}}}}
	}
	with := func(f func(*api.Agent)) []api.Agent { a := well(); f(&a); return []api.Agent{a} }
	for name, c := range map[string]struct {
		agents  []api.Agent
		expires time.Time
		want    string // conditions with their severity
		health  string
	}{
		"well":       {agents: []api.Agent{well()}, health: "normal"},
		"no agent":   {want: "no-agent critical", health: "critical"},
		"silent":     {agents: with(func(a *api.Agent) { a.Healthy, a.Reason = false, "silent" }), want: "agent-down critical", health: "critical"},
		"one of two": {agents: append(with(func(a *api.Agent) { a.Healthy, a.Reason = false, "silent" }), well()), want: "agent-down warning", health: "warning"},
		"hypervisor": {agents: with(func(a *api.Agent) { a.Healthy, a.Status.HypervisorError = false, "gone" }), want: "hypervisor-down critical", health: "critical"},
		"low":        {agents: with(func(a *api.Agent) { a.Status.Storage.FreeBytes = 10 << 30 }), want: "storage-low warning", health: "warning"},
		"full":       {agents: with(func(a *api.Agent) { a.Status.Storage.FreeBytes = 1 << 29 }), want: "storage-full critical", health: "critical"},
		"scratch":    {agents: with(func(a *api.Agent) { a.Status.Capacity.Scratch.FreeBytes = 1 << 30 }), want: "scratch-low warning", health: "warning"},
		"disks near": {agents: with(func(a *api.Agent) { a.Status.Capacity.Disks = 9 }), want: "disks-near notice", health: "normal"},
		"disks full": {agents: with(func(a *api.Agent) { a.Status.Capacity.Disks = 10 }), want: "disks-full warning", health: "warning"},
		"no limit":   {agents: with(func(a *api.Agent) { a.Status.Capacity.Disks, a.Status.Capacity.MaxDisks = 900, 0 }), health: "normal"},
		"files":      {agents: with(func(a *api.Agent) { a.Status.Capacity.OpenFiles = 1000 }), want: "open-files-near notice", health: "normal"},
		"clock":      {agents: with(func(a *api.Agent) { a.Status.Time = now.Add(-time.Minute) }), want: "clock-differs warning", health: "warning"},
		"version":    {agents: with(func(a *api.Agent) { a.Version = "0" }), want: "version-differs notice", health: "normal"},
		"ending":     {agents: []api.Agent{well()}, expires: now.Add(time.Hour), want: "certificate-ending warning", health: "warning"},
		"ended":      {agents: []api.Agent{well()}, expires: now.Add(-time.Hour), want: "certificate-ending critical", health: "critical"},
	} {
		t.Run(name, func(t *testing.T) {
			list := siteConditions(c.agents, map[switchback.AgentID]time.Time{"a": c.expires}, "1", now)
			var got []string
			for _, x := range list {
				got = append(got, x.Name+" "+string(x.Severity))
				if x.Cause == "" || x.Remedy == "" {
					t.Errorf("%s lacks cause or remedy", x.Name)
				}
			}
			if strings.Join(got, ", ") != c.want || healthOf(list) != c.health {
				t.Errorf("%v (%s), want %s (%s)", got, healthOf(list), c.want, c.health)
			}
		})
	}
}

func TestJudgeLeg(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	well := transport.Measurement{Latency: time.Millisecond, Version: "1", CertificateExpires: now.Add(100 * time.Hour)}
	for name, c := range map[string]struct {
		change func(*api.Leg)
		ok     bool
		warns  string
	}{
		"well":        {func(*api.Leg) {}, true, ""},
		"clock":       {func(l *api.Leg) { l.ClockSkew = -10 * time.Second }, true, "clocks differ"},
		"clock, far":  {func(l *api.Leg) { l.ClockSkew = time.Hour }, false, ""},
		"version":     {func(l *api.Leg) { l.Version = "2" }, true, "version 2"},
		"certificate": {func(l *api.Leg) { l.CertificateExpires = now.Add(time.Hour) }, true, "ends in"},
		"broken":      {func(l *api.Leg) { l.Error = switchback.Errorf(switchback.CodeUnavailable, "cannot reach x") }, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			l := api.Leg{Kind: api.LegAgentAgent, From: "a", To: "b", LegResult: agentapi.LegResult{Address: "x:1", Measurement: well}}
			c.change(&l)
			l = judgeLeg(l, "1", now)
			if l.OK != c.ok || (l.Error == nil) != c.ok || !l.OK && l.Error.Hint == "" {
				t.Errorf("%+v", l)
			}
			if got := strings.Join(l.Warnings, ";"); !strings.Contains(got, c.warns) || c.warns == "" && got != "" {
				t.Errorf("warnings %q", got)
			}
		})
	}
}

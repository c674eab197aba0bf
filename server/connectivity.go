package server

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// Bounds of what is sent on one leg to measure it.
const (
	legBytes = 32 << 20
	legLimit = time.Second
)

// What is worth a warning, and what is trouble now.
const (
	skewWarning = 2 * time.Second
	skewTrouble = 5 * time.Minute // certificates begin 10 minutes before they are made
	expiryNear  = 24 * time.Hour
)

func (s *Server) routeConnectivity(mux *http.ServeMux, admin func(pattern string, f func(r *http.Request) (any, error))) {
	transport.RouteMeasure(mux, s.cfg.Version, transport.RoleAgent, transport.RoleAdmin)
	admin("POST /v1/connectivity", func(r *http.Request) (any, error) {
		var req api.ConnectivityRequest
		if err := transport.ReadJSON(r, &req); err != nil {
			return nil, err
		}
		return s.testConnectivity(r.Context(), req.Sites)
	})
}

// testConnectivity measures every leg that touches the sites, one after the other.
func (s *Server) testConnectivity(ctx context.Context, sites []switchback.SiteID) (api.Connectivity, error) {
	c := api.Connectivity{At: s.store.Now(), OK: true, Legs: []api.Leg{}}
	for _, id := range sites {
		if _, err := s.store.Site(ctx, id); err != nil {
			if switchback.CodeOf(err) == switchback.CodeNotFound {
				err = switchback.Errorf(switchback.CodeNotFound, "there is no site %q", id).WithHint("'switchback site list' shows them")
			}
			return c, err
		}
	}
	agents, err := s.store.Agents(ctx, "")
	if err != nil {
		return c, err
	}
	if len(agents) == 0 {
		return c, switchback.Errorf(switchback.CodeRefused, "no agent has joined").WithHint("switchback site add SITE")
	}
	chosen := func(id switchback.SiteID) bool { return len(sites) == 0 || slices.Contains(sites, id) }
	name := func(a store.Agent) string { return string(a.Site) + "/" + string(a.ID) }
	add := func(kind api.LegKind, from, to string, r agentapi.LegResult) {
		leg := judgeLeg(api.Leg{Kind: kind, From: from, To: to, LegResult: r}, s.cfg.Version, c.At)
		c.OK = c.OK && leg.OK
		c.Legs = append(c.Legs, leg)
	}
	for _, a := range agents {
		var peers []agentapi.Peer
		var names []string
		for _, b := range agents {
			if b.Site != a.Site && (chosen(a.Site) || chosen(b.Site)) {
				peers = append(peers, agentapi.Peer{Agent: b.ID, Site: b.Site, Address: b.Address})
				names = append(names, name(b))
			}
		}
		if !chosen(a.Site) && len(peers) == 0 {
			continue
		}
		leg := agentapi.LegResult{Address: a.Address}
		limited, cancel := context.WithTimeout(ctx, 10*time.Second)
		leg.Measurement, err = transport.Measure(limited, s.agents, transport.AgentName(a.ID), legBytes/4, legLimit/2)
		cancel()
		if err != nil {
			leg.Error = switchback.Flatten(err)
		}
		if chosen(a.Site) {
			add(api.LegServerAgent, "server", name(a), leg)
		}
		var answer agentapi.ConnectivityAnswer
		if leg.Error == nil {
			limited, cancel := context.WithTimeout(ctx, time.Minute+time.Duration(len(peers))*15*time.Second)
			answer, err = s.agentClient(a.ID).Connectivity(limited, agentapi.ConnectivityRequest{Peers: peers, Bytes: legBytes, Limit: legLimit})
			cancel()
			if err != nil {
				leg.Error = switchback.Flatten(err)
			}
		}
		if leg.Error != nil { // nobody can tell
			unknown := agentapi.LegResult{Error: switchback.Errorf(switchback.CodeUnavailable, "not known: the server cannot ask agent %s", a.ID).WithHint("mend the leg from the server to %s first", name(a))}
			answer = agentapi.ConnectivityAnswer{Server: unknown, Hypervisor: unknown, Storage: unknown}
			for range peers {
				answer.Peers = append(answer.Peers, unknown)
			}
		}
		if chosen(a.Site) {
			add(api.LegAgentServer, name(a), "server", answer.Server)
		}
		for i, r := range answer.Peers {
			if i < len(names) {
				add(api.LegAgentAgent, name(a), names[i], r)
			}
		}
		if chosen(a.Site) {
			add(api.LegHypervisor, name(a), "hypervisor", answer.Hypervisor)
			add(api.LegStorage, name(a), "storage", answer.Storage)
		}
	}
	return c, nil
}

// judgeLeg says whether a leg is well, and what will be trouble on it.
func judgeLeg(l api.Leg, version string, now time.Time) api.Leg {
	if e := l.Error; e != nil {
		if e.Hint == "" {
			c := *e
			c.Hint = legRemedy(l, e.Code)
			l.Error = &c
		}
		return l
	}
	l.OK = true
	skew := l.ClockSkew.Abs()
	switch l.Kind {
	case api.LegHypervisor, api.LegStorage:
		return l
	}
	if skew > skewTrouble {
		l.OK = false
		l.Error = switchback.Errorf(switchback.CodeRefused, "the clocks of %s and %s differ by %s", l.From, l.To, skew.Round(time.Second)).
			WithHint("let both keep time by NTP: certificates and points' times depend on it")
	} else if skew > skewWarning {
		l.Warnings = append(l.Warnings, fmt.Sprintf("the clocks differ by %s: keep them by NTP", skew.Round(100*time.Millisecond)))
	}
	if l.Version != version {
		l.Warnings = append(l.Warnings, fmt.Sprintf("%s runs version %s, the server %s", l.To, l.Version, version))
	}
	if left := l.CertificateExpires.Sub(now); !l.CertificateExpires.IsZero() && left < expiryNear {
		l.Warnings = append(l.Warnings, fmt.Sprintf("the certificate of %s ends in %s: it should have been renewed", l.To, left.Round(time.Minute)))
	}
	return l
}

func legRemedy(l api.Leg, code switchback.Code) string {
	switch {
	case code == switchback.CodeUnauthorized:
		return "look at the certificates of both: 'switchback agent list', and join the agent again if its own has ended"
	case l.To == "server":
		return fmt.Sprintf("see that the server listens on %s, and that a firewall lets %s reach it", l.Address, l.From)
	case l.Address != "":
		return fmt.Sprintf("see that 'switchback agent' runs there and listens on %s, and that a firewall lets %s reach it", l.Address, l.From)
	}
	return "see the log of " + l.From
}

package server

import (
	"context"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/transport"
)

// connect prepares how this server and the agents reach each other.
func (s *Server) connect() {
	s.inbound = transport.NewInbound(s.creds, s.admitLine)
	s.agents = transport.NewHTTPClient(transport.ClientConfig{Credentials: s.creds, Resolve: s.resolve, Inbound: s.inbound})
	s.addressed = transport.NewHTTPClient(transport.ClientConfig{Credentials: s.creds, Want: transport.AnyAgent, Inbound: s.inbound})
}

// storeTime is how long the store may take to say who an agent is.
const storeTime = 5 * time.Second

// admitLine lets agents of this installation keep lines.
func (s *Server) admitLine(id transport.Identity) error {
	ctx, cancel := context.WithTimeout(context.Background(), storeTime)
	defer cancel()
	return s.knownAgent(ctx, id)
}

// knownAgent refuses an agent that is not, or no more, one of the installation,
// or not of the site that it was let join.
func (s *Server) knownAgent(ctx context.Context, id transport.Identity) error {
	a, err := s.store.Agent(ctx, switchback.AgentID(id.ID))
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return switchback.Errorf(switchback.CodeUnauthorized, "agent %s is not known (any more)", id.ID).WithHint("join it again with a new token")
	}
	if err == nil && a.Site != id.Site {
		return switchback.Errorf(switchback.CodeUnauthorized, "agent %s belongs to site %s, its certificate says %s", id.ID, a.Site, id.Site)
	}
	return err
}

// resolve says how an agent is reached that is called by its name. Only that
// very agent is believed, whoever else claims its address.
func (s *Server) resolve(ctx context.Context, name string) (string, func(transport.Identity) error, error) {
	id, ok := transport.NamedAgent(name)
	if !ok {
		return "", nil, switchback.Errorf(switchback.CodeInternal, "%q names no agent", name)
	}
	a, err := s.store.Agent(ctx, id)
	return a.Address, transport.Agent(id), err
}

// movedPeers are those of the agents named that have another address now.
func (s *Server) movedPeers(ctx context.Context, known map[switchback.AgentID]string) (map[switchback.AgentID]string, error) {
	if len(known) == 0 {
		return nil, nil
	}
	now, err := s.store.AgentAddresses(ctx)
	if err != nil {
		return nil, err
	}
	moved := map[switchback.AgentID]string{}
	for id, address := range known {
		if is := now[id]; is != "" && is != address {
			moved[id] = is
		}
	}
	return moved, nil
}

// ownAddress refuses an address that names another agent.
func ownAddress(id switchback.AgentID, address string) error {
	if transport.IsName(address) && address != transport.AgentName(id) {
		return switchback.Errorf(switchback.CodeInvalid, "agent %s cannot be reached as %q", id, address)
	}
	return nil
}

// keepLines keeps lines to all agents, for a server that they cannot dial.
func (s *Server) keepLines(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	stops := map[string]context.CancelFunc{}
	handler := s.handler()
	for ctx.Err() == nil {
		list, err := s.store.Agents(ctx, "")
		if err != nil && ctx.Err() == nil {
			s.log.Warn("lines to the agents", "error", err)
		}
		want := map[string]bool{}
		for _, a := range list {
			if transport.IsName(a.Address) {
				continue
			}
			key := string(a.ID) + " " + a.Address
			if want[key] = true; stops[key] != nil {
				continue
			}
			o := transport.NewOutbound(transport.OutboundConfig{Credentials: s.creds, Peer: a.Address, Want: transport.Agent(a.ID), Handler: handler, Logger: s.log})
			c, stop := context.WithCancel(ctx)
			stops[key] = stop
			wg.Go(func() { o.Run(c) })
		}
		for key, stop := range stops {
			if err == nil && !want[key] {
				stop()
				delete(stops, key)
			}
		}
		t := time.NewTimer(2 * time.Second)
		select {
		case <-ctx.Done():
			t.Stop()
		case <-t.C:
		}
	}
	for _, stop := range stops {
		stop()
	}
}

// pairReachable refuses a pair of agents neither of which can dial the other.
func pairReachable(a, b api.Agent) error {
	if transport.IsName(a.Address) && transport.IsName(b.Address) {
		return switchback.Errorf(switchback.CodeRefused, "neither agent %s of site %s nor agent %s of site %s takes connections: they cannot reach each other", a.ID, a.Site, b.ID, b.Site).
			WithHint("open one port at one of the sites, and join its agent with --address HOST:PORT")
	}
	return nil
}

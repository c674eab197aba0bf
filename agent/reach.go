package agent

import (
	"context"
	"net/http"
	"strings"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/transport"
)

// reach keeps the lines by which others call this agent, and those by which it
// calls others.
type reach struct {
	inbound *transport.Inbound

	mu       sync.Mutex
	outbound map[lineTo]*transport.Outbound
}

// lineTo names whom a line leads to: a server where agent is empty.
type lineTo struct {
	address string
	agent   switchback.AgentID
}

func (l lineTo) want() func(transport.Identity) error {
	if l.agent == "" {
		return transport.AnyServer
	}
	return transport.Agent(l.agent)
}

// admitLine judges who may open a line: servers, and the peers of what this
// agent was assigned.
func (a *Agent) admitLine(id transport.Identity) error {
	if id.Role == transport.RoleServer {
		return nil
	}
	return a.isPeer(id)
}

func peerIs(as Assignment, id transport.Identity) bool {
	return string(as.Peer.Agent) == id.ID && as.Peer.Site == id.Site
}

// isPeer refuses agents that no VM here has as its peer.
func (a *Agent) isPeer(id transport.Identity) error {
	for _, v := range a.all() {
		if peerIs(v.assignment(), id) {
			return nil
		}
	}
	return switchback.Errorf(switchback.CodeUnauthorized, "agent %s is the peer of no VM here", id.ID)
}

// lines are those that this agent should keep: to all servers, and to the peers
// that can be dialled.
func (a *Agent) lines() map[lineTo]bool {
	want := map[lineTo]bool{}
	if a.cfg.Reachable == agentapi.ReachableYes {
		return want
	}
	add := func(l lineTo) {
		if l.address != "" && !transport.IsName(l.address) {
			want[l] = true
		}
	}
	if a.cfg.ServerAddress != "" {
		for _, s := range a.servers.all() {
			add(lineTo{address: s})
		}
	}
	for _, v := range a.all() {
		if p := v.assignment().Peer; p.Agent != "" {
			add(lineTo{p.Address, p.Agent})
		}
	}
	return want
}

// keepLines opens and ends lines as assignments come and go, until ctx ends.
func (a *Agent) keepLines(ctx context.Context, handler http.Handler) {
	var wg sync.WaitGroup
	defer wg.Wait()
	stops := map[lineTo]context.CancelFunc{}
	announced := a.cfg.Address
	if transport.IsName(announced) {
		announced = ""
	}
	for ctx.Err() == nil {
		want := a.lines()
		for l, stop := range stops {
			if !want[l] {
				stop()
				delete(stops, l)
				a.reach.mu.Lock()
				delete(a.reach.outbound, l)
				a.reach.mu.Unlock()
			}
		}
		for l := range want {
			if stops[l] != nil {
				continue
			}
			o := transport.NewOutbound(transport.OutboundConfig{Credentials: a.cfg.Credentials, Peer: l.address, Want: l.want(),
				Address: announced, Handler: handler, Logger: a.log})
			c, stop := context.WithCancel(ctx)
			stops[l] = stop
			a.reach.mu.Lock()
			a.reach.outbound[l] = o
			a.reach.mu.Unlock()
			wg.Go(func() { o.Run(c) })
		}
		sleep(ctx, 500*time.Millisecond)
	}
	for _, stop := range stops {
		stop()
	}
}

// lineStatus lists all lines of this agent.
func (a *Agent) lineStatus() []transport.LineStatus {
	list := a.reach.inbound.Lines()
	a.reach.mu.Lock()
	defer a.reach.mu.Unlock()
	for _, o := range a.reach.outbound {
		list = append(list, o.Status())
	}
	return list
}

// checkReachable judges how an agent is to be reached.
func checkReachable(r agentapi.Reachable, address string) error {
	switch {
	case r != agentapi.ReachableYes && r != agentapi.ReachableNo && r != agentapi.ReachableAuto:
		return switchback.Errorf(switchback.CodeInvalid, "reachable is true, false or auto, not %q", r)
	case r == agentapi.ReachableNo && address != "":
		return switchback.Errorf(switchback.CodeInvalid, "an agent that cannot be dialled has no address").WithHint("leave --address out, or use --reachable=auto")
	case r != agentapi.ReachableNo && !strings.Contains(address, ":"):
		return switchback.Errorf(switchback.CodeInvalid, "--address HOST:PORT is needed: how the server and the other agents reach this agent").
			WithHint("where nobody can open a connection to it: --reachable=false")
	}
	return nil
}

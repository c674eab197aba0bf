package agent

import (
	"context"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/transport"
)

// Readdress changes how an agent that has joined is reached, from its next
// start on. The server hears of it with the first report, and tells its peers.
func Readdress(stateDir, address string, reachable agentapi.Reachable) error {
	if err := checkReachable(reachable, address); err != nil {
		return err
	}
	id, err := LoadIdentity(stateDir)
	if err != nil {
		return err
	}
	if reachable == agentapi.ReachableNo {
		address = transport.AgentName(switchback.AgentID(id.Credentials.Identity().ID))
	}
	id.Address, id.Reachable = address, reachable
	return saveIdentity(stateDir, id)
}

// peerAddresses are those that the agent goes by.
func (a *Agent) peerAddresses() map[switchback.AgentID]string {
	list := map[switchback.AgentID]string{}
	for _, v := range a.all() {
		if p := v.assignment().Peer; p.Agent != "" {
			list[p.Agent] = p.Address
		}
	}
	return list
}

// learnPeers goes on with peers at the addresses that they have now. A VM that
// an action is at work on is left for the next report.
func (a *Agent) learnPeers(peers map[switchback.AgentID]string) {
	for _, v := range a.all() {
		p := v.assignment().Peer
		address, told := peers[p.Agent]
		if !told || address == p.Address || !v.act.TryLock() {
			continue
		}
		a.tasks.wg.Go(func() {
			defer v.act.Unlock()
			if err := v.movePeer(a.tasks.ctx, address); err != nil {
				a.log.Error("the peer's new address is not taken over", "protection", v.assignment().Protection, "error", err)
			}
		})
	}
}

// movePeer makes the new address durable and lets the engine start anew with it.
func (v *vm) movePeer(ctx context.Context, address string) error {
	runs := v.running() != nil
	if runs {
		v.stopEngine()
	}
	was := v.assignment().Peer
	if err := v.change(func(x *Assignment) { x.Peer.Address = address }); err != nil {
		return err
	}
	v.agent.log.Info("the peer has another address", "protection", v.assignment().Protection, "peer", was.Agent, "from", was.Address, "to", address)
	if !runs {
		return nil
	}
	return v.startEngine(ctx)
}

package agent

import (
	"context"
	"net/http"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/transport"
)

const (
	// describeEvery is how often a source looks whether its VM is defined otherwise;
	// describeSoon how often while its target has not been told under this epoch.
	describeEvery = 20 * time.Second
	describeSoon  = 2 * time.Second
	// describeAgain is how often it tells the target all the same.
	describeAgain = 5 * time.Minute
)

// described is what a source last told its target.
type described struct {
	epoch switchback.Epoch
	peer  switchback.AgentID
	journal.Definition
	at time.Time // when it was told
	// looked is when the definition was last looked at.
	looked time.Time
}

// due reports whether the definition is to be looked at.
func (d described) due(as Assignment) bool {
	return d.epoch != as.Epoch || d.peer != as.Peer.Agent || time.Since(d.looked) >= describeEvery
}

func (d described) covers(as Assignment, now journal.Definition) bool {
	return d.epoch == as.Epoch && d.peer == as.Peer.Agent && d.Text == now.Text && slices.Equal(d.Networks, now.Networks) && time.Since(d.at) < describeAgain
}

// describeVMs keeps the definitions at the targets of all VMs that are active
// here up to date, until ctx ends. What a target has not taken is sent again.
func (a *Agent) describeVMs(ctx context.Context) {
	told, failing := map[switchback.ProtectionID]described{}, map[switchback.ProtectionID]bool{}
	for ; ctx.Err() == nil; sleep(ctx, describeSoon) {
		for _, v := range a.all() {
			as := v.assignment()
			if as.Role != agentapi.RoleSource || !failing[as.Protection] && !told[as.Protection].due(as) {
				continue
			}
			d, err := a.tellDefinition(ctx, v, as, told[as.Protection])
			if err == nil {
				d.looked = time.Now()
				told[as.Protection] = d
			} else if !failing[as.Protection] && ctx.Err() == nil {
				a.log.Warn("the target does not have the VM's present definition, trying again", "protection", as.Protection, "error", err)
			}
			failing[as.Protection] = err != nil
		}
	}
}

func (a *Agent) tellDefinition(ctx context.Context, v *vm, as Assignment, told described) (described, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	v.mu.Lock()
	client := v.peers
	v.mu.Unlock()
	if client == nil { // no engine: it is being replaced
		return told, nil
	}
	dom, err := a.hv.Domain(ctx, as.VM)
	if err != nil {
		return told, err
	}
	text, err := a.hv.Definition(ctx, as.VM, false)
	if err != nil {
		return told, err
	}
	now := journal.Definition{Text: text, Networks: dom.Networks, Time: time.Now()}
	if told.covers(as, now) {
		return told, nil
	}
	t := &peerTarget{client: client, peer: as.Peer, protection: as.Protection}
	if err := t.sendDefinition(ctx, as.Epoch, now); err != nil {
		return told, err
	}
	return described{epoch: as.Epoch, peer: as.Peer.Agent, Definition: now, at: now.Time}, nil
}

// receiveDefinition keeps what the source says of the VM, with the replica.
func (v *vm) receiveDefinition(r *http.Request) error {
	if _, err := v.targetRole(r); err != nil {
		return err
	}
	var d journal.Definition
	if err := transport.ReadJSON(r, &d); err != nil {
		return err
	}
	replica, err := v.openReplica()
	if err != nil {
		return err
	}
	return replica.SetDefinition(d)
}

func (a *Agent) keptDefinition(_ context.Context, _ *task, _ *vm, replica *journal.Replica, _ agentapi.Task, _ struct{}) (any, error) {
	return journal.ReadDefinition(replica.Dir())
}

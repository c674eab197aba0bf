package agent

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/transport"
)

const (
	// lookEvery is how often it is decided anew what may run here.
	lookEvery = 500 * time.Millisecond
	// askEvery is how often it is asked who is active; askSoon, where a VM waits for
	// the answer or lives by it.
	askEvery = 5 * time.Second
	askSoon  = time.Second
	// askTimeout bounds a question to the server or a peer.
	askTimeout = 3 * time.Second
	// beginPatience is how long a start that failed is not tried again.
	beginPatience = 10 * time.Second
)

// asks is what is known of the asking itself.
type asks struct {
	mu sync.Mutex
	// err is why the server does not answer; nil = it does.
	err   error
	peers map[switchback.AgentID]*http.Client
}

// peerClient believes this one agent only.
func (a *Agent) peerClient(id switchback.AgentID) *http.Client {
	a.asks.mu.Lock()
	defer a.asks.mu.Unlock()
	c, ok := a.asks.peers[id]
	if !ok {
		if a.asks.peers == nil {
			a.asks.peers = map[switchback.AgentID]*http.Client{}
		}
		c = transport.NewHTTPClient(transport.ClientConfig{Credentials: a.cfg.Credentials, Want: transport.Agent(id), Inbound: a.reach.inbound})
		a.asks.peers[id] = c
	}
	return c
}

// askOwnership asks the server, and where that does not answer the peers, until ctx ends.
func (a *Agent) askOwnership(ctx context.Context) {
	for ctx.Err() == nil {
		next := askEvery
		var owned []*vm
		for _, v := range a.all() {
			if s := v.standing(); s.Role.Owns() {
				owned = append(owned, v)
				if d := fencing.Decide(s, v.moment(false)); !d.MayStart || s.Policy.Lease > 0 {
					next = askSoon
				}
			}
		}
		a.ask(ctx, owned)
		sleep(ctx, next)
	}
}

// ask asks about these VMs once, and takes the answers in.
func (a *Agent) ask(ctx context.Context, vms []*vm) {
	if len(vms) == 0 {
		return
	}
	missing := slices.Clone(vms)
	if a.cfg.ServerAddress != "" {
		address := a.servers.address()
		err := a.askOne(ctx, a.server, "https://"+address+"/v1/agents/ownership", "server", &missing)
		a.servers.answered(address, err)
		a.asks.mu.Lock()
		if (err != nil) != (a.asks.err != nil) && ctx.Err() == nil {
			a.log.Info("who is active: the server answers", "answers", err == nil, "error", err)
		}
		a.asks.err = err
		a.asks.mu.Unlock()
	}
	byPeer := map[agentapi.Peer][]*vm{}
	for _, v := range missing {
		if p := v.assignment().Peer; p.Agent != "" {
			byPeer[p] = append(byPeer[p], v)
		}
	}
	var wg sync.WaitGroup
	for p, list := range byPeer {
		wg.Go(func() {
			if err := a.askOne(ctx, a.peerClient(p.Agent), "https://"+p.Address+"/v1/ownership", string(p.Agent), &list); err != nil {
				a.log.Debug("a peer does not say who is active", "peer", p.Agent, "error", err)
			}
		})
	}
	wg.Wait()
}

// askOne asks one party, and leaves in vms those it had nothing to say of.
func (a *Agent) askOne(ctx context.Context, client *http.Client, url, by string, vms *[]*vm) error {
	q := agentapi.OwnershipQuestion{Held: map[switchback.ProtectionID]switchback.Epoch{}}
	for _, v := range *vms {
		as := v.assignment()
		q.Held[as.Protection] = as.Epoch
	}
	c, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	asked := hostClock() // a lease runs from the question
	answer, err := transport.Call[agentapi.OwnershipAnswer](c, client, http.MethodPost, url, q)
	if err != nil {
		return err
	}
	var left []*vm
	for _, v := range *vms {
		r, ok := answer.Rulings[v.assignment().Protection]
		if !ok {
			left = append(left, v)
		} else if err := v.hear(ctx, r, asked, by); err != nil {
			a.log.Error("an answer of who is active cannot be kept", "vm", v.assignment().Name, "error", err)
		}
	}
	*vms = left
	return nil
}

// hear takes in what somebody says of who is active. With asked, when the
// question left, an answer that confirms is a grant.
func (v *vm) hear(_ context.Context, r fencing.Ruling, asked fencing.Instant, by string) error {
	next, heard := v.standing().Hear(r)
	if next.Heard != v.standing().Heard {
		v.agent.log.Warn("heard of a newer epoch", "vm", v.assignment().Name, "epoch", r.Epoch, "active", r.Site, "from", by, "means", heard)
		if err := v.change(func(x *Assignment) { x.Heard = x.with(v.agent.site(), r) }); err != nil {
			return err
		}
	}
	if heard != fencing.HeardConfirmed || asked == 0 {
		return nil
	}
	v.mu.Lock()
	v.confirmed, v.confirmedBy = time.Now(), by
	v.mu.Unlock()
	// Anew, under the lock: a command may have changed epoch or policy meanwhile.
	v.granting.Lock()
	defer v.granting.Unlock()
	if next, heard = v.standing().Hear(r); heard != fencing.HeardConfirmed || next.Contested {
		return nil
	}
	return v.putGrant(v.assignment().VM, fencing.Confirm(next, v.agent.boot.name, asked, by), false)
}

// with is what has been heard, once r was.
func (x *Assignment) with(site switchback.SiteID, r fencing.Ruling) fencing.Ruling {
	next, _ := x.standing(site).Hear(r)
	return next.Heard
}

// awaitTakeover waits until the old side's lease has ended, where it was not seen off.
func (v *vm) awaitTakeover(ctx context.Context, t *task) error {
	for ctx.Err() == nil {
		s, m := v.standing(), v.moment(false)
		if s.Takeover == nil {
			return nil
		}
		left := s.Takeover.Remaining(m.Boot, m.Up, m.Now)
		if left <= 0 {
			return nil
		}
		t.Report(fmt.Sprintf("waiting for the end of the lease that the other side may still have: %d s", int(left.Seconds())), nil)
		sleep(ctx, min(left, 200*time.Millisecond))
	}
	return ctx.Err()
}

// routeOwnership answers peers that ask whether this side stands in their way.
func (a *Agent) routeOwnership(mux *http.ServeMux) {
	mux.Handle("POST /v1/ownership", transport.RequireRole(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, err := a.answerOwnership(r)
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, answer)
	}), transport.RoleAgent))
}

func (a *Agent) answerOwnership(r *http.Request) (agentapi.OwnershipAnswer, error) {
	answer := agentapi.OwnershipAnswer{Rulings: map[switchback.ProtectionID]fencing.Ruling{}}
	id, err := transport.PeerIdentity(r)
	if err != nil {
		return answer, err
	}
	if err := a.isPeer(id); err != nil {
		return answer, err
	}
	var q agentapi.OwnershipQuestion
	if err := transport.ReadJSON(r, &q); err != nil {
		return answer, err
	}
	for p, epoch := range q.Held {
		v, err := a.vm(p)
		if err != nil || !peerIs(v.assignment(), id) {
			continue // not known here, or not the asker's business
		}
		answer.Rulings[p] = v.standing().Answer(switchback.SiteID(id.Site), epoch)
	}
	return answer, nil
}

// serverReached asks the server anything.
func (a *Agent) serverReached() bool {
	c, cancel := context.WithTimeout(context.Background(), askTimeout)
	defer cancel()
	_, err := transport.Call[agentapi.OwnershipAnswer](c, a.server, http.MethodPost, "https://"+a.servers.address()+"/v1/agents/ownership", agentapi.OwnershipQuestion{})
	return err == nil
}

func ruling(e switchback.Epoch, site switchback.SiteID) fencing.Ruling {
	return fencing.Ruling{Epoch: e, Site: site}
}

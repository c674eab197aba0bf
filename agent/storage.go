package agent

import (
	"context"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
)

// offloadRate is how many bytes a second go to the object store beside replication.
const offloadRate = 50 << 20

// offloadPause is how long an object store that failed is left alone.
const offloadPause = 30 * time.Second

// checkStorage refuses a policy that this site cannot keep points by.
func (a *Agent) checkStorage(p switchback.Policy) error {
	if p.Encrypt && a.cfg.KeySource == nil {
		return switchback.Errorf(switchback.CodeRefused, "the policy asks for encrypted points, and the agent of the target has no key").
			WithHint("start it with --encryption-key-file or --encryption-command")
	}
	if p.OffloadAfter > 0 && a.cfg.Objects == nil {
		return switchback.Errorf(switchback.CodeRefused, "the policy moves old points to an object store, and the agent of the target has none").
			WithHint("start it with --object-store")
	}
	return nil
}

// applySealing makes a replica follow the policy and the agent's key source.
func (a *Agent) applySealing(r *journal.Replica, p switchback.Policy) error {
	if err := a.checkStorage(switchback.Policy{Encrypt: p.Encrypt}); err != nil {
		return err
	}
	if now := r.Storage(); !p.Encrypt && !now.Seal {
		return nil
	}
	return r.SetSealing(a.tasks.ctx, p.Encrypt, a.cfg.KeySource)
}

// rotateKey makes a new data key for the replica's new points.
func (a *Agent) rotateKey(ctx context.Context, _ *task, _ *vm, replica *journal.Replica, _ agentapi.Task, _ struct{}) (any, error) {
	if err := replica.RotateKey(ctx); err != nil {
		return nil, err
	}
	return agentapi.RotateKeyResult{Keys: len(replica.Storage().Keyring.Keys)}, nil
}

// offloadUpTo is the newest point whose data is old enough for the object
// store; 0 if there is none.
func (v *vm) offloadUpTo(replica *journal.Replica, now time.Time) (upTo switchback.Sequence) {
	after := v.a.Policy.OffloadAfter
	if after == 0 || v.agent.cfg.Objects == nil {
		return 0
	}
	points := replica.Points()
	for _, p := range points[:max(0, len(points)-1)] { // the head stays
		if now.Sub(p.Time) >= after {
			upTo = p.Sequence
		}
	}
	return upTo
}

// offloadDue reports whether something is to be moved. The caller holds v.mu.
func (v *vm) offloadDue(replica *journal.Replica) bool {
	upTo := v.offloadUpTo(replica, time.Now())
	return upTo > 0 && time.Now().After(v.farAgain) && (v.far != nil || replica.HasLocal(upTo))
}

// offload moves the data of old points to the object store.
func (v *vm) offload(ctx context.Context, replica *journal.Replica) error {
	v.mu.Lock()
	upTo := v.offloadUpTo(replica, time.Now())
	due := time.Now().After(v.farAgain)
	v.mu.Unlock()
	if upTo == 0 || !due {
		return nil
	}
	if replica.Storage().Objects == nil {
		if err := replica.SetObjects(ctx, v.agent.cfg.Objects); err != nil {
			return err
		}
	}
	if _, err := replica.Offload(ctx, upTo, offloadRate); err != nil {
		return err
	}
	return replica.TendObjects(ctx)
}

// setOffloaded keeps how that went. The caller holds v.mu.
func (v *vm) setOffloaded(err error) {
	if err == nil {
		v.far = nil
		return
	}
	c := &switchback.Condition{Name: "object-store-failing", Severity: switchback.SeverityWarning, Cause: err.Error(), Since: time.Now(),
		Remedy: "points stay in the local journal meanwhile, and nothing is lost; see to the object store: it is tried again by itself"}
	if v.far != nil {
		c.Since = v.far.Since
	}
	v.far, v.farAgain = c, time.Now().Add(offloadPause)
}

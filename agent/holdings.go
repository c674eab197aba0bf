package agent

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/recovery"
)

// holdings are what a server that lost its memory needs to know of this agent.
func (a *Agent) holdings(ctx context.Context) agentapi.Holdings {
	creds := a.cfg.Credentials
	id := creds.Identity()
	h := agentapi.Holdings{Agent: recovery.Keeper{Agent: switchback.AgentID(id.ID), Site: id.Site, Address: a.cfg.Address}, Version: a.cfg.Version,
		Installation: id.Installation, CertificateExpires: creds.Expires(), Storage: a.storage(), VMs: []recovery.Holding{}, Revoked: a.revocations()}
	if at := a.answered.Load(); at != 0 {
		h.ServerAnswered = time.Unix(0, at)
	}
	power := map[switchback.VMUUID]string{}
	domains, err := a.hv.Domains(ctx)
	for _, d := range domains {
		power[d.UUID] = string(d.State)
	}
	for _, v := range a.all() {
		as := v.assignment()
		if as.Role == "" { // nothing was made yet
			continue
		}
		held := v.holding(h.Agent, as)
		if held.Power = power[as.VM]; held.Power == "" && err == nil {
			held.Power = "absent"
		}
		h.VMs = append(h.VMs, held)
	}
	return h
}

func (v *vm) holding(self recovery.Keeper, as Assignment) recovery.Holding {
	h := recovery.Holding{Keeper: self, Protection: as.Protection, VM: as.VM, Name: as.Name, Epoch: as.Epoch, Role: string(as.Role),
		Peer:   recovery.Keeper{Agent: as.Peer.Agent, Site: as.Peer.Site, Address: as.Peer.Address},
		Policy: as.Policy, Held: as.Held, ShutdownAsked: !as.ShutdownUntil.IsZero(), Disks: as.Disks, OwnDisks: len(as.Disks) > 0,
		Replica: as.ReplicaDir != "", Seeds: as.Rest != nil, KeptPoints: as.Kept != nil}
	for _, d := range as.Disks {
		for _, dir := range []string{v.agent.cfg.StorageDir, as.Dir} {
			if dir != "" && strings.HasPrefix(d.Path, filepath.Clean(dir)+"/") {
				h.OwnDisks = false
			}
		}
	}
	if rec, ok := v.agent.records.of(as.Protection); ok {
		h.Record = &rec
	}
	if c := as.Change; c != nil {
		h.Change = &recovery.HeldChange{Sequence: c.Sequence, Snapshot: c.Snapshot}
	}
	if run := as.Run; run != nil {
		h.Run = &recovery.HeldRun{Epoch: run.Epoch, Point: switchback.Point{Protection: as.Protection, Sequence: run.Sequence}, Snapshot: run.Snapshot,
			Follows: run.Definition != "", Started: run.Started, StartedAt: run.StartedAt,
			Committing: run.Folded || run.Viewless || run.Abandoned != nil || as.Kept != nil}
	}
	if e := v.running(); e != nil && as.Role == agentapi.RoleSource {
		h.Newest = e.Status().LastPoint
	}
	if !h.Replica {
		return h
	}
	replica, err := v.openReplica()
	if err != nil {
		h.Unreadable = err.Error()
		return h
	}
	points := replica.Points()
	h.Frozen = replica.Manifest().RetentionFrozen
	h.Points, h.JournalBytes = len(points), replica.JournalBytes()
	for i := range points {
		h.Newest = &points[i]
		if h.Run != nil && points[i].Sequence == h.Run.Point.Sequence {
			h.Run.Point = points[i]
		}
	}
	return h
}

package agent

import (
	"context"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/transport"
)

// reportEvery is how often the agent tells the server how it stands.
const reportEvery = 2 * time.Second

// report sends the status until ctx ends. A server that does not answer is no
// trouble: replication needs agents only.
func (a *Agent) report(ctx context.Context) {
	lost := false
	for ctx.Err() == nil {
		err := func() error {
			c, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			address := a.servers.address()
			answer, err := transport.Call[agentapi.ReportAnswer](c, a.server, http.MethodPost, "https://"+address+"/v1/agents/report", a.Status(c))
			a.servers.answered(address, err)
			a.learnServers(answer.Servers)
			a.learnPeers(answer.Peers)
			a.learnRecoveryKey(answer.RecoveryKey)
			a.keepRecords(answer.Records)
			if err == nil {
				a.answered.Store(time.Now().UnixNano())
				err = a.learnTrust(c, answer.TrustUpdate)
			}
			return err
		}()
		if (err != nil) != lost && ctx.Err() == nil {
			lost = err != nil
			if lost {
				a.log.Warn("the server does not take reports; replication goes on", "error", err)
			} else {
				a.log.Info("the server takes reports")
			}
		}
		sleep(ctx, reportEvery)
	}
}

// Status is what the agent reports.
func (a *Agent) Status(ctx context.Context) agentapi.AgentStatus {
	s := agentapi.AgentStatus{Version: a.cfg.Version, Address: a.cfg.Address, Time: time.Now(), Storage: a.storage(), Capacity: a.capacity(),
		Reachable: a.cfg.Reachable, Lines: a.lineStatus(), Trust: agentapi.TrustOf(a.cfg.Credentials), Peers: a.peerAddresses()}
	power, flagged := map[switchback.VMUUID]string{}, map[switchback.VMUUID]bool{}
	domains, err := a.hv.Domains(ctx)
	if err != nil {
		s.HypervisorError = err.Error()
	}
	for _, d := range domains {
		power[d.UUID], flagged[d.UUID] = string(d.State), d.Autostart
	}
	for _, v := range a.all() {
		st := v.status()
		if st.Power = power[v.assignment().VM]; st.Power == "" {
			st.Power = "absent"
		}
		v.noteDomain(flagged[v.assignment().VM], st.Power == string(hypervisor.StateRunning) || st.Power == string(hypervisor.StatePaused))
		s.VMs = append(s.VMs, st)
	}
	return s
}

func (v *vm) status() agentapi.VMStatus {
	v.mu.Lock()
	a, replica, engine, cond, retained, far := v.a, v.replica, v.engine, v.cond, v.retained, v.far
	v.mu.Unlock()
	st := agentapi.VMStatus{Protection: a.Protection, Role: a.Role, Epoch: a.Epoch, Drills: drillStatus(a)}
	if rec, ok := v.agent.records.of(a.Protection); ok {
		st.RecordVersion = rec.Protection.Version
	}
	if cond != nil {
		st.Conditions = append(st.Conditions, *cond)
	}
	if engine != nil {
		rs := engine.Status()
		rs.Paused = a.Held
		st.Replication = &rs
		st.Conditions = append(st.Conditions, rs.Conditions...)
	}
	var points []switchback.Point
	if replica != nil {
		m := replica.Manifest()
		r := &agentapi.ReplicaStatus{Dir: a.ReplicaDir, Seeded: !m.Seeding}
		r.FreeBytes, _ = freeBytes(a.ReplicaDir)
		_, derr := journal.ReadDefinition(a.ReplicaDir)
		r.Described = derr == nil
		points = replica.Points()
		r.JournalBytes, r.SnapshotBytes = replica.JournalBytes(), replica.BranchBytes()
		r.Encrypted, r.Offloaded, r.Objects = replica.StorageStatus()
		if a.Role == agentapi.RoleTarget {
			st.Conditions = append(st.Conditions, retained...)
			if far != nil {
				st.Conditions = append(st.Conditions, *far)
			}
		}
		if len(points) > 0 {
			r.Points, r.Oldest, r.Newest = len(points), &points[0], &points[len(points)-1]
		}
		check, damage := v.checkStatus(replica, a)
		st.Check, st.Conditions = check, append(st.Conditions, append(damage, suspicions(replica, a.Name)...)...)
		st.Replica = r
	}
	own, held := v.ownership()
	st.Ownership, st.Conditions = own, append(st.Conditions, held...)
	st.Snapshots, st.Kept = a.snapshots(points), a.Kept.status()
	return st
}

package agentapi

import (
	"encoding/json"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/replicator"
	"github.com/switchback-dr/switchback/transport"
)

// Role is what an agent does for a protected VM.
type Role = fencing.Role

const (
	// RoleSource: the VM is active here and replicated from here.
	RoleSource = fencing.RoleSource
	// RoleTarget: the replica is kept here.
	RoleTarget = fencing.RoleTarget
	// RoleActive: the VM is active here and not replicated: switched or committed.
	RoleActive = fencing.RoleActive
	// RoleFenced: the VM is active elsewhere; its copy here must not run.
	RoleFenced = fencing.RoleFenced
)

// Task is a request to carry out an action.
type Task struct {
	// Key is unique per operation, step and attempt-independent: the same key is the same effect.
	Key        string                  `json:"key"`
	Action     string                  `json:"action"`
	Protection switchback.ProtectionID `json:"protection"`
	Epoch      switchback.Epoch        `json:"epoch"`
	Params     json.RawMessage         `json:"params,omitempty"`
	// Fence grows with every server that takes the operation over: an agent
	// refuses an older one. 0 = the task is of no operation.
	Fence int64 `json:"fence,omitempty"`
}

// ReportAnswer is the server's answer to an AgentStatus.
type ReportAnswer struct {
	// Servers are the addresses of all servers of the installation; none = unknown.
	Servers []string `json:"servers,omitempty"`
	// Peers are those that have another address than the agent goes by.
	Peers map[switchback.AgentID]string `json:"peers,omitempty"`
	TrustUpdate
	// Records are of VMs whose copy at the agent is older; RecoveryKey is the public
	// half of the installation's.
	Records     []recovery.Record `json:"records,omitempty"`
	RecoveryKey string            `json:"recovery_key,omitempty"`
}

// TaskState is how a task stands.
type TaskState struct {
	Key string `json:"key"`
	// Done is true when Result or Error is final.
	Done     bool                 `json:"done"`
	Result   json.RawMessage      `json:"result,omitempty"`
	Error    *switchback.Error    `json:"error,omitempty"`
	Progress *replicator.Progress `json:"progress,omitempty"`
	Message  string               `json:"message,omitempty"`
}

// Peer is the agent at the other end of a replication.
type Peer struct {
	Agent   switchback.AgentID `json:"agent"`
	Site    switchback.SiteID  `json:"site"`
	Address string             `json:"address"`
}

// Inventory is what an agent's hypervisor has.
type Inventory struct {
	Host    hypervisor.Host     `json:"host"`
	Domains []hypervisor.Domain `json:"domains"`
	// Storage is where replicas are kept here.
	Storage Storage `json:"storage"`
}

// Storage is a directory that holds replicas.
type Storage struct {
	Path      string `json:"path"`
	FreeBytes int64  `json:"free_bytes"`
	SizeBytes int64  `json:"size_bytes"`
}

// VMStatus is what an agent reports of one protected VM.
type VMStatus struct {
	Protection switchback.ProtectionID `json:"protection"`
	Role       Role                    `json:"role"`
	Epoch      switchback.Epoch        `json:"epoch"`
	// Power is the domain's state here; "absent" when it is not defined.
	Power string `json:"power"`
	// Replication is set for a source.
	Replication *replicator.Status `json:"replication,omitempty"`
	// Replica is set where a replica is kept.
	Replica *ReplicaStatus `json:"replica,omitempty"`
	// Check is how the checks of that replica stand.
	Check *CheckStatus `json:"check,omitempty"`
	// Snapshots are kept writes of abandoned runs.
	Snapshots []Snapshot `json:"snapshots,omitempty"`
	// Kept are points that a commit has kept, read-only.
	Kept       *KeptPoints            `json:"kept_points,omitempty"`
	Conditions []switchback.Condition `json:"conditions,omitempty"`
	// Ownership is set where the VM may be active, or was started by hand.
	Ownership *Ownership `json:"ownership,omitempty"`
	// Drills run here, or left something.
	Drills []DrillStatus `json:"drills,omitempty"`
	// RecordVersion is of the copy of the server's record that the agent keeps.
	RecordVersion int64 `json:"record_version,omitempty"`
}

// ReplicaStatus describes a replica at its target.
type ReplicaStatus struct {
	Dir          string            `json:"dir"`
	Seeded       bool              `json:"seeded"`
	Points       int               `json:"points"`
	Oldest       *switchback.Point `json:"oldest,omitempty"`
	Newest       *switchback.Point `json:"newest,omitempty"`
	JournalBytes int64             `json:"journal_bytes"`
	// SnapshotBytes is what kept writes of abandoned runs take in the journal beside its points.
	SnapshotBytes int64 `json:"snapshot_bytes,omitempty"`
	FreeBytes     int64 `json:"free_bytes"`
	// Described: the VM's definition is kept with it.
	Described bool `json:"described,omitempty"`
	// Encrypted: new points are encrypted where they are kept.
	Encrypted bool `json:"encrypted,omitempty"`
	// Offloaded is how many points' data is in the object store named by Objects.
	Offloaded int    `json:"offloaded,omitempty"`
	Objects   string `json:"objects,omitempty"`
}

// KeptPoints are the points that a commit has kept until the new direction has its own.
type KeptPoints struct {
	// Dir is their journal; 'switchback replica export' reads them there.
	Dir       string `json:"dir"`
	Points    int    `json:"points"`
	SizeBytes int64  `json:"size_bytes"`
}

// Snapshot is what a run that was abandoned wrote, kept until dropped.
type Snapshot struct {
	Name string `json:"name"`
	// Point is the one that the run started from, of which PointTime is the
	// instant and which Pin keeps; Epoch is the run's.
	Point     switchback.Sequence `json:"point"`
	PointTime time.Time           `json:"point_time,omitzero"`
	Epoch     switchback.Epoch    `json:"epoch"`
	Pin       string              `json:"pin,omitempty"`
	// SelfContained: it holds whole disks and needs no point.
	SelfContained bool `json:"self_contained"`
	// Pending: the files are the run's overlays still, on the snapshot Over where
	// it names one; they are being moved into the journal.
	Pending bool   `json:"pending,omitempty"`
	Over    string `json:"over,omitempty"`
	// InUse: the VM runs from it.
	InUse bool `json:"in_use,omitempty"`
	// Dir is the replica that holds it, for 'switchback replica'; Files are its data.
	Dir   string   `json:"dir,omitempty"`
	Files []string `json:"files"`
	// SizeBytes is what the files occupy, ChangedBytes what they hold of the
	// disks; WholeBytes is what it would at most if it were self-contained.
	SizeBytes    int64     `json:"size_bytes"`
	ChangedBytes int64     `json:"changed_bytes,omitempty"`
	WholeBytes   int64     `json:"whole_bytes"`
	Time         time.Time `json:"time"`
}

// AgentStatus is what an agent reports to the server.
type AgentStatus struct {
	Version string `json:"version"`
	// Address is where peers and the server reach the agent.
	Address string     `json:"address"`
	Time    time.Time  `json:"time"`
	Storage Storage    `json:"storage"`
	VMs     []VMStatus `json:"vms"`
	// Reachable is how others get at it; Lines are the connections over which
	// calls go against the direction they were dialled in.
	Reachable Reachable              `json:"reachable,omitempty"`
	Lines     []transport.LineStatus `json:"lines,omitempty"`
	Trust     Trust                  `json:"trust"`
	// Peers are the addresses by which it calls its peers.
	Peers map[switchback.AgentID]string `json:"peers,omitempty"`
	// Capacity is what it works for, with its limits.
	Capacity Capacity `json:"capacity"`
	// HypervisorError is set when the hypervisor does not answer.
	HypervisorError string `json:"hypervisor_error,omitempty"`
}

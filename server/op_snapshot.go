package server

import (
	"context"
	"log/slog"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
)

// dropSnapshotParams name a snapshot and the agent that keeps it.
type dropSnapshotParams struct {
	Snapshot string             `json:"snapshot"`
	Agent    switchback.AgentID `json:"agent"`
}

// commitParams are the parameters of commit.
type commitParams struct {
	// Snapshots is "drop" or "keep" (self-contained); empty where there are none.
	Snapshots string `json:"snapshots,omitempty"`
	// Points is "keep", or "delete" (also when empty).
	Points string `json:"points,omitempty"`
}

func (s *Server) dropSnapshotSteps() []operation.Step {
	return []operation.Step{{Name: "drop", Title: "delete what the abandoned run wrote", RetryFor: shortRetry, Irreversible: true, Do: func(ctx context.Context, r *operation.Run) error {
		var params dropSnapshotParams
		if err := r.Params(&params); err != nil {
			return err
		}
		p, err := s.of(ctx, r)
		if err != nil {
			return err
		}
		return s.do(ctx, r, params.Agent, p.Epoch, agentapi.ActionDropSnapshot, agentapi.DropSnapshotParams{Name: params.Snapshot}, nil)
	}}}
}

// snapshotKeeper finds the agent that keeps a snapshot, by the agents' reports.
func snapshotKeeper(v api.VM, name string) (switchback.AgentID, *agentapi.Snapshot, error) {
	for _, side := range []struct {
		agent  switchback.AgentID
		status *agentapi.VMStatus
	}{{v.SourceAgent, v.AtSource}, {v.TargetAgent, v.AtTarget}} {
		if side.status == nil {
			continue
		}
		for i := range side.status.Snapshots {
			if side.status.Snapshots[i].Name == name {
				return side.agent, &side.status.Snapshots[i], nil
			}
		}
	}
	return "", nil, switchback.Errorf(switchback.CodeNotFound, "no snapshot %q of %s is kept", name, v.Name).WithHint("'vm snapshots' lists them")
}

// leaning are snapshots that need points of the replica at the site where a
// switched VM runs: a commit deletes those. The one that the VM runs from
// becomes part of its disks.
func leaning(st *agentapi.VMStatus) []agentapi.Snapshot {
	var list []agentapi.Snapshot
	if st != nil {
		for _, x := range st.Snapshots {
			if !x.SelfContained && !x.InUse {
				list = append(list, x)
			}
		}
	}
	return list
}

// checkSnapshots refuses a commit that does not say what becomes of them.
func checkSnapshots(choice string, st *agentapi.VMStatus) error {
	switch choice {
	case "drop", "keep":
		return nil
	case "":
	default:
		return switchback.Errorf(switchback.CodeInvalid, "snapshots cannot be %q", choice).WithHint("drop or keep")
	}
	if list := leaning(st); len(list) > 0 {
		var bytes int64
		for _, x := range list {
			bytes += x.WholeBytes
		}
		return switchback.Errorf(switchback.CodeRefused, "%d kept snapshots need points that the commit deletes", len(list)).
			WithHint("add --snapshots drop, or --snapshots keep, which makes them self-contained (at most %d MiB are written)", bytes>>20)
	}
	return nil
}

// settleSnapshots is the step of a commit before anything of it is final.
func (s *Server) settleSnapshots(prefix string) operation.Step {
	return operation.Step{Name: prefix + "snapshots", Title: "check the room, settle the kept snapshots", RetryFor: longRetry, Cancellable: true, Do: func(ctx context.Context, r *operation.Run) error {
		var params commitParams
		if err := r.Params(&params); err != nil {
			return err
		}
		p, err := s.of(ctx, r)
		if err != nil {
			return err
		}
		if params.Points == "keep" { // that there is room is seen while there is a way back
			err := s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionKeepPoints, agentapi.KeepPointsParams{DryRun: true}, nil)
			if switchback.CodeOf(err) == switchback.CodeNoSpace { // not to be waited for
				return switchback.Errorf(switchback.CodeRefused, "%w", err).WithHint("make room, or delete the points: --points delete")
			}
			if err != nil {
				return err
			}
		}
		if params.Snapshots == "" {
			return operation.Skip("there are none") // the agent refuses to fold where there are
		}
		var out agentapi.SettleSnapshotsResult
		err = s.do(ctx, r, p.SourceAgent, p.Epoch, agentapi.ActionSettleSnapshots, agentapi.SettleSnapshotsParams{Keep: params.Snapshots == "keep"}, &out)
		if err != nil {
			return err
		}
		r.Log(slog.LevelInfo, "snapshots settled", "kept", len(out.Kept), "dropped", len(out.Dropped), "bytes", out.Bytes)
		return r.SetResult(out)
	}}
}

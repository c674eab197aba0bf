package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/export"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// pointsParams are the parameters of operations on points.
type pointsParams struct {
	Protection switchback.ProtectionID `json:"protection"`
	Sequence   switchback.Sequence     `json:"sequence,omitempty"`
	// Agent keeps the snapshot that PointsRequest names.
	Agent switchback.AgentID `json:"agent,omitempty"`
	api.PointsRequest
}

// pointDefinitions are the operations on points. Verify and export only read:
// they belong to no protection, so that no switch has to wait for them.
func (s *Server) pointDefinitions() []operation.Definition {
	one := func(name, title string, do func(ctx context.Context, r *operation.Run, p switchback.Protection, q pointsParams) error) operation.Step {
		return operation.Step{Name: name, Title: title, RetryFor: shortRetry, Cancellable: true, Do: func(ctx context.Context, r *operation.Run) error {
			var q pointsParams
			if err := r.Params(&q); err != nil {
				return err
			}
			p, err := s.store.Protection(ctx, q.Protection)
			if err != nil {
				return err
			}
			return do(ctx, r, p, q)
		}}
	}
	return []operation.Definition{
		{Kind: "verify", Steps: operation.Fixed(one("check", "read everything and compare checksums", s.verifyPoints))},
		{Kind: "export", Steps: operation.Fixed(one("copy", "copy the point out", s.exportPoint))},
		{Kind: "delete-point", OnEnd: s.end, Steps: operation.Fixed(one("delete", "delete the point", func(ctx context.Context, r *operation.Run, p switchback.Protection, q pointsParams) error {
			return s.doFor(ctx, r, p.ID, "", s.keeper(p), p.Epoch, agentapi.ActionDeletePoint, agentapi.DeletePointParams{Sequence: q.Sequence}, nil)
		}))},
		{Kind: "repair", OnEnd: s.end, Steps: operation.Fixed(
			one("find", "find what is damaged", s.repairFind),
			one("send", "have the source send it again", s.repairSend),
			one("mend", "put older points right", s.repairMend),
			one("check", "read everything and compare checksums", func(ctx context.Context, r *operation.Run, p switchback.Protection, q pointsParams) error {
				err := s.verifyPoints(ctx, r, p, q)
				if switchback.CodeOf(err) == switchback.CodeCorrupt {
					return s.repaired(ctx, r, p, err)
				}
				return err
			}))},
	}
}

// keeper is the agent that keeps the replica.
func (s *Server) keeper(p switchback.Protection) switchback.AgentID {
	switch {
	case p.Switch != nil:
		return p.Switch.ToAgent
	case p.KeptPoints && p.Phase == switchback.PhaseCommitted:
		return p.SourceAgent
	}
	return p.TargetAgent
}

func (s *Server) verifyPoints(ctx context.Context, r *operation.Run, p switchback.Protection, q pointsParams) error {
	var out agentapi.ReplicaCheck
	keeper, action := s.keeper(p), agentapi.ActionCheckReplica
	if q.Snapshot != "" {
		keeper, action = q.Agent, agentapi.ActionCheckSnapshot
	}
	err := s.doFor(ctx, r, p.ID, "", keeper, p.Epoch, action,
		agentapi.CheckReplicaParams{Sequence: q.Sequence, Snapshot: q.Snapshot, BytesPerSecond: q.BytesPerSecond}, &out)
	if err != nil {
		return err
	}
	if err := summarise(r, func(sum *api.Summary) { sum.Check = &out }); err != nil {
		return err
	}
	if err := r.SetResult(out); err != nil {
		return err
	}
	r.Log(slog.LevelInfo, "checked", "points", out.Points, "bytes", out.Bytes, "unproven_bytes", out.UnprovenBytes, "damage", len(out.Damage))
	if len(out.Damage) > 0 {
		text := make([]string, len(out.Damage))
		for i, d := range out.Damage {
			text[i] = d.Error() + ": affects " + d.Points()
		}
		return switchback.Errorf(switchback.CodeCorrupt, "%s", strings.Join(text, "; ")).WithHint("switchback points repair %s", p.Name)
	}
	return nil
}

func (s *Server) exportPoint(ctx context.Context, r *operation.Run, p switchback.Protection, q pointsParams) error {
	params := agentapi.ExportParams{Sequence: q.Sequence, Snapshot: q.Snapshot, Format: q.Format, To: q.To}
	keeper, action := s.keeper(p), agentapi.ActionExportPoint
	if q.Snapshot != "" {
		keeper, action = q.Agent, agentapi.ActionExportSnapshot
	}
	if q.Format == string(export.Dir) {
		d, err := s.describe(ctx, p)
		switch {
		case err != nil:
			r.Log(slog.LevelWarn, "the VM's definition is not exported", "error", err)
		case d.note != "":
			r.Log(slog.LevelWarn, "the source is not asked", "why", d.note)
		}
		params.Definition = d.definition
	}
	var out export.Result
	if err := s.doFor(ctx, r, p.ID, "", keeper, p.Epoch, action, params, &out); err != nil {
		return err
	}
	if err := summarise(r, func(sum *api.Summary) { sum.Export = &out }); err != nil {
		return err
	}
	return r.SetResult(out)
}

func (s *Server) repairFind(ctx context.Context, r *operation.Run, p switchback.Protection, q pointsParams) error {
	var out agentapi.FindDamageResult
	err := s.doFor(ctx, r, p.ID, "", p.TargetAgent, p.Epoch, agentapi.ActionFindDamage, agentapi.FindDamageParams{DropUnreadable: q.DropUnreadable}, &out)
	if err != nil {
		return err
	}
	if len(out.Hopeless) > 0 {
		return switchback.Errorf(switchback.CodeCorrupt, "this cannot be mended by sending it again: %s", strings.Join(out.Hopeless, "; ")).
			WithHint("protect the VM anew; until then choose points that are not affected")
	}
	for _, x := range append(out.Restored, out.Dropped...) {
		r.Log(slog.LevelInfo, "mended at the target", "what", x)
	}
	return r.SetResult(out)
}

func (s *Server) repairSend(ctx context.Context, r *operation.Run, p switchback.Protection, _ pointsParams) error {
	var found agentapi.FindDamageResult
	if err := r.StepResult("find", &found); err != nil {
		return err
	}
	var bytes int64
	for _, set := range found.Ranges {
		bytes += set.Bytes()
	}
	if bytes == 0 && len(found.Dropped) == 0 {
		return operation.Skip("the newest point reads nothing that is damaged")
	}
	if err := s.doFor(ctx, r, p.ID, "", p.SourceAgent, p.Epoch, agentapi.ActionResend, agentapi.ResendParams{Ranges: found.Ranges}, nil); err != nil {
		return err
	}
	var out agentapi.PointResult
	if err := s.doFor(ctx, r, p.ID, "", p.SourceAgent, p.Epoch, agentapi.ActionTakePoint, nil, &out); err != nil {
		return err
	}
	r.Log(slog.LevelInfo, "sent again", "bytes", bytes, "point", out.Report.Point.Sequence)
	return r.SetResult(out)
}

// repairMend has the target put back in older points what the newest one still
// has. What stays damaged, and why, is in the log and the summary.
func (s *Server) repairMend(ctx context.Context, r *operation.Run, p switchback.Protection, _ pointsParams) error {
	var found agentapi.FindDamageResult
	if err := r.StepResult("find", &found); err != nil {
		return err
	}
	if len(found.Damage) == 0 {
		return operation.Skip("nothing is damaged")
	}
	var out journal.MendResult
	if err := s.doFor(ctx, r, p.ID, "", p.TargetAgent, p.Epoch, agentapi.ActionMend, agentapi.MendParams{Damage: found.Damage}, &out); err != nil {
		return err
	}
	for _, d := range out.Mended {
		r.Log(slog.LevelInfo, "mended", "points", d.Points(), "what", d.Error())
	}
	for _, d := range out.Left {
		r.Log(slog.LevelWarn, "stays damaged", "points", d.Points(), "what", d.Error())
	}
	if err := summarise(r, func(sum *api.Summary) { sum.Mend = &out }); err != nil {
		return err
	}
	return r.SetResult(out)
}

// repaired accepts damage that only older points have.
func (s *Server) repaired(ctx context.Context, r *operation.Run, p switchback.Protection, damage error) error {
	var check agentapi.ReplicaCheck
	if err := r.StepResult("check", &check); err != nil {
		return err
	}
	points, err := s.points(ctx, p)
	if err != nil || len(points) == 0 {
		return damage
	}
	newest := points[len(points)-1].Sequence
	for _, d := range check.Damage {
		if d.Affects(newest) {
			return damage
		}
	}
	r.Log(slog.LevelWarn, "the newest point is whole; older ones stay damaged", "newest", newest, "damage", damage.Error())
	return nil
}

// pointNamed finds a point by any choice, by its bare tag, or "oldest".
func pointNamed(points []switchback.MarkedPoint, name string) (switchback.MarkedPoint, error) {
	if len(points) == 0 {
		return switchback.MarkedPoint{}, switchback.Errorf(switchback.CodeNotFound, "there is no point yet").WithHint("wait for the first one")
	}
	switch name {
	case "": // a choice would take it for latest
		return switchback.MarkedPoint{}, switchback.Errorf(switchback.CodeInvalid, "no point is named").WithHint("%s, or oldest", recovery.ChoiceHelp)
	case "oldest":
		return points[0], nil
	}
	for _, p := range points { // also those that a choice needs tag: in front of
		if p.Mark.Tag == name {
			return p, nil
		}
	}
	choice, err := recovery.ParseChoice(name)
	if err != nil {
		return switchback.MarkedPoint{}, err
	}
	return choice.Choose(points, time.Now())
}

// mark asks the keeper at once: there is nothing to go on with after a crash.
func (s *Server) mark(ctx context.Context, p switchback.Protection, params agentapi.MarkParams) (switchback.MarkedPoint, error) {
	var out switchback.MarkedPoint
	err := s.askKeeper(ctx, p, agentapi.ActionMarkPoint, params, &out)
	return out, err
}

// askKeeper has the keeper of the replica do something at once, as no part of
// an operation.
func (s *Server) askKeeper(ctx context.Context, p switchback.Protection, action string, params, out any) error {
	a, err := s.store.Agent(ctx, s.keeper(p))
	if err != nil {
		return err
	}
	t := agentapi.Task{Key: fmt.Sprintf("%s/%s/%d", action, p.ID, time.Now().UnixNano()), Action: action, Protection: p.ID, Epoch: p.Epoch}
	return s.agentClient(a.ID).Run(ctx, t, params, out, nil)
}

// requestPoints judges an operation on points and begins it.
func (s *Server) requestPoints(ctx context.Context, who string, p switchback.Protection, kind string, q pointsParams) (api.OperationAnswer, error) {
	var none api.OperationAnswer
	title := kind
	if q.Sequence > 0 {
		title += " point " + strconv.FormatUint(uint64(q.Sequence), 10) + " of"
		if kind == "delete-point" {
			title = strings.Replace(title, "delete-point point", "delete point", 1)
		}
	}
	if kind == "verify" || kind == "export" {
		if q.Snapshot != "" {
			v, err := s.view(ctx, p, true)
			if err == nil {
				q.Agent, _, err = snapshotKeeper(v, q.Snapshot)
			}
			if err != nil {
				return none, err
			}
			title += " snapshot " + q.Snapshot + " of"
		}
		switch p.Phase {
		case switchback.PhaseProtected, switchback.PhaseSwitching, switchback.PhaseSwitched, switchback.PhaseUndoing:
		default:
			if q.Snapshot == "" {
				return none, switchback.Errorf(switchback.CodeRefused, "%s is not possible: the VM is %s and has no points", kind, p.Phase)
			}
		}
		raw, err := json.Marshal(q)
		if err != nil {
			return none, err
		}
		rec, err := s.begin(ctx, operation.Record{Kind: kind, Title: title + " " + p.Name, Params: raw, RequestedBy: who})
		return api.OperationAnswer{Operation: &rec}, err
	}
	v, err := s.view(ctx, p, true)
	if err != nil {
		return none, err
	}
	if v.Current != nil && !v.Current.State.Finished() {
		return none, switchback.Errorf(switchback.CodeRefused, "%s is not possible: operation %s (%s) is under way", kind, v.Current.ID, v.Current.Kind).
			WithHint("wait for it: switchback operation watch %s", v.Current.ID)
	}
	if p.Phase != switchback.PhaseProtected {
		return none, switchback.Errorf(switchback.CodeRefused, "%s is not possible: the VM is %s", kind, p.Phase).WithHint("it is while the VM is protected")
	}
	if kind == "delete-point" {
		if err := s.mayDelete(ctx, p, q.Sequence); err != nil {
			return none, err
		}
	}
	rec, err := s.submit(ctx, who, p, kind, title, q)
	return api.OperationAnswer{Operation: &rec}, err
}

// mayDelete says at once what the agent would refuse.
func (s *Server) mayDelete(ctx context.Context, p switchback.Protection, seq switchback.Sequence) error {
	points, err := s.points(ctx, p)
	if err != nil {
		return err
	}
	for i, x := range points {
		switch {
		case x.Sequence != seq:
		case x.Mark.Locked:
			return switchback.Errorf(switchback.CodeRefused, "point %d is locked", seq).WithHint("switchback points unlock %s %d", p.Name, seq)
		case i == len(points)-1:
			return switchback.Errorf(switchback.CodeRefused, "point %d is the newest: the source continues from it", seq).WithHint("take another point first: switchback vm take-point %s", p.Name)
		}
	}
	a, err := s.store.Agent(ctx, s.keeper(p))
	if err != nil {
		return err
	}
	var d journal.PointDetail
	if d, err = s.agentClient(a.ID).Point(ctx, p.ID, seq); err != nil {
		return err
	}
	if len(d.Pins) > 0 {
		return switchback.Errorf(switchback.CodeRefused, "point %d is in use: pin %s", seq, d.Pins[0]).WithHint("end that first")
	}
	return nil
}

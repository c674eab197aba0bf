package server

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// The second approver: operations of chosen kinds wait, once they are durable and
// before their first step, until another person agrees. Whoever asks may go on
// alone where they break the glass, with a reason, which is noted first.

// settingApprovals keeps the policy.
const settingApprovals = "approval-policy"

// breakGlassHeader carries the reason for going on alone.
const breakGlassHeader = "Break-Glass"

const maxBreakGlass = 500

// expireEvery is how often approvals that nobody gave are looked for.
const expireEvery = 5 * time.Second

// approvable are the kinds of operations that can take a second person's approval.
var approvable = []string{
	string(recovery.Failover), string(recovery.Failback), string(recovery.ChangePoint), string(recovery.Commit), string(recovery.Cancel),
	string(recovery.Unprotect), string(recovery.DropSnapshot), string(recovery.DropKept), string(recovery.Resolve), "delete-point",
}

func (s *Server) approvalPolicy(ctx context.Context) (api.ApprovalPolicy, error) {
	p := api.ApprovalPolicy{Operations: []string{}, Role: switchback.Operator, ValidFor: 24 * time.Hour}
	text, err := s.store.Setting(ctx, settingApprovals)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return p, nil
	}
	if err == nil {
		if uerr := json.Unmarshal([]byte(text), &p); uerr != nil {
			err = switchback.Errorf(switchback.CodeCorrupt, "the approval policy: %w", uerr)
		}
	}
	return p, err
}

func (s *Server) setApprovalPolicy(ctx context.Context, p api.ApprovalPolicy) (api.ApprovalPolicy, error) {
	p.Operations = slices.Compact(slices.Sorted(slices.Values(p.Operations)))
	if p.Operations == nil {
		p.Operations = []string{}
	}
	for _, kind := range p.Operations {
		if !slices.Contains(approvable, kind) {
			return p, switchback.Errorf(switchback.CodeInvalid, "operation %q takes no approval", kind).WithHint("one of %s", strings.Join(approvable, ", "))
		}
	}
	if _, err := switchback.ParseAccessRole(string(p.Role)); err != nil {
		return p, err
	}
	if !p.Role.Includes(switchback.Operator) {
		return p, switchback.Errorf(switchback.CodeInvalid, "a %s cannot approve", p.Role).WithHint("operator or administrator")
	}
	if p.ValidFor < time.Minute || p.ValidFor > 30*24*time.Hour {
		return p, switchback.Errorf(switchback.CodeInvalid, "an approval is waited for from 1m to 720h, not %s", p.ValidFor)
	}
	text, err := json.Marshal(p)
	if err != nil {
		return p, err
	}
	return p, s.store.SetSetting(ctx, settingApprovals, string(text))
}

// approval is what an operation takes that is about to be begun: nil for none,
// given where the glass was broken.
func (s *Server) approval(ctx context.Context, rec operation.Record) (*operation.Approval, error) {
	policy, err := s.approvalPolicy(ctx)
	if err != nil {
		return nil, err
	}
	kinds := []string{rec.Kind}
	if rec.Kind == string(recovery.Failback) { // it may commit as well
		var params switchParams
		if err := json.Unmarshal(rec.Params, &params); err != nil {
			return nil, err
		}
		if params.AndCommit {
			kinds = append(kinds, string(recovery.Commit))
		}
	}
	if !slices.ContainsFunc(kinds, func(k string) bool { return slices.Contains(policy.Operations, k) }) {
		return nil, nil
	}
	now := s.store.Now()
	c := callOf(ctx)
	if c.breakGlass == "" {
		return &operation.Approval{Role: policy.Role, Until: now.Add(policy.ValidFor)}, nil
	}
	err = s.audit(ctx, audit.Entry{Request: c.id, Who: c.who.Name, Role: c.who.Role, Via: c.who.Via, Action: "break-glass", Object: rec.Title, Outcome: audit.Asked, Detail: c.breakGlass})
	if err != nil {
		return nil, err
	}
	s.log.Warn("the glass was broken: an operation goes on without a second person's approval", "who", c.who.Name, "operation", rec.Title, "reason", c.breakGlass, "request", c.id)
	return &operation.Approval{Role: policy.Role, At: now, BreakGlass: c.breakGlass}, nil
}

// approve lets an operation go on, with the consent of another person than who asked.
func (s *Server) approve(ctx context.Context, who caller, id switchback.OperationID, note string) (operation.Record, error) {
	rec, err := s.store.Operation(ctx, id)
	if err != nil {
		return rec, err
	}
	if rec.State == operation.StateAwaiting {
		switch {
		case who.Name == rec.RequestedBy:
			return rec, switchback.Errorf(switchback.CodeUnauthorized, "%s asked for operation %s: somebody else has to approve it", who.Name, id).
				WithHint("ask somebody with the role %s, or cancel it and break the glass: --break-glass REASON", rec.Approval.Role)
		case !who.Role.Includes(rec.Approval.Role):
			return rec, switchback.Errorf(switchback.CodeUnauthorized, "%s has the role %s: approving operation %s takes the role %s", who.Name, who.Role, id, rec.Approval.Role).
				WithHint("ask somebody with the role %s", rec.Approval.Role)
		}
	}
	if err := s.stillAllowed(ctx, rec); err != nil {
		return rec, err
	}
	return s.runner.Approve(ctx, id, who.Name, note)
}

// expireApprovals cancels what nobody approves in time, until ctx ends.
func (s *Server) expireApprovals(ctx context.Context) {
	tick := time.NewTicker(expireEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		expired, err := s.runner.Expire(ctx)
		for _, rec := range expired {
			err = errors.Join(err, s.audit(ctx, audit.Entry{Who: rec.RequestedBy, Via: "server", Action: "approval-expired", Object: "operations/" + string(rec.ID), Outcome: audit.Done, Detail: rec.Title}))
		}
		if err != nil && ctx.Err() == nil {
			s.log.Error("operations that nobody approved are not cancelled or not noted, trying again", "error", err)
		}
	}
}

// viewApproval says what a VM's operation waits for.
func viewApproval(v *api.VM, rec operation.Record) {
	if rec.State == operation.StateAwaiting {
		v.Conditions = append(v.Conditions, switchback.Condition{Name: "approval-awaited", Severity: switchback.SeverityNotice, Since: rec.CreatedAt,
			Cause:  rec.Title + ", asked for by " + rec.RequestedBy + ", awaits another person's approval until " + rec.Approval.Until.UTC().Format(time.RFC3339),
			Remedy: "switchback operation approve " + string(rec.ID) + ", or cancel it"})
	}
}

func (s *Server) routeApprovals(rt *routes) {
	handle(rt, route{ID: "get-approval-policy", Tag: "Access", Pattern: "GET /v1/approval-policy", Summary: "Which operations take a second person's approval", Need: switchback.Viewer},
		func(ctx context.Context, _ *struct{}) (api.ApprovalPolicy, error) { return s.approvalPolicy(ctx) })
	handle(rt, route{ID: "set-approval-policy", Tag: "Access", Pattern: "PUT /v1/approval-policy", Summary: "Choose which operations take a second person's approval", Need: switchback.Administrator},
		func(ctx context.Context, in *struct{ Body api.ApprovalPolicy }) (api.ApprovalPolicy, error) {
			return s.setApprovalPolicy(ctx, in.Body)
		})
	handle(rt, route{ID: "approve-operation", Tag: "Operations", Pattern: "POST /v1/operations/{id}/approve", Summary: "Let an operation go on that another person has asked for", Need: switchback.Operator},
		func(ctx context.Context, in *struct {
			OperationIn
			Body api.ApproveRequest
		}) (operation.Record, error) {
			return s.approve(ctx, callOf(ctx).who, in.ID, in.Body.Note)
		})
}

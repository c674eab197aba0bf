package server

import (
	"context"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// The timer of the commit policy. Its deadline stands in the store, so that it
// survives restarts; what is due while no server runs begins when one does. It
// asks for the operation as an operator would, and takes refusals for an answer:
// they are shown, and it asks again.

const (
	// countdownEvery is how often deadlines are looked at.
	countdownEvery = time.Second
	// overdueEvery is how often an operation that was refused is asked for again.
	overdueEvery = 10 * time.Second
	// policyName stands for the operator in what the timer asks for.
	policyName = "commit-policy"
)

// watchDeadlines begins what is due until ctx ends.
func (s *Server) watchDeadlines(ctx context.Context) {
	tick := time.NewTicker(countdownEvery)
	defer tick.Stop()
	tried := map[switchback.ProtectionID]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := s.beginDue(ctx, time.Now(), tried); err != nil && ctx.Err() == nil {
			s.log.Error("commit policies cannot be carried out, trying again", "error", err)
		}
	}
}

// due reports whether the policy's action is to begin.
func due(p switchback.Protection, now time.Time) bool {
	return p.Phase == switchback.PhaseSwitched && p.Switch != nil && !p.Switch.Deadline.IsZero() && !now.Before(p.Switch.Deadline)
}

// beginDue asks for every operation that is due. tried says when one was asked
// for last, so that a refused one is not asked for all the time.
func (s *Server) beginDue(ctx context.Context, now time.Time, tried map[switchback.ProtectionID]time.Time) error {
	list, err := s.store.Protections(ctx)
	if err != nil {
		return err
	}
	for _, p := range list {
		if !due(p, now) || now.Sub(tried[p.ID]) < overdueEvery {
			continue
		}
		tried[p.ID] = now
		kind := recovery.Commit
		if p.Policy.Commit.Action == switchback.CommitUndo {
			kind = recovery.Cancel
		}
		var req api.OperationRequest
		if p.Policy.Commit.KeepPoints {
			req.Points = "keep"
		}
		_, asked := s.request(ctx, policyName, string(p.ID), kind, req)
		if asked == nil {
			s.log.Info("the commit policy's time has passed", "vm", p.Name, "operation", kind)
		}
		_, err := s.update(ctx, p.ID, func(x *switchback.Protection) error {
			switch {
			case x.Switch == nil || !x.Switch.Deadline.Equal(p.Switch.Deadline): // done already, or extended
			case asked == nil: // from here on the operation says how it stands
				x.Switch.Deadline, x.Switch.Overdue = time.Time{}, ""
			default:
				x.Switch.Overdue = fmt.Sprintf("%s: %v", kind, asked)
			}
			return nil
		})
		if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
			return err
		}
	}
	return nil
}

// notApproved lets the timer go on where nobody has approved what it asked for:
// that is shown, and asked for again.
func notApproved(p *switchback.Protection, rec operation.Record, now time.Time) {
	if rec.RequestedBy != policyName || p.Phase != switchback.PhaseSwitched || p.Switch == nil || !p.Switch.Deadline.IsZero() {
		return
	}
	p.Switch.Deadline, p.Switch.Overdue = now, fmt.Sprintf("%s: %v", rec.Kind, rec.Error)
}

// countdown shows the timer on a VM.
func countdown(v *api.VM, now time.Time) {
	sw := v.Switch
	if sw == nil || sw.Deadline.IsZero() || v.Phase != switchback.PhaseSwitched {
		return
	}
	v.Countdown = &api.Countdown{Action: v.Policy.Commit.Action, At: sw.Deadline, Seconds: sw.Deadline.Sub(now).Seconds()}
	if sw.Overdue != "" {
		v.Conditions = append(v.Conditions, switchback.Condition{Name: "commit-policy-refused", Severity: switchback.SeverityWarning, Since: sw.Deadline,
			Cause: fmt.Sprintf("the commit policy wants to %s, which is refused: %s", v.Policy.Commit.Action, sw.Overdue), Remedy: "do what the cause names, or commit, cancel, or stop the countdown: vm extend --stop"})
		return
	}
	v.Conditions = append(v.Conditions, switchback.Condition{Name: "commit-countdown", Severity: switchback.SeverityNotice, Since: sw.StartedAt,
		Cause:  fmt.Sprintf("%s by itself at %s", v.Policy.Commit.Action, sw.Deadline.UTC().Format(time.RFC3339)),
		Remedy: "commit or cancel before, or extend the countdown: vm extend"})
}

// extendParams are the parameters of extend.
type extendParams struct {
	// Until is the new deadline; zero stops the countdown.
	Until time.Time `json:"until,omitzero"`
}

// extension computes the new deadline: so much later than the old one, or than
// now where that has passed.
func extension(p switchback.Protection, by time.Duration, stop bool, now time.Time) (extendParams, error) {
	if stop {
		return extendParams{}, nil
	}
	if by <= 0 {
		return extendParams{}, switchback.Errorf(switchback.CodeInvalid, "a countdown is extended by a time").WithHint("for example 30m, or --stop")
	}
	from := p.Switch.Deadline
	if from.Before(now) {
		from = now
	}
	return extendParams{Until: from.Add(by)}, nil
}

func (s *Server) extendSteps() []operation.Step {
	return []operation.Step{{Name: "extend", Title: "move the deadline", RetryFor: shortRetry, Do: func(ctx context.Context, r *operation.Run) error {
		var params extendParams
		if err := r.Params(&params); err != nil {
			return err
		}
		_, err := s.update(ctx, r.Protection(), func(p *switchback.Protection) error {
			if p.Switch == nil || p.Phase != switchback.PhaseSwitched {
				return switchback.Errorf(switchback.CodeRefused, "the VM is %s: no countdown runs", p.Phase)
			}
			p.Switch.Deadline, p.Switch.Overdue = params.Until, ""
			return nil
		})
		return err
	}}}
}

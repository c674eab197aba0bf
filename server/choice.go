package server

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// choose resolves a choice among the points that the VM's replica holds now;
// durations count back from now.
func (s *Server) choose(ctx context.Context, p switchback.Protection, choice recovery.Choice, now time.Time) (switchback.MarkedPoint, error) {
	points, err := s.points(ctx, p)
	if err != nil {
		return switchback.MarkedPoint{}, err
	}
	return choice.Choose(points, now)
}

// held is the result of the step hold: the point that was chosen, unless it is
// the one that is made after the shutdown.
type held struct {
	Point *switchback.MarkedPoint `json:"point,omitempty"`
}

// holdPoint fixes the choice once retention is frozen, so that the point cannot
// go away any more. The choice is made once; a repeated step finds it.
func (s *Server) holdPoint(ctx context.Context, r *operation.Run, p switchback.Protection) error {
	var params switchParams
	if err := r.Params(&params); err != nil {
		return err
	}
	choice, err := recovery.ParseChoice(params.Point)
	if err != nil {
		return err
	}
	var before held
	if err := r.StepResult("hold", &before); err == nil {
		return nil
	} else if switchback.CodeOf(err) != switchback.CodeNotFound {
		return err
	}
	if choice.Newest() {
		return r.SetResult(held{})
	}
	chosen, err := s.choose(ctx, p, choice, r.Record().CreatedAt)
	if err != nil {
		return err
	}
	logChoice(r, choice, chosen)
	return r.SetResult(held{Point: &chosen})
}

// logChoice says in the operation's log what a choice came to.
func logChoice(r *operation.Run, choice recovery.Choice, chosen switchback.MarkedPoint) {
	r.Log(slog.LevelInfo, "point chosen", "choice", choice.String(), "sequence", chosen.Sequence, "kind", chosen.Kind, "time", chosen.Time.UTC().Format(time.RFC3339Nano))
	if w := recovery.Warning(chosen); w != "" {
		r.Log(slog.LevelWarn, "the chosen point may be bad", "why", w)
	}
}

// switchPoint is the point that a switch starts from, once the last changes are
// shipped; the log says what is left behind, or that nothing waited.
func (s *Server) switchPoint(ctx context.Context, r *operation.Run, p switchback.Protection, last switchback.Point, changed int64) (switchback.Point, error) {
	var h held
	if err := r.StepResult("hold", &h); err != nil {
		return last, err
	}
	points, err := s.points(ctx, p)
	if err != nil {
		return last, err
	}
	if h.Point == nil || h.Point.Sequence == last.Sequence {
		for _, x := range points {
			if w := recovery.Warning(x); x.Sequence == last.Sequence && w != "" {
				r.Log(slog.LevelWarn, "the chosen point may be bad", "why", w)
			}
		}
		if changed == 0 {
			r.Log(slog.LevelInfo, "nothing waited: the target held everything already", "sequence", last.Sequence)
		} else {
			r.Log(slog.LevelInfo, "what waited is shipped: nothing is left behind", "sequence", last.Sequence, "changed_bytes", changed)
		}
		return last, nil
	}
	skipped, bytes := 0, int64(0)
	for _, x := range points {
		if x.Sequence > h.Point.Sequence {
			skipped++
			bytes += x.ChangedBytes
		}
	}
	r.Log(slog.LevelWarn, "later points are left behind", "chosen", h.Point.Sequence, "last", last.Sequence, "points", skipped,
		"at_most_bytes", bytes, "age", last.Time.Sub(h.Point.Time).Round(time.Millisecond))
	return h.Point.Point, nil
}

// checkChoice refuses a choice that cannot be met, and one that loses something
// unless that was accepted. It returns the point as far as it is known now:
// nil for the one that a switch has yet to make.
func (s *Server) checkChoice(ctx context.Context, v api.VM, sp switchParams) (*switchback.MarkedPoint, error) {
	choice, err := recovery.ParseChoice(sp.Point)
	if err != nil || choice.Newest() {
		return nil, err
	}
	if sp.FromCommitted {
		if choice.Kind != recovery.ChooseProcessed {
			return nil, switchback.Errorf(switchback.CodeRefused, "there are no points on the way home yet: %s cannot be chosen", choice).
				WithHint("choose latest, or reprotect first")
		}
		return nil, nil
	}
	chosen, err := s.choose(ctx, v.Protection, choice, time.Now())
	if err != nil || sp.AcceptLoss {
		return &chosen, err
	}
	return &chosen, switchback.Errorf(switchback.CodeRefused, "%s", lossText(chosen)).WithHint("choose latest, or add --accept-loss")
}

// lossText says what a planned switch from this point loses.
func lossText(p switchback.MarkedPoint) string {
	return fmt.Sprintf("point %d is of %s: everything written since, %s and what follows until the shutdown, would be lost",
		p.Sequence, p.Time.UTC().Format(time.RFC3339), time.Since(p.Time).Round(time.Second))
}

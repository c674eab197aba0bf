package server

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sync/errgroup"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/operation"
)

// proofAttempts is how often a side that does not answer is asked for its hashes.
const proofAttempts = 5

// proofStep shows that the new side has what the old side left. The guest runs
// already: it prolongs no outage. It never fails for want of a proof, since a
// step that fails would take the running guest back.
func (s *Server) proofStep() operation.Step {
	return operation.Step{Name: "prove", Title: "prove that both sides hold the same", RetryFor: shortRetry, Cancellable: true, Do: s.prove}
}

func (s *Server) prove(ctx context.Context, r *operation.Run) error {
	var params switchParams
	if err := r.Params(&params); err != nil {
		return err
	}
	if params.NoProof {
		return operation.Skip("not asked for")
	}
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	proof := &switchback.Proof{Point: p.Switch.Last.Sequence}
	old, now, err := s.hashSides(ctx, r, p, false)
	if err == nil {
		compareSides(proof, old, now)
		if !proof.Equal {
			if old, now, err = s.hashSides(ctx, r, p, true); err == nil {
				compareSides(proof, old, now)
			}
		}
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		proof.Missing = err.Error()
		if switchback.CodeOf(err) == switchback.CodeCorrupt {
			// Not to be passed over as a side that did not answer.
			proof.Missing = "the replica is damaged: " + err.Error()
		}
	}
	proof.At = time.Now()
	switch {
	case proof.Missing != "":
		r.Log(slog.LevelWarn, "no proof of equality", "why", proof.Missing)
	case proof.Equal:
		r.Log(slog.LevelInfo, "both sides hold the same", "point", proof.Point, "read_bytes", proof.ReadBytes, "took", proof.Took)
	default:
		r.Log(slog.LevelError, "both sides do not hold the same", "point", proof.Point, "differs", proof.Mismatch())
	}
	if err := r.SetResult(proof); err != nil {
		return err
	}
	if err := summarise(r, func(sum *api.Summary) { sum.Proof = proof }); err != nil {
		return err
	}
	_, err = s.update(ctx, p.ID, func(p *switchback.Protection) error {
		if p.Switch != nil {
			p.Switch.Proof = proof
		}
		return nil
	})
	if err == nil && params.AndCommit && proof.Mismatch() != "" {
		return switchback.Errorf(switchback.CodeRefused, "both sides do not hold the same: %s", proof.Mismatch()).
			WithHint("the switch is undone; verify the replica, repair it, then try again")
	}
	return err
}

// hashSides has both sides hash at once.
func (s *Server) hashSides(ctx context.Context, r *operation.Run, p switchback.Protection, leaves bool) (old, now agentapi.HashResult, err error) {
	key := ""
	if leaves {
		key = "/leaves"
	}
	ask := func(ctx context.Context, agent switchback.AgentID, action string, params agentapi.HashParams, out *agentapi.HashResult) error {
		for attempt := 1; ; attempt++ {
			err := s.doFor(ctx, r, p.ID, key, agent, p.Epoch, action, params, out)
			if err == nil || ctx.Err() != nil || attempt == proofAttempts || !switchback.IsRetryable(err) {
				return err
			}
			select {
			case <-ctx.Done():
			case <-time.After(time.Duration(attempt) * time.Second):
			}
		}
	}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		return ask(gctx, p.Switch.FromAgent, agentapi.ActionHashRest, agentapi.HashParams{Leaves: leaves}, &old)
	})
	g.Go(func() error {
		return ask(gctx, p.Switch.ToAgent, agentapi.ActionHashPoint, agentapi.HashParams{Sequence: p.Switch.Last.Sequence, Leaves: leaves}, &now)
	})
	err = g.Wait()
	return old, now, err
}

// compareSides fills the proof.
func compareSides(proof *switchback.Proof, old, now agentapi.HashResult) {
	proof.Equal, proof.Disks = len(old.Disks) == len(now.Disks) && len(old.Disks) > 0, nil
	proof.ReadBytes, proof.Took = old.ReadBytes+now.ReadBytes, max(old.Took, now.Took)
	for _, a := range old.Disks {
		d := switchback.ProofDisk{Name: a.Name, SizeBytes: a.SizeBytes, Old: a.Root}
		for _, b := range now.Disks {
			if b.Name != a.Name {
				continue
			}
			d.New = b.Root
			for i := range max(len(a.Leaves), len(b.Leaves)) {
				if i >= len(a.Leaves) || i >= len(b.Leaves) || a.Leaves[i] != b.Leaves[i] {
					off := int64(i) * agentapi.LeafBytes
					d.Differs.AddRange(extent.Range{Offset: off, Length: min(agentapi.LeafBytes, max(1, max(a.SizeBytes, b.SizeBytes)-off))})
				}
			}
		}
		proof.Equal = proof.Equal && d.Old == d.New
		proof.Disks = append(proof.Disks, d)
	}
}

// proofConditions says what the proof of an uncommitted switch means.
func proofConditions(p switchback.Protection) []switchback.Condition {
	if p.Switch == nil || p.Switch.Proof == nil {
		return nil
	}
	proof := p.Switch.Proof
	if m := proof.Mismatch(); m != "" {
		return []switchback.Condition{{Name: "sides-differ", Severity: switchback.SeverityCritical, Since: proof.At,
			Cause:  fmt.Sprintf("what site %s holds of point %d is not what site %s left: %s", p.Switch.To, proof.Point, p.Switch.From, m),
			Remedy: fmt.Sprintf("cancel the switch and repair the replica (switchback vm cancel %s, switchback points repair %s); to commit all the same, --accept-mismatch", p.Name, p.Name)}}
	}
	if proof.Missing != "" {
		return []switchback.Condition{{Name: "equality-not-proven", Severity: switchback.SeverityWarning, Since: proof.At,
			Cause: "both sides were not compared: " + proof.Missing, Remedy: "check the VM before it is committed"}}
	}
	return nil
}

// proofAllows refuses to commit what was found to differ.
func proofAllows(p switchback.Protection, accepted bool) error {
	if p.Switch == nil || accepted {
		return nil
	}
	if m := p.Switch.Proof.Mismatch(); m != "" {
		return switchback.Errorf(switchback.CodeRefused, "commit is not possible: the new side does not hold what the old side left: %s", m).
			WithHint("cancel the switch and repair the replica, or commit with --accept-mismatch")
	}
	return nil
}

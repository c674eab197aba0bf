package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/check"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

const (
	// drillLane is where drills run: beside what moves the VM.
	drillLane = "drill"
	// drillMargin is what a drill may take beside its checks and its time to
	// live before the agent clears it by itself.
	drillMargin = 10 * time.Minute
	maxKeep     = 7 * 24 * time.Hour
)

// drillParams are the parameters of a test failover.
type drillParams struct {
	Point string `json:"point"`
	Cause string `json:"cause"`
	// Group is the drill of several VMs that this one belongs to, Together the
	// others, and Wait how long their checks may take.
	Group    switchback.OperationID `json:"group,omitempty"`
	Together []string               `json:"together,omitempty"`
	Wait     time.Duration          `json:"wait,omitempty"`
	api.DrillRequest
}

// drillPlan is what the preflight found, on which all other steps rest: a switch
// that overtakes the drill changes the protection.
type drillPlan struct {
	Agent      switchback.AgentID `json:"agent"`
	Site       switchback.SiteID  `json:"site"`
	Epoch      switchback.Epoch   `json:"epoch"`
	Point      switchback.Point   `json:"point"`
	Definition string             `json:"definition"`
	// Note says where the definition is from, if not from the source.
	Note      string                  `json:"note,omitempty"`
	Networks  agentapi.DrillNetworks  `json:"networks"`
	Checks    []switchback.GuestCheck `json:"checks"`
	ExpiresAt time.Time               `json:"expires_at"`
}

// drillSteps run a copy of a point. Undo of everything is one piece, on the
// step view. A drill that fails its checks is cleared like any other, and says
// so in its last step.
func (s *Server) drillSteps() []operation.Step {
	return []operation.Step{
		{Name: "preflight", Title: "check the point and the isolated network", RetryFor: shortRetry, Cancellable: true, Do: s.drillPreflight},
		{Name: "view", Title: "pin the point and serve it", RetryFor: shortRetry, Do: s.drillView, Undo: s.clearDrill},
		{Name: "start", Title: "start a copy of the guest", RetryFor: shortRetry, Do: s.drillStart},
		{Name: "checks", Title: "check the guest", RetryFor: shortRetry, Cancellable: true, Do: s.drillChecks},
		{Name: "screenshot", Title: "take a picture of its screen", RetryFor: shortRetry, Cancellable: true, Do: s.drillScreenshot},
		{Name: "prove", Title: "note the result on the point", RetryFor: shortRetry, Do: s.drillProve},
		{Name: "hold", Title: "keep the copy running", RetryFor: shortRetry, Cancellable: true, Do: s.drillHold},
		{Name: "clean", Title: "clear the drill", RetryFor: longRetry, Do: s.clearDrill},
		{Name: "verdict", Title: "judge the drill", Irreversible: true, Do: s.drillVerdict},
	}
}

func (s *Server) drillPlan(r *operation.Run) (plan drillPlan, params drillParams, err error) {
	if err = r.Params(&params); err == nil {
		err = r.StepResult("preflight", &plan)
	}
	return plan, params, err
}

// reportDrill changes the drill's report.
func reportDrill(r *operation.Run, f func(*api.DrillReport)) error {
	return summarise(r, func(sum *api.Summary) {
		if sum.Drill == nil {
			sum.Drill = &api.DrillReport{Drill: r.ID(), RequestedAt: r.Record().CreatedAt}
		}
		f(sum.Drill)
	})
}

func (s *Server) drillPreflight(ctx context.Context, r *operation.Run) error {
	var params drillParams
	if err := r.Params(&params); err != nil {
		return err
	}
	p, err := s.of(ctx, r)
	if err != nil {
		return err
	}
	if p.Phase != switchback.PhaseProtected {
		return switchback.Errorf(switchback.CodeRefused, "the VM is %s meanwhile", p.Phase).WithHint("drill it when it is protected again")
	}
	source, err := s.describe(ctx, p)
	if err != nil {
		return err
	}
	if source.note != "" {
		r.Log(slog.LevelWarn, "the source is not asked", "why", source.note)
	}
	points, err := s.points(ctx, p)
	if err != nil {
		return err
	}
	point, err := drillPoint(points, params.Point)
	if err != nil {
		return err
	}
	networks, err := s.drillNetworks(ctx, p, source.networks, params.DrillRequest)
	if err != nil {
		return err
	}
	checks := source.checksOf(params.Checks, p.Policy.Checks)
	plan := drillPlan{Agent: p.TargetAgent, Site: p.Target, Epoch: p.Epoch, Point: point, Definition: source.definition, Note: source.note, Networks: networks, Checks: checks,
		ExpiresAt: time.Now().Add(max(check.Budget(checks), params.Wait) + params.Keep + drillMargin)}
	if err := s.do(ctx, r, plan.Agent, plan.Epoch, agentapi.ActionDrillPreflight, networks, nil); err != nil {
		return err
	}
	if err := r.SetResult(plan); err != nil {
		return err
	}
	r.Log(slog.LevelInfo, "drill planned", "point", point.Sequence, "of", point.Time, "networks", strings.Join(networks.Used(), " "))
	return reportDrill(r, func(d *api.DrillReport) {
		d.VM, d.Site, d.Point, d.Cause, d.Networks = p.Name, p.Target, point, params.Cause, networks.Used()
		d.Group, d.Together = params.Group, params.Together
	})
}

// drillPoint finds the point: latest is the newest that is complete, since a
// drill takes none.
func drillPoint(points []switchback.MarkedPoint, name string) (switchback.Point, error) {
	choice, err := recovery.ParseChoice(name)
	if err != nil {
		return switchback.Point{}, err
	}
	chosen, err := choice.Choose(points, time.Now())
	return chosen.Point, err
}

// drillNetworks adds what counts as production at the target: where this VM
// would be after a failover, and where others are or would be.
func (s *Server) drillNetworks(ctx context.Context, p switchback.Protection, used []string, req api.DrillRequest) (agentapi.DrillNetworks, error) {
	n := agentapi.DrillNetworks{Networks: req.Networks, Network: req.Network}
	there := func(q switchback.Protection, name string) string {
		for home, away := range q.Networks {
			if q.Home == p.Target && away == name {
				return home
			}
			if q.Home != p.Target && home == name {
				return away
			}
		}
		return name
	}
	for _, name := range used {
		n.Production = append(n.Production, there(p, name))
	}
	others, err := s.store.Protections(ctx)
	if err != nil {
		return n, err
	}
	for _, q := range others {
		for home, away := range q.Networks {
			switch p.Target {
			case q.Home:
				n.Production = append(n.Production, home)
			case q.Source, q.Target:
				n.Production = append(n.Production, away)
			}
		}
	}
	return n, nil
}

func (s *Server) drillView(ctx context.Context, r *operation.Run) error {
	plan, _, err := s.drillPlan(r)
	if err != nil {
		return err
	}
	err = s.do(ctx, r, plan.Agent, plan.Epoch, agentapi.ActionDrillOpen,
		agentapi.DrillOpenParams{Drill: r.ID(), Sequence: plan.Point.Sequence, ExpiresAt: plan.ExpiresAt}, nil)
	if err != nil {
		return err
	}
	return reportDrill(r, func(d *api.DrillReport) { d.ViewAt = time.Now() })
}

func (s *Server) drillStart(ctx context.Context, r *operation.Run) error {
	plan, params, err := s.drillPlan(r)
	if err != nil {
		return err
	}
	var out agentapi.DrillStartResult
	err = s.do(ctx, r, plan.Agent, plan.Epoch, agentapi.ActionDrillStart,
		agentapi.DrillStartParams{Drill: r.ID(), Definition: plan.Definition, DrillNetworks: plan.Networks, KeepMACs: params.KeepMACs}, &out)
	if err != nil {
		return err
	}
	for _, n := range out.Notes {
		r.Log(slog.LevelInfo, "the copy differs", "note", n)
	}
	if plan.Note != "" {
		out.Notes = append([]string{plan.Note}, out.Notes...)
	}
	return reportDrill(r, func(d *api.DrillReport) { d.Domain, d.Notes, d.GuestUpAt = out.Name, out.Notes, out.RunningAt })
}

func (s *Server) drillChecks(ctx context.Context, r *operation.Run) error {
	plan, params, err := s.drillPlan(r)
	if err != nil {
		return err
	}
	// They may ask each other.
	if err := s.awaitDrills(ctx, r, params, "start"); err != nil {
		return err
	}
	var out agentapi.GuestChecksResult
	if err := s.do(ctx, r, plan.Agent, plan.Epoch, agentapi.ActionGuestChecks, agentapi.GuestChecksParams{Drill: r.ID(), Checks: plan.Checks}, &out); err != nil {
		return err
	}
	logChecks(r, out.Results)
	return reportDrill(r, func(d *api.DrillReport) {
		d.Checks, d.CheckedAt, d.Judged = out.Results, time.Now(), true
		if err := check.Verdict(out.Results); err != nil {
			d.Passed, d.Error = false, err.Error()
		} else {
			d.Passed, d.Error = true, ""
		}
	})
}

func logChecks(r *operation.Run, results []switchback.CheckResult) {
	for _, c := range results {
		took := c.EndedAt.Sub(c.StartedAt).Round(time.Millisecond)
		switch {
		case c.Passed:
			r.Log(slog.LevelInfo, "check passed", "check", c.Check, "took", took, "attempts", c.Attempts, "saw", c.Detail)
		case c.Required:
			r.Log(slog.LevelError, "required check failed", "check", c.Check, "took", took, "attempts", c.Attempts, "error", c.Error)
		default:
			r.Log(slog.LevelWarn, "informative check failed", "check", c.Check, "took", took, "attempts", c.Attempts, "error", c.Error)
		}
	}
}

// guestChecks runs the policy's checks on a VM that was started at an agent. A
// required one that fails is an error that names each; it is not retried, since
// each check has been, in its own time.
func (s *Server) guestChecks(ctx context.Context, r *operation.Run, p switchback.Protection, agent switchback.AgentID, epoch switchback.Epoch) ([]switchback.CheckResult, error) {
	if len(p.Policy.Checks) == 0 {
		return nil, nil
	}
	var out agentapi.GuestChecksResult
	if err := s.do(ctx, r, agent, epoch, agentapi.ActionGuestChecks, agentapi.GuestChecksParams{Checks: p.Policy.Checks}, &out); err != nil {
		return nil, err
	}
	logChecks(r, out.Results)
	return out.Results, check.Verdict(out.Results)
}

func (s *Server) pictureFile(id switchback.OperationID) string {
	return filepath.Join(s.cfg.StateDir, "drills", string(id)+".png")
}

func (s *Server) drillScreenshot(ctx context.Context, r *operation.Run) error {
	plan, _, err := s.drillPlan(r)
	if err != nil {
		return err
	}
	var out agentapi.DrillScreenResult
	if err := s.do(ctx, r, plan.Agent, plan.Epoch, agentapi.ActionDrillScreen, agentapi.DrillParams{Drill: r.ID()}, &out); err != nil {
		return err
	}
	if len(out.PNG) > 0 {
		file := s.pictureFile(r.ID())
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			return err
		}
		// Replaced as a whole, so that a reader never sees half of it.
		if err := os.WriteFile(file+".tmp", out.PNG, 0o600); err != nil {
			return err
		}
		if err := os.Rename(file+".tmp", file); err != nil {
			return err
		}
	}
	return reportDrill(r, func(d *api.DrillReport) {
		d.NoScreen = out.Missing
		if len(out.PNG) > 0 {
			d.Screen = &api.DrillScreen{Width: out.Width, Height: out.Height, Bytes: len(out.PNG)}
		}
	})
}

// drillProve notes the result on the point and on the VM, as soon as it is known.
func (s *Server) drillProve(ctx context.Context, r *operation.Run) error {
	plan, _, err := s.drillPlan(r)
	if err != nil {
		return err
	}
	report, err := drillReport(r.Record())
	if err != nil {
		return err
	}
	proof := switchback.BootProof{At: report.CheckedAt, Passed: report.Passed, Report: string(r.ID())}
	err = s.do(ctx, r, plan.Agent, plan.Epoch, agentapi.ActionDrillMark, agentapi.DrillMarkParams{Sequence: plan.Point.Sequence, Proof: proof}, nil)
	if err != nil {
		return err
	}
	_, err = s.update(ctx, r.Protection(), func(p *switchback.Protection) error {
		noteDrill(&p.Drill, switchback.DrillProof{At: report.CheckedAt, Sequence: plan.Point.Sequence, Time: plan.Point.Time, Passed: report.Passed, Report: r.ID()})
		return nil
	})
	return err
}

func noteDrill(axis *switchback.DrillAxis, proof switchback.DrillProof) {
	axis.Last = &proof
	if proof.Passed {
		axis.Passed = &proof
	}
}

// drillHold waits until the copy's time is over, or until somebody wants it gone.
func (s *Server) drillHold(ctx context.Context, r *operation.Run) error {
	_, params, err := s.drillPlan(r)
	if err != nil {
		return err
	}
	report, err := drillReport(r.Record())
	if err != nil {
		return err
	}
	if err := s.awaitDrills(ctx, r, params, "checks"); err != nil {
		return err
	}
	if params.Keep <= 0 {
		return operation.Skip("it is not to be kept")
	}
	checked, err := s.lastChecked(ctx, params, report.CheckedAt)
	if err != nil {
		return err
	}
	until := checked.Add(params.Keep)
	for time.Now().Before(until) {
		p, err := s.of(ctx, r)
		if err != nil {
			return err
		}
		if p.Drill.Release == r.ID() {
			r.Log(slog.LevelInfo, "ended on request")
			return nil
		}
		r.Progress(operation.Progress{Message: fmt.Sprintf("runs as %s until %s", report.Domain, until.Local().Format(time.TimeOnly)), ETA: time.Until(until)})
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(min(time.Second, time.Until(until))):
		}
	}
	return nil
}

// clearDrill is both the last step and the undo of a drill.
func (s *Server) clearDrill(ctx context.Context, r *operation.Run) error {
	plan, _, err := s.drillPlan(r)
	if err != nil {
		return err
	}
	var out agentapi.DrillCleanResult
	err = s.do(ctx, r, plan.Agent, plan.Epoch, agentapi.ActionDrillClean, agentapi.DrillParams{Drill: r.ID()}, &out)
	meanwhile := s.replicationMeanwhile(ctx, r)
	if rerr := reportDrill(r, func(d *api.DrillReport) {
		d.Left = nil
		switch {
		case err != nil:
			d.Left = []string{switchback.Flatten(err).Message}
		default:
			d.CleanedAt = time.Now()
			if out.BytesWritten > 0 {
				d.BytesWritten = out.BytesWritten
			}
			if len(out.Removed) > 0 {
				d.Removed = out.Removed
			}
			d.Replication = meanwhile
		}
	}); err == nil {
		err = rerr
	}
	return err
}

func (s *Server) drillVerdict(_ context.Context, r *operation.Run) error {
	report, err := drillReport(r.Record())
	if err != nil {
		return err
	}
	return check.Verdict(report.Checks)
}

// endDrill frees the VM's drill axis. A drill that came to no judgement has failed, unless it was cancelled.
func (s *Server) endDrill(ctx context.Context, r *operation.Run, final operation.State) error {
	rec := r.Record()
	report, rerr := drillReport(rec)
	_, err := s.update(ctx, r.Protection(), func(p *switchback.Protection) error {
		if p.Drill.Operation == rec.ID {
			p.Drill.Operation = ""
		}
		if p.Drill.Release == rec.ID {
			p.Drill.Release = ""
		}
		if rerr == nil && !report.Judged && final != operation.StateCancelled {
			noteDrill(&p.Drill, switchback.DrillProof{At: time.Now(), Sequence: report.Point.Sequence, Time: report.Point.Time, Report: rec.ID})
		}
		return nil
	})
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return nil
	}
	return err
}

func readPicture(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, switchback.Errorf(switchback.CodeNotFound, "there is no picture of this drill")
	}
	return b, err
}

package recovery

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/fencing"
)

var adoptedAt = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func heldAt(site, role string, epoch switchback.Epoch) Holding {
	peers := map[string]string{"a": "b", "b": "a"}
	h := Holding{Keeper: Keeper{Agent: switchback.AgentID("a-" + site), Site: switchback.SiteID(site), Address: site + ":1"}, Protection: "p-1", VM: "u", Name: "vm",
		Epoch: epoch, Role: role, Policy: switchback.DefaultPolicy(), Power: "off", Disks: []switchback.Disk{{Name: "vda", SizeBytes: 1 << 20}}, OwnDisks: site == "a"}
	h.Peer = Keeper{Agent: switchback.AgentID("a-" + peers[site]), Site: switchback.SiteID(peers[site]), Address: peers[site] + ":1"}
	return h
}

func (h Holding) points(n int) Holding {
	h.Replica, h.Points = true, n
	if n > 0 {
		h.Newest = &switchback.Point{Sequence: switchback.Sequence(n), Digest: "d"}
	}
	return h
}

func (h Holding) with(f func(*Holding)) Holding { f(&h); return h }

func (h Holding) record(phase switchback.Phase, f func(*Record)) Holding {
	r := Record{Protection: switchback.Protection{ID: "p-1", VM: "u", Name: "vm", Home: "a", Source: "a", Target: "b", SourceAgent: "a-a", TargetAgent: "a-b",
		Phase: phase, Epoch: 1, Version: 9, Policy: switchback.DefaultPolicy(), Networks: map[string]string{"n": "m"}}}
	if f != nil {
		f(&r)
	}
	h.Record = &r
	return h
}

func TestRebuild(t *testing.T) {
	run := func(f func(*HeldRun)) func(*Holding) {
		return func(h *Holding) {
			h.Run = &HeldRun{Epoch: h.Epoch, Point: switchback.Point{Sequence: 3, Digest: "c"}, Started: true}
			if f != nil {
				f(h.Run)
			}
		}
	}
	sw := func(r *Record) {
		r.Protection.Switch = &switchback.Switch{From: "a", To: "b", FromAgent: "a-a", ToAgent: "a-b", PreviousEpoch: 1, WasRunning: true}
	}
	for name, c := range map[string]struct {
		held   []Holding
		phase  switchback.Phase
		source string
		next   Kind
		epoch  switchback.Epoch
		check  func(Adopted) string
		err    switchback.Code
	}{
		"protected": {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseProtected, nil), heldAt("b", "target", 1).points(3)},
			phase: switchback.PhaseProtected, source: "a", epoch: 1, check: func(a Adopted) string {
				if a.Protection.Networks["n"] != "m" || a.Protection.Version <= 9 || a.Missing != nil || a.Points != 3 {
					return "networks, version, missing or points"
				}
				return ""
			}},
		"protected, no record": {held: []Holding{heldAt("a", "source", 1), heldAt("b", "target", 1).points(3)},
			phase: switchback.PhaseProtected, source: "a", epoch: 1, check: func(a Adopted) string {
				if a.Protection.Home != "a" || len(a.Notes) == 0 {
					return "home or notes"
				}
				return ""
			}},
		"homeward, no record": {held: []Holding{heldAt("b", "source", 4), heldAt("a", "target", 4).points(3)},
			phase: switchback.PhaseProtected, source: "b", epoch: 4, check: func(a Adopted) string {
				if a.Protection.Home != "a" {
					return "home is " + string(a.Protection.Home)
				}
				return ""
			}},
		"seeding":       {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseSeeding, nil), heldAt("b", "target", 1).points(0)}, phase: switchback.PhaseSeeding, source: "a", next: Protect, epoch: 1},
		"just seeded":   {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseSeeding, nil), heldAt("b", "target", 1).points(1)}, phase: switchback.PhaseProtected, source: "a", epoch: 1},
		"not begun":     {held: []Holding{heldAt("b", "target", 1).points(0).record(switchback.PhaseUnprotected, nil)}, phase: switchback.PhaseSeeding, source: "a", next: Protect, epoch: 1},
		"reprotecting":  {held: []Holding{heldAt("b", "source", 2).record(switchback.PhaseReprotecting, nil), heldAt("a", "target", 2).points(0)}, phase: switchback.PhaseReprotecting, source: "b", next: Reprotect, epoch: 2},
		"paused":        {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseProtected, nil).with(func(h *Holding) { h.Held = true }), heldAt("b", "target", 1).points(3)}, phase: switchback.PhaseProtected, source: "a", epoch: 1, check: func(a Adopted) string { return wrong(!a.Protection.Paused, "not paused") }},
		"shutting down": {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseProtected, nil).with(func(h *Holding) { h.Held, h.ShutdownAsked = true, true }), heldAt("b", "target", 1).points(3)}, phase: switchback.PhaseSwitching, source: "a", next: Cancel, epoch: 1, check: func(a Adopted) string { return wrong(!a.Protection.Switch.WasRunning, "it will stay off") }},
		"holding":       {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseProtected, nil).with(func(h *Holding) { h.Held, h.Power = true, "running" }), heldAt("b", "target", 1).points(3).with(func(h *Holding) { h.Frozen = true })}, phase: switchback.PhaseSwitching, source: "a", next: Cancel, epoch: 1},
		"switching":     {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseSwitching, sw), heldAt("b", "target", 1).points(3)}, phase: switchback.PhaseSwitching, source: "a", next: Cancel, epoch: 1},
		"fenced": {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseSwitching, sw), heldAt("b", "target", 1).points(3)}, phase: switchback.PhaseSwitching, source: "a", next: Cancel, epoch: 2, check: func(a Adopted) string {
			return wrong(a.Protection.Switch.UndoEpoch != 0, "an epoch that was not minted")
		}},
		"activated":   {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseSwitching, sw), heldAt("b", "active", 2).points(3)}, phase: switchback.PhaseSwitching, source: "a", next: Cancel, epoch: 2},
		"not started": {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseSwitching, sw), heldAt("b", "active", 2).points(3).with(run(func(r *HeldRun) { r.Started = false }))}, phase: switchback.PhaseSwitching, source: "a", next: Cancel, epoch: 2},
		"started": {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseSwitching, sw), heldAt("b", "active", 2).points(3).with(run(nil))}, phase: switchback.PhaseSwitched, source: "b", epoch: 2, check: func(a Adopted) string {
			return wrong(a.Protection.Switch.Point.Digest != "c" || a.Protection.Target != "a", "switch")
		}},
		"undoing":      {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseUndoing, sw), heldAt("b", "active", 2).points(3).with(run(nil))}, phase: switchback.PhaseSwitching, source: "a", next: Cancel, epoch: 2},
		"half undone":  {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseUndoing, sw), heldAt("b", "target", 3).points(3)}, phase: switchback.PhaseSwitching, source: "a", next: Cancel, epoch: 3},
		"undone":       {held: []Holding{heldAt("a", "source", 3).record(switchback.PhaseUndoing, sw), heldAt("b", "target", 3).points(3)}, phase: switchback.PhaseProtected, source: "a", epoch: 3, check: func(a Adopted) string { return wrong(a.Protection.Switch != nil, "a switch") }},
		"changing":     {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseSwitched, sw), heldAt("b", "active", 3).points(3).with(run(nil)).with(func(h *Holding) { h.Change = &HeldChange{Sequence: 2} })}, phase: switchback.PhaseSwitching, source: "b", next: ChangePoint, epoch: 3, check: func(a Adopted) string { return wrong(!strings.Contains(string(a.Params), `"2"`), string(a.Params)) }},
		"committing":   {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseCommitting, func(r *Record) { sw(r); r.Operation, r.Params = Commit, json.RawMessage(`{"points":"keep"}`) }), heldAt("b", "active", 2).points(3).with(run(nil))}, phase: switchback.PhaseCommitting, source: "b", next: Commit, epoch: 2, check: func(a Adopted) string { return wrong(string(a.Params) != `{"points":"keep"}`, string(a.Params)) }},
		"commit began": {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseSwitched, sw), heldAt("b", "active", 2).points(3).with(run(func(r *HeldRun) { r.Committing = true }))}, phase: switchback.PhaseCommitting, source: "b", next: Commit, epoch: 2},
		"committed":    {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseCommitted, nil).with(func(h *Holding) { h.Seeds = true }), heldAt("b", "active", 2)}, phase: switchback.PhaseCommitted, source: "b", epoch: 2, check: func(a Adopted) string { return wrong(len(a.Protection.Seeds["a"]) != 1, "no seeds") }},
		"not retired":  {held: []Holding{heldAt("a", "fenced", 2).record(switchback.PhaseCommitting, nil), heldAt("b", "active", 2)}, phase: switchback.PhaseCommitting, source: "b", next: Commit, epoch: 2},
		"target alone": {held: []Holding{heldAt("b", "target", 2).points(3).record(switchback.PhaseProtected, nil)}, phase: switchback.PhaseProtected, source: "a", epoch: 2, check: missing("a-a")},
		"source alone": {held: []Holding{heldAt("a", "source", 2).record(switchback.PhaseProtected, nil)}, phase: switchback.PhaseProtected, source: "a", epoch: 2, check: missing("a-b")},
		"source alone, older record": {held: []Holding{heldAt("a", "source", 2).record(switchback.PhaseSeeding, nil).with(func(h *Holding) { h.Newest = &switchback.Point{Sequence: 1} })},
			phase: switchback.PhaseProtected, source: "a", epoch: 2, check: missing("a-b")},
		"switching, source alone": {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseSwitching, sw)}, phase: switchback.PhaseSwitching, source: "a", epoch: 1, check: missing("a-b")},
		"seeding, source alone":   {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseSeeding, nil)}, phase: switchback.PhaseSeeding, source: "a", epoch: 1, check: missing("a-b")},
		"epoch of record": {held: []Holding{heldAt("a", "source", 2).record(switchback.PhaseProtected, func(r *Record) { r.Protection.Epoch = 7 }), heldAt("b", "target", 2).points(3)},
			phase: switchback.PhaseProtected, source: "a", epoch: 7},
		"contested": {held: []Holding{heldAt("a", "source", 2), heldAt("b", "active", 2)}, err: switchback.CodeConflict},
		"not fenced": {held: []Holding{heldAt("a", "source", 1).record(switchback.PhaseSwitching, sw), heldAt("b", "active", 2).points(3).with(run(nil))}, phase: switchback.PhaseSwitched, source: "b", epoch: 2, check: func(a Adopted) string {
			return wrong(a.Protection.Target != "a" || !strings.Contains(strings.Join(a.Notes, ""), "counts as fenced"), "target or note")
		}},
		"not fenced, replicated": {held: []Holding{heldAt("a", "source", 3).with(func(h *Holding) { h.Newest = &switchback.Point{Sequence: 1} }), heldAt("b", "active", 2)}, phase: switchback.PhaseProtected, source: "a", epoch: 3, check: func(a Adopted) string {
			return wrong(a.Protection.Target != "b", "target")
		}},
		"orphan":       {held: []Holding{heldAt("b", "target", 1).points(3), {}}[:1], err: switchback.CodeNotFound},
		"only a fence": {held: []Holding{heldAt("a", "fenced", 1)}, err: switchback.CodeNotFound},
		"unheard role": {held: []Holding{heldAt("a", "", 1)}, err: switchback.CodeConflict},
	} {
		t.Run(name, func(t *testing.T) {
			alone := strings.Contains(name, "alone") || name == "only a fence"
			answered := func(id switchback.AgentID) bool {
				return !alone || id == c.held[0].Keeper.Agent
			}
			a, err := Rebuild(c.held, answered, adoptedAt)
			if switchback.CodeOf(err) != c.err {
				t.Fatalf("error %v, want %q", err, c.err)
			}
			if err != nil {
				return
			}
			p := a.Protection
			if p.Phase != c.phase || string(p.Source) != c.source || a.Next != c.next || p.Epoch != c.epoch || p.Home != "a" || p.Source == p.Target || p.SourceAgent == "" || p.TargetAgent == "" {
				t.Errorf("%s at %s (target %s, home %s), next %q, epoch %d; want %s at %s, %q, %d", p.Phase, p.Source, p.Target, p.Home, a.Next, p.Epoch, c.phase, c.source, c.next, c.epoch)
			}
			if a.Next != "" && a.Why == "" {
				t.Error("it does not say why")
			}
			if c.check != nil {
				if why := c.check(a); why != "" {
					t.Errorf("%s: %+v", why, a)
				}
			}
			for _, h := range c.held {
				if p.Epoch < h.Epoch || p.Mint() <= h.Epoch {
					t.Errorf("epoch %d, an agent knows %d", p.Epoch, h.Epoch)
				}
			}
		})
	}
}

func wrong(is bool, what string) string {
	if is {
		return what
	}
	return ""
}

// missing: an agent that was not asked may know of epochs that nobody else does.
func missing(agent switchback.AgentID) func(Adopted) string {
	return func(a Adopted) string {
		p := a.Protection
		return wrong(a.Missing == nil || a.Missing.Agent != agent || p.Mint() < a.Protection.Epoch+2, "missing agent")
	}
}

// TestRebuildKeepsOwner: whoever runs the VM by the facts is not told that it is active elsewhere.
func TestRebuildKeepsOwner(t *testing.T) {
	for _, phase := range []switchback.Phase{switchback.PhaseSwitching, switchback.PhaseUndoing} {
		for _, epoch := range []switchback.Epoch{1, 3} { // not fenced yet; reinstated
			for _, alone := range []bool{false, true} {
				src := heldAt("a", "source", epoch).record(phase, func(r *Record) {
					r.Protection.Epoch = max(2, epoch)
					r.Protection.Switch = &switchback.Switch{From: "a", To: "b", FromAgent: "a-a", ToAgent: "a-b", PreviousEpoch: 1, Epoch: 2, WasRunning: true}
					if phase == switchback.PhaseUndoing {
						r.Protection.Epoch, r.Protection.Switch.UndoEpoch = 3, 3
					}
				}).with(func(h *Holding) { h.Power = "running" })
				held := []Holding{src, heldAt("b", "target", epoch).points(3)}
				if alone {
					held = held[:1]
				}
				a, err := Rebuild(held, func(id switchback.AgentID) bool { return !alone || id == "a-a" }, adoptedAt)
				if err != nil {
					t.Fatal(err)
				}
				r := fencing.Rule(a.Protection)
				own := fencing.Standing{Site: "a", Role: fencing.RoleSource, Epoch: epoch}
				if next, _ := own.Hear(r); r.Site != "a" || next.Superseded() {
					t.Errorf("%s, epoch %d, alone %v: %+v", phase, epoch, alone, r)
				}
			}
		}
	}
	// An undo whose epoch is not told to anybody yet: it is not known whose it is.
	act := heldAt("b", "active", 2).points(3).with(func(h *Holding) { h.Run = &HeldRun{Epoch: 2, Started: true} }).record(switchback.PhaseUndoing, func(r *Record) {
		r.Protection.Epoch = 3
		r.Protection.Switch = &switchback.Switch{From: "a", To: "b", FromAgent: "a-a", ToAgent: "a-b", PreviousEpoch: 1, Epoch: 2, UndoEpoch: 3}
	})
	a, err := Rebuild([]Holding{heldAt("a", "fenced", 2), act}, func(switchback.AgentID) bool { return true }, adoptedAt)
	if r := fencing.Rule(a.Protection); err != nil || r != (fencing.Ruling{}) {
		t.Errorf("half an undo: %+v, %v", r, err)
	}
}

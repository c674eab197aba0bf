package simlab_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/server"
)

// situation is where a VM is between operations.
type situation string

const (
	unprotected situation = "unprotected"
	protected   situation = "protected" // active at home
	switched    situation = "switched"  // away
	committed   situation = "committed" // away, its points deleted
	keeping     situation = "keeping"   // away, committed, its points kept
	homeward    situation = "protected homeward"
)

// Operations on points, which the server knows beside the kinds of recovery.
const (
	verify      recovery.Kind = "verify"
	exportPoint recovery.Kind = "export"
	deletePoint recovery.Kind = "delete-point"
	repair      recovery.Kind = "repair"
)

// path is what an operation of the matrix does to the VM.
type path struct {
	kind     recovery.Kind
	from, to situation
	// undone is where it is after being undone; cancelAt is the last step at
	// which that can be asked for. Empty: it cannot be undone.
	undone   situation
	cancelAt string
	// keep: its commit keeps the points.
	keep bool
}

// paths has one for each kind of operation.
var paths = []path{
	{kind: recovery.Protect, from: unprotected, to: protected, undone: unprotected, cancelAt: "seed"},
	{kind: recovery.TakePoint, from: protected, to: protected},
	{kind: recovery.Edit, from: protected, to: protected},
	{kind: verify, from: protected, to: protected},
	{kind: exportPoint, from: protected, to: protected},
	{kind: deletePoint, from: protected, to: protected},
	{kind: repair, from: protected, to: protected},
	{kind: recovery.DropSnapshot, from: protected, to: protected},
	{kind: recovery.Resolve, from: protected, to: protected},
	{kind: recovery.Failover, from: protected, to: switched, undone: protected, cancelAt: "prove"},
	{kind: recovery.Extend, from: switched, to: switched},
	{kind: recovery.ChangePoint, from: switched, to: switched},
	{kind: recovery.Cancel, from: switched, to: protected},
	{kind: recovery.Commit, from: switched, to: committed},
	{kind: recovery.DropKept, from: keeping, to: committed},
	{kind: recovery.Reprotect, from: committed, to: homeward, undone: committed, cancelAt: "verify"},
	{kind: recovery.Failback, from: committed, to: protected, undone: homeward, cancelAt: "commit-snapshots"},
	{kind: recovery.Unprotect, from: protected, to: unprotected},
}

// byways are more ways from one situation to another.
var byways = []path{
	{kind: recovery.Commit, from: switched, to: keeping, keep: true},
	{kind: recovery.Reprotect, from: keeping, to: homeward},
	{kind: recovery.Failback, from: keeping, to: protected},
	{kind: recovery.Failback, from: homeward, to: protected},
}

// notSimulated are the kinds that have no cells, and why.
var notSimulated = map[recovery.Kind]string{
	recovery.TestFailover:   "a simulated host is no hypervisor.Inspector: it has no networks to isolate, screens or commands in guests. Real guests are drilled in lab/drill_test.go",
	"test-failover-several": "it begins drills and waits for them; see test-failover and lab/drills_test.go",
	recovery.CleanDrill:     "it is refused where no drill has left anything; see test-failover",
}

func pathOf(kind recovery.Kind) path {
	return paths[slices.IndexFunc(paths, func(p path) bool { return p.kind == kind })]
}

// path is that of the cell's operation. The steps that keep points, or drop
// those, do so only where there are some.
func (c cell) path() path {
	p := pathOf(c.Kind)
	switch string(c.Kind) + "/" + c.Step {
	case "commit/keep":
		p.to, p.keep = keeping, true
	case "reprotect/kept", "failback/reprotect-kept":
		p.from = keeping
	case "failback/commit-keep", "failback/again-kept":
		p.keep = true
	}
	return p
}

// Victims. Source is the agent of the site where the VM was active when the
// operation began, target that of the other.
const (
	victimServer = "server"
	victimSource = "source"
	victimTarget = "target"
)

// cell is one place where one process is killed.
type cell struct {
	Kind   recovery.Kind
	Step   string // with "/undo" where the operation is being undone
	Line   killpoint.Line
	Victim string
	Undo   bool
}

func (c cell) String() string { return fmt.Sprintf("%s/%s:%s:%s", c.Kind, c.Step, c.Line, c.Victim) }

// carriedOut says which agents carry out a task in a step, by step: those are
// killed at their own lines. Another agent is killed while the server is held at
// its line. A wrong entry shows: the kill does not hit.
var carriedOut = map[string][]string{
	"protect/preflight": {victimSource}, "protect/replica": {victimTarget}, "protect/replicate": {victimSource}, "protect/seed": {victimSource},
	"protect/replicate/undo": {victimSource}, "protect/replica/undo": {victimTarget},
	"take-point/point": {victimSource},
	"edit/policy":      {victimSource, victimTarget},
	"verify/check":     {victimTarget}, "export/copy": {victimTarget}, "delete-point/delete": {victimTarget},
	"repair/find": {victimTarget}, "repair/check": {victimTarget},
	"drop-snapshot/drop":  {victimTarget},
	"resolve/resolve":     {victimSource, victimTarget},
	"change-point/choose": {victimSource}, "change-point/change": {victimSource}, "change-point/check": {victimSource},
	"drop-kept/drop":     {victimSource},
	"failover/preflight": {victimSource}, "failover/sync": {victimSource}, "failover/hold": {victimSource, victimTarget},
	"failover/shutdown": {victimSource}, "failover/final-point": {victimSource}, "failover/fence": {victimSource},
	"failover/activate": {victimTarget}, "failover/start": {victimTarget}, "failover/check": {victimTarget},
	"failover/prove":     {victimSource, victimTarget},
	"failover/hold/undo": {victimSource, victimTarget},
	"cancel/undo":        {victimSource, victimTarget},
	"commit/snapshots":   {victimSource}, "commit/keep": {victimSource},
	"commit/fold": {victimSource}, "commit/collapse": {victimSource}, "commit/settle": {victimSource}, "commit/retire": {victimTarget},
	"reprotect/preflight": {victimTarget}, "reprotect/replica": {victimTarget}, "reprotect/replicate": {victimSource},
	"reprotect/verify": {victimSource, victimTarget}, "reprotect/replicate/undo": {victimSource}, "reprotect/kept": {victimSource},
	"failback/reprotect-preflight": {victimTarget}, "failback/reprotect-replica": {victimTarget}, "failback/reprotect-replicate": {victimSource},
	"failback/reprotect-verify": {victimSource, victimTarget}, "failback/reprotect-kept": {victimSource},
	"failback/preflight": {victimSource}, "failback/sync": {victimSource}, "failback/hold": {victimSource, victimTarget},
	"failback/shutdown": {victimSource}, "failback/final-point": {victimSource}, "failback/fence": {victimSource},
	"failback/activate": {victimTarget}, "failback/start": {victimTarget}, "failback/check": {victimTarget},
	"failback/prove":            {victimSource, victimTarget},
	"failback/commit-snapshots": {victimTarget}, "failback/commit-keep": {victimTarget},
	"failback/hold/undo":   {victimSource, victimTarget},
	"failback/commit-fold": {victimTarget}, "failback/commit-collapse": {victimTarget}, "failback/commit-settle": {victimTarget}, "failback/commit-retire": {victimSource},
	"failback/again-preflight": {victimSource}, "failback/again-replica": {victimSource}, "failback/again-replicate": {victimTarget},
	"failback/again-verify": {victimSource, victimTarget}, "failback/again-kept": {victimTarget},
	"unprotect/source": {victimSource}, "unprotect/target": {victimTarget},
}

// impossible are the cells that cannot be hit, and why.
func impossible(c cell) string {
	if c.Kind == recovery.Failback && c.Step == "again-replicate/undo" {
		return "the commit before it is irreversible: the operation is not undone any more"
	}
	return ""
}

// within are steps whose effect has a line of its own in the middle, by the
// agent that passes it.
var within = map[string]string{
	"failover/start": victimTarget, "failback/start": victimTarget,
	"commit/fold": victimSource, "failback/commit-fold": victimTarget,
	"commit/collapse": victimSource, "failback/commit-collapse": victimTarget,
	"commit/settle": victimSource, "failback/commit-settle": victimTarget,
	"cancel/undo":        victimSource,
	"failover/hold/undo": victimTarget, "failback/hold/undo": victimTarget,
}

// allCells makes every cell of every step of the registry.
func allCells(t testing.TB) []cell {
	t.Helper()
	registry, err := server.Registry()
	if err != nil {
		t.Fatal(err)
	}
	var cells []cell
	add := func(c cell) {
		if victim, ok := within[string(c.Kind)+"/"+c.Step]; ok {
			c.Line, c.Victim = killpoint.Within, victim
			cells = append(cells, c)
		}
		for _, line := range killpoint.Lines {
			for _, victim := range []string{victimServer, victimSource, victimTarget} {
				c.Line, c.Victim = line, victim
				if impossible(c) == "" {
					cells = append(cells, c)
				}
			}
		}
	}
	for _, o := range registry {
		kind := recovery.Kind(o.Kind)
		if notSimulated[kind] != "" {
			continue
		}
		if !slices.ContainsFunc(paths, func(p path) bool { return p.kind == kind }) {
			t.Errorf("operation %s has no path in the matrix; give it one and cells, or a reason in notSimulated", kind)
			continue
		}
		for _, s := range o.Steps {
			add(cell{Kind: kind, Step: s.Name})
			if s.Undo {
				if pathOf(kind).undone == "" {
					t.Errorf("step %s of %s can be undone, but the matrix does not know how to", s.Name, kind)
				}
				add(cell{Kind: kind, Step: s.Name + "/undo", Undo: true})
			}
		}
		add(cell{Kind: kind, Step: operation.EndStep})
	}
	return cells
}

// process names the victim's process, active being the site where the VM runs
// when the operation begins.
func (c cell) process(active string) string {
	other := map[string]string{simlab.Primary: simlab.Recovery, simlab.Recovery: simlab.Primary}[active]
	return map[string]string{victimServer: simlab.Server, victimSource: active, victimTarget: other}[c.Victim]
}

// atItsOwnLine reports whether the victim passes the line itself.
func (c cell) atItsOwnLine() bool {
	return c.Victim == victimServer || slices.Contains(carriedOut[string(c.Kind)+"/"+c.Step], c.Victim)
}

// TestCells holds the tables against the registry, without running anything.
func TestCells(t *testing.T) {
	cells := allCells(t)
	registry, err := server.Registry()
	if err != nil {
		t.Fatal(err)
	}
	for kind := range notSimulated {
		if !slices.ContainsFunc(registry, func(o server.OperationSteps) bool { return o.Kind == string(kind) }) ||
			slices.ContainsFunc(paths, func(p path) bool { return p.kind == kind }) {
			t.Errorf("operation %s is no exception", kind)
		}
	}
	// An operation can be cancelled up to its last cancellable step before what is final.
	for _, o := range registry {
		i := slices.IndexFunc(paths, func(p path) bool { return string(p.kind) == o.Kind && p.cancelAt != "" })
		if i < 0 {
			continue
		}
		last := ""
		for _, s := range o.Steps {
			if s.Irreversible {
				break
			}
			if s.Cancellable {
				last = s.Name
			}
		}
		if last != paths[i].cancelAt {
			t.Errorf("%s can last be cancelled at %q, want %q", o.Kind, last, paths[i].cancelAt)
		}
	}
	for step := range carriedOut {
		if !slices.ContainsFunc(cells, func(c cell) bool { return string(c.Kind)+"/"+c.Step == step }) {
			t.Errorf("no operation has the step %s", step)
		}
	}
	seen := map[string]bool{}
	for _, c := range cells {
		if seen[c.String()] {
			t.Errorf("cell %s is there twice", c)
		}
		seen[c.String()] = true
	}
	t.Logf("%d cells", len(cells))
}

package simlab_test

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor/simulated"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

var (
	matrixFull   = flag.Bool("matrix.full", false, "run every cell of the crash matrix, not a sample")
	matrixSample = flag.Int("matrix.sample", 9, "how many cells a sample has")
	matrixSeed   = flag.Uint64("matrix.seed", 0, "which sample; 0 = another one each time")
	matrixCells  = flag.String("matrix.cells", "", "run the cells that match this expression")
	matrixLabs   = flag.Int("matrix.labs", 3, "how many labs work on the full matrix at once")
	matrixReport = flag.String("matrix.report", "", "file that gets a line for each cell, and the sum")
)

// TestCrashMatrix kills one process in each cell, and judges what comes of it.
func TestCrashMatrix(t *testing.T) {
	cells := allCells(t)
	labs := *matrixLabs
	switch {
	case *matrixCells != "":
		want := regexp.MustCompile(*matrixCells)
		cells = slices.DeleteFunc(cells, func(c cell) bool { return !want.MatchString(c.String()) })
	case !*matrixFull:
		seed := *matrixSeed
		if seed == 0 {
			seed = uint64(time.Now().UnixNano())
		}
		t.Logf("-matrix.seed=%d", seed)
		all := len(cells)
		rand.New(rand.NewPCG(seed, 0)).Shuffle(len(cells), func(i, j int) { cells[i], cells[j] = cells[j], cells[i] })
		cells, labs = cells[:min(*matrixSample, all)], 2
		t.Logf("%d of %d cells", len(cells), all)
	}
	if len(cells) == 0 {
		t.Fatal("no cells")
	}
	m := &matrix{t: t}
	for i := range labs {
		var share []cell
		for j, c := range cells {
			if j%labs == i {
				share = append(share, c)
			}
		}
		m.wg.Go(func() { m.work(share) })
	}
	m.wg.Wait()
	slices.Sort(m.failed)
	sum := fmt.Sprintf("%d cells, %d failed", m.done, len(m.failed))
	t.Log(sum)
	if m.done != len(cells) {
		t.Errorf("%d cells were to be run", len(cells))
	}
	if len(m.failed) > 0 {
		t.Errorf("failed:\n%s", strings.Join(m.failed, "\n"))
	}
	m.report(sum)
}

// matrix is a run of the crash matrix.
type matrix struct {
	t  *testing.T
	wg sync.WaitGroup

	mu     sync.Mutex
	done   int
	failed []string
}

func (m *matrix) report(line string) {
	if *matrixReport == "" {
		return
	}
	f, err := os.OpenFile(*matrixReport, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err == nil {
		_, err = fmt.Fprintln(f, line)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		m.t.Error(err)
	}
}

// work runs cells in a lab of its own, in the order in which the VM comes by. A
// cell that fails ends its lab, and the others go on in a new one.
func (m *matrix) work(cells []cell) {
	for n := 0; len(cells) > 0; n++ {
		m.t.Run("lab", func(t *testing.T) {
			b := newBed(t)
			for len(cells) > 0 && !t.Failed() {
				i := b.next(cells)
				c := cells[i]
				cells = slices.Delete(slices.Clone(cells), i, i+1)
				began := time.Now()
				t.Run(c.String(), func(t *testing.T) {
					g := *b
					g.t = t
					defer func() { b.at = g.at }()
					g.run(c)
				})
				verdict := "ok"
				m.mu.Lock()
				m.done++
				if t.Failed() {
					m.failed = append(m.failed, c.String())
					verdict = "FAILED"
				}
				m.mu.Unlock()
				m.report(fmt.Sprintf("%-60s %s %v", c, verdict, time.Since(began).Round(time.Millisecond)))
			}
		})
	}
}

// route returns the operations that lead from the VM's situation to the nearest
// one where a cell can be run, and that cell.
func (b *bed) route(cells []cell) (ways []path, next int) {
	type reached struct {
		at   situation
		ways []path
	}
	queue := []reached{{b.situation(), nil}}
	seen := map[situation]bool{}
	for len(queue) > 0 {
		r := queue[0]
		queue = queue[1:]
		for i, c := range cells {
			if c.path().from == r.at {
				return r.ways, i
			}
		}
		for _, p := range append(slices.Clone(paths), byways...) {
			if p.from == r.at && !seen[p.to] {
				seen[p.to] = true
				queue = append(queue, reached{p.to, append(slices.Clone(r.ways), p)})
			}
		}
	}
	b.t.Fatalf("no cell can be reached from %s", b.situation())
	return nil, 0
}

func (b *bed) next(cells []cell) int {
	_, i := b.route(cells)
	return i
}

func (b *bed) situation() situation {
	if b.at == "" {
		return unprotected
	}
	return b.at
}

// active is the site where the VM runs in a situation.
func (s situation) active() string {
	switch s {
	case switched, committed, keeping, homeward:
		return simlab.Recovery
	}
	return simlab.Primary
}

func (s situation) phase() switchback.Phase {
	switch s {
	case switched:
		return switchback.PhaseSwitched
	case committed, keeping:
		return switchback.PhaseCommitted
	}
	return switchback.PhaseProtected
}

// spec arms a line of a process and returns the file that says it was hit.
func (b *bed) spec(process, name, text string) (hit string) {
	b.t.Helper()
	file := filepath.Join(b.kills, process, name)
	b.must(os.WriteFile(file+".new", []byte(text), 0o600))
	b.must(os.Rename(file+".new", file+".spec"))
	return file + ".hit"
}

func isThere(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// beginUnanswered asks for an operation whose server may die before it answers.
func (b *bed) beginUnanswered(a asking, hit string) {
	b.t.Helper()
	b.until(string(a.kind)+" is accepted", func() (bool, string) {
		_, err := b.ask(a)
		return err == nil || isThere(hit), fmt.Sprint(err)
	})
}

// newest is the operation that was begun last; it must be of the kind.
func (b *bed) newest(kind recovery.Kind) (id switchback.OperationID) {
	b.t.Helper()
	b.until("the operation is listed", func() (bool, string) {
		ops, err := b.client.Operations(b.t.Context(), "", false, 1)
		if err != nil || len(ops) == 0 {
			return false, fmt.Sprint(err)
		}
		id = ops[0].ID
		return ops[0].Kind == string(kind), ops[0].Title
	})
	return id
}

// run brings the VM to where the cell begins, runs its operation, kills, and judges.
func (b *bed) run(c cell) {
	b.t.Helper()
	ways, _ := b.route([]cell{c})
	for _, p := range ways {
		b.carryOut(b.asking(p))
		b.at = p.to
	}
	p := c.path()
	b.prepare(c)
	active, asks := p.from.active(), b.asking(p)
	before := b.facts()
	victim := c.process(active)
	process, scope, hold := simlab.Server, string(c.Kind), "hold "
	if c.atItsOwnLine() {
		hold = ""
		if c.Victim != victimServer {
			process, scope = victim, "*"
		}
	}
	spec := func(scope, step string, line killpoint.Line) string {
		if process == simlab.Server {
			return killpoint.Spec("server", scope, step, line)
		}
		return killpoint.Spec("agent", scope, step, line)
	}
	arm := hold + spec(scope, c.Step, c.Line)
	var hit string
	if c.Undo {
		// Held where it can last be cancelled, the cell is armed and the cancel asked for.
		waits := b.spec(simlab.Server, "cancel", "hold "+killpoint.Spec("server", string(c.Kind), p.cancelAt, killpoint.BeforeEffect))
		id := b.beginAsked(asks)
		b.awaitHit(waits)
		hit = b.spec(process, "cell", arm)
		b.must(b.client.CancelOperation(b.t.Context(), id))
		b.must(os.Remove(waits))
	} else {
		hit = b.spec(process, "cell", arm)
		b.beginUnanswered(asks, hit)
	}
	b.awaitHit(hit)
	if hold == "" {
		b.awaitGone(process)
	} else {
		b.must(b.Kill(victim, syscall.SIGKILL))
	}
	restarted := time.Now()
	b.must(b.Start(b.t.Context(), victim))
	b.must(os.Remove(hit))
	rec := b.end(b.newest(c.Kind))
	b.t.Logf("%s is %s %v after the restart", rec.Title, rec.State, time.Since(restarted).Round(time.Millisecond))
	want, to := operation.StateSucceeded, p.to
	if c.Undo {
		want, to = operation.StateCancelled, p.undone
	}
	if rec.State != want {
		b.t.Fatalf("%s is %s, want %s: %v; %s", rec.Title, rec.State, want, rec.Error, steps(rec))
	}
	b.at = to
	b.judge(c, to, before)
	b.outcome(c, asks)
}

// steps tells how far an operation has come.
func steps(rec operation.Record) string {
	var list []string
	for _, s := range rec.Steps {
		text := fmt.Sprintf("%s %s", s.Name, s.State)
		if s.Error != nil {
			text += ": " + s.Error.Error()
		}
		if s.UndoError != nil {
			text += "; undo: " + s.UndoError.Error()
		}
		list = append(list, text)
	}
	return strings.Join(list, ", ")
}

// awaitHit waits until a line was reached. Where no operation runs any more it
// will not be.
func (b *bed) awaitHit(hit string) {
	b.t.Helper()
	idle := time.Time{}
	b.until("the line is reached", func() (bool, string) {
		if isThere(hit) {
			return true, ""
		}
		ops, err := b.client.Operations(b.t.Context(), "", true, 1)
		state := fmt.Sprint(err)
		if len(ops) > 0 {
			state = steps(ops[0])
		}
		switch {
		case err != nil || len(ops) > 0:
			idle = time.Time{}
		case idle.IsZero():
			idle = time.Now()
		case time.Since(idle) > 2*time.Second:
			all, err := b.client.Operations(b.t.Context(), "", false, 1)
			b.must(err)
			for _, rec := range all {
				state = steps(rec)
			}
			b.t.Fatalf("the kill did not hit: %s", state)
		}
		return false, state
	})
}

func (b *bed) awaitGone(process string) {
	b.t.Helper()
	b.until(process+" is gone", func() (bool, string) { return !b.Process(process).Alive(), "" })
}

// facts are what a cell's judgement compares.
type facts struct {
	epoch switchback.Epoch
	acked map[string]uint64 // by site, in the last boot
	boots map[string]int
	log   int // lines of the power log
}

func (b *bed) facts() facts {
	b.t.Helper()
	f := facts{acked: map[string]uint64{}, boots: map[string]int{}}
	if b.situation() != unprotected {
		f.epoch = b.vm().Epoch
	}
	for _, s := range simlab.Sites {
		if boots := b.console(s).Boots; len(boots) > 0 {
			f.acked[s], f.boots[s] = boots[len(boots)-1].Acked, len(boots)
		}
	}
	f.log = len(b.powerLog())
	return f
}

func (b *bed) powerLog() []simulated.PowerEvent {
	b.t.Helper()
	events, err := simulated.ReadPowerLog(b.PowerLog())
	b.must(err)
	return events
}

// judge holds what a cell has left against what the operation should have done.
func (b *bed) judge(c cell, to situation, before facts) {
	b.t.Helper()
	active, old := to.active(), c.path().from.active()
	v := b.vm()
	if to == unprotected {
		b.until("it is forgotten", func() (bool, string) {
			_, err := b.client.VM(b.t.Context(), b.machine.Name)
			return switchback.CodeOf(err) == switchback.CodeNotFound, fmt.Sprint(err)
		})
		b.unprotected()
	} else {
		if v.Phase != to.phase() || string(v.Source) != active {
			b.t.Errorf("it is %s at %s, want %s at %s", v.Phase, v.Source, to.phase(), active)
		}
		b.epochs(c, before, v)
	}
	b.runsAt(active)
	b.effects(c, before)
	b.content(active, old, before)
	if to == switched && old != active {
		b.cutOver(old, active)
	}
	if to == committed || to == keeping {
		b.plain(active)
	}
	if to != unprotected {
		other := map[string]string{simlab.Primary: simlab.Recovery, simlab.Recovery: simlab.Primary}[active]
		err := b.Driver(other).Start(b.t.Context(), b.machine.UUID(), false)
		if code := switchback.CodeOf(err); code != switchback.CodeRefused && code != switchback.CodeNotFound {
			b.t.Errorf("a start of the copy at %s: %v, want it refused", other, err)
		}
	}
	if to == protected || to == homeward {
		b.replicates()
	}
}

// epochs: one for each change of the active site, no more for a repeated step.
func (b *bed) epochs(c cell, before facts, v api.VM) {
	b.t.Helper()
	minted := switchback.Epoch(0)
	switch c.Kind {
	case recovery.Failover, recovery.Failback, recovery.Cancel, recovery.ChangePoint:
		minted = 1
		if c.Undo {
			minted = 2
		}
	case recovery.Protect:
		return
	}
	if v.Epoch != before.epoch+minted {
		b.t.Errorf("the epoch went from %d to %d, want %d more", before.epoch, v.Epoch, minted)
	}
}

// effects: a guest was let run and turned off as often as the operation says.
func (b *bed) effects(c cell, before facts) {
	b.t.Helper()
	got := map[string]int{}
	for _, e := range b.powerLog()[before.log:] {
		if e.Kind == simulated.PowerRun {
			got[e.Host]++
		}
	}
	active := c.path().from.active()
	other := map[string]string{simlab.Primary: simlab.Recovery, simlab.Recovery: simlab.Primary}[active]
	want := map[string]int{}
	switch {
	case (c.Kind == recovery.Failover || c.Kind == recovery.Failback) && c.Undo:
		want[active], want[other] = 1, 1 // away and back
	case c.Kind == recovery.Failover, c.Kind == recovery.Failback, c.Kind == recovery.Cancel:
		want[other] = 1
	case c.Kind == recovery.ChangePoint:
		want[active] = 1
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		b.t.Errorf("guests were let run %v times, want %v", got, want)
	}
}

// content: what the guest finds is whole, and what was acknowledged is there,
// except what an undone switch or a cancel abandons at the other side.
func (b *bed) content(active, old string, before facts) {
	b.t.Helper()
	for _, s := range simlab.Sites {
		boots := b.console(s).Boots
		for i, boot := range boots {
			if i >= before.boots[s] && boot.Found.Damaged > 0 {
				b.t.Errorf("at %s boot %d found damage: %+v", s, boot.Number, boot.Found)
			}
			if len(boot.Errors) > 0 {
				b.t.Errorf("at %s boot %d met errors: %v", s, boot.Number, boot.Errors)
			}
		}
	}
	// Each boot at a site must find all that the same disks, or those it took
	// over, had acknowledged: the boots of both sites in the order of the power log.
	type run struct {
		site string
		boot simulated.Boot
	}
	var runs []run
	booted := map[string]simulated.Boot{}
	for _, s := range simlab.Sites {
		for _, boot := range b.console(s).Boots {
			booted[fmt.Sprint(s, boot.Number)] = boot
		}
	}
	for _, e := range b.powerLog() {
		// A machine that was turned off before its guest was up has read and written nothing.
		if boot, ok := booted[fmt.Sprint(e.Host, e.Boot)]; ok && e.Kind == simulated.PowerRun {
			runs = append(runs, run{e.Host, boot})
		}
	}
	if len(runs) < 2 {
		return
	}
	last, previous := runs[len(runs)-1], runs[len(runs)-2]
	if last.site == previous.site || last.boot.Found.Highest >= previous.boot.Acked {
		return
	}
	// Abandoned on purpose: the runs before the last were away, the last of them ended by a cancel.
	stayed := len(runs) - 2
	for stayed >= 0 && runs[stayed].site != last.site {
		stayed--
	}
	if stayed >= 0 && last.boot.Found.Highest >= runs[stayed].boot.Acked && b.wasCancelled() {
		return
	}
	b.t.Errorf("at %s it found %+v, at %s record %d was acknowledged before", last.site, last.boot.Found, previous.site, previous.boot.Acked)
}

// wasCancelled reports whether the last switch was taken back.
func (b *bed) wasCancelled() bool {
	ops, err := b.client.Operations(b.t.Context(), "", false, 500)
	b.must(err)
	for _, o := range ops {
		switch recovery.Kind(o.Kind) {
		case recovery.Cancel:
			return o.State == operation.StateSucceeded
		case recovery.Failover, recovery.Failback:
			return o.State == operation.StateCancelled
		}
	}
	return false
}

// unprotected: nothing of ours is left on the machine.
func (b *bed) unprotected() {
	b.t.Helper()
	list, err := b.Driver(simlab.Primary).Checkpoints(b.t.Context(), b.machine.UUID())
	b.must(err)
	for _, c := range list {
		if strings.HasPrefix(c.Name, "sb-") {
			b.t.Errorf("checkpoint %s is left", c.Name)
		}
	}
	for _, s := range simlab.Sites {
		for _, pattern := range []string{"assignments/*.json", "storage/*", "index/*"} {
			if left, _ := filepath.Glob(filepath.Join(b.StateDir(s), pattern)); len(left) > 0 {
				b.t.Errorf("at %s there is left %v", s, left)
			}
		}
	}
}

// replicates waits for a new point, which must need no resync.
func (b *bed) replicates() {
	b.t.Helper()
	newest := func() (switchback.Sequence, bool) {
		points, err := b.client.Points(b.t.Context(), b.machine.Name)
		if err != nil || len(points) == 0 {
			return 0, false
		}
		seq := switchback.Sequence(0)
		for _, p := range points {
			seq = max(seq, p.Sequence)
		}
		return seq, true
	}
	var first switchback.Sequence
	b.until("it has points", func() (ok bool, _ string) { first, ok = newest(); return ok, "" })
	b.until("a new point comes", func() (bool, string) {
		seq, _ := newest()
		v := b.vm()
		return seq > first, fmt.Sprintf("%d, %+v", seq, v.Conditions)
	})
}

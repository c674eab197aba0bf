package operation_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/store"

	"github.com/google/go-cmp/cmp"
)

func openStore(t *testing.T) *store.Store {
	t.Helper()
	s, err := store.Open(context.Background(), filepath.Join(memoryDir(t), "test.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// newRunner returns a Runner with short waits.
func newRunner(t *testing.T, s operation.Store, owner string, defs ...operation.Definition) *operation.Runner {
	t.Helper()
	r, err := operation.NewRunner(operation.Config{
		Store: s, Owner: owner, Definitions: defs,
		RetryMin: time.Millisecond, RetryMax: 10 * time.Millisecond, ProgressInterval: 10 * time.Millisecond,
		LeaseDuration: time.Minute, // nothing in these tests may depend on its expiry, unless said
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// run lets r work until the returned function is called, or the test ends.
func run(t *testing.T, r *operation.Runner) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := r.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	stop = func() { cancel(); wg.Wait() }
	t.Cleanup(stop)
	return stop
}

func submit(t *testing.T, r *operation.Runner, req operation.Record) switchback.OperationID {
	t.Helper()
	rec, err := r.Submit(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	return rec.ID
}

// finish waits for the operation's end.
func finish(t *testing.T, r *operation.Runner, id switchback.OperationID) operation.Record {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	records, err := r.Watch(ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	var last operation.Record
	for rec := range records {
		last = rec
	}
	if !last.State.Finished() {
		t.Fatalf("operation did not end: %+v", last)
	}
	return last
}

func wantState(t *testing.T, rec operation.Record, state operation.State) {
	t.Helper()
	if rec.State != state {
		t.Fatalf("operation ended %s (%v), want %s", rec.State, rec.Error, state)
	}
}

func TestResultsAndLog(t *testing.T) {
	s := openStore(t)
	type params struct{ Point int }
	def := operation.Definition{
		Kind: "failover",
		Steps: operation.Fixed(
			operation.Step{Name: "mint", Title: "Mint an epoch", Do: func(ctx context.Context, r *operation.Run) error {
				var p params
				if err := r.Params(&p); err != nil {
					return err
				}
				if want := string(r.ID()) + "/mint"; r.Key() != want {
					return fmt.Errorf("key is %s, want %s", r.Key(), want)
				}
				r.Log(slog.LevelInfo, "epoch minted", "point", p.Point)
				r.Progress(operation.Progress{Percent: 100})
				return r.SetResult(p.Point + 1)
			}},
			operation.Step{Name: "skip", Do: func(context.Context, *operation.Run) error { return operation.Skip("nothing to ship") }},
			operation.Step{Name: "use", Do: func(ctx context.Context, r *operation.Run) error {
				var epoch int
				if err := r.StepResult("mint", &epoch); err != nil {
					return err
				}
				if err := r.StepResult("use", &epoch); switchback.CodeOf(err) != switchback.CodeNotFound {
					return fmt.Errorf("own result: %v", err)
				}
				return r.SetSummary(map[string]int{"epoch": epoch})
			}},
		),
		OnEnd: func(ctx context.Context, r *operation.Run, final operation.State) error {
			r.Log(slog.LevelInfo, "on end", "final", final, "key", strings.TrimPrefix(r.Key(), string(r.ID())))
			return nil
		},
	}
	r := newRunner(t, s, "srv", def)
	id := submit(t, r, operation.Record{Kind: "failover", Params: json.RawMessage(`{"Point":7}`), RequestedBy: "ann"})
	queued, err := r.Get(t.Context(), id)
	if err != nil || queued.State != operation.StateQueued || len(queued.Steps) != 3 {
		t.Fatalf("before Run: %+v, %v", queued, err)
	}
	run(t, r)
	rec := finish(t, r, id)
	wantState(t, rec, operation.StateSucceeded)
	if string(rec.Result) != `{"epoch":8}` {
		t.Errorf("result is %s", rec.Result)
	}
	if s := rec.Step("skip"); s.State != operation.StepSkipped || s.Error.Message != "nothing to ship" {
		t.Errorf("skipped step is %+v", s)
	}
	lines, err := s.OperationLog(t.Context(), id, 0)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range lines {
		got = append(got, l.Step+": "+l.Message)
	}
	want := []string{": operation started", "mint: epoch minted", ": on end", ": operation ended"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(map[string]string{"point": "7"}, lines[1].Attrs); diff != "" {
		t.Errorf("attributes:\n%s", diff)
	}
}

func TestSubmitRefuses(t *testing.T) {
	r := newRunner(t, openStore(t), "srv", operation.Definition{Kind: "k", Steps: operation.Fixed()})
	submit(t, r, operation.Record{Kind: "k", Protection: "p-1", ID: "op-mine"})
	for _, c := range []struct {
		req  operation.Record
		want switchback.Code
	}{
		{operation.Record{Kind: "other"}, switchback.CodeInvalid},
		{operation.Record{Kind: "k", Protection: "p-1"}, switchback.CodeConflict},
		{operation.Record{Kind: "k", ID: "op-mine"}, switchback.CodeConflict},
	} {
		if _, err := r.Submit(t.Context(), c.req); switchback.CodeOf(err) != c.want {
			t.Errorf("%+v: %v, want %s", c.req, err, c.want)
		}
	}
	var ids []switchback.OperationID
	for range 50 {
		ids = append(ids, submit(t, r, operation.Record{Kind: "k"}))
	}
	if !slices.IsSorted(ids) {
		t.Errorf("IDs do not sort by creation: %v", ids)
	}
}

// TestManyAtOnce: operations of different VMs run side by side.
func TestManyAtOnce(t *testing.T) {
	const n = 8
	var together sync.WaitGroup
	together.Add(n)
	r := newRunner(t, openStore(t), "srv", operation.Definition{Kind: "k", Steps: operation.Fixed(
		operation.Step{Name: "meet", Do: func(ctx context.Context, r *operation.Run) error {
			together.Done()
			together.Wait() // all n are in this step, or the test hangs
			return nil
		}})})
	run(t, r)
	var ids []switchback.OperationID
	for i := range n {
		ids = append(ids, submit(t, r, operation.Record{Kind: "k", Protection: switchback.ProtectionID(fmt.Sprint("p-", i))}))
	}
	for _, id := range ids {
		wantState(t, finish(t, r, id), operation.StateSucceeded)
	}
}

// trace records which step functions ran.
type trace struct {
	mu    sync.Mutex
	calls []string
}

func (tr *trace) add(s string) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.calls = append(tr.calls, s)
}

func (tr *trace) want(t *testing.T, want ...string) {
	t.Helper()
	tr.mu.Lock()
	defer tr.mu.Unlock()
	if diff := cmp.Diff(want, tr.calls); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
}

// step is one that records its calls and does do, which may be nil.
func (tr *trace) step(name string, do func(context.Context, *operation.Run) error) operation.Step {
	return operation.Step{
		Name: name,
		Do: func(ctx context.Context, r *operation.Run) error {
			tr.add(name)
			if do == nil {
				return nil
			}
			return do(ctx, r)
		},
		Undo: func(ctx context.Context, r *operation.Run) error {
			tr.add("undo " + name)
			return nil
		},
	}
}

func TestFailureUndoesInReverse(t *testing.T) {
	var tr trace
	var ends []operation.State
	r := newRunner(t, openStore(t), "srv", operation.Definition{
		Kind: "k",
		Steps: operation.Fixed(tr.step("a", nil), tr.step("b", nil),
			tr.step("c", func(context.Context, *operation.Run) error {
				return fmt.Errorf("define: %w", switchback.Errorf(switchback.CodeUnsupported, "no such network").WithHint("map it"))
			}), tr.step("d", nil)),
		OnEnd: func(_ context.Context, _ *operation.Run, final operation.State) error {
			ends = append(ends, final)
			return nil
		},
	})
	run(t, r)
	rec := finish(t, r, submit(t, r, operation.Record{Kind: "k"}))
	wantState(t, rec, operation.StateUndone)
	tr.want(t, "a", "b", "c", "undo c", "undo b", "undo a")
	if diff := cmp.Diff(&switchback.Error{Code: switchback.CodeUnsupported, Message: "define: no such network", Hint: "map it"}, rec.Error); diff != "" {
		t.Errorf("error:\n%s", diff)
	}
	if !slices.Equal(ends, []operation.State{operation.StateUndone}) {
		t.Errorf("OnEnd saw %v", ends)
	}
}

func TestRetryableIsRetried(t *testing.T) {
	var n atomic.Int32
	r := newRunner(t, openStore(t), "srv", operation.Definition{Kind: "k", Steps: operation.Fixed(operation.Step{
		Name: "dial", RetryFor: time.Minute,
		Do: func(context.Context, *operation.Run) error {
			if n.Add(1) < 4 {
				return switchback.Errorf(switchback.CodeUnavailable, "agent is away")
			}
			return nil
		},
	})})
	run(t, r)
	rec := finish(t, r, submit(t, r, operation.Record{Kind: "k"}))
	wantState(t, rec, operation.StateSucceeded)
	if rec.Steps[0].Attempts != 4 || rec.Steps[0].Error != nil {
		t.Errorf("step is %+v", rec.Steps[0])
	}
}

// TestRetry: a failed operation goes on from its failed step.
func TestRetry(t *testing.T) {
	s := openStore(t)
	var broken atomic.Bool
	broken.Store(true)
	var calls trace
	count := func(name string, err error) operation.Step {
		return operation.Step{Name: name, Do: func(context.Context, *operation.Run) error {
			calls.add(name)
			if broken.Load() {
				return err
			}
			return nil
		}}
	}
	r := newRunner(t, s, "srv", operation.Definition{Kind: "k", Steps: operation.Fixed(count("a", nil), count("b", errors.New("broken")))})
	run(t, r)
	id := submit(t, r, operation.Record{Kind: "k", Protection: "p-1"})
	rec := finish(t, r, id)
	wantState(t, rec, operation.StateFailed)
	if rec.Error.Code != switchback.CodeInternal || rec.Error.Message != "broken" {
		t.Errorf("error is %v", rec.Error)
	}
	broken.Store(false)
	if err := r.Retry(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	wantState(t, finish(t, r, id), operation.StateSucceeded)
	calls.want(t, "a", "b", "b")
	if err := r.Retry(t.Context(), id); switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("retry of a successful operation: %v", err)
	}

	broken.Store(true)
	id = submit(t, r, operation.Record{Kind: "k", Protection: "p-1"})
	wantState(t, finish(t, r, id), operation.StateFailed)
	broken.Store(false)
	wantState(t, finish(t, r, submit(t, r, operation.Record{Kind: "k", Protection: "p-1"})), operation.StateSucceeded)
	for name, call := range map[string]func(context.Context, switchback.OperationID) error{"retry": r.Retry, "cancel": r.Cancel} {
		if err := call(t.Context(), id); switchback.CodeOf(err) != switchback.CodeConflict {
			t.Errorf("%s of a superseded operation: %v", name, err)
		}
	}
}

func TestCancel(t *testing.T) {
	// Cancelling while a step waits for its next attempt must not meet a token
	// of an earlier case: each has channels of its own.
	var began, release chan struct{}
	untilCancelled := func(ctx context.Context, r *operation.Run) error {
		began <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	}
	untilReleased := func(ctx context.Context, r *operation.Run) error {
		began <- struct{}{}
		<-release
		return ctx.Err()
	}
	away := func(ctx context.Context, r *operation.Run) error {
		select {
		case began <- struct{}{}:
		default:
		}
		return switchback.Errorf(switchback.CodeUnavailable, "away")
	}
	for _, c := range []struct {
		name  string
		setup func(*operation.Step)
		do    func(context.Context, *operation.Run) error
		hold  bool // release the step only after Cancel returned
		state operation.State
		code  switchback.Code
		calls []string
	}{
		{name: "cancellable step", do: untilCancelled, setup: func(s *operation.Step) { s.Cancellable = true },
			state: operation.StateCancelled, calls: []string{"a", "b", "undo b", "undo a"}},
		{name: "after a step that is not", do: untilReleased, hold: true, setup: func(s *operation.Step) {},
			state: operation.StateCancelled, calls: []string{"a", "b", "undo b", "undo a"}},
		{name: "during retries", do: away, setup: func(s *operation.Step) { s.RetryFor = time.Hour },
			state: operation.StateCancelled},
		{name: "irreversible step", do: untilReleased, hold: true, setup: func(s *operation.Step) { s.Irreversible = true },
			state: operation.StateSucceeded, code: switchback.CodeRefused, calls: []string{"a", "b", "c"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			began, release = make(chan struct{}, 1), make(chan struct{})
			var tr trace
			b := tr.step("b", c.do)
			c.setup(&b)
			r := newRunner(t, openStore(t), "srv", operation.Definition{Kind: "k", Steps: operation.Fixed(tr.step("a", nil), b, tr.step("c", nil))})
			run(t, r)
			id := submit(t, r, operation.Record{Kind: "k"})
			<-began
			for range 2 { // idempotent
				if err := r.Cancel(t.Context(), id); switchback.CodeOf(err) != c.code {
					t.Fatalf("cancel: %v, want code %q", err, c.code)
				}
			}
			if c.hold {
				release <- struct{}{}
			}
			rec := finish(t, r, id)
			wantState(t, rec, c.state)
			if c.calls != nil {
				tr.want(t, c.calls...)
			}
			if c.state == operation.StateCancelled && (rec.Error == nil || rec.Error.Code != switchback.CodeCancelled) {
				t.Errorf("error is %v", rec.Error)
			}
			err := r.Cancel(t.Context(), id) // a fulfilled request stays one
			if want := map[operation.State]switchback.Code{operation.StateSucceeded: switchback.CodeRefused}[c.state]; switchback.CodeOf(err) != want {
				t.Errorf("cancel of an ended operation: %v, want code %q", err, want)
			}
		})
	}
}

func TestCancelQueuedAndFailed(t *testing.T) {
	var tr trace
	def := operation.Definition{Kind: "k", Steps: operation.Fixed(operation.Step{Name: "a", Do: func(context.Context, *operation.Run) error {
		tr.add("a")
		return errors.New("broken")
	}})}
	r := newRunner(t, openStore(t), "srv", def)
	queued := submit(t, r, operation.Record{Kind: "k"})
	if err := r.Cancel(t.Context(), queued); err != nil {
		t.Fatal(err)
	}
	run(t, r)
	wantState(t, finish(t, r, queued), operation.StateCancelled)
	tr.want(t)

	failed := submit(t, r, operation.Record{Kind: "k"})
	wantState(t, finish(t, r, failed), operation.StateFailed)
	if err := r.Cancel(t.Context(), failed); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		rec, err := r.Get(t.Context(), failed)
		if err != nil {
			t.Fatal(err)
		}
		if rec.State == operation.StateCancelled {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("failed operation was not cancelled: %s", rec.State)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestWatchShowsProgress(t *testing.T) {
	seen := make(chan struct{})
	s := openStore(t)
	r := newRunner(t, s, "srv", operation.Definition{Kind: "k", Steps: operation.Fixed(
		operation.Step{Name: "copy", Do: func(ctx context.Context, r *operation.Run) error {
			for i := 1; ; i++ {
				r.Progress(operation.Progress{Percent: 42, DoneBytes: int64(i)})
				select {
				case <-seen:
					return nil
				case <-time.After(time.Millisecond):
				}
			}
		}})})
	run(t, r)
	id := submit(t, r, operation.Record{Kind: "k"})
	records, err := r.Watch(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	var last operation.Record
	told := false
	for rec := range records {
		last = rec
		if p := rec.Steps[0].Progress; p != nil && p.Percent == 42 && !told {
			// Progress also reaches the store, for those who watch elsewhere.
			if stored, err := s.Operation(t.Context(), id); err == nil && stored.Steps[0].Progress != nil {
				told = true
				close(seen)
			}
		}
	}
	wantState(t, last, operation.StateSucceeded)
	if _, err := r.Watch(t.Context(), "op-none"); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("watching an unknown operation: %v", err)
	}
}

func TestPanicFailsTheOperation(t *testing.T) {
	r := newRunner(t, openStore(t), "srv", operation.Definition{Kind: "k", Steps: operation.Fixed(
		operation.Step{Name: "a", Do: func(context.Context, *operation.Run) error { panic("oh") }})})
	run(t, r)
	rec := finish(t, r, submit(t, r, operation.Record{Kind: "k"}))
	wantState(t, rec, operation.StateFailed)
	if rec.Error.Code != switchback.CodeInternal || rec.Error.Message != "panic: oh" {
		t.Errorf("error is %v", rec.Error)
	}
}

func TestOnEndFails(t *testing.T) {
	var attempts atomic.Int32
	r := newRunner(t, openStore(t), "srv", operation.Definition{
		Kind:  "k",
		Steps: operation.Fixed(operation.Step{Name: "a", Do: func(context.Context, *operation.Run) error { return nil }}),
		OnEnd: func(context.Context, *operation.Run, operation.State) error {
			switch attempts.Add(1) {
			case 1:
				return switchback.Errorf(switchback.CodeUnavailable, "store is away")
			case 2:
				return errors.New("broken")
			}
			return nil
		},
	})
	run(t, r)
	id := submit(t, r, operation.Record{Kind: "k"})
	rec := finish(t, r, id)
	wantState(t, rec, operation.StateFailed)
	if err := r.Retry(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	wantState(t, finish(t, r, id), operation.StateSucceeded)
}

func TestUnknownKindAtRestart(t *testing.T) {
	s := openStore(t)
	noop := operation.Step{Name: "a", Do: func(context.Context, *operation.Run) error { return nil }}
	old := newRunner(t, s, "srv", operation.Definition{Kind: "gone", Steps: operation.Fixed(noop)})
	id := submit(t, old, operation.Record{Kind: "gone"})
	r := newRunner(t, s, "srv")
	stop := run(t, r)
	rec := finish(t, r, id)
	wantState(t, rec, operation.StateFailed)
	if rec.Error.Code != switchback.CodeUnsupported {
		t.Errorf("error is %v", rec.Error)
	}
	stop()
	run(t, old) // the version that knows it
	if err := old.Retry(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	wantState(t, finish(t, old, id), operation.StateSucceeded)
}

// silent is a store that one Runner can no longer write: its lease runs out.
type silent struct {
	operation.Store
	cut atomic.Bool
}

func (s *silent) SaveOperation(ctx context.Context, rec operation.Record) (bool, error) {
	if s.cut.Load() {
		return false, switchback.Errorf(switchback.CodeUnavailable, "store is away")
	}
	return s.Store.SaveOperation(ctx, rec)
}

func (s *silent) ClaimOperation(ctx context.Context, id switchback.OperationID, owner string, now, until time.Time) (operation.Record, error) {
	if s.cut.Load() {
		return operation.Record{}, switchback.Errorf(switchback.CodeUnavailable, "store is away")
	}
	return s.Store.ClaimOperation(ctx, id, owner, now, until)
}

// TestTakeover: a Runner that cannot renew its lease stops its step before
// another one begins it, and what it writes later is refused.
func TestTakeover(t *testing.T) {
	s := &silent{Store: openStore(t)}
	var inside, overlaps atomic.Int32
	began := make(chan int64, 10)
	def := operation.Definition{Kind: "k", Steps: operation.Fixed(operation.Step{
		Name: "hold",
		Do: func(ctx context.Context, r *operation.Run) error {
			if inside.Add(1) > 1 {
				overlaps.Add(1)
			}
			defer inside.Add(-1)
			began <- r.Fence()
			if r.Fence() == 1 {
				<-ctx.Done()
				return context.Cause(ctx)
			}
			return nil
		},
	})}
	config := operation.Config{
		Definitions: []operation.Definition{def}, LeaseDuration: time.Second,
		PollInterval: 10 * time.Millisecond, ProgressInterval: 10 * time.Millisecond, RetryMin: time.Millisecond,
	}
	first, second := config, config
	first.Store, first.Owner = s, "first"
	second.Store, second.Owner = s.Store, "second"
	a, err := operation.NewRunner(first)
	if err != nil {
		t.Fatal(err)
	}
	b, err := operation.NewRunner(second)
	if err != nil {
		t.Fatal(err)
	}
	run(t, a)
	id := submit(t, a, operation.Record{Kind: "k"})
	if fence := <-began; fence != 1 {
		t.Fatalf("first fence is %d", fence)
	}
	run(t, b)
	time.Sleep(2 * config.LeaseDuration) // it renews: nobody takes over
	if len(began) != 0 {
		t.Fatal("a renewed lease was taken")
	}
	s.cut.Store(true)
	if fence := <-began; fence < 2 {
		t.Fatalf("fence after the takeover is %d", fence)
	}
	wantState(t, finish(t, b, id), operation.StateSucceeded)
	if overlaps.Load() != 0 {
		t.Error("two runners were in the step at once")
	}
}

package operation_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/store"

	"github.com/google/go-cmp/cmp"
)

// The fault tests run one operation of four steps in a world that is a folder:
// the file "effects" gets one line per effect, written at most once per key,
// as the contract asks of Do and Undo. The operation is stopped at every cell
// (effect × before, after, after its outcome is stored), started again, and
// must end as if nothing had happened.

// ending is how the operation is made to end.
type ending string

const (
	succeeding ending = "succeeding"
	failing    ending = "failing"    // the last step fails after its effect
	cancelling ending = "cancelling" // the last step asks for its cancel and waits for it
)

var stepNames = []string{"stop", "ship", "mint", "start"}

// effects returns what must have happened, in order.
func (e ending) effects() []string {
	want := slices.Clone(stepNames)
	if e == succeeding {
		return append(want, "end")
	}
	for _, name := range slices.Backward(stepNames) {
		want = append(want, name+"/undo")
	}
	return append(want, "end")
}

func (e ending) state() operation.State {
	return map[ending]operation.State{
		succeeding: operation.StateSucceeded, failing: operation.StateUndone, cancelling: operation.StateCancelled,
	}[e]
}

// cell is a place where the process dies, once.
type cell struct {
	Effect string // as in effects
	When   string // before, after, outcome
}

// world is the folder, and die, which stops the process or the Runner.
type world struct {
	dir  string
	cell cell
	die  func()
}

// reach dies if this is the cell and it was not hit before.
func (w world) reach(effect, when string) (died bool) {
	if w.cell != (cell{effect, when}) {
		return false
	}
	f, err := os.OpenFile(filepath.Join(w.dir, "hit"), os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return false
	}
	f.Close()
	w.die()
	return true
}

// effect writes the line, unless it is there.
func (w world) effect(ctx context.Context, name string) error {
	if w.reach(name, "before") {
		<-ctx.Done()
		return ctx.Err()
	}
	path := filepath.Join(w.dir, "effects")
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if !slices.Contains(strings.Fields(string(data)), name) {
		if err := os.WriteFile(path, append(data, name+"\n"...), 0o600); err != nil {
			return err
		}
	}
	if w.reach(name, "after") {
		<-ctx.Done()
		return ctx.Err()
	}
	return nil
}

// watched is a store that dies after an outcome is stored.
type watched struct {
	operation.Store
	w world
}

func (s watched) SaveOperation(ctx context.Context, rec operation.Record) (bool, error) {
	cancel, err := s.Store.SaveOperation(ctx, rec)
	if err != nil {
		return cancel, err
	}
	for _, step := range rec.Steps {
		switch step.State {
		case operation.StepDone, operation.StepFailed:
			s.w.reach(step.Name, "outcome")
		case operation.StepUndone:
			s.w.reach(step.Name, "outcome")
			s.w.reach(step.Name+"/undo", "outcome")
		case operation.StepUndoing:
			s.w.reach(step.Name, "outcome")
		}
	}
	if rec.State.Finished() {
		s.w.reach("end", "outcome")
	}
	return cancel, nil
}

func (w world) definition(cancel func(ctx context.Context, r *operation.Run) error) operation.Definition {
	return operation.Definition{
		Kind: "switch",
		Steps: func(params json.RawMessage) ([]operation.Step, error) {
			var how ending
			if err := json.Unmarshal(params, &how); err != nil {
				return nil, err
			}
			var steps []operation.Step
			for i, name := range stepNames {
				step := operation.Step{
					Name: name,
					Do:   func(ctx context.Context, r *operation.Run) error { return w.effect(ctx, name) },
					Undo: func(ctx context.Context, r *operation.Run) error { return w.effect(ctx, name+"/undo") },
				}
				if i == len(stepNames)-1 && how != succeeding {
					step.Cancellable = true
					step.Do = func(ctx context.Context, r *operation.Run) error {
						if err := w.effect(ctx, name); err != nil {
							return err
						}
						if how == failing {
							return errors.New("it does not boot")
						}
						if err := cancel(ctx, r); err != nil {
							return err
						}
						<-ctx.Done()
						return context.Cause(ctx)
					}
				}
				steps = append(steps, step)
			}
			return steps, nil
		},
		OnEnd: func(ctx context.Context, r *operation.Run, final operation.State) error { return w.effect(ctx, "end") },
	}
}

// work runs the world's one operation, submitting it first if it is new, until it has ended.
func work(ctx context.Context, w world, how ending) (operation.Record, error) {
	s, err := store.Open(context.Background(), filepath.Join(w.dir, "store.db"))
	if err != nil {
		return operation.Record{}, err
	}
	defer s.Close()
	var r *operation.Runner
	def := w.definition(func(ctx context.Context, run *operation.Run) error { return r.Cancel(ctx, run.ID()) })
	r, err = operation.NewRunner(operation.Config{
		Store: watched{s, w}, Owner: "server", Definitions: []operation.Definition{def},
		LeaseDuration: time.Hour, // a restarted owner does not wait for it
	})
	if err != nil {
		return operation.Record{}, err
	}
	const id = "op-1"
	if _, err := r.Get(ctx, id); err != nil {
		params, _ := json.Marshal(how)
		if _, err := r.Submit(ctx, operation.Record{ID: id, Kind: "switch", Protection: "p-1", Params: params}); err != nil {
			return operation.Record{}, err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	records, err := r.Watch(ctx, id)
	if err == nil {
		for range records {
		}
	}
	cancel()
	if err := errors.Join(err, <-done); err != nil {
		return operation.Record{}, err
	}
	return s.Operation(context.Background(), id)
}

// check compares what happened with what must have.
func (w world) check(t *testing.T, how ending, rec operation.Record) {
	t.Helper()
	wantState(t, rec, how.state())
	data, err := os.ReadFile(filepath.Join(w.dir, "effects"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(how.effects(), strings.Fields(string(data))); diff != "" {
		t.Errorf("effects (-want +got):\n%s", diff)
	}
	for _, s := range rec.Steps {
		want := operation.StepDone
		if how != succeeding {
			want = operation.StepUndone
		}
		if s.State != want {
			t.Errorf("step %s is %s, want %s", s.Name, s.State, want)
		}
	}
}

// cells generates every place for every ending.
func cells(t *testing.T, test func(t *testing.T, how ending, c cell)) {
	for _, how := range []ending{succeeding, failing, cancelling} {
		for _, effect := range how.effects() {
			for _, when := range []string{"before", "after", "outcome"} {
				if how == cancelling && effect == "start" && when == "outcome" {
					continue // its outcome is the interruption: stored with the undo's intention, as in failing
				}
				t.Run(fmt.Sprintf("%s/%s/%s", how, strings.ReplaceAll(effect, "/", "-"), when), func(t *testing.T) {
					test(t, how, cell{effect, when})
				})
			}
		}
	}
}

// memoryDir returns a temporary folder in memory where the system has one: a
// killed process loses nothing it wrote there, and many fsyncs cost nothing.
func memoryDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "switchback-operation-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// TestStopped stops the Runner in every cell and starts another.
func TestStopped(t *testing.T) {
	cells(t, func(t *testing.T, how ending, c cell) {
		t.Parallel()
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		w := world{dir: memoryDir(t), cell: c, die: cancel}
		if _, err := work(ctx, w, how); err != nil && ctx.Err() == nil {
			t.Fatal(err)
		}
		if ctx.Err() == nil {
			t.Fatal("the cell was not reached")
		}
		ctx, cancel = context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		rec, err := work(ctx, w, how)
		if err != nil {
			t.Fatal(err)
		}
		w.check(t, how, rec)
	})
}

const childEnv = "SWITCHBACK_OPERATION_TEST_CHILD"

type child struct {
	Dir    string
	Ending ending
	Cell   cell
}

// TestMain is also the program that TestKilled kills.
func TestMain(m *testing.M) {
	spec := os.Getenv(childEnv)
	if spec == "" {
		os.Exit(m.Run())
	}
	var c child
	if err := json.Unmarshal([]byte(spec), &c); err != nil {
		panic(err)
	}
	w := world{dir: c.Dir, cell: c.Cell, die: func() {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}}
	if _, err := work(context.Background(), w, c.Ending); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// TestKilled kills a real process by SIGKILL in every cell and starts it again
// under the same owner name: it goes on at once, though its lease has an hour to run.
func TestKilled(t *testing.T) {
	cells(t, func(t *testing.T, how ending, c cell) {
		t.Parallel()
		w := world{dir: memoryDir(t)}
		spec, err := json.Marshal(child{w.dir, how, c})
		if err != nil {
			t.Fatal(err)
		}
		start := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), childEnv+"="+string(spec))
			cmd.Stderr = os.Stderr
			return cmd.Run()
		}
		var exit *exec.ExitError
		err = start()
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("the cell was not reached: %v", err)
		}
		if err := start(); err != nil {
			t.Fatal(err)
		}
		s, err := store.Open(t.Context(), filepath.Join(w.dir, "store.db"))
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		rec, err := s.Operation(t.Context(), "op-1")
		if err != nil {
			t.Fatal(err)
		}
		w.check(t, how, rec)
		// Cells are real: the second process took the lease over.
		if c != (cell{"end", "outcome"}) && rec.Lease.Epoch != 2 {
			t.Errorf("lease epoch is %d, want 2", rec.Lease.Epoch)
		}
	})
}

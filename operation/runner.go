package operation

import (
	"context"
	"crypto/rand"
	"encoding/base32"
	"encoding/binary"
	"log/slog"
	"strings"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Config says how a Runner works. Store, Definitions and Owner are required.
type Config struct {
	Store       Store
	Definitions []Definition
	// Owner names this process; the same after a restart, different from every
	// other living process on the store.
	Owner string
	// LeaseDuration is how long a dead Runner keeps others away; 10 s if zero.
	// Clocks of the Runners on one store may differ by a quarter of it.
	LeaseDuration time.Duration
	// PollInterval is how often other Runners' abandoned work is looked for; 1 s if zero.
	PollInterval time.Duration
	// ProgressInterval is how often progress is stored; 1 s if zero.
	ProgressInterval time.Duration
	// RetryMin and RetryMax bound the wait between attempts of a step; 500 ms and 15 s if zero.
	RetryMin, RetryMax time.Duration
	// Now is the clock; time.Now if nil.
	Now    func() time.Time
	Logger *slog.Logger
}

// Runner runs operations. Its methods may be called from several goroutines;
// all but Run work whether or not Run does.
type Runner struct {
	cfg  Config
	defs map[string]Definition
	wake chan struct{}

	mu     sync.Mutex
	live   map[switchback.OperationID]*live
	lastID int64 // milliseconds of the newest ID
}

// NewRunner checks cfg and returns a Runner that does nothing until Run.
func NewRunner(cfg Config) (*Runner, error) {
	if cfg.Store == nil || cfg.Owner == "" {
		return nil, switchback.Errorf(switchback.CodeInvalid, "a runner needs a store and an owner")
	}
	setDefault(&cfg.LeaseDuration, 10*time.Second)
	setDefault(&cfg.PollInterval, time.Second)
	setDefault(&cfg.ProgressInterval, time.Second)
	setDefault(&cfg.RetryMin, 500*time.Millisecond)
	setDefault(&cfg.RetryMax, 15*time.Second)
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Runner{
		cfg:  cfg,
		defs: map[string]Definition{},
		wake: make(chan struct{}, 1),
		live: map[switchback.OperationID]*live{},
	}
	for _, d := range cfg.Definitions {
		if d.Kind == "" || d.Steps == nil {
			return nil, switchback.Errorf(switchback.CodeInvalid, "definition %q needs a kind and steps", d.Kind)
		}
		if _, ok := r.defs[d.Kind]; ok {
			return nil, switchback.Errorf(switchback.CodeInvalid, "operation kind %q is defined twice", d.Kind)
		}
		r.defs[d.Kind] = d
	}
	return r, nil
}

func setDefault(d *time.Duration, v time.Duration) {
	if *d <= 0 {
		*d = v
	}
}

// Submit makes a new operation durable and returns it, queued or awaiting approval, before any of
// its effects. Of req it takes Kind, Protection, Lane, Title, Params, RequestedBy, Request, Approval, and
// ID, where the caller wants a repeated Submit to be refused (CodeConflict).
// CodeConflict also: an unfinished operation works on the same protection in the same lane, or the request's key was used.
func (r *Runner) Submit(ctx context.Context, req Record) (Record, error) {
	def, ok := r.defs[req.Kind]
	if !ok {
		return Record{}, switchback.Errorf(switchback.CodeInvalid, "unknown operation kind %q", req.Kind)
	}
	steps, err := def.Steps(req.Params)
	if err != nil {
		return Record{}, err
	}
	now := r.cfg.Now().UTC()
	rec := Record{
		ID: req.ID, Kind: req.Kind, Protection: req.Protection, Lane: req.Lane, Title: req.Title,
		Params: req.Params, RequestedBy: req.RequestedBy, Request: req.Request,
		Approval: req.Approval, State: StateQueued, CreatedAt: now,
	}
	if !rec.Approval.Given() {
		rec.State = StateAwaiting
	}
	if rec.ID == "" {
		rec.ID = r.newID(now)
	}
	if rec.Title == "" {
		rec.Title = rec.Kind
	}
	for _, s := range steps {
		if rec.Step(s.Name) != nil || s.Name == "" || s.Do == nil {
			return Record{}, switchback.Errorf(switchback.CodeInternal, "definition of %q: bad step %q", req.Kind, s.Name)
		}
		rec.Steps = append(rec.Steps, StepRecord{Name: s.Name, Title: s.Title, State: StepPending})
	}
	if err := r.cfg.Store.CreateOperation(ctx, rec); err != nil {
		return Record{}, err
	}
	r.kick()
	return rec, nil
}

// newID mints an ID that sorts after every older one of this process.
func (r *Runner) newID(now time.Time) switchback.OperationID {
	r.mu.Lock()
	ms := max(now.UnixMilli(), r.lastID+1)
	r.lastID = ms
	r.mu.Unlock()
	var b [12]byte
	binary.BigEndian.PutUint64(b[:8], uint64(ms)<<16)
	_, _ = rand.Read(b[6:10]) // never fails
	return switchback.OperationID("op-" + strings.ToLower(base32.HexEncoding.EncodeToString(b[:10])))
}

// Get returns an operation, with its newest progress if it runs here.
func (r *Runner) Get(ctx context.Context, id switchback.OperationID) (Record, error) {
	if l := r.underWay(id); l != nil {
		return l.snapshot(), nil
	}
	return r.cfg.Store.Operation(ctx, id)
}

// Cancel asks for an operation to be stopped and undone; it returns when the
// request is durable, not when it is fulfilled. CodeRefused says why it cannot
// be. Idempotent.
func (r *Runner) Cancel(ctx context.Context, id switchback.OperationID) error {
	rec, err := r.cfg.Store.Operation(ctx, id)
	if err != nil {
		return err
	}
	if rec.State == StateCancelled {
		return nil
	}
	if err := rec.CanCancel(); err != nil {
		return err
	}
	switch rec.State {
	case StateUndoing:
		return nil
	case StateAwaiting:
		if err = r.release(ctx, cancelled(rec)); switchback.CodeOf(err) == switchback.CodeConflict {
			return r.Cancel(ctx, id) // it was approved or cancelled meanwhile
		}
		return err
	case StateFailed:
		err = r.cfg.Store.ReopenOperation(ctx, Abandon(rec))
	default:
		err = r.cfg.Store.RequestCancel(ctx, id)
	}
	if err != nil {
		return err
	}
	if l := r.running(id); l != nil {
		l.requestCancel()
	}
	r.kick()
	return nil
}

// Retry makes a failed operation go on from the step, or the Undo, that
// failed. CodeRefused: it has not failed. CodeConflict: a newer operation has
// worked on the same protection since.
func (r *Runner) Retry(ctx context.Context, id switchback.OperationID) error {
	rec, err := r.cfg.Store.Operation(ctx, id)
	if err != nil {
		return err
	}
	if err := rec.CanRetry(); err != nil {
		return err
	}
	if err := r.cfg.Store.ReopenOperation(ctx, Reopen(rec)); err != nil {
		return err
	}
	r.kick()
	return nil
}

// Watch sends the operation as it is now, after each change, and several times
// a second where nothing changes, until it has finished or ctx is done; then it
// closes the channel. A slow receiver misses records in between, never the last
// one. An unknown operation is CodeNotFound.
func (r *Runner) Watch(ctx context.Context, id switchback.OperationID) (<-chan Record, error) {
	if _, err := r.Get(ctx, id); err != nil {
		return nil, err
	}
	out := make(chan Record)
	go func() {
		defer close(out)
		for {
			var rec Record
			var changed <-chan struct{}
			if l := r.underWay(id); l != nil {
				rec, changed = l.watch()
			} else {
				var err error
				if rec, err = r.cfg.Store.Operation(ctx, id); err != nil {
					return
				}
			}
			select {
			case out <- rec:
			case <-ctx.Done():
				return
			}
			if rec.State.Finished() {
				return
			}
			select {
			case <-changed:
			case <-time.After(min(r.cfg.PollInterval, time.Second/4)):
			case <-ctx.Done():
				return
			}
			// At most ten records a second.
			select {
			case <-time.After(time.Second / 10):
			case <-ctx.Done():
				return
			}
		}
	}()
	return out, nil
}

// Run takes and runs operations until ctx is done, then interrupts the steps,
// waits for them and returns nil. Interrupted operations go on at the next Run.
func (r *Runner) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ticker := time.NewTicker(r.cfg.PollInterval)
	defer ticker.Stop()
	away := false
	for {
		err := r.claim(ctx, &wg)
		switch {
		case ctx.Err() != nil:
		case err != nil && !away:
			r.cfg.Logger.Warn("operations not listed, trying again", "error", err)
		case err == nil && away:
			r.cfg.Logger.Info("operations are listed again")
		}
		away = err != nil
		select {
		case <-ctx.Done():
			return nil
		case <-r.wake:
		case <-ticker.C:
		}
	}
}

// claim takes every operation there is to take and starts it.
func (r *Runner) claim(ctx context.Context, wg *sync.WaitGroup) error {
	ids, err := r.cfg.Store.ClaimableOperations(ctx, r.cfg.Owner, r.cfg.Now())
	if err != nil {
		return err
	}
	for _, id := range ids {
		if r.running(id) != nil {
			continue
		}
		now := r.cfg.Now()
		rec, err := r.cfg.Store.ClaimOperation(ctx, id, r.cfg.Owner, now, now.Add(r.cfg.LeaseDuration))
		if switchback.CodeOf(err) == switchback.CodeConflict {
			continue // another Runner was faster, or it has ended
		}
		if err != nil {
			return err
		}
		r.start(ctx, rec, wg)
	}
	return nil
}

func (r *Runner) start(ctx context.Context, rec Record, wg *sync.WaitGroup) {
	l := &live{
		runner:    r,
		def:       r.defs[rec.Kind],
		rec:       rec,
		savedAt:   r.cfg.Now(),
		cancelled: make(chan struct{}),
		changed:   make(chan struct{}),
	}
	if rec.CancelRequested {
		close(l.cancelled)
	}
	l.ctx, l.stop = context.WithCancelCause(context.WithoutCancel(ctx))
	l.expiry = time.AfterFunc(r.cfg.LeaseDuration*3/4, func() { l.stop(errLeaseLost) })
	release := context.AfterFunc(ctx, func() { l.stop(errStopped) })
	l.machine = Machine{RetryMin: r.cfg.RetryMin, RetryMax: r.cfg.RetryMax}
	problem := l.bind()

	r.mu.Lock()
	r.live[rec.ID] = l
	r.mu.Unlock()
	wg.Go(func() {
		defer r.kick() // what became claimable meanwhile
		defer func() {
			r.mu.Lock()
			delete(r.live, rec.ID)
			r.mu.Unlock()
			release()
			l.expiry.Stop()
			l.stop(nil)
		}()
		if problem != nil {
			failed := End(l.snapshot(), StateFailed, r.cfg.Now())
			failed.Error = switchback.Flatten(problem)
			_ = l.persist(failed)
			return
		}
		msg := "operation resumed"
		if rec.State == StateQueued {
			msg = "operation started"
		}
		l.log(slog.LevelInfo, "", msg, "owner", rec.Lease.Owner, "lease_epoch", rec.Lease.Epoch)
		l.run()
	})
}

// bind finds the steps of the definition that belong to the record's.
func (l *live) bind() error {
	if l.def.Steps == nil {
		return switchback.Errorf(switchback.CodeUnsupported, "this version knows no operation of kind %q", l.rec.Kind).
			WithHint("run the version that started it, then retry")
	}
	steps, err := l.def.Steps(l.rec.Params)
	if err != nil {
		return err
	}
	for _, s := range l.rec.Steps {
		for i := range steps {
			if steps[i].Name == s.Name {
				l.machine.Steps = append(l.machine.Steps, steps[i])
			}
		}
	}
	if len(l.machine.Steps) != len(l.rec.Steps) {
		return switchback.Errorf(switchback.CodeUnsupported, "this version knows other steps of %q", l.rec.Kind).
			WithHint("run the version that started it, then retry")
	}
	return nil
}

// running returns the run of an operation that this Runner has in hand.
func (r *Runner) running(id switchback.OperationID) *live {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.live[id]
}

// underWay is running, but for a run that has ended and is about to be put
// away: what holds then is in the store, where the operation may have been
// reopened since.
func (r *Runner) underWay(id switchback.OperationID) *live {
	if l := r.running(id); l != nil && !l.snapshot().State.Finished() {
		return l
	}
	return nil
}

func (r *Runner) kick() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

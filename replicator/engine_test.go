package replicator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/hypervisor"
)

const testProtection = "p-0123456789ab"

// pair is a VM, its target, and the engine between them.
type pair struct {
	t      *testing.T
	cfg    Config
	vm     *fakeVM
	target *fakeTarget
	e      *Engine
	head   switchback.Sequence
}

func newPair(t *testing.T, disks []switchback.Disk, kept map[string][]byte) *pair {
	t.Helper()
	dir := tempDir(t)
	p := &pair{t: t, vm: newFakeVM(disks), target: newFakeTarget(t, disks, kept)}
	p.cfg = Config{Protection: testProtection, VM: "uuid", Epoch: 1, Disks: disks, Policy: switchback.DefaultPolicy(),
		Hypervisor: p.vm, Target: p.target, OpenOffline: p.vm.openOffline,
		Dir: dir + "/index", ScratchDir: dir + "/scratch", SocketDir: dir, ScratchReserveBytes: 1,
		MakeScratch: func(_ context.Context, path string, _ int64) error { return os.WriteFile(path, nil, 0o600) }}
	p.start()
	t.Cleanup(func() {
		p.e.Close()
		p.vm.dead = false
		if err := p.vm.EndBackup(context.Background(), ""); err != nil {
			t.Error(err)
		}
	})
	return p
}

func (p *pair) start() {
	p.t.Helper()
	var err error
	if p.e, err = New(p.cfg); err != nil {
		p.t.Fatal(err)
	}
}

// restart is an agent that ended and was started again.
func (p *pair) restart() {
	p.t.Helper()
	if err := p.e.Close(); err != nil {
		p.t.Fatal(err)
	}
	p.vm.dead = false
	p.start()
}

// cycle takes a point that must succeed, in the mode, and compares.
func (p *pair) cycle(mode Mode) CycleReport {
	p.t.Helper()
	r, err := p.e.Cycle(context.Background(), CycleOptions{})
	if err != nil {
		p.t.Fatalf("cycle: %v", err)
	}
	if r.Mode != mode {
		p.t.Errorf("point %d: mode %s (%s), want %s", r.Point.Sequence, r.Mode, r.Reason, mode)
	}
	p.equal()
	return r
}

// equal fails unless the newest point is the instant of the newest job.
func (p *pair) equal() {
	p.t.Helper()
	for disk, set := range differing(p.vm.frozen, p.target.content()) {
		if !set.IsEmpty() {
			p.t.Fatalf("point %d differs from the source in %s at %v", p.target.replica.Head().Sequence, disk, set.Ranges())
		}
	}
	if d := cmp.Diff([]string{p.target.replica.Head().Checkpoint}, slices.DeleteFunc(p.vm.names(), func(s string) bool { return !strings.HasPrefix(s, "sb-") })); d != "" {
		p.t.Errorf("checkpoints after point %d: %s", p.target.replica.Head().Sequence, d)
	}
	if p.vm.job != nil && p.vm.state != hypervisor.StateOff {
		p.t.Error("a backup job is left open")
	}
}

// cycleDisks have together less than one batch of a seed.
func cycleDisks() []switchback.Disk {
	return []switchback.Disk{{Name: "vda", SizeBytes: 1 << 20}, {Name: "vdb", SizeBytes: 640<<10 + 512}}
}

// scribble writes at random, often what a block held before.
func (p *pair) scribble(rng *rand.Rand) {
	for range 1 + rng.IntN(5) {
		d := p.cfg.Disks[rng.IntN(len(p.cfg.Disks))]
		off := rng.Int64N(d.SizeBytes/512) * 512
		n := min(d.SizeBytes-off, 512*(1+rng.Int64N(100)))
		p.vm.write(d.Name, off, bytes.Repeat([]byte{byte(rng.IntN(4))}, int(n)))
	}
}

// TestCycles: random writes, also while a point is being sent; errors at every
// call of the target before, in and after their effect; agents killed with a
// job open. Every point equals its instant, and nothing that was acknowledged
// is sent again.
func TestCycles(t *testing.T) {
	failed := map[string]int{}
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			p := newPair(t, cycleDisks(), nil)
			p.vm.noRecords = seed%2 == 1
			p.scribble(rng)
			rate := 0
			p.target.fail = func(call string) when {
				if call == "point" {
					p.scribble(rng) // the guest goes on
				}
				if rng.IntN(100) >= rate {
					return never
				}
				w := before + when(rng.IntN(3))
				failed[fmt.Sprint(call, w)]++
				return w
			}
			if seed == 0 { // without any failure
				p.cycle(ModeSeed)
			}
			doubt := map[string]extent.Set{}
			for range 20 {
				p.scribble(rng)
				if seed > 0 {
					rate = 30
				}
				lostAnswer := false
				for attempt := 0; ; attempt++ {
					if attempt == 8 {
						rate = 0
					}
					seeded := !p.target.replica.Manifest().Seeding
					var held map[string][]byte
					if seeded {
						held = p.target.content()
					}
					head := p.target.replica.Head().Sequence
					r, err := p.e.Cycle(context.Background(), CycleOptions{})
					now := p.target.replica.Head().Sequence
					if now > head && seeded {
						changed, cerr := p.target.replica.ChangedAfter(head)
						if cerr != nil {
							t.Fatal(cerr)
						}
						for disk, set := range changed {
							again := set.Subtract(differing(held, p.target.content())[disk]).Subtract(doubt[disk])
							if !again.IsEmpty() {
								t.Fatalf("point %d sends %v of %s again", now, again.Ranges(), disk)
							}
						}
						doubt = map[string]extent.Set{}
					}
					if err == nil {
						if r.Mode == ModeResync {
							t.Errorf("point %d: resync: %s", r.Point.Sequence, r.Reason)
						}
						p.equal()
						break
					}
					if !errors.Is(err, errLost) {
						t.Fatalf("cycle: %v", err)
					}
					if now == head && seeded { // what may have arrived of it is not known
						for disk, set := range differing(p.vm.frozen, held) {
							doubt[disk] = doubt[disk].Union(set)
						}
					}
					lostAnswer = lostAnswer || now > head
					if rng.IntN(3) == 0 {
						p.restart()
					}
				}
			}
		})
	}
	for _, call := range []string{"state", "point", "seed"} {
		for w := before; w <= after; w++ {
			if failed[fmt.Sprint(call, w)] == 0 && (call != "seed" || w == before) {
				t.Errorf("no %s failed in the way %d", call, w)
			}
		}
	}
}

// TestKilledAgent: whoever is killed with a job open, before or after the target
// has the point, the next cycle goes on from the match.
func TestKilledAgent(t *testing.T) {
	for _, w := range []when{before, during, after} {
		t.Run(fmt.Sprint(w), func(t *testing.T) {
			p := newPair(t, cycleDisks(), nil)
			p.cycle(ModeSeed)
			p.vm.write("vda", 0, bytes.Repeat([]byte{1}, 10000))
			p.target.fail = func(call string) when {
				if call != "point" {
					return never
				}
				if w != after {
					p.vm.kill()
				}
				return w
			}
			p.target.done = func(call string) {
				if call == "point" {
					p.vm.kill()
				}
			}
			if _, err := p.e.Cycle(context.Background(), CycleOptions{}); err == nil {
				t.Fatal("the killed agent's cycle succeeded")
			}
			p.target.fail, p.target.done = func(string) when { return never }, func(string) {}
			if len(p.vm.names()) != 2 {
				t.Fatalf("the killed agent left checkpoints %v: nothing is tested", p.vm.names())
			}
			p.vm.write("vdb", 0, bytes.Repeat([]byte{2}, 512))
			p.restart()
			r := p.cycle(ModeIncremental)
			want := int64(BlockSize)
			if w != after {
				want += 3 * BlockSize
			}
			if w == after && r.Point.Sequence != 3 || w != after && r.Point.Sequence != 2 {
				t.Errorf("the next point is %d", r.Point.Sequence)
			}
			if r.ChangedBytes != want {
				t.Errorf("%d bytes were sent, want %d", r.ChangedBytes, want)
			}
		})
	}
}

// TestSeedResumes: a first copy that is interrupted after a durable mark sends
// the rest only, in the same process and in a new one.
func TestSeedResumes(t *testing.T) {
	const size = 28 << 20 // three batches and a half
	disks := []switchback.Disk{{Name: "vda", SizeBytes: size}}
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart=%v", restart), func(t *testing.T) {
			p := newPair(t, disks, nil)
			// A clock by which each batch is flushed.
			clock := time.Unix(0, 0)
			p.cfg.Now = func() time.Time { clock = clock.Add(seedFlushEvery); return clock }
			p.cfg.Policy.Compression = "none"
			p.restart()
			rng := rand.New(rand.NewPCG(1, 1))
			for off := int64(0); off < size; off += 1 << 20 {
				b := make([]byte, 1<<20)
				for i := range b {
					b[i] = byte(rng.Uint32()) | 1
				}
				p.vm.write("vda", off, b)
			}
			seeds := 0
			p.target.fail = func(call string) when {
				if call == "seed" {
					if seeds++; seeds == 3 {
						return before
					}
				}
				return never
			}
			if _, err := p.e.Cycle(context.Background(), CycleOptions{}); !errors.Is(err, errLost) {
				t.Fatalf("error %v, want %v", err, errLost)
			}
			if s := p.e.Status(); len(s.Conditions) != 1 || s.Conditions[0].Name != "target-unreachable" || s.LastPoint != nil {
				t.Errorf("status %+v", s)
			}
			first := p.target.body
			p.vm.write("vda", 5<<20, bytes.Repeat([]byte{9}, BlockSize)) // in what was sent already
			if restart {
				p.restart()
			}
			r := p.cycle(ModeSeed)
			if r.Reason != "the first full copy goes on" {
				t.Errorf("reason %q", r.Reason)
			}
			if first < 16<<20 || r.ChangedBytes > size-16<<20+BlockSize || r.ReadBytes != size {
				t.Errorf("first %d bytes, then %d changed of %d read", first, r.ChangedBytes, r.ReadBytes)
			}
			if d := cmp.Diff(CycleReport{}.Point.Parent, r.Point.Parent); d != "" || r.Point.Digest != "session" || r.Point.Sequence != 1 {
				t.Errorf("point %+v", r.Point)
			}
			p.vm.write("vda", 27<<20, make([]byte, 1<<20)) // zeros where there was content
			p.cycle(ModeIncremental)
		})
	}
}

// TestSeedOntoANewBase: a base that was made anew gets everything.
func TestSeedOntoANewBase(t *testing.T) {
	p := newPair(t, cycleDisks(), nil)
	p.vm.write("vda", 0, bytes.Repeat([]byte{1}, 1<<20))
	p.target.fail = func(call string) when {
		if call == "finish" {
			return before
		}
		return never
	}
	if _, err := p.e.Cycle(context.Background(), CycleOptions{}); !errors.Is(err, errLost) {
		t.Fatal(err)
	}
	// The target lost its storage meanwhile.
	p.target = newFakeTarget(t, p.cfg.Disks, nil)
	p.target.session = "another"
	p.cfg.Target = p.target
	p.restart()
	if r := p.cycle(ModeSeed); r.ChangedBytes != 1<<20 {
		t.Errorf("%d bytes were sent, want all", r.ChangedBytes)
	}
}

// TestFinishSeedAnswerLost: the first point exists though nobody was told.
func TestFinishSeedAnswerLost(t *testing.T) {
	p := newPair(t, cycleDisks(), nil)
	p.vm.write("vda", 0, bytes.Repeat([]byte{1}, 100<<10))
	p.target.fail = func(call string) when {
		if call == "finish" {
			return after
		}
		return never
	}
	if _, err := p.e.Cycle(context.Background(), CycleOptions{}); !errors.Is(err, errLost) {
		t.Fatal(err)
	}
	p.vm.write("vda", 0, []byte{2})
	if r := p.cycle(ModeIncremental); r.ChangedBytes != BlockSize || r.Point.Sequence != 2 {
		t.Errorf("point %d with %d bytes", r.Point.Sequence, r.ChangedBytes)
	}
}

func TestOfflinePoint(t *testing.T) {
	p := newPair(t, cycleDisks(), nil)
	p.vm.write("vda", 0, bytes.Repeat([]byte{1}, 100<<10))
	p.cycle(ModeSeed)
	p.vm.write("vda", 0, bytes.Repeat([]byte{2}, 5000))
	before := p.cycle(ModeIncremental)
	p.vm.write("vdb", 640<<10, bytes.Repeat([]byte{3}, 512)) // the short last block
	p.vm.state = hypervisor.StateOff
	r, err := p.e.Cycle(context.Background(), CycleOptions{Offline: true})
	if err != nil {
		t.Fatal(err)
	}
	p.equal()
	if r.Point.Kind != switchback.ShutdownConsistent || r.Point.Checkpoint != before.Point.Checkpoint || r.Mode != ModeIncremental || r.ChangedBytes != 512 {
		t.Errorf("point %+v by %s with %d bytes", r.Point, r.Mode, r.ChangedBytes)
	}
	// Undone: the guest is started again, and goes on from there.
	p.vm.state = hypervisor.StateRunning
	p.vm.write("vda", 0, bytes.Repeat([]byte{4}, 10))
	if r := p.cycle(ModeIncremental); r.ChangedBytes != BlockSize {
		t.Errorf("%d bytes after the shutdown, want one block", r.ChangedBytes)
	}
}

func TestOfflineBitmapLost(t *testing.T) {
	p := newPair(t, cycleDisks(), nil)
	p.cycle(ModeSeed)
	p.vm.write("vda", 0, bytes.Repeat([]byte{1}, 512))
	p.vm.lost["sb-1-1"] = true
	p.vm.state = hypervisor.StateOff
	r, err := p.e.Cycle(context.Background(), CycleOptions{Offline: true})
	if err != nil {
		t.Fatal(err)
	}
	if r.Mode != ModeResync || !r.Point.Resync || r.Point.ResyncReason == "" || r.Point.Checkpoint != "" {
		t.Errorf("point %+v by %s", r.Point, r.Mode)
	}
	for disk, set := range differing(p.vm.frozen, p.target.content()) {
		if !set.IsEmpty() {
			t.Errorf("%s differs at %v", disk, set.Ranges())
		}
	}
}

// TestResync: whenever no bitmap can be trusted all is read, the point says so,
// and only what differs is sent.
func TestResync(t *testing.T) {
	for _, c := range []struct {
		name   string
		lose   func(p *pair)
		reason string
	}{
		{"the bitmap is lost", func(p *pair) { p.vm.lost["sb-1-2"] = true }, "is lost"},
		{"the checkpoint is gone", func(p *pair) { p.vm.checkpoints = nil }, "is not in the domain"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, cycleDisks(), nil)
			p.vm.write("vda", 0, bytes.Repeat([]byte{1}, 1<<20))
			p.cycle(ModeSeed)
			p.cycle(ModeIncremental)
			p.vm.write("vda", 4096, bytes.Repeat([]byte{2}, 4096))
			c.lose(p)
			r := p.cycle(ModeResync)
			if !r.Point.Resync || !strings.Contains(r.Point.ResyncReason, c.reason) || r.Reason != r.Point.ResyncReason {
				t.Errorf("point says %v, %q", r.Point.Resync, r.Point.ResyncReason)
			}
			if r.DirtyBytes != switchback.DisksSize(p.cfg.Disks) || r.ChangedBytes != BlockSize {
				t.Errorf("%d looked at, %d sent", r.DirtyBytes, r.ChangedBytes)
			}
			p.vm.write("vdb", 0, []byte{1})
			p.cycle(ModeIncremental)
		})
	}
}

// TestVoidIndex: without its index the source sends what is dirty whether or
// not it is known, and nothing else.
func TestVoidIndex(t *testing.T) {
	p := newPair(t, cycleDisks(), nil)
	p.vm.noRecords = true
	p.vm.write("vda", 0, bytes.Repeat([]byte{1}, 512<<10))
	p.cycle(ModeSeed)
	p.vm.write("vda", 0, []byte{2})
	if err := os.RemoveAll(p.cfg.Dir); err != nil {
		t.Fatal(err)
	}
	p.restart()
	if r := p.cycle(ModeIncremental); r.ChangedBytes != bitmapGrain {
		t.Errorf("%d bytes were sent, want the %d that the bitmap names", r.ChangedBytes, bitmapGrain)
	}
	p.vm.write("vda", 0, []byte{3})
	if r := p.cycle(ModeIncremental); r.ChangedBytes != BlockSize {
		t.Errorf("%d bytes were sent, want one block", r.ChangedBytes)
	}
}

// TestHomeward: over kept disks the first point carries what the bitmap and
// MustSend name, and only that.
func TestHomeward(t *testing.T) {
	disks := cycleDisks()
	kept := map[string][]byte{"vda": bytes.Repeat([]byte{1}, 1<<20), "vdb": bytes.Repeat([]byte{1}, 640<<10+512)}
	p := newPair(t, disks, kept)
	p.vm.noRecords = true
	p.target.checkpoint = "sb-2-0"
	p.vm.disks = map[string][]byte{"vda": bytes.Clone(kept["vda"]), "vdb": bytes.Clone(kept["vdb"])}
	// Points that were abandoned had changed the far end of vdb at the old site.
	copy(p.vm.disks["vdb"][600<<10:], bytes.Repeat([]byte{7}, 8192))
	p.vm.checkpoints = []fakeCheckpoint{{"sb-2-0", map[string]extent.Set{}}}
	p.vm.write("vda", 128<<10, bytes.Repeat([]byte{5}, 100))
	p.cfg.Epoch, p.cfg.MustSend = 2, map[string]extent.Set{"vdb": extent.NewSet(extent.Range{Offset: 600 << 10, Length: 8192})}
	p.restart()
	r := p.cycle(ModeIncremental)
	if r.Point.Sequence != 1 || r.ChangedBytes != bitmapGrain+8192 {
		t.Errorf("point %d with %d bytes, want %d", r.Point.Sequence, r.ChangedBytes, bitmapGrain+8192)
	}
	p.vm.write("vda", 128<<10, []byte{6}) // in what the first point has made known
	if r := p.cycle(ModeIncremental); r.ChangedBytes != BlockSize {
		t.Errorf("second point with %d bytes, want one block", r.ChangedBytes)
	}
	p.vm.write("vda", 0, []byte{1}) // in what nobody knows anything of
	if r := p.cycle(ModeIncremental); r.ChangedBytes != bitmapGrain {
		t.Errorf("third point with %d bytes, want %d", r.ChangedBytes, bitmapGrain)
	}
}

// TestRefusals: what a cycle must not touch, and what it leaves behind.
func TestRefusals(t *testing.T) {
	seeded := func(p *pair) { p.cycle(ModeSeed) }
	for _, c := range []struct {
		name      string
		prepare   func(p *pair)
		offline   bool
		code      switchback.Code
		condition string
		begun     int
	}{
		{"a newer epoch at the target", func(p *pair) { seeded(p); p.target.epoch = 2 }, false, switchback.CodeStaleEpoch, "stale-epoch", 1},
		{"the VM is off", func(p *pair) { seeded(p); p.vm.state = hypervisor.StateOff }, false, switchback.CodeConflict, "source-not-running", 1},
		{"the VM runs though it should be off", seeded, true, switchback.CodeConflict, "source-not-running", 1},
		{"off before the first copy", func(p *pair) { p.vm.state = hypervisor.StateOff }, true, switchback.CodeConflict, "source-not-running", 0},
		{"scratch space in reserve", func(p *pair) { seeded(p); p.e.cfg.ScratchReserveBytes = 1 << 62 }, false, switchback.CodeNoSpace, "source-scratch-out-of-space", 1},
		{"a disk has grown", func(p *pair) { seeded(p); p.vm.disks["vdb"] = make([]byte, 2<<20) }, false, switchback.CodeUnsupported, "replication-failing", 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t, cycleDisks(), nil)
			c.prepare(p)
			checkpoints := p.vm.names()
			_, err := p.e.Cycle(context.Background(), CycleOptions{Offline: c.offline})
			if switchback.CodeOf(err) != c.code {
				t.Fatalf("error %v, want %s", err, c.code)
			}
			if s := p.e.Status(); len(s.Conditions) != 1 || s.Conditions[0].Name != c.condition || s.Activity != "idle" {
				t.Errorf("while %q: conditions %+v, want %s", s.Activity, s.Conditions, c.condition)
			}
			if p.vm.begun != c.begun || p.vm.job != nil {
				t.Errorf("%d jobs were begun, want %d; one is open: %v", p.vm.begun, c.begun, p.vm.job != nil)
			}
			if d := cmp.Diff(checkpoints, p.vm.names()); d != "" {
				t.Errorf("checkpoints: %s", d)
			}
		})
	}
}

// TestPausedGuest: a guest that a full scratch space paused runs again.
func TestPausedGuest(t *testing.T) {
	for _, c := range []struct {
		reason hypervisor.PauseReason
		want   int
	}{{hypervisor.PauseIOError, 1}, {hypervisor.PauseUser, 0}} {
		p := newPair(t, cycleDisks(), nil)
		p.cycle(ModeSeed)
		// A dead agent's job, and the pause that it caused, or did not.
		if err := p.vm.BeginBackup(context.Background(), "", hypervisor.BackupSpec{Socket: p.cfg.SocketDir + "/old", Checkpoint: "sb-1-2"}); err != nil {
			t.Fatal(err)
		}
		p.vm.state, p.vm.reason = hypervisor.StatePaused, c.reason
		p.cycle(ModeIncremental)
		if p.vm.resumed != c.want {
			t.Errorf("paused by %s: resumed %d times, want %d", c.reason, p.vm.resumed, c.want)
		}
	}
}

// TestRunRetries: a target that is away is asked again at growing intervals,
// and only a newer epoch ends the engine.
func TestRunRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		var at []time.Duration
		target := &stateTarget{}
		target.state = func() (TargetState, error) {
			at = append(at, time.Since(begin))
			if len(at) == 5 {
				return TargetState{Epoch: 9}, nil
			}
			return TargetState{}, errLost
		}
		dir := tempDir(t)
		policy := switchback.DefaultPolicy()
		policy.Interval = 2 * time.Second
		e, err := New(Config{Protection: testProtection, Epoch: 1, Disks: cycleDisks(), Policy: policy, Target: target, Hypervisor: idleVM{}, Dir: dir, ScratchDir: dir, SocketDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		err = e.Run(context.Background())
		if switchback.CodeOf(err) != switchback.CodeStaleEpoch {
			t.Errorf("ended with %v", err)
		}
		want := []time.Duration{0, 2 * time.Second, 5 * time.Second, 9500 * time.Millisecond, 16250 * time.Millisecond}
		if d := cmp.Diff(want, at); d != "" {
			t.Errorf("asked at: %s", d)
		}
		if s := e.Status(); s.Running || s.Conditions[0].Name != "stale-epoch" {
			t.Errorf("status %+v", s)
		}
	})
}

// TestRunEnds: the end of the context ends a wait at once.
func TestRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		target := &stateTarget{state: func() (TargetState, error) { return TargetState{}, errLost }}
		dir := tempDir(t)
		e, err := New(Config{Protection: testProtection, Epoch: 1, Disks: cycleDisks(), Policy: switchback.DefaultPolicy(), Target: target, Hypervisor: idleVM{}, Dir: dir, ScratchDir: dir, SocketDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(7*time.Second, cancel)
		begin := time.Now()
		if err := e.Run(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v", err)
		}
		if took := time.Since(begin); took != 7*time.Second {
			t.Errorf("ended after %v", took)
		}
	})
}

// idleVM runs and has no checkpoint.
type idleVM struct{ hypervisor.Hypervisor }

func (idleVM) Domain(context.Context, switchback.VMUUID) (hypervisor.Domain, error) {
	return hypervisor.Domain{State: hypervisor.StateRunning}, nil
}

func (idleVM) Checkpoints(context.Context, switchback.VMUUID) ([]hypervisor.Checkpoint, error) {
	return nil, nil
}

// stateTarget only answers State.
type stateTarget struct {
	Target
	state func() (TargetState, error)
}

func (s *stateTarget) State(context.Context) (TargetState, error) { return s.state() }

package replicator

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/nbd"
)

// CycleOptions vary one cycle.
type CycleOptions struct {
	// Offline takes the point of a domain that is off: the last one before a
	// switch. Without it a domain that is off is CodeConflict.
	Offline bool
}

// Cycle takes one point now and returns when it is durable at the target. It
// waits for a cycle under way.
func (e *Engine) Cycle(ctx context.Context, o CycleOptions) (CycleReport, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	report, err := e.cycle(ctx, o)
	changed := ctx.Err() == nil && e.setCondition(err)
	if err != nil {
		e.indexReady, e.jobsClear = false, false
		e.history.finish(nil)
		// The guest must not stay paused until the next try.
		if !o.Offline && switchback.CodeOf(err) == switchback.CodeNoSpace {
			c, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			if cerr := e.clearJob(c); cerr != nil {
				e.log.Error("cannot see to the guest after a cycle that failed for space", "error", cerr)
			}
			cancel()
		}
		if changed {
			e.log.Warn("cycle failed, it is tried again", "mode", report.Mode, "error", err)
		}
		return report, err
	}
	e.history.finish(&report)
	level := e.log.Debug
	if report.Mode != ModeIncremental || changed {
		level = e.log.Info
	}
	level("point taken", "sequence", report.Point.Sequence, "mode", report.Mode, "reason", report.Reason,
		"changed_bytes", report.ChangedBytes, "sent_bytes", report.SentBytes, "seconds", report.Total.Seconds())
	return report, nil
}

func (e *Engine) cycle(ctx context.Context, o CycleOptions) (CycleReport, error) {
	report := CycleReport{StartedAt: e.now()}
	var state TargetState
	var dom hypervisor.Domain
	facts := Facts{Epoch: e.cfg.Epoch}
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() (err error) { state, err = e.cfg.Target.State(gctx); return err })
	g.Go(func() (err error) { dom, err = e.cfg.Hypervisor.Domain(gctx, e.cfg.VM); return atSource(err) })
	g.Go(func() (err error) { facts.Checkpoints, err = e.checkpointNames(gctx); return atSource(err) })
	err := g.Wait()
	if state.Epoch > e.cfg.Epoch {
		return report, switchback.Errorf(switchback.CodeStaleEpoch, "the target knows epoch %d, this source holds %d", state.Epoch, e.cfg.Epoch)
	}
	if err != nil {
		return report, err
	}
	facts.Target = state
	off := dom.State == hypervisor.StateOff
	if off != o.Offline {
		return report, atSource(switchback.Errorf(switchback.CodeConflict, "VM %s is %s", dom.Name, dom.State))
	}
	if !off && (!e.jobsClear || dom.State == hypervisor.StatePaused) {
		if err := e.clearJob(ctx); err != nil {
			return report, atSource(err)
		}
		e.jobsClear = true
	}
	if !off {
		if err := e.awaitAgent(ctx, dom); err != nil {
			return report, atSource(err)
		}
	}
	if state.Seeded && !e.indexReady {
		valid, err := e.index.Recover(state.Head.Digest)
		if err != nil {
			return report, err
		}
		if !valid {
			if err := e.index.SetStamp(state.Head.Digest); err != nil { // empty: all unknown, suppresses nothing
				return report, err
			}
			e.log.Info("block index is void, it starts anew", "head", state.Head.Sequence)
		}
		e.indexReady = true
	}
	d := Decide(facts)
	if d.Mode == ModeSeed {
		if off {
			return report, atSource(switchback.Errorf(switchback.CodeConflict, "VM %s is off and the target has no complete copy yet", dom.Name).
				WithHint("start the VM and wait for the first point"))
		}
		return e.seed(ctx, report, state, d)
	}
	report, err = e.point(ctx, report, state, d, off)
	if switchback.CodeOf(err) == switchback.CodeBitmapLost && d.Mode == ModeIncremental {
		facts.BitmapLost = true
		d = Decide(facts)
		return e.point(ctx, report, state, d, off)
	}
	return report, err
}

// clearJob ends a backup job that a dead agent or a failed cycle left, and
// resumes a guest that its full scratch space has paused.
func (e *Engine) clearJob(ctx context.Context) error {
	open, err := e.cfg.Hypervisor.HasBackup(ctx, e.cfg.VM)
	if err != nil {
		return err
	}
	if open {
		e.log.Info("ending a backup job left by an earlier run")
		if err := e.cfg.Hypervisor.EndBackup(ctx, e.cfg.VM); err != nil {
			return err
		}
	}
	dom, err := e.cfg.Hypervisor.Domain(ctx, e.cfg.VM)
	if err != nil {
		return err
	}
	if dom.State == hypervisor.StatePaused && dom.PauseReason == hypervisor.PauseIOError {
		e.log.Warn("resuming the guest after an I/O error during a backup job")
		return e.cfg.Hypervisor.Resume(ctx, e.cfg.VM)
	}
	return nil
}

// agentPatience is how long a cycle waits for the guest agent of a guest that boots.
const agentPatience = 15 * time.Second

// awaitAgent lets a guest agent connect before a backup job is open. Libvirt 9.0
// handles the connection in a thread that all its domains share, and has it wait
// 30 s for a job that is open; the end of that very job then waits behind it
// (seen). A guest whose agent does not come is waited for once.
func (e *Engine) awaitAgent(ctx context.Context, dom hypervisor.Domain) error {
	for begin := e.now(); dom.GuestAgent == hypervisor.AgentDisconnected && !e.agentMissed; {
		if e.now().Sub(begin) >= agentPatience {
			e.agentMissed = true
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(300 * time.Millisecond):
		}
		var err error
		if dom, err = e.cfg.Hypervisor.Domain(ctx, e.cfg.VM); err != nil {
			return err
		}
	}
	if dom.GuestAgent == hypervisor.AgentConnected {
		e.agentMissed = false
	}
	return nil
}

func (e *Engine) checkpointNames(ctx context.Context) ([]string, error) {
	list, err := e.cfg.Hypervisor.Checkpoints(ctx, e.cfg.VM)
	if err != nil {
		return nil, err
	}
	names := make([]string, len(list))
	for i, c := range list {
		names[i] = c.Name
	}
	return names, nil
}

// frozen is an opened instant: a reader per disk and how to let go of it.
type frozen struct {
	time    time.Time
	readers []DiskReader
	data    []extent.Set // to read and compare
	zero    []extent.Set // known to be zero now
	release func(context.Context) error
	// of a running domain:
	socket  string
	exports []string
	more    []DiskReader // to be closed with readers
}

// freeze opens a running domain's instant with a new checkpoint.
func (e *Engine) freeze(ctx context.Context, from, checkpoint string) (*frozen, error) {
	spec := hypervisor.BackupSpec{Socket: e.socket(), Checkpoint: checkpoint}
	if err := e.checkScratch(); err != nil {
		return nil, err
	}
	for _, d := range e.cfg.Disks {
		path := e.scratch(d.Name)
		if err := e.cfg.MakeScratch(ctx, path, d.SizeBytes); err != nil {
			return nil, fmt.Errorf("scratch image: %w", err)
		}
		spec.Disks = append(spec.Disks, hypervisor.BackupDisk{Name: d.Name, Scratch: path, Incremental: from})
	}
	select { // an I/O error from before this job says nothing of its scratch space
	case <-e.ioErrors:
	default:
	}
	f := &frozen{time: e.now(), socket: spec.Socket}
	if err := e.cfg.Hypervisor.BeginBackup(ctx, e.cfg.VM, spec); err != nil {
		e.removeScratch()
		return nil, err
	}
	f.release = func(ctx context.Context) error {
		for _, r := range append(f.readers, f.more...) {
			r.Close()
		}
		if err := e.cfg.Hypervisor.EndBackup(ctx, e.cfg.VM); err != nil {
			return err
		}
		e.removeScratch()
		return nil
	}
	for _, d := range e.cfg.Disks {
		// One context a connection: a server works out all of them for each question.
		contexts := []string{nbd.ContextAllocation}
		if from != "" {
			contexts = []string{nbd.ContextDirtyPrefix + "backup-" + d.Name}
		}
		r, err := dialDisk(ctx, spec.Socket, d.Name, contexts)
		if err != nil {
			return f, err
		}
		f.readers, f.exports = append(f.readers, r), append(f.exports, d.Name)
		if r.Size() != d.SizeBytes {
			return f, switchback.Errorf(switchback.CodeUnsupported, "disk %s is %d bytes now, %d when it was protected", d.Name, r.Size(), d.SizeBytes).
				WithHint("unprotect the VM and protect it again")
		}
	}
	return f, nil
}

func (e *Engine) removeScratch() {
	for _, d := range e.cfg.Disks {
		if err := os.Remove(e.scratch(d.Name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			e.log.Warn("scratch image is left, the next cycle replaces it", "error", err)
		}
	}
}

func (e *Engine) checkScratch() error {
	var st unix.Statfs_t
	if err := unix.Statfs(e.cfg.ScratchDir, &st); err != nil {
		return fmt.Errorf("scratch directory: %w", err)
	}
	if free := int64(st.Bavail) * st.Bsize; free < e.cfg.ScratchReserveBytes {
		return switchback.Errorf(switchback.CodeNoSpace, "scratch directory %s has %d MiB left, %d MiB are kept in reserve",
			e.cfg.ScratchDir, free>>20, e.cfg.ScratchReserveBytes>>20)
	}
	return nil
}

// guardScratch cancels the cycle before a full scratch space pauses the guest,
// or when the platform says that it has.
func (e *Engine) guardScratch(ctx context.Context, cancel context.CancelCauseFunc) {
	t := time.NewTicker(100 * time.Millisecond)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case detail := <-e.ioErrors:
			cancel(atSource(switchback.Errorf(switchback.CodeNoSpace, "the guest met an I/O error while the scratch space of a cycle was in use: %s", detail)))
			return
		case <-t.C:
			if err := e.checkScratch(); err != nil {
				cancel(atSource(err))
				return
			}
		}
	}
}

// mapRanges fills data and zero for a running domain.
func (f *frozen) mapRanges(ctx context.Context, disks []switchback.Disk, incremental bool, must map[string]extent.Set) error {
	for i, d := range disks {
		r := f.readers[i]
		var want extent.Set
		if incremental {
			dirty, err := r.BlockStatus(ctx, nbd.ContextDirtyPrefix+"backup-"+d.Name, 0, d.SizeBytes)
			if err != nil {
				return fmt.Errorf("dirty ranges of %s: %w", d.Name, err)
			}
			for _, x := range dirty {
				if x.Dirty() {
					want.Add(x.Offset, x.Length)
				}
			}
			want = want.Union(must[d.Name])
		} else {
			want.Add(0, d.SizeBytes)
		}
		data, zero, err := splitZero(ctx, func() (DiskReader, error) { return f.allocation(ctx, i, incremental) }, want, d.SizeBytes)
		if err != nil {
			return fmt.Errorf("allocation of %s: %w", d.Name, err)
		}
		f.data, f.zero = append(f.data, data), append(f.zero, zero)
	}
	return nil
}

// allocation returns a reader of disk i that knows its allocation map.
func (f *frozen) allocation(ctx context.Context, i int, incremental bool) (DiskReader, error) {
	if !incremental {
		return f.readers[i], nil
	}
	r, err := dialDisk(ctx, f.socket, f.exports[i], []string{nbd.ContextAllocation})
	if err == nil {
		f.more = append(f.more, r)
	}
	return r, err
}

// askFrom is the length from which on it is worth a round trip to ask whether a
// range is allocated before it is read.
const askFrom = 1 << 20

// splitZero parts what has to be looked at into what must be read and what the
// allocation map says is zero. Where there is little, reading it is cheaper than asking.
func splitZero(ctx context.Context, open func() (DiskReader, error), want extent.Set, size int64) (data, zero extent.Set, err error) {
	want = want.Align(BlockSize).Clip(0, size)
	if want.Bytes() <= 4<<20 {
		return want, zero, nil
	}
	var r DiskReader
	for _, rg := range want.Ranges() {
		if rg.Length < askFrom {
			continue
		}
		if r == nil {
			if r, err = open(); err != nil {
				return data, zero, err
			}
		}
		alloc, err := r.BlockStatus(ctx, nbd.ContextAllocation, rg.Offset, rg.Length)
		if err != nil {
			return data, zero, err
		}
		for _, x := range alloc {
			if x.Zero() {
				zero.AddRange(innerAlign(extent.Range{Offset: x.Offset, Length: x.Length}, size))
			}
		}
	}
	zero = zero.Intersect(want)
	return want.Subtract(zero), zero, nil
}

// innerAlign shrinks a range to whole blocks; the end of the disk counts as aligned.
func innerAlign(r extent.Range, size int64) extent.Range {
	begin := (r.Offset + BlockSize - 1) / BlockSize * BlockSize
	end := r.Offset + r.Length
	if end != size {
		end = end / BlockSize * BlockSize
	}
	if end <= begin {
		return extent.Range{}
	}
	return extent.Range{Offset: begin, Length: end - begin}
}

// openOffline opens the disks of a domain that is off.
func (e *Engine) openOffline(ctx context.Context, d Decision, must map[string]extent.Set) (*frozen, error) {
	f := &frozen{time: e.now()}
	f.release = func(context.Context) error {
		var errs []error
		for _, r := range f.readers {
			errs = append(errs, r.Close())
		}
		return errors.Join(errs...)
	}
	for _, disk := range e.cfg.Disks {
		var bitmaps []string
		if d.Mode == ModeIncremental {
			bitmaps = append([]string{d.From}, d.Drop...)
		}
		r, dirty, err := e.cfg.OpenOffline(ctx, disk, bitmaps)
		if err != nil {
			return f, fmt.Errorf("open disk %s at rest: %w", disk.Name, err)
		}
		f.readers = append(f.readers, r)
		dirty = dirty.Union(must[disk.Name])
		if d.Mode != ModeIncremental {
			dirty = extent.Set{}
			dirty.Add(0, disk.SizeBytes)
		}
		data, zero, err := splitZero(ctx, func() (DiskReader, error) { return r, nil }, dirty, disk.SizeBytes)
		if err != nil {
			return f, err
		}
		f.data, f.zero = append(f.data, data), append(f.zero, zero)
	}
	return f, nil
}

// point takes an incremental or resync point and makes it durable at the target.
func (e *Engine) point(ctx context.Context, report CycleReport, state TargetState, d Decision, off bool) (_ CycleReport, err error) {
	report.Mode, report.Reason = d.Mode, d.Reason
	if d.Mode == ModeResync {
		e.log.Warn("resync: reading whole disks", "reason", d.Reason)
	}
	hv := e.cfg.Hypervisor
	p := switchback.Point{Protection: e.cfg.Protection, Sequence: d.Sequence, Epoch: e.cfg.Epoch, Kind: switchback.CrashConsistent,
		Checkpoint: CheckpointName(e.cfg.Epoch, d.Sequence), Parent: state.Head.Digest,
		Resync: d.Mode == ModeResync, ResyncReason: d.Reason}
	var must map[string]extent.Set
	if state.Head.Sequence == 0 {
		must = e.cfg.MustSend
	}
	var f *frozen
	if off {
		p.Kind, p.Checkpoint = switchback.ShutdownConsistent, d.From
		f, err = e.openOffline(ctx, d, must)
	} else {
		for _, name := range d.Drop {
			if err := hv.DeleteCheckpoint(ctx, e.cfg.VM, name); err != nil {
				return report, atSource(fmt.Errorf("delete checkpoint %s: %w", name, err))
			}
		}
		f, err = e.freeze(ctx, d.From, p.Checkpoint)
	}
	err = atSource(err)
	unsure := false // the target may have made the point, whose checkpoint must then stay
	release := sync.OnceValue(func() error {
		if f == nil {
			return nil
		}
		c, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		return f.release(c)
	})
	defer func() {
		rerr := release()
		if err == nil {
			err = rerr
		}
		if err != nil && f != nil && !off && !unsure {
			// The new checkpoint merges into its parent; the next cycle carries both.
			c, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			defer cancel()
			if derr := hv.DeleteCheckpoint(c, e.cfg.VM, p.Checkpoint); derr != nil {
				e.log.Warn("checkpoint of a failed cycle is left, the next cycle drops it", "checkpoint", p.Checkpoint, "error", derr)
			}
		}
	}()
	if err != nil {
		return report, err
	}
	p.Time = f.time
	report.Begin = e.now().Sub(report.StartedAt)

	if !off {
		guarded, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		go e.guardScratch(guarded, cancel)
		ctx = guarded
		if err := f.mapRanges(ctx, e.cfg.Disks, d.Mode == ModeIncremental, must); err != nil {
			return report, causeOf(ctx, err)
		}
	}
	begin := e.now()
	acked, err := e.send(ctx, &report, p, f, release, &unsure)
	if err != nil {
		return report, causeOf(ctx, err)
	}
	report.Point = acked
	report.Transfer = e.now().Sub(begin)
	if state.Head.Sequence > 0 && !state.Head.Time.IsZero() {
		report.RPO = e.now().Sub(state.Head.Time)
	}
	begin = e.now()
	if err := release(); err != nil {
		return report, err
	}
	if !off && d.From != "" {
		if err := hv.DeleteCheckpoint(ctx, e.cfg.VM, d.From); err != nil {
			// The point exists; the next cycle drops the leftover.
			e.log.Warn("older checkpoint is left, the next cycle drops it", "checkpoint", d.From, "error", err)
		}
	}
	report.End = e.now().Sub(begin)
	report.Total = e.now().Sub(report.StartedAt)
	return report, nil
}

// causeOf prefers why the context was cancelled over what that made fail.
func causeOf(ctx context.Context, err error) error {
	if c := context.Cause(ctx); c != nil && ctx.Err() != nil {
		return c
	}
	return err
}

// segmentSink writes what differs into a segment.
type segmentSink struct {
	w       *journal.SegmentWriter
	pending Pending
}

func (s *segmentSink) Data(disk int, off int64, p []byte) error { return s.w.Data(disk, off, p) }
func (s *segmentSink) Zero(disk int, off, n int64) error        { return s.w.Zero(disk, off, n) }
func (s *segmentSink) Known(disk int, block int64, h Hash) error {
	s.pending.add(disk, block, h)
	return nil
}

// send streams the segment. The job is released as soon as everything is read;
// the index is logged before the segment's last bytes leave and moved after the answer.
func (e *Engine) send(ctx context.Context, report *CycleReport, p switchback.Point, f *frozen, release func() error, unsure *bool) (switchback.Point, error) {
	var dirty int64
	for i := range f.data {
		dirty += f.data[i].Bytes() + f.zero[i].Bytes()
	}
	report.DirtyBytes = dirty
	e.history.begin(string(report.Mode), e.now())
	e.history.advance(dirty, 0, 0)
	codec := e.codec(dirty)
	report.Codec = codec.String()

	pr, pw := io.Pipe()
	type answer struct {
		point switchback.Point
		err   error
	}
	answered := make(chan answer, 1)
	go func() {
		point, err := e.cfg.Target.SendPoint(ctx, e.cfg.Epoch, pr)
		pr.CloseWithError(errors.Join(err, io.ErrClosedPipe)) // a writer still at work must not hang
		answered <- answer{point, err}
	}()

	begin := time.Now()
	counted := &countingWriter{w: pw}
	buffered := bufio.NewWriterSize(counted, 256<<10)
	digest, pending, err := e.produce(ctx, report, p, f, buffered, codec, release)
	if err == nil {
		*unsure = true
		err = buffered.Flush()
	}
	if err != nil {
		pw.CloseWithError(err)
		a := <-answered
		if a.err != nil && ctx.Err() == nil && (errors.Is(err, io.ErrClosedPipe) || errors.Is(err, a.err)) {
			return switchback.Point{}, a.err // the target's refusal is the cause
		}
		return switchback.Point{}, err
	}
	pw.Close()
	a := <-answered
	report.SentBytes = counted.n
	if dirty > smallPoint {
		e.tuner.observe(codec, report.ReadBytes, time.Since(begin))
	}
	if a.err != nil {
		return switchback.Point{}, a.err
	}
	if a.point.Digest != digest {
		return switchback.Point{}, switchback.Errorf(switchback.CodeCorrupt, "the target stored point %d as %s, sent was %s", p.Sequence, a.point.Digest, digest)
	}
	return a.point, e.index.Commit(pending, digest)
}

func (e *Engine) produce(ctx context.Context, report *CycleReport, p switchback.Point, f *frozen, w io.Writer, codec journal.Codec, release func() error) (string, *Pending, error) {
	sw, err := journal.NewSegmentWriter(w, segmentHeader(p, e.cfg.Disks, false), codec)
	if err != nil {
		return "", nil, err
	}
	defer sw.Abort()
	out := &segmentSink{w: sw}
	sc := &scanner{index: e.index, progress: func(n int64) { e.history.advance(0, n, 0) }}
	for i := range e.cfg.Disks {
		if err := sc.scan(ctx, i, f.readers[i], f.data[i], f.zero[i], out); err != nil {
			return "", nil, fmt.Errorf("disk %s: %w", e.cfg.Disks[i].Name, err)
		}
	}
	report.ReadBytes, report.ChangedBytes = sc.readBytes, sc.changedBytes
	// Everything is read: let go of the instant while the tail is on its way.
	go release()
	digest, err := sw.Seal()
	if err == nil {
		err = e.index.Log(&out.pending, digest)
	}
	if err == nil {
		_, err = sw.Finish()
	}
	return digest, &out.pending, err
}

func segmentHeader(p switchback.Point, disks []switchback.Disk, seed bool) journal.Header {
	h := journal.Header{Protection: p.Protection, Epoch: p.Epoch, Sequence: p.Sequence, Kind: p.Kind, Time: p.Time,
		Checkpoint: p.Checkpoint, Parent: p.Parent, Resync: p.Resync, ResyncReason: p.ResyncReason, Seed: seed}
	for _, d := range disks {
		h.Disks = append(h.Disks, journal.DiskGeometry{Name: d.Name, SizeBytes: d.SizeBytes})
	}
	return h
}

var _ DiskReader = (*nbd.Client)(nil)

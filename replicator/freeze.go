package replicator

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/nbd"
)

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
	track   tracking
	// app: the guest's file systems were frozen at the instant; frozen is for how long.
	app    bool
	frozen time.Duration
}

// freeze opens a running domain's instant with a new checkpoint.
func (e *Engine) freeze(ctx context.Context, from, checkpoint string, want consistency) (*frozen, error) {
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
	f := &frozen{socket: spec.Socket, track: e.trackWrites(ctx, checkpoint, from)}
	if err := e.begin(ctx, spec, f, want); err != nil {
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
	if want == appRequired && !f.app {
		return f, refusal{switchback.Errorf(switchback.CodeRefused, "the instant could not be fixed within %v of the freeze: the guest was thawed before", frozenLimit).
			WithHint("try again when the host is less busy; or take a crash-consistent point")}
	}
	f.track.export(ctx)
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

// begin fixes the instant, with the guest's file systems frozen around it where
// that is wanted. The guest is thawed when it returns, or the condition says so.
func (e *Engine) begin(ctx context.Context, spec hypervisor.BackupSpec, f *frozen, want consistency) error {
	var guest *guestFreeze
	if want != crashWillDo {
		var err error
		if guest, err = e.freezeGuest(ctx); err != nil && want == appRequired {
			return refusal{err}
		} else if err != nil {
			e.missedApp(err)
		}
	}
	if guest != nil {
		defer guest.thaw(false)
	}
	f.time = e.now()
	if err := e.cfg.Hypervisor.BeginBackup(ctx, e.cfg.VM, spec); err != nil || guest == nil {
		return err
	}
	took, early, _ := guest.thaw(false) // an error stands in a condition
	f.app, f.frozen = !early, took
	if early {
		e.missedApp(switchback.Errorf(switchback.CodeTimeout, "the instant was not fixed within %v of the freeze", frozenLimit))
	}
	return nil
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
			want = f.refine(ctx, d, dirtyOf(dirty)).Union(must[d.Name])
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

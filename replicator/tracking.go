package replicator

import (
	"context"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/nbd"
)

// tracking is the record of writes, in units finer than a dirty bitmap's, that
// a cycle begins, and the one that the cycle before it has begun. It saves
// reading; whatever fails here costs no more than that.
type tracking struct {
	engine *Engine
	since  string
	// kept has the disks of which the older record can be read.
	kept map[string]string
}

// trackWrites begins a record under the new checkpoint's name, before the
// checkpoint is made, and finds that of the checkpoint from which changes are read.
func (e *Engine) trackWrites(ctx context.Context, checkpoint, from string) tracking {
	t := tracking{engine: e, since: from}
	h, ok := e.cfg.Hypervisor.(hypervisor.FineTracker)
	if !ok {
		return t
	}
	var disks []string
	for _, d := range e.cfg.Disks {
		disks = append(disks, d.Name)
	}
	kept, err := h.TrackWrites(ctx, e.cfg.VM, checkpoint, from, disks)
	if err != nil {
		t.missed(err)
		return t
	}
	t.kept = kept
	return t
}

func (t *tracking) missed(err error) {
	t.kept = nil
	t.engine.log.Debug("writes are not known in fine units, more is read than need be", "error", err)
}

// export offers the record beside the disks of the open job.
func (t *tracking) export(ctx context.Context) {
	if len(t.kept) == 0 {
		return
	}
	h := t.engine.cfg.Hypervisor.(hypervisor.FineTracker)
	if err := h.ExportWrites(ctx, t.engine.cfg.VM, t.since, t.kept); err != nil {
		t.missed(err)
	}
}

// refine narrows what a dirty bitmap says of a disk to what the record says.
func (f *frozen) refine(ctx context.Context, d switchback.Disk, dirty extent.Set) extent.Set {
	if _, ok := f.track.kept[d.Name]; !ok || dirty.IsEmpty() {
		return dirty
	}
	r, err := dialDisk(ctx, f.socket, hypervisor.FineExport(d.Name), []string{hypervisor.FineContext})
	if err != nil {
		f.track.missed(err)
		return dirty
	}
	f.more = append(f.more, r)
	extents, err := r.BlockStatus(ctx, hypervisor.FineContext, 0, d.SizeBytes)
	if err != nil {
		f.track.missed(err)
		return dirty
	}
	return narrow(dirty, dirtyOf(extents))
}

// bitmapUnit is the coarsest granularity of a checkpoint's bitmap.
const bitmapUnit = 64 << 10

// narrow returns the part of the bitmap's ranges that the record has, too. The
// record was begun earlier and ends later, so each unit of the bitmap has
// something of it. Where one has not the record is not what it should be, and
// the bitmap alone counts.
func narrow(bitmap, record extent.Set) extent.Set {
	if !bitmap.Subtract(record.Align(bitmapUnit)).IsEmpty() {
		return bitmap
	}
	return bitmap.Intersect(record)
}

func dirtyOf(extents []nbd.Extent) (s extent.Set) {
	for _, x := range extents {
		if x.Dirty() {
			s.Add(x.Offset, x.Length)
		}
	}
	return s
}

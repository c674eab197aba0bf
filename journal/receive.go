package journal

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"path/filepath"

	"github.com/switchback-dr/switchback"
)

// Receive reads one segment from r, verifies all of it and makes it durable;
// it returns the point that then exists. Two streams may be received at once:
// the first to be complete wins.
//
//   - CodeStaleEpoch: epoch, or that in the header, is older than the replica's.
//     A newer one is taken over durably first.
//   - CodeConflict: the segment does not continue the head. One that is the
//     head already (the answer was lost) is accepted again without effect.
//   - CodeCorrupt: the stream is damaged or ends early.
//   - CodeNoSpace: the file system is full, or would go below the reserve.
//   - CodeRefused: the replica is being seeded, or a disk has shrunk.
//
// After any error nothing of the segment is left. A hanging r is unblocked by
// its owner; ctx is looked at between frames.
func (r *Replica) Receive(ctx context.Context, epoch switchback.Epoch, stream io.Reader) (switchback.Point, error) {
	none := switchback.Point{}
	s, err := openStream(stream)
	if err != nil {
		return none, err
	}
	h := s.header
	r.mu.Lock()
	repeated, err := r.admit(epoch, h)
	r.temps++
	temp := filepath.Join(r.dir, segmentDir, fmt.Sprintf("%016d-%d%s", h.Sequence, r.temps, tempSuffix))
	head := r.head().point
	r.mu.Unlock()
	if err != nil {
		return none, err
	}
	if repeated {
		_, foot, size, err := s.copyTo(ctx, io.Discard)
		if err != nil {
			return none, err
		}
		if foot.summary(size).Digest != head.Digest {
			return none, conflict(h, head)
		}
		return head, nil
	}

	foot, size, err := r.store(ctx, s, temp)
	if err != nil {
		r.fs.remove(temp)
		return none, err
	}
	point := h.Point(foot.summary(size))

	r.mu.Lock()
	defer r.mu.Unlock()
	if repeated, err = r.admit(epoch, h); err != nil || repeated {
		r.fs.remove(temp)
		if head := r.head().point; err == nil && head.Digest == point.Digest {
			return head, nil
		} else if err == nil {
			err = conflict(h, head)
		}
		return none, err
	}
	path := segmentPath(r.dir, h.Sequence)
	if err := r.fs.rename(temp, path); err != nil {
		r.fs.remove(temp)
		return none, fault(err, "store segment %d", h.Sequence)
	}
	if err := r.fs.syncDir(filepath.Dir(path)); err != nil {
		r.fs.remove(path)
		return none, fault(err, "store segment %d", h.Sequence)
	}
	r.segments = append(r.segments, segmentInfo{point, h.Disks})
	r.note(point, foot, s.denseBytes)
	return point, nil
}

// admit decides whether the segment with header h may come now; repeated says
// that it may be the head again.
func (r *Replica) admit(epoch switchback.Epoch, h Header) (repeated bool, err error) {
	m := &r.manifest
	switch {
	case h.Protection != m.Protection:
		return false, switchback.Errorf(switchback.CodeInvalid, "segment of %s for the replica of %s", h.Protection, m.Protection)
	case h.Epoch != epoch && h.Epoch >= m.Epoch && epoch >= m.Epoch:
		return false, switchback.Errorf(switchback.CodeInvalid, "segment of epoch %d sent in epoch %d", h.Epoch, epoch)
	case h.Seed:
		return false, switchback.Errorf(switchback.CodeInvalid, "a batch of the first copy is no point")
	case h.Branch != nil:
		return false, switchback.Errorf(switchback.CodeInvalid, "branch %s is no point", h.Branch.Name)
	case h.Merged != nil:
		return false, switchback.Errorf(switchback.CodeInvalid, "segment %d was merged, and is no more what its source sent", h.Sequence)
	case m.Seeding:
		return false, switchback.Errorf(switchback.CodeRefused, "replica %s is being seeded", m.Protection).WithHint("finish the first copy")
	}
	if err := r.checkEpoch(min(epoch, h.Epoch)); err != nil {
		return false, err
	}
	if m.Dropping != nil { // a drop that met an I/O error
		if err := r.finishDrop(); err != nil {
			return false, err
		}
	}
	if len(r.broken) > 0 {
		return false, switchback.Errorf(switchback.CodeCorrupt, "replica %s has damaged segments after point %d: %w", m.Protection, r.head().point.Sequence, r.broken[0]).
			WithHint("drop them, then resync")
	}
	head := r.head()
	if h.Sequence == head.point.Sequence && h.Parent == head.point.Parent && h.Sequence > 0 {
		return true, nil
	}
	if h.Sequence != head.point.Sequence+1 || h.Parent != head.point.Digest {
		return false, conflict(h, head.point)
	}
	for _, d := range h.Disks {
		for _, old := range head.disks {
			if d.Name == old.Name && d.SizeBytes < old.SizeBytes {
				return false, switchback.Errorf(switchback.CodeRefused, "disk %s has shrunk from %d to %d bytes", d.Name, old.SizeBytes, d.SizeBytes).
					WithHint("protect the VM anew")
			}
		}
	}
	return false, r.setEpoch(epoch)
}

func conflict(h Header, head switchback.Point) error {
	return switchback.Errorf(switchback.CodeConflict, "segment %d, which continues %s, does not follow the head: point %d, digest %s",
		h.Sequence, shortDigest(h.Parent), head.Sequence, shortDigest(head.Digest)).
		WithHint("continue from the head, or resync")
}

// store writes the stream to the file temp and syncs it.
func (r *Replica) store(ctx context.Context, s *segmentStream, temp string) (footer, int64, error) {
	seq := s.header.Sequence
	f, err := r.fs.create(temp)
	if err != nil {
		return footer{}, 0, fault(err, "store segment %d", seq)
	}
	var foot footer
	var size int64
	err = r.writeSegment(f, sealName(seq), func(w io.Writer) error {
		_, foot, size, err = s.copyTo(ctx, w)
		return err
	})
	return foot, size, fault(err, "store segment %d", seq)
}

// writeSegment has content written to f, sealed under name if so configured, makes it
// durable and closes f.
func (r *Replica) writeSegment(f file, name string, content func(io.Writer) error) error {
	r.mu.Lock()
	st := r.storage
	r.mu.Unlock()
	buffered := bufio.NewWriterSize(&reserveWriter{r: r, f: f}, 512<<10)
	out, end, err := st.sealer(buffered, name)
	if err == nil {
		err = content(out)
	}
	if err == nil {
		err = end()
	}
	if err == nil {
		err = buffered.Flush()
	}
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	return err
}

// reserveWriter refuses to fill the file system beyond the reserve.
type reserveWriter struct {
	r         *Replica
	f         io.Writer
	unchecked int64 // how much may be written before looking again
}

func (w *reserveWriter) Write(p []byte) (int, error) {
	if reserve := w.r.opts.ReserveBytes; reserve > 0 && w.unchecked < int64(len(p)) {
		free, err := w.r.fs.free(w.r.dir)
		if err != nil {
			return 0, err
		}
		room := free - reserve
		if room < int64(len(p)) {
			return 0, switchback.Errorf(switchback.CodeNoSpace, "%s has %d MiB free, of which %d MiB are reserved", w.r.dir, free>>20, reserve>>20).
				WithHint("free space or add some; replication goes on by itself")
		}
		w.unchecked = min(room, 32<<20)
	}
	w.unchecked -= int64(len(p))
	return w.f.Write(p)
}

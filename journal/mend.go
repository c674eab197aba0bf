package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/zeebo/xxh3"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// MendResult says what Mend did.
type MendResult struct {
	// Mended is what was damaged and is whole again.
	Mended []Damage `json:"mended,omitempty"`
	// Left stays damaged; each Reason ends in why.
	Left []Damage `json:"left,omitempty"`
	// Bytes of frames that were put back.
	Bytes int64 `json:"bytes"`
}

// badFrame is a damaged frame and, where it was found, its content.
type badFrame struct {
	damage  Damage
	content []byte // nil: not found
}

// Mend puts damaged frames of segments and blocks of bases back from the newest
// point, where it has the very content: the checksum in the segment's index, or
// beside the base, says whether it is. What the guest has changed since stays as it
// is. damage names what to look at, as Check finds it; what is neither frame nor
// block is left alone, and not in the result. open is as for Fold.
//
// Before it the newest point must be whole: the source sends it what it cannot
// read. A segment is replaced by rename, as by Merge: a crash leaves either, and
// points keep their identity. Views that are open keep the damaged file. A block of
// a base that a crash tears stays damaged. Original disks are not written before
// their first fold.
func (r *Replica) Mend(ctx context.Context, damage []Damage, open OpenBaseFunc) (MendResult, error) {
	var result MendResult
	var sequences []switchback.Sequence
	for _, d := range damage {
		if d.Segment > 0 && d.Disk != "" && len(d.Ranges) > 0 {
			sequences = append(sequences, d.Segment)
		}
	}
	slices.Sort(sequences)
	r.maintenance.Lock()
	defer r.maintenance.Unlock()
	head, err := OpenView(r.dir, r.Head().Sequence)
	if err != nil {
		return result, err
	}
	defer head.Close()
	for _, seq := range slices.Compact(sequences) {
		r.mu.Lock()
		_, there := r.findSegment(seq)
		st := r.storage
		r.mu.Unlock()
		if !there {
			continue // folded or merged away meanwhile
		}
		if err := r.mendSegment(ctx, st, seq, head, damage, &result); err != nil {
			return result, err
		}
	}
	for _, d := range damage {
		if d.Segment == 0 && d.Disk != "" && d.Reason == baseReason {
			if err := r.mendBase(d, head, open, &result); err != nil {
				return result, err
			}
		}
	}
	return result, nil
}

// mendBase puts blocks of a base back.
func (r *Replica) mendBase(damage Damage, head *View, open OpenBaseFunc, result *MendResult) (err error) {
	m := r.Manifest()
	b, disk := m.disk(damage.Disk), head.Disk(damage.Disk)
	leave := func(ranges []extent.Range, why string) {
		left := damage
		left.Ranges, left.Reason = ranges, damage.Reason+"; "+why
		result.Left = append(result.Left, left)
	}
	switch {
	case b == nil || b.Absent || m.Folding > 0:
		return nil // what the base holds there is being written anyway
	case m.BaseIsOriginal && m.Base.Sequence == 0:
		leave(damage.Ranges, "it is the VM's original disk, which is not written before the first fold")
		return nil
	case disk == nil:
		leave(damage.Ranges, "the VM has no such disk any more")
		return nil
	}
	sums, err := openSums(r.dir, b.Name, b.SizeBytes, false)
	if err != nil || sums == nil {
		return err
	}
	defer sums.close()
	var found, lost []extent.Range
	var content [][]byte
	why := ""
	for _, x := range damage.Ranges {
		for at := x.Offset / sumBlock * sumBlock; at < x.End(); at += sumBlock {
			p := make([]byte, min(sumBlock, b.SizeBytes-at))
			if at+int64(len(p)) > disk.Size() {
				lost, why = appendExtent(lost, extent.Range{Offset: at, Length: int64(len(p))}), "the disk is smaller now"
				continue
			}
			if _, err := disk.ReadAt(p, at); err != nil {
				lost, why = appendExtent(lost, extent.Range{Offset: at, Length: int64(len(p))}), "the newest point cannot be read there: "+err.Error()
				continue
			}
			bad, unproven, err := sums.compare(p, at)
			if err != nil {
				return err
			}
			if len(bad) > 0 || unproven > 0 {
				lost = appendExtent(lost, extent.Range{Offset: at, Length: int64(len(p))})
				why = fmt.Sprintf("the guest has written there since point %d, so that nobody has the content any more", m.Base.Sequence)
				continue
			}
			found, content = append(found, extent.Range{Offset: at, Length: int64(len(p))}), append(content, p)
		}
	}
	if len(lost) > 0 {
		leave(lost, why)
	}
	if len(found) == 0 {
		return nil
	}
	w, done, err := open(DiskGeometry{b.Name, b.SizeBytes})
	if err != nil {
		return fault(err, "open base of disk %s", b.Name)
	}
	defer func() {
		if e := done(); err == nil {
			err = fault(e, "close base of disk %s", b.Name)
		}
	}()
	mended := damage
	mended.Ranges = nil
	for i, x := range found {
		if _, err := w.WriteAt(content[i], x.Offset); err != nil {
			return fault(err, "write base of disk %s at %d", b.Name, x.Offset)
		}
		mended.Ranges = appendExtent(mended.Ranges, x)
		result.Bytes += x.Length
	}
	if err := w.Flush(); err != nil {
		return fault(err, "flush base of disk %s", b.Name)
	}
	result.Mended = append(result.Mended, mended)
	return nil
}

func (r *Replica) mendSegment(ctx context.Context, st *storage, seq switchback.Sequence, head *View, damage []Damage, result *MendResult) error {
	s, err := st.openSegment(seq)
	if err != nil {
		return fault(err, "mend segment %d", seq)
	}
	defer s.close()
	if err := s.loadIndex(); err != nil {
		return err
	}
	bad, err := s.badFrames(ctx, head, damage)
	if err != nil {
		return err
	}
	found := 0
	for _, f := range bad {
		if f.content != nil {
			found++
		}
	}
	if found > 0 {
		if err := r.replaceSegment(ctx, s, bad); err != nil {
			return err
		}
	}
	for _, f := range bad {
		if f.content == nil {
			result.Left = append(result.Left, f.damage)
		} else {
			result.Mended = append(result.Mended, f.damage)
			result.Bytes += int64(len(f.content))
		}
	}
	return nil
}

// badFrames reads the whole segment and looks for the content of each damaged
// frame at the newest point.
func (s *segment) badFrames(ctx context.Context, head *View, known []Damage) (map[uint32]badFrame, error) {
	bad := map[uint32]badFrame{}
	raw := make([]byte, maxFrame)
	for n := range s.index.frames {
		if err := ctx.Err(); err != nil {
			return nil, switchback.Errorf(switchback.CodeCancelled, "mend: %w", err)
		}
		err := s.checkFrame(uint32(n), raw)
		if err == nil {
			continue
		}
		f := badFrame{}
		if !errors.As(err, &f.damage) {
			return nil, fault(err, "mend segment %d", s.header.Sequence)
		}
		f.damage.From, f.damage.To = s.header.Sequence, NewestPoint
		for _, d := range known {
			if d.Segment == f.damage.Segment && d.Disk == f.damage.Disk && slices.Equal(d.Ranges, f.damage.Ranges) {
				f.damage.From, f.damage.To = d.From, d.To
			}
		}
		if s.load(uint32(n), raw[:s.index.frames[n].rawLength()]) == nil { // only its head is damaged
			f.content = bytes.Clone(raw[:s.index.frames[n].rawLength()])
			bad[uint32(n)] = f
			continue
		}
		content, why := s.contentAt(uint32(n), f.damage, head)
		if why != "" {
			f.damage.Reason += "; " + why
		}
		f.content = content
		bad[uint32(n)] = f
	}
	return bad, nil
}

// contentAt gathers what the newest point has where the frame belongs. It is the
// frame's content, or why says that it is not to be had.
func (s *segment) contentAt(n uint32, damage Damage, head *View) (content []byte, why string) {
	disk := head.Disk(damage.Disk)
	if disk == nil {
		return nil, "the VM has no such disk any more"
	}
	content = make([]byte, 0, s.index.frames[n].rawLength())
	for _, x := range damage.Ranges {
		if x.End() > disk.Size() {
			return nil, "the disk is smaller now"
		}
		p := content[len(content) : len(content)+int(x.Length)]
		if _, err := disk.ReadAt(p, x.Offset); err != nil {
			return nil, "the newest point cannot be read there: " + err.Error()
		}
		content = content[:len(content)+len(p)]
	}
	if xxh3.Hash128(content).Bytes() != s.index.frames[n].sum {
		return nil, fmt.Sprintf("the guest has written there since point %d, so that nobody has the content any more", s.header.Sequence)
	}
	return content, ""
}

// replaceSegment writes the segment anew, with what was found in place of what is
// damaged, and puts it in its own place. Damaged frames that were not found are
// taken over as they are: they stay damaged. The new file has the form of a
// merged segment that has taken in nothing.
func (r *Replica) replaceSegment(ctx context.Context, s *segment, bad map[uint32]badFrame) error {
	seq := s.header.Sequence
	r.mu.Lock()
	r.temps++
	temp := filepath.Join(r.dir, segmentDir, fmt.Sprintf("%016d-%d%s", seq, r.temps, tempSuffix))
	r.mu.Unlock()
	point, err := r.writeMerged(ctx, temp, []*segment{s}, bad)
	if err != nil {
		r.fs.remove(temp)
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	at, there := r.findSegment(seq)
	if !there {
		r.fs.remove(temp)
		return nil
	}
	path := segmentPath(r.dir, seq)
	if err := r.fs.rename(temp, path); err != nil {
		r.fs.remove(temp)
		return fault(err, "mend segment %d", seq)
	}
	r.segments[at].point = point
	if err := r.fs.syncDir(filepath.Dir(path)); err != nil {
		return fault(err, "mend segment %d", seq)
	}
	return r.discardReference(seq) // of the damaged object
}

// loadMended is load of a frame that is known to be damaged: its content was
// found, or its stored bytes are taken over as they are.
func (f *survivor) loadMended(b badFrame) {
	defer close(f.ready)
	if b.content == nil {
		stored := f.record[frameHeadSize:][:f.frame.stored]
		err := f.segment.readAt(stored, f.frame.offset)
		if unreachable(err) {
			f.err = err
		} else if err != nil { // nothing that could be read is lost
			clear(stored)
		}
		return
	}
	record, codec := compress(f.record[:frameHeadSize], b.content, f.frame.codec)
	copy(f.record[:], record) // it is never longer than its content
	f.frame.stored, f.frame.codec = uint32(len(record)-frameHeadSize), codec
}

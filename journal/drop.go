package journal

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/switchback-dr/switchback"
)

// DropAfter durably deletes all points after seq, and segments that follow them
// damaged. Once it returned without error they are gone even after a crash; a
// crash on the way leaves all of them or none. It is refused while one is
// pinned or locked.
func (r *Replica) DropAfter(seq switchback.Sequence) error {
	r.maintenance.Lock()
	defer r.maintenance.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkReadable(seq); err != nil {
		return err
	}
	if err := r.mayDrop(func(s switchback.Sequence) bool { return s > seq }, fmt.Sprintf("dropping points after %d", seq)); err != nil {
		return err
	}
	if r.head().point.Sequence == seq && len(r.broken) == 0 && r.manifest.Dropping == nil {
		return r.settle()
	}
	if err := r.update(func(m *Manifest) { m.Dropping = &seq }); err != nil {
		return err
	}
	return r.finishDrop()
}

func pinned(p Pin, format string, args ...any) error {
	if p.Damaged {
		return switchback.Errorf(switchback.CodeRefused, format+": pin %s cannot be read", append(args, p.Name)...).
			WithHint("remove the pin when nothing uses it")
	}
	return switchback.Errorf(switchback.CodeRefused, format+": pin %s needs point %d", append(args, p.Name, p.Sequence)...).
		WithHint("end what holds the pin first")
}

// finishDrop does what Manifest.Dropping says. The caller holds r.mu, or is Open.
func (r *Replica) finishDrop() error {
	if r.manifest.Dropping == nil {
		return nil
	}
	seq := *r.manifest.Dropping
	after := func(s switchback.Sequence) bool { return s > seq }
	if err := r.removeSegments(after); err != nil {
		return err
	}
	if err := r.forgetMarks(after); err != nil {
		return err
	}
	return r.update(func(m *Manifest) { m.Dropping = nil })
}

// removeFolded deletes segments that the base contains.
func (r *Replica) removeFolded() error {
	base := r.manifest.Base.Sequence
	return r.removeSegments(func(s switchback.Sequence) bool { return s <= base })
}

// removeSegments durably deletes segment files, newest first.
func (r *Replica) removeSegments(which func(switchback.Sequence) bool) error {
	if err := r.settle(); err != nil {
		return err
	}
	sequences, err := listSegments(r.dir)
	if err != nil {
		return err
	}
	slices.Reverse(sequences)
	removed := false
	for _, seq := range sequences {
		if !which(seq) {
			continue
		}
		if err := r.removeSegment(seq); err != nil {
			return err
		}
		removed = true
	}
	if removed {
		return fault(r.fs.syncDir(filepath.Join(r.dir, segmentDir)), "remove segments")
	}
	return nil
}

// removeSegment deletes a segment's file and makes its reference garbage. The
// caller syncs the directory.
func (r *Replica) removeSegment(seq switchback.Sequence) error {
	if err := r.discardReference(seq); err != nil {
		return err
	}
	if err := r.fs.remove(segmentPath(r.dir, seq)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fault(err, "remove segment %d", seq)
	}
	return nil
}

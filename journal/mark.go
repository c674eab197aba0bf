package journal

import (
	"errors"
	"maps"
	"os"
	"path/filepath"

	"github.com/switchback-dr/switchback"
)

func marksPath(dir string) string { return filepath.Join(dir, "marks.json") }

// readMarks reads the marks of the replica in dir.
func readMarks(dir string) (map[switchback.Sequence]switchback.Mark, error) {
	marks := map[switchback.Sequence]switchback.Mark{}
	err := readDocument(marksPath(dir), &marks)
	if errors.Is(err, os.ErrNotExist) {
		return marks, nil
	}
	if err != nil {
		return nil, err
	}
	return marks, nil
}

// MarksDamage says why the marks cannot be read, or is nil. Points are received
// and read all the same, but none is dropped until the file is mended or moved
// away and the replica opened again.
func (r *Replica) MarksDamage() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.unreadableMarks()
}

// MarksFile returns the path of the marks.
func (r *Replica) MarksFile() string { return marksPath(r.dir) }

func (r *Replica) unreadableMarks() error {
	if r.marksDamage == nil {
		return nil
	}
	return switchback.Errorf(switchback.CodeOf(r.marksDamage), "the marks of the points cannot be read: %w", r.marksDamage).
		WithHint("nothing is dropped meanwhile, since a point may be locked; move %s away to forget all marks, then restart the agent", marksPath(r.dir))
}

// mayDrop refuses what nothing may drop: pinned and locked points, and any while
// pins or marks cannot be read. dropped says which points go. The caller holds r.mu.
func (r *Replica) mayDrop(dropped func(switchback.Sequence) bool, what string) error {
	for _, p := range r.sortedPins() {
		if dropped(p.Sequence) || p.Damaged {
			return pinned(p, "%s", what)
		}
	}
	if err := r.unreadableMarks(); err != nil {
		return err
	}
	for _, p := range r.points() {
		if r.marks[p.Sequence].Locked && dropped(p.Sequence) {
			return switchback.Errorf(switchback.CodeRefused, "%s: point %d is locked", what, p.Sequence).WithHint("unlock it first")
		}
	}
	return nil
}

// forgetMarks durably removes the marks of dropped points, whose sequences other
// points may get. The caller holds r.mu.
func (r *Replica) forgetMarks(dropped func(switchback.Sequence) bool) error {
	next := maps.Clone(r.marks)
	maps.DeleteFunc(next, func(seq switchback.Sequence, _ switchback.Mark) bool { return dropped(seq) })
	if len(next) == len(r.marks) {
		return nil
	}
	if err := writeDocument(r.fs, marksPath(r.dir), next); err != nil {
		return err
	}
	r.marks = next
	return nil
}

// SetMark durably changes the mark of a point. change may refuse by returning
// an error; nothing is changed then. A tag that another point has is refused
// with CodeConflict.
func (r *Replica) SetMark(seq switchback.Sequence, change func(*switchback.Mark) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkReadable(seq); err != nil {
		return err
	}
	if err := r.unreadableMarks(); err != nil {
		return err
	}
	m := r.marks[seq]
	if err := change(&m); err != nil {
		return err
	}
	next := map[switchback.Sequence]switchback.Mark{}
	for _, p := range r.points() { // those of dropped points are forgotten
		if old, ok := r.marks[p.Sequence]; ok {
			next[p.Sequence] = old
		}
	}
	for other, o := range next {
		if other != seq && m.Tag != "" && o.Tag == m.Tag {
			return switchback.Errorf(switchback.CodeConflict, "point %d has the tag %q already", other, m.Tag).WithHint("choose another tag, or remove that one")
		}
	}
	if m == (switchback.Mark{}) {
		delete(next, seq)
	} else {
		next[seq] = m
	}
	if maps.Equal(next, r.marks) {
		return nil
	}
	if err := writeDocument(r.fs, marksPath(r.dir), next); err != nil {
		return err
	}
	r.marks = next
	return nil
}

// MarkedPoints is Points with their marks.
func (r *Replica) MarkedPoints() []switchback.MarkedPoint {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []switchback.MarkedPoint
	for _, p := range r.points() {
		out = append(out, switchback.MarkedPoint{Point: p, Mark: r.marks[p.Sequence]})
	}
	return out
}

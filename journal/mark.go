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
	return marks, err
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

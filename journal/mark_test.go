package journal

import (
	"testing"

	"github.com/switchback-dr/switchback"
)

func TestMarks(t *testing.T) {
	w := newWorld(t, 7)
	for range 3 {
		if err := w.receive(); err != nil {
			t.Fatal(err)
		}
	}
	r := w.r
	head := r.Head().Sequence
	tag := func(seq switchback.Sequence, tag string) error {
		return r.SetMark(seq, func(m *switchback.Mark) error { m.Tag, m.Locked = tag, tag != ""; return nil })
	}
	if err := tag(head-1, "before-upgrade"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "the same tag again", tag(head, "before-upgrade"), switchback.CodeConflict)
	wantCode(t, "a point there is not", tag(head+1, "x"), switchback.CodeNotFound)
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(r.Dir())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for _, p := range again.MarkedPoints() {
		if want := (switchback.Mark{Tag: "before-upgrade", Locked: true}); p.Sequence == head-1 && p.Mark != want {
			t.Errorf("point %d has mark %+v after reopening", p.Sequence, p.Mark)
		} else if p.Sequence != head-1 && p.Mark != (switchback.Mark{}) {
			t.Errorf("point %d has mark %+v", p.Sequence, p.Mark)
		}
	}
}

package journal

import (
	"fmt"
	"os"
	"testing"

	"github.com/switchback-dr/switchback"
)

func TestInspect(t *testing.T) {
	s := newSeeded(t)
	s.receive(64<<10, 8<<10)
	s.receive(4096, 4096)
	if err := s.r.SetMark(3, func(m *switchback.Mark) error { m.Tag = "before upgrade"; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.r.Pin("run-7", 2, nil); err != nil {
		t.Fatal(err)
	}
	in, err := Inspect(s.dir) // while it is open
	if err != nil {
		t.Fatal(err)
	}
	if in.Open != fmt.Sprint(os.Getpid()) || len(in.Points) != 3 || in.Points[2].Mark.Tag != "before upgrade" || len(in.Pins) != 1 || len(in.Damage) != 0 || in.SegmentBytes == 0 {
		t.Errorf("%+v", in)
	}
	for i, p := range s.r.MarkedPoints() {
		if in.Points[i] != p {
			t.Errorf("point %+v, want %+v", in.Points[i], p)
		}
	}
	d, err := InspectPoint(s.dir, 2)
	if err != nil || len(d.Disks) != 1 || d.Disks[0].ChangedBytes != 8<<10 || d.Disks[0].Name != "vda" || len(d.Pins) != 1 || d.InBase || d.Parent != "5eed" {
		t.Errorf("%+v, %v", d, err)
	}
	if d, err := InspectPoint(s.dir, 1); err != nil || !d.InBase || d.Sequence != 1 {
		t.Errorf("%+v, %v", d, err)
	}
	_, err = InspectPoint(s.dir, 9)
	wantCode(t, "no such point", err, switchback.CodeNotFound)

	s.r.Close()
	defer flip(t, segmentPath(s.dir, 2), 50)()
	if in, err = Inspect(s.dir); err != nil || in.Open != "" || len(in.Damage) == 0 || in.Damage[0].Segment != 2 || in.Damage[0].Points() != "points from 2 on" {
		t.Errorf("damaged: %+v, %v", in, err)
	}
	_, err = Inspect(t.TempDir())
	wantCode(t, "no replica", err, switchback.CodeNotFound)
}

// TestRestoreManifest: a manifest that is damaged under an open replica is written again.
func TestRestoreManifest(t *testing.T) {
	s := newSeeded(t)
	if done, err := s.r.RestoreManifest(); done || err != nil {
		t.Errorf("nothing to restore: %v, %v", done, err)
	}
	flip(t, manifestPath(s.dir), 150)
	if st := s.check(CheckOptions{}); len(st.Damage) != 1 {
		t.Errorf("%+v", st)
	}
	if done, err := s.r.RestoreManifest(); !done || err != nil {
		t.Errorf("%v, %v", done, err)
	}
	if st := s.check(CheckOptions{}); len(st.Damage) != 0 {
		t.Errorf("restored: %+v", st)
	}
}

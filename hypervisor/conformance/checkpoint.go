package conformance

import (
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// wantCheckpoints checks names, each the parent of the next.
func (s *suite) wantCheckpoints(uuid switchback.VMUUID, want ...string) {
	s.Helper()
	list, err := s.h.Checkpoints(s.ctx, uuid)
	s.must(err)
	var names []string
	parent := ""
	for _, c := range list {
		names = append(names, c.Name)
		if c.Parent != parent {
			s.Errorf("checkpoint %s has parent %q, want %q", c.Name, c.Parent, parent)
		}
		parent = c.Name
		if age := time.Since(c.Time); age < -time.Minute || age > time.Hour {
			s.Errorf("checkpoint %s was made at %s", c.Name, c.Time)
		}
		if !slices.Equal(c.Disks, []string{"vda"}) {
			s.Errorf("checkpoint %s covers %v, want vda", c.Name, c.Disks)
		}
	}
	if !slices.Equal(names, want) {
		s.Errorf("checkpoints %v, want %v", names, want)
	}
}

func testCheckpointChain(s *suite) {
	uuid := s.started(VM{Disks: []string{"vda", "vdb"}})
	for i, name := range []string{"c0", "c1", "c2"} {
		s.must(s.h.CreateCheckpoint(s.ctx, uuid, name, []string{"vda"}))
		s.env.Write(s, uuid, "vda", int64(2*i)*unit, unit, byte(i+1))
	}
	s.wantCheckpoints(uuid, "c0", "c1", "c2")
	s.wantCode("CreateCheckpoint of a name that exists", s.h.CreateCheckpoint(s.ctx, uuid, "c1", []string{"vda"}), switchback.CodeConflict)
	s.wantSince(uuid, "c0", Range{0, unit}, Range{2 * unit, unit}, Range{4 * unit, unit})
	s.wantSince(uuid, "c1", Range{2 * unit, unit}, Range{4 * unit, unit})

	s.must(s.h.DeleteCheckpoint(s.ctx, uuid, "c1"))
	s.must(s.h.DeleteCheckpoint(s.ctx, uuid, "c1"))
	s.wantCheckpoints(uuid, "c0", "c2")
	s.wantSince(uuid, "c0", Range{0, unit}, Range{2 * unit, unit}, Range{4 * unit, unit})
	s.wantSince(uuid, "c2", Range{4 * unit, unit})

	s.must(s.h.DeleteCheckpoint(s.ctx, uuid, "c2")) // the newest: its changes go to c0
	s.wantSince(uuid, "c0", Range{0, unit}, Range{2 * unit, unit}, Range{4 * unit, unit})
	s.must(s.h.DeleteCheckpoint(s.ctx, uuid, "c0"))
	s.wantCheckpoints(uuid)
	s.must(s.h.CreateCheckpoint(s.ctx, uuid, "c0", []string{"vda"})) // the name is free again
	s.wantSince(uuid, "c0")
}

func testCheckpointOff(s *suite) {
	uuid := s.started(VM{})
	s.must(s.h.CreateCheckpoint(s.ctx, uuid, "c0", []string{"vda"}))
	s.must(s.h.CreateCheckpoint(s.ctx, uuid, "c1", []string{"vda"}))
	s.must(s.h.Destroy(s.ctx, uuid))
	s.wantCheckpoints(uuid, "c0", "c1")
	s.must(s.h.DeleteCheckpoint(s.ctx, uuid, "c1"))
	s.wantCheckpoints(uuid, "c0")
	s.must(s.h.DeleteCheckpoint(s.ctx, uuid, "nothing"))
}

func testBitmapKept(s *suite) {
	uuid := s.started(VM{})
	s.must(s.h.CreateCheckpoint(s.ctx, uuid, "c0", []string{"vda"}))
	s.env.Write(s, uuid, "vda", unit, unit, 7)
	s.must(s.h.Destroy(s.ctx, uuid))
	s.must(s.h.Start(s.ctx, uuid, true))
	s.env.Write(s, uuid, "vda", 4*unit, unit, 8)
	s.wantSince(uuid, "c0", Range{unit, unit}, Range{4 * unit, unit})
}

// testBitmapLost loses bitmaps that were never stored and one that was.
func testBitmapLost(s *suite) {
	uuid := s.started(VM{})
	s.must(s.h.CreateCheckpoint(s.ctx, uuid, "stored", []string{"vda"}))
	s.must(s.h.Destroy(s.ctx, uuid))
	s.must(s.h.Start(s.ctx, uuid, true))
	s.must(s.h.CreateCheckpoint(s.ctx, uuid, "unstored", []string{"vda"}))
	s.env.Write(s, uuid, "vda", unit, unit, 7)
	s.env.Kill(s, uuid)
	s.must(s.h.Start(s.ctx, uuid, true))
	for _, name := range []string{"stored", "unstored"} {
		s.wantCode("BeginBackup from "+name, s.h.BeginBackup(s.ctx, uuid, s.spec(name, "new", "vda")), switchback.CodeBitmapLost)
		s.must(s.h.DeleteCheckpoint(s.ctx, uuid, name))
	}
	s.wantCheckpoints(uuid)
	for _, name := range []string{"stored", "unstored"} { // both names are free again
		j := s.begin(uuid, s.spec("", name, "vda"))
		j.wantContent(0, unit, unit, 7)
		j.end()
	}
	s.env.Write(s, uuid, "vda", 2*unit, unit, 9)
	s.wantSince(uuid, "stored", Range{2 * unit, unit})
}

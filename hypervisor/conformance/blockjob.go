package conformance

import (
	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// ready waits until a disk's block job can be pivoted.
func (s *suite) ready(uuid switchback.VMUUID, disk string) {
	s.Helper()
	s.until("the block job is ready", func() bool {
		p, err := s.h.BlockJob(s.ctx, uuid, disk)
		s.must(err)
		if p.Current > p.Total {
			s.Errorf("block job progress is %d of %d", p.Current, p.Total)
		}
		return p.Ready
	})
}

// disk returns one disk of the domain.
func (s *suite) disk(uuid switchback.VMUUID, name string) hypervisor.Disk {
	s.Helper()
	for _, d := range s.domain(uuid).Disks {
		if d.Name == name {
			return d
		}
	}
	s.Fatalf("the domain has no disk %s", name)
	return hypervisor.Disk{}
}

// wantVDA checks the content of vda by a backup job of its own.
func (s *suite) wantVDA(uuid switchback.VMUUID, off, length int64, pattern byte) {
	s.Helper()
	j := s.begin(uuid, s.spec("", "", "vda"))
	j.wantContent(0, off, length, pattern)
	j.end()
}

func testBlockCopy(s *suite) {
	uuid := s.started(VM{})
	s.must(s.h.BlockAbort(s.ctx, uuid, "vda"))
	_, err := s.h.BlockJob(s.ctx, uuid, "vda")
	s.wantCode("BlockJob without a job", err, switchback.CodeNotFound)
	s.wantCode("BlockPivot without a job", s.h.BlockPivot(s.ctx, uuid, "vda"), switchback.CodeNotFound)
	s.wantCode("BlockCommit without backing", s.h.BlockCommit(s.ctx, uuid, "vda"), switchback.CodeConflict)

	s.env.Write(s, uuid, "vda", 0, 2*unit, 1)
	before := s.disk(uuid, "vda").Path
	to := hypervisor.CopyTarget{Path: s.env.NewImage(s, ""), Format: "qcow2"}
	s.must(s.h.BlockCopy(s.ctx, uuid, "vda", to))
	s.wantCode("a second BlockCopy", s.h.BlockCopy(s.ctx, uuid, "vda", to), switchback.CodeConflict)
	s.ready(uuid, "vda")
	s.must(s.h.BlockAbort(s.ctx, uuid, "vda"))
	if got := s.disk(uuid, "vda").Path; got != before {
		s.Errorf("after BlockAbort the disk is %s, want %s", got, before)
	}
	_, err = s.h.BlockJob(s.ctx, uuid, "vda")
	s.wantCode("BlockJob after BlockAbort", err, switchback.CodeNotFound)

	to.Path = s.env.NewImage(s, "")
	s.must(s.h.BlockCopy(s.ctx, uuid, "vda", to))
	s.ready(uuid, "vda")
	s.env.Write(s, uuid, "vda", unit, unit, 2) // followed by the job
	s.ready(uuid, "vda")
	s.must(s.h.BlockPivot(s.ctx, uuid, "vda"))
	if d := s.disk(uuid, "vda"); d.Path != to.Path || len(d.Backing) != 0 {
		s.Errorf("after BlockPivot the disk is %s over %v, want %s", d.Path, d.Backing, to.Path)
	}
	s.wantVDA(uuid, 0, unit, 1)
	s.wantVDA(uuid, unit, unit, 2)
}

// testCollapse does what a commit does: it moves a disk from an overlay on one
// base to an overlay on another of equal content, and then onto that base,
// while the guest writes and a checkpoint records.
func testCollapse(s *suite) {
	uuid := s.started(VM{Backed: true})
	s.must(s.h.CreateCheckpoint(s.ctx, uuid, "c0", []string{"vda"}))
	s.must(s.h.Resume(s.ctx, uuid))
	s.env.Write(s, uuid, "vda", 0, unit, 1)

	base := s.env.NewImage(s, "")
	overlay := s.env.NewImage(s, base)
	s.must(s.h.BlockCopy(s.ctx, uuid, "vda", hypervisor.CopyTarget{
		Path: overlay, Format: "qcow2", Backing: base, BackingFormat: "qcow2", Shallow: true,
	}))
	s.env.Write(s, uuid, "vda", 2*unit, unit, 2)
	s.ready(uuid, "vda")
	s.must(s.h.BlockPivot(s.ctx, uuid, "vda"))
	if d := s.disk(uuid, "vda"); d.Path != overlay || len(d.Backing) != 1 || d.Backing[0] != base {
		s.Errorf("after the copy the disk is %s over %v, want %s over %s", d.Path, d.Backing, overlay, base)
	}
	s.env.Write(s, uuid, "vda", 4*unit, unit, 3)
	s.must(s.h.BlockCommit(s.ctx, uuid, "vda"))
	s.env.Write(s, uuid, "vda", 6*unit, unit, 4)
	s.ready(uuid, "vda")
	s.must(s.h.BlockPivot(s.ctx, uuid, "vda"))
	if d := s.disk(uuid, "vda"); d.Path != base || len(d.Backing) != 0 {
		s.Errorf("after the commit the disk is %s over %v, want %s alone", d.Path, d.Backing, base)
	}
	for i := range int64(4) {
		s.wantVDA(uuid, 2*i*unit, unit, byte(i+1))
	}
	s.wantSince(uuid, "c0", Range{0, unit}, Range{2 * unit, unit}, Range{4 * unit, unit}, Range{6 * unit, unit})
	s.wantState(uuid, hypervisor.StateRunning)

	// The persistent definition follows, so a restart finds the base.
	s.must(s.h.Destroy(s.ctx, uuid))
	if d := s.disk(uuid, "vda"); d.Path != base {
		s.Errorf("after a restart the disk would be %s, want %s", d.Path, base)
	}
	s.must(s.h.Start(s.ctx, uuid, true))
	s.wantSince(uuid, "c0", Range{0, unit}, Range{2 * unit, unit}, Range{4 * unit, unit}, Range{6 * unit, unit})
}

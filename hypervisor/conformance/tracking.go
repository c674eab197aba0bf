package conformance

import (
	"github.com/switchback-dr/switchback/hypervisor"
)

// testTrackWrites follows writes in units of hypervisor.FineUnit through jobs
// as a replication cycle opens them.
func testTrackWrites(s *suite) {
	h, ok := s.h.(hypervisor.FineTracker)
	if !ok {
		s.Skip("the implementation is no FineTracker")
	}
	const fine = hypervisor.FineUnit
	disks := []string{"vda", "vdb"}
	uuid := s.started(VM{Disks: disks})
	write := func(disk string, unit int64) {
		s.Helper()
		s.env.Write(s, uuid, disk, unit*fine, fine, 0xa1)
	}
	// cycle goes from one checkpoint to the next; wrote is what the guest does
	// while the job is open. It returns the connections to the records.
	cycle := func(from, to string, want int, wrote func()) (*job, []Export) {
		s.Helper()
		kept, err := h.TrackWrites(s.ctx, uuid, to, from, disks)
		s.must(err)
		if len(kept) != want {
			s.Fatalf("%d disks have a record since %q, want %d", len(kept), from, want)
		}
		j := s.begin(uuid, s.spec(from, to, disks...))
		wrote()
		s.must(h.ExportWrites(s.ctx, uuid, from, kept))
		var records []Export
		for _, d := range disks {
			if _, ok := kept[d]; ok {
				records = append(records, s.env.Export(s, j.spec.Socket, hypervisor.FineExport(d), hypervisor.FineContext))
			}
		}
		return j, records
	}
	end := func(j *job, records []Export) {
		s.Helper()
		for _, e := range records {
			s.must(e.Close())
		}
		j.end()
	}
	wants := func(records []Export, disk int, units ...int64) {
		s.Helper()
		var want []Range
		for _, u := range units {
			want = append(want, Range{u * fine, fine})
		}
		r := &job{suite: s, exports: records}
		r.wantDirty(disk, want...)
	}

	write("vda", 1)
	j, records := cycle("", "c1", 0, func() { write("vda", 2) })
	end(j, records)

	write("vda", 40)
	write("vdb", 7)
	// What is written after the instant may be in the record; the bitmap of
	// the checkpoint says that it does not belong there.
	j, records = cycle("c1", "c2", 2, func() { write("vdb", 100) })
	wants(records, 0, 2, 40)
	wants(records, 1, 7, 100)
	j.wantDirty(0, Range{0, unit}, Range{40 * fine / unit * unit, unit})
	j.wantDirty(1, Range{0, unit})
	end(j, records)

	// A cycle that failed: its record and checkpoint go, the older stay.
	write("vda", 60)
	j, records = cycle("c2", "c3", 2, func() {})
	end(j, records)
	s.must(s.h.DeleteCheckpoint(s.ctx, uuid, "c3"))
	write("vda", 80)
	j, records = cycle("c2", "c4", 2, func() {})
	wants(records, 0, 60, 80)
	wants(records, 1, 100)
	end(j, records)

	// Records end when they are forgotten, and with the domain's process.
	s.must(h.ForgetWrites(s.ctx, uuid))
	j, records = cycle("c4", "c5", 0, func() {})
	end(j, records)
	s.must(s.h.Destroy(s.ctx, uuid))
	s.must(h.ForgetWrites(s.ctx, uuid))
	s.must(s.h.Start(s.ctx, uuid, true))
	write("vda", 3)
	j, records = cycle("c5", "c6", 0, func() {})
	j.wantDirty(0, Range{0, unit})
	end(j, records)
	// Nothing of ours is in the way of the platform's own work with bitmaps.
	s.must(s.h.DeleteCheckpoint(s.ctx, uuid, "c5"))
	s.wantSince(uuid, "c6")
}

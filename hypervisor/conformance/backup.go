package conformance

import (
	"bytes"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

const unit = Granularity

// job is an open backup job.
type job struct {
	*suite
	uuid    switchback.VMUUID
	spec    hypervisor.BackupSpec
	exports []Export
}

// spec describes a job on the disks, all from the same checkpoint.
func (s *suite) spec(from, checkpoint string, disks ...string) hypervisor.BackupSpec {
	spec := hypervisor.BackupSpec{Socket: s.env.Path(s), Checkpoint: checkpoint}
	for _, d := range disks {
		spec.Disks = append(spec.Disks, hypervisor.BackupDisk{Name: d, Scratch: s.env.NewImage(s, ""), Incremental: from})
	}
	return spec
}

// begin opens a job and connects to all its exports.
func (s *suite) begin(uuid switchback.VMUUID, spec hypervisor.BackupSpec) *job {
	s.Helper()
	s.must(s.h.BeginBackup(s.ctx, uuid, spec))
	j := &job{suite: s, uuid: uuid, spec: spec}
	for _, d := range spec.Disks {
		context := ""
		if d.Incremental != "" {
			context = "qemu:dirty-bitmap:backup-" + d.Name
		}
		e := s.env.Export(s, spec.Socket, d.Name, context)
		if e.Size() != DiskBytes {
			s.Errorf("export %s has %d bytes, want %d", d.Name, e.Size(), DiskBytes)
		}
		j.exports = append(j.exports, e)
	}
	return j
}

func (j *job) end() {
	j.Helper()
	for _, e := range j.exports {
		e.Close()
	}
	j.must(j.h.EndBackup(j.ctx, j.uuid))
	if open, err := j.h.HasBackup(j.ctx, j.uuid); err != nil || open {
		j.Errorf("after EndBackup HasBackup says %v, %v", open, err)
	}
}

// wantContent checks that a range of the i-th disk holds the pattern.
func (j *job) wantContent(i int, off, length int64, pattern byte) {
	j.Helper()
	got := make([]byte, length)
	if _, err := j.exports[i].ReadAt(got, off); err != nil {
		j.Fatalf("read export %d at %d: %v", i, off, err)
	}
	if want := bytes.Repeat([]byte{pattern}, int(length)); !bytes.Equal(got, want) {
		j.Errorf("disk %d at %d does not hold %#x in all %d bytes", i, off, pattern, length)
	}
}

// wantDirty checks that exactly these ranges of the i-th disk are dirty.
func (j *job) wantDirty(i int, want ...Range) {
	j.Helper()
	got, err := j.exports[i].Dirty()
	if err != nil {
		j.Fatalf("dirty ranges of export %d: %v", i, err)
	}
	if !slices.Equal(merge(got), merge(want)) {
		j.Errorf("dirty ranges of disk %d are %v, want %v", i, got, want)
	}
}

// merge joins neighbours.
func merge(in []Range) []Range {
	var out []Range
	for _, r := range in {
		if n := len(out); n > 0 && out[n-1].Offset+out[n-1].Length == r.Offset {
			out[n-1].Length += r.Length
			continue
		}
		out = append(out, r)
	}
	return out
}

// wantSince checks what is dirty on vda since a checkpoint, with a job of its own.
func (s *suite) wantSince(uuid switchback.VMUUID, checkpoint string, want ...Range) {
	s.Helper()
	j := s.begin(uuid, s.spec(checkpoint, "", "vda"))
	j.wantDirty(0, want...)
	j.end()
}

func testBackup(s *suite) {
	uuid := s.started(VM{Disks: []string{"vda", "vdb"}})
	s.must(s.h.EndBackup(s.ctx, uuid))
	s.env.Write(s, uuid, "vda", 0, unit, 0xa1)
	s.env.Write(s, uuid, "vdb", 2*unit, unit, 0xb1)

	full := s.begin(uuid, s.spec("", "c1", "vda", "vdb"))
	if open, err := s.h.HasBackup(s.ctx, uuid); err != nil || !open {
		s.Errorf("with an open job HasBackup says %v, %v", open, err)
	}
	began := time.Now()
	s.wantCode("a second BeginBackup", s.h.BeginBackup(s.ctx, uuid, s.spec("", "", "vda")), switchback.CodeConflict)
	if took := time.Since(began); took > 10*time.Second {
		s.Errorf("a second BeginBackup is refused only after %s", took)
	}
	// The instant is fixed: what the guest writes now is not in the job.
	s.env.Write(s, uuid, "vda", 0, 2*unit, 0xa2)
	full.wantContent(0, 0, unit, 0xa1)
	full.wantContent(0, unit, unit, 0)
	full.wantContent(1, 2*unit, unit, 0xb1)
	s.must(s.h.Resume(s.ctx, uuid))
	s.must(s.h.Suspend(s.ctx, uuid))
	full.end()
	s.must(s.h.EndBackup(s.ctx, uuid))

	s.env.Write(s, uuid, "vda", 5*unit, unit, 0xa3)
	next := s.begin(uuid, s.spec("c1", "c2", "vda", "vdb"))
	next.wantDirty(0, Range{0, 2 * unit}, Range{5 * unit, unit})
	next.wantDirty(1)
	next.wantContent(0, 0, 2*unit, 0xa2)
	next.wantContent(0, 5*unit, unit, 0xa3)
	next.end()
	s.must(s.h.DeleteCheckpoint(s.ctx, uuid, "c1"))

	last := s.begin(uuid, s.spec("c2", "", "vda", "vdb"))
	last.wantDirty(0)
	last.end()

	// One disk goes on, the other starts anew, at one instant.
	s.env.Write(s, uuid, "vdb", 0, unit, 0xb2)
	mixed := s.spec("c2", "c3", "vda", "vdb")
	mixed.Disks[1].Incremental = ""
	j := s.begin(uuid, mixed)
	j.wantDirty(0)
	j.wantContent(1, 0, unit, 0xb2)
	j.end()

	s.wantCode("BeginBackup from a checkpoint that is not there", s.h.BeginBackup(s.ctx, uuid, s.spec("c1", "", "vda")),
		switchback.CodeNotFound, switchback.CodeBitmapLost)
	s.wantCode("BeginBackup with a checkpoint that exists", s.h.BeginBackup(s.ctx, uuid, s.spec("c2", "c3", "vda")), switchback.CodeConflict)
	s.wantCode("BeginBackup without disks", s.h.BeginBackup(s.ctx, uuid, s.spec("c2", "c4")), switchback.CodeInvalid)
	if open, err := s.h.HasBackup(s.ctx, uuid); err != nil || open {
		s.Errorf("after a refused BeginBackup HasBackup says %v, %v", open, err)
	}
	s.wantSince(uuid, "c3")
}

// testBackupDies ends the guest, and then its host, under an open job.
func testBackupDies(s *suite) {
	uuid := s.started(VM{})
	s.must(s.h.CreateCheckpoint(s.ctx, uuid, "c0", []string{"vda"}))
	s.env.Write(s, uuid, "vda", unit, unit, 1)
	s.must(s.h.BeginBackup(s.ctx, uuid, s.spec("c0", "c1", "vda")))
	s.env.Write(s, uuid, "vda", 3*unit, unit, 2)
	s.must(s.h.Destroy(s.ctx, uuid))
	if open, err := s.h.HasBackup(s.ctx, uuid); err != nil || open {
		s.Errorf("with the domain off HasBackup says %v, %v", open, err)
	}
	s.must(s.h.EndBackup(s.ctx, uuid))
	s.must(s.h.Start(s.ctx, uuid, true))
	s.wantSince(uuid, "c0", Range{unit, unit}, Range{3 * unit, unit})
	s.wantSince(uuid, "c1", Range{3 * unit, unit})

	spec := s.spec("c1", "c2", "vda")
	s.must(s.h.BeginBackup(s.ctx, uuid, spec))
	s.env.Kill(s, uuid)
	s.must(s.h.EndBackup(s.ctx, uuid))
	s.must(s.h.Start(s.ctx, uuid, true))
	// The same paths again: what the dead job left there must not be in the way.
	spec.Checkpoint, spec.Disks[0].Incremental = "c3", ""
	j := s.begin(uuid, spec)
	j.wantContent(0, 3*unit, unit, 2)
	j.end()
}

func testBackupOff(s *suite) {
	uuid := s.env.NewVM(s, VM{})
	s.must(s.h.EndBackup(s.ctx, uuid))
	s.wantCode("BeginBackup of a domain that is off", s.h.BeginBackup(s.ctx, uuid, s.spec("", "c1", "vda")), switchback.CodeConflict)
	s.wantCode("CreateCheckpoint on a domain that is off", s.h.CreateCheckpoint(s.ctx, uuid, "c1", []string{"vda"}), switchback.CodeConflict)
	list, err := s.h.Checkpoints(s.ctx, uuid)
	s.must(err)
	if len(list) != 0 {
		s.Errorf("refused calls left checkpoints: %v", list)
	}
}

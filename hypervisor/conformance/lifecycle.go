package conformance

import (
	"context"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// nobody is a UUID that no machine has.
const nobody switchback.VMUUID = "5e0b5f0e-0000-4000-8000-000000000000"

func testHost(s *suite) {
	h, err := s.h.Host(s.ctx)
	s.must(err)
	if h.Name == "" || h.Hypervisor == "" || h.UUID == "" || h.MemoryMiB <= 0 || h.CPUs <= 0 {
		s.Errorf("host is incomplete: %+v", h)
	}
}

func testMissing(s *suite) {
	ctx, path := s.ctx, s.env.Path(s)
	spec := hypervisor.BackupSpec{Socket: path, Disks: []hypervisor.BackupDisk{{Name: "vda", Scratch: path + "s"}}}
	to := hypervisor.CopyTarget{Path: path, Format: "qcow2"}
	ignore := func(_ any, err error) error { return err }
	for what, err := range map[string]error{
		"Domain":           ignore(s.h.Domain(ctx, nobody)),
		"Definition":       ignore(s.h.Definition(ctx, nobody, false)),
		"Start":            s.h.Start(ctx, nobody, false),
		"Resume":           s.h.Resume(ctx, nobody),
		"Suspend":          s.h.Suspend(ctx, nobody),
		"Shutdown":         s.h.Shutdown(ctx, nobody, hypervisor.ShutdownOptions{Deadline: time.Second}),
		"Destroy":          s.h.Destroy(ctx, nobody),
		"SetAutostart":     s.h.SetAutostart(ctx, nobody, true),
		"AgentPing":        s.h.AgentPing(ctx, nobody, time.Second),
		"BeginBackup":      s.h.BeginBackup(ctx, nobody, spec),
		"EndBackup":        s.h.EndBackup(ctx, nobody),
		"HasBackup":        ignore(s.h.HasBackup(ctx, nobody)),
		"CreateCheckpoint": s.h.CreateCheckpoint(ctx, nobody, "c", []string{"vda"}),
		"Checkpoints":      ignore(s.h.Checkpoints(ctx, nobody)),
		"DeleteCheckpoint": s.h.DeleteCheckpoint(ctx, nobody, "c"),
		"BlockCopy":        s.h.BlockCopy(ctx, nobody, "vda", to),
		"BlockCommit":      s.h.BlockCommit(ctx, nobody, "vda"),
		"BlockJob":         ignore(s.h.BlockJob(ctx, nobody, "vda")),
		"BlockPivot":       s.h.BlockPivot(ctx, nobody, "vda"),
		"BlockAbort":       s.h.BlockAbort(ctx, nobody, "vda"),
	} {
		s.wantCode(what+" of a missing domain", err, switchback.CodeNotFound)
	}
	if err := s.h.Undefine(ctx, nobody); err != nil {
		s.Errorf("Undefine of a missing domain: %v", err)
	}
}

func testDescribe(s *suite) {
	uuid := s.env.NewVM(s, VM{Disks: []string{"vda", "vdb"}})
	d := s.domain(uuid)
	if d.UUID != uuid || d.Name == "" || !d.Persistent || d.Autostart || d.State != hypervisor.StateOff || d.MemoryMiB <= 0 || d.CPUs <= 0 {
		s.Errorf("domain is described wrongly: %+v", d)
	}
	var names []string
	for _, disk := range d.Disks {
		if disk.Device != "disk" {
			if disk.Unsupported == "" {
				s.Errorf("%s %s is shown as one that can be protected", disk.Device, disk.Name)
			}
			continue
		}
		names = append(names, disk.Name)
		if disk.SizeBytes != DiskBytes || disk.Path == "" || disk.Format == "" || disk.Unsupported != "" || len(disk.Backing) != 0 {
			s.Errorf("disk is described wrongly: %+v", disk)
		}
	}
	if want := []string{"vda", "vdb"}; !slices.Equal(names, want) {
		s.Errorf("disks %v, want %v", names, want)
	}
	all, err := s.h.Domains(s.ctx)
	s.must(err)
	if !slices.ContainsFunc(all, func(d hypervisor.Domain) bool { return d.UUID == uuid }) {
		s.Errorf("Domains does not list %s", uuid)
	}

	networked := s.domain(s.env.NewVM(s, VM{Network: true}))
	if want := []string{Network}; !slices.Equal(networked.Networks, want) {
		s.Errorf("networks %v, want %v", networked.Networks, want)
	}

	backed := s.env.NewVM(s, VM{Backed: true})
	s.must(s.h.Start(s.ctx, backed, true))
	if d := s.disk(backed, "vda"); len(d.Backing) != 1 {
		s.Errorf("the backing of a running domain's disk is not shown: %+v", d)
	}
}

func testLifecycle(s *suite) {
	uuid := s.env.NewVM(s, VM{})
	s.must(s.h.Destroy(s.ctx, uuid))
	s.must(s.h.Start(s.ctx, uuid, true))
	if d := s.domain(uuid); d.State != hypervisor.StatePaused || d.PauseReason != hypervisor.PauseUser {
		s.Errorf("started paused, the domain is %s (%s)", d.State, d.PauseReason)
	}
	s.wantCode("Start of a live domain", s.h.Start(s.ctx, uuid, false), switchback.CodeConflict)
	s.must(s.h.Resume(s.ctx, uuid))
	s.wantState(uuid, hypervisor.StateRunning)
	s.must(s.h.Resume(s.ctx, uuid))
	s.must(s.h.Suspend(s.ctx, uuid))
	s.wantState(uuid, hypervisor.StatePaused)
	s.must(s.h.Suspend(s.ctx, uuid))
	s.must(s.h.Destroy(s.ctx, uuid))
	s.wantState(uuid, hypervisor.StateOff)
	s.must(s.h.Destroy(s.ctx, uuid))
	s.wantCode("Resume of a domain that is off", s.h.Resume(s.ctx, uuid), switchback.CodeConflict)
	s.wantCode("Suspend of a domain that is off", s.h.Suspend(s.ctx, uuid), switchback.CodeConflict)

	s.must(s.h.SetAutostart(s.ctx, uuid, true))
	s.must(s.h.SetAutostart(s.ctx, uuid, true))
	if !s.domain(uuid).Autostart {
		s.Error("autostart is not on")
	}
	s.must(s.h.SetAutostart(s.ctx, uuid, false))
	if s.domain(uuid).Autostart {
		s.Error("autostart is not off")
	}
}

func testUndefine(s *suite) {
	uuid := s.started(VM{})
	s.must(s.h.CreateCheckpoint(s.ctx, uuid, "c0", []string{"vda"}))
	s.must(s.h.Destroy(s.ctx, uuid))
	definition, err := s.h.Definition(s.ctx, uuid, false)
	s.must(err)
	if _, err := s.h.Define(s.ctx, definition); err != nil {
		s.Errorf("Define of what is defined: %v", err)
	}
	s.must(s.h.Undefine(s.ctx, uuid))
	_, err = s.h.Domain(s.ctx, uuid)
	s.wantCode("Domain after Undefine", err, switchback.CodeNotFound)
	s.must(s.h.Undefine(s.ctx, uuid))
	d, err := s.h.Define(s.ctx, definition)
	s.must(err)
	if d.UUID != uuid || d.State != hypervisor.StateOff {
		s.Errorf("defined again, the domain is %+v", d)
	}
	list, err := s.h.Checkpoints(s.ctx, uuid)
	s.must(err)
	if len(list) != 0 {
		s.Errorf("checkpoints survived Undefine: %v", list)
	}
}

func testTranslate(s *suite) {
	uuid := s.env.NewVM(s, VM{Disks: []string{"vda", "vdb"}, Network: true})
	original, err := s.h.Definition(s.ctx, uuid, false)
	s.must(err)
	d := s.domain(uuid)
	home := map[string]hypervisor.DiskSource{}
	away := map[string]hypervisor.DiskSource{}
	for _, disk := range d.Disks {
		if disk.Device != "disk" {
			continue
		}
		home[disk.Name] = hypervisor.DiskSource{Path: disk.Path, Format: disk.Format}
		away[disk.Name] = hypervisor.DiskSource{Path: s.env.NewImage(s, ""), Format: disk.Format}
	}
	same, err := s.h.Translate(original, hypervisor.Translation{})
	s.must(err)

	there, err := s.h.Translate(original, hypervisor.Translation{Disks: away, Networks: map[string]string{Network: "elsewhere"}})
	s.must(err)
	s.must(s.h.Undefine(s.ctx, uuid))
	moved, err := s.h.Define(s.ctx, there)
	s.must(err)
	if moved.UUID != uuid || moved.Name != d.Name {
		s.Errorf("the translated domain is %s %q, want %s %q", moved.UUID, moved.Name, uuid, d.Name)
	}
	for _, disk := range moved.Disks {
		if want, ok := away[disk.Name]; ok && disk.Path != want.Path {
			s.Errorf("translated disk %s is at %s, want %s", disk.Name, disk.Path, want.Path)
		}
	}
	if want := []string{"elsewhere"}; !slices.Equal(moved.Networks, want) {
		s.Errorf("translated networks %v, want %v", moved.Networks, want)
	}
	fetched, err := s.h.Definition(s.ctx, uuid, false)
	s.must(err)
	back, err := s.h.Translate(fetched, hypervisor.Translation{Disks: home, Networks: map[string]string{"elsewhere": Network}})
	s.must(err)
	if back != same {
		s.Errorf("translated there and back the definition changed:\n%s\nwant:\n%s", back, same)
	}

	away["vda"] = hypervisor.DiskSource{Path: away["vda"].Path, Format: away["vda"].Format, BackingSocket: s.env.Path(s), BackingExport: "rp"}
	view, err := s.h.Translate(original, hypervisor.Translation{Disks: away})
	s.must(err)
	moved, err = s.h.Define(s.ctx, view)
	s.must(err)
	if i := slices.IndexFunc(moved.Disks, func(d hypervisor.Disk) bool { return d.Name == "vda" }); i < 0 || len(moved.Disks[i].Backing) != 1 {
		s.Errorf("the NBD backing is not in the definition: %+v", moved.Disks)
	}
	back, err = s.h.Translate(view, hypervisor.Translation{Disks: home})
	s.must(err)
	if back != same {
		s.Errorf("translated onto a view and back the definition changed:\n%s\nwant:\n%s", back, same)
	}
	_, err = s.h.Translate(original, hypervisor.Translation{Disks: map[string]hypervisor.DiskSource{"vdz": home["vda"]}})
	s.wantCode("Translate of a disk that is not there", err, switchback.CodeInvalid)
}

func testEvents(s *suite) {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	events, err := s.h.Events(ctx)
	s.must(err)
	uuid := s.env.NewVM(s, VM{})
	s.must(s.h.Start(s.ctx, uuid, true))
	s.must(s.h.Resume(s.ctx, uuid))
	s.must(s.h.Suspend(s.ctx, uuid))
	s.must(s.h.Destroy(s.ctx, uuid))
	s.must(s.h.Undefine(s.ctx, uuid))
	want := []hypervisor.EventKind{
		hypervisor.EventDefined, hypervisor.EventStarted, hypervisor.EventResumed,
		hypervisor.EventSuspended, hypervisor.EventStopped, hypervisor.EventUndefined,
	}
	var got []hypervisor.EventKind
	for len(want) > 0 {
		select {
		case e := <-events:
			if e.UUID != uuid {
				continue
			}
			if e.Name == "" || e.Time.IsZero() {
				s.Errorf("event is incomplete: %+v", e)
			}
			got = append(got, e.Kind)
			if e.Kind == want[0] { // others may come in between, e.g. suspended at a paused start
				want = want[1:]
			}
		case <-s.ctx.Done():
			s.Fatalf("no event %s after %v", want[0], got)
		}
	}
	cancel()
	s.until("the channel is closed", func() bool {
		select {
		case _, open := <-events:
			return !open
		default:
			return false
		}
	})
}

func testShutdown(s *suite) {
	uuid := s.env.NewVM(s, VM{Reacts: true})
	s.must(s.h.Shutdown(s.ctx, uuid, hypervisor.ShutdownOptions{Deadline: time.Second}))
	s.must(s.h.Start(s.ctx, uuid, false))
	s.env.Boot(s, uuid)
	s.must(s.h.Shutdown(s.ctx, uuid, hypervisor.ShutdownOptions{Deadline: 30 * time.Second}))
	s.wantState(uuid, hypervisor.StateOff)
}

func testShutdownRefused(s *suite) {
	uuid := s.env.NewVM(s, VM{})
	s.must(s.h.Start(s.ctx, uuid, false))
	s.wantCode("AgentPing without an agent", s.h.AgentPing(s.ctx, uuid, time.Second),
		switchback.CodeUnsupported, switchback.CodeUnavailable, switchback.CodeTimeout)
	s.wantCode("Shutdown without a deadline", s.h.Shutdown(s.ctx, uuid, hypervisor.ShutdownOptions{}), switchback.CodeInvalid)
	s.wantCode("Shutdown of a deaf guest", s.h.Shutdown(s.ctx, uuid, hypervisor.ShutdownOptions{Deadline: time.Second}), switchback.CodeTimeout)
	s.wantState(uuid, hypervisor.StateRunning)
	s.must(s.h.Suspend(s.ctx, uuid))
	s.wantCode("Shutdown of a paused guest", s.h.Shutdown(s.ctx, uuid, hypervisor.ShutdownOptions{Deadline: time.Second}),
		switchback.CodeConflict, switchback.CodeTimeout)
	s.wantState(uuid, hypervisor.StatePaused)
	s.must(s.h.Resume(s.ctx, uuid))
	s.must(s.h.Shutdown(s.ctx, uuid, hypervisor.ShutdownOptions{Deadline: 500 * time.Millisecond, Force: true}))
	s.wantState(uuid, hypervisor.StateOff)
}

func testCancelled(s *suite) {
	ctx, cancel := context.WithCancel(s.ctx)
	cancel()
	_, err := s.h.Domains(ctx)
	s.wantCode("Domains with a context that has ended", err, switchback.CodeCancelled)
	ctx, cancel = context.WithDeadline(s.ctx, time.Now().Add(-time.Second))
	defer cancel()
	_, err = s.h.Domains(ctx)
	s.wantCode("Domains after the deadline", err, switchback.CodeTimeout)
}

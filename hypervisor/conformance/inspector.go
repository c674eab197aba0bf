package conformance

import (
	"context"
	"slices"
	"time"

	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

func (s *suite) inspector() hypervisor.Inspector {
	s.Helper()
	i, ok := s.h.(hypervisor.Inspector)
	if !ok {
		s.Skip("the implementation is no Inspector")
	}
	return i
}

// testCopy runs a copy beside its original.
func testCopy(s *suite) {
	h := s.inspector()
	original := s.started(VM{Disks: []string{"vda", "vdb"}})
	definition, err := s.h.Definition(s.ctx, original, false)
	s.must(err)
	image, log := s.env.NewImage(s, ""), s.env.Path(s)
	as := hypervisor.Isolation{Name: s.domain(original).Name + "-copy", UUID: switchback.VMUUID(uuid.NewString()), ConsoleLog: log,
		Disks: map[string]hypervisor.DiskSource{"vda": {Path: image, Format: "qcow2"}}}
	copied, notes, err := h.Isolate(definition, as)
	s.must(err)
	if len(notes) == 0 {
		s.Error("nothing is said of the disk that was left out")
	}
	if path, err := h.ConsoleLog(copied); err != nil || path != log {
		s.Errorf("the copy's console goes to %q, %v; want %q", path, err, log)
	}
	dom, err := s.h.Define(s.ctx, copied)
	s.must(err)
	s.Cleanup(func() {
		s.h.Destroy(context.Background(), as.UUID)
		s.h.Undefine(context.Background(), as.UUID)
	})
	disks := slices.DeleteFunc(slices.Clone(dom.Disks), func(d hypervisor.Disk) bool { return d.Device == "cdrom" && d.Path == "" })
	if dom.UUID != as.UUID || dom.Name != as.Name || dom.Autostart || len(disks) != 1 || disks[0].Path != image || len(dom.Networks) != 0 {
		s.Errorf("the copy is %+v", dom)
	}
	s.must(s.h.Start(s.ctx, as.UUID, true))
	s.wantState(as.UUID, hypervisor.StatePaused)
	s.wantState(original, hypervisor.StatePaused)
	if list, err := s.h.Checkpoints(s.ctx, as.UUID); err != nil || len(list) != 0 {
		s.Errorf("the copy has checkpoints %v, %v", list, err)
	}
	_, _, err = h.Screenshot(s.ctx, as.UUID) // the suite's machines have no screen
	s.wantCode("Screenshot without a screen", err, switchback.CodeUnsupported)
	_, err = h.GuestExec(s.ctx, as.UUID, []string{"true"}, time.Second)
	s.wantCode("GuestExec without an agent", err, switchback.CodeUnsupported, switchback.CodeUnavailable, switchback.CodeConflict)
	s.must(s.h.Destroy(s.ctx, as.UUID))
	s.must(s.h.Undefine(s.ctx, as.UUID))
	s.wantState(original, hypervisor.StatePaused)

	_, err = h.GuestExec(s.ctx, nobody, []string{"true"}, time.Second)
	s.wantCode("GuestExec in a missing domain", err, switchback.CodeNotFound)
	_, _, err = h.Screenshot(s.ctx, nobody)
	s.wantCode("Screenshot of a missing domain", err, switchback.CodeNotFound)
	as.Name = s.domain(original).Name
	_, _, err = h.Isolate(definition, as)
	s.wantCode("a copy of the same name", err, switchback.CodeInvalid)
	_, err = h.Networks(s.ctx)
	s.must(err)
}

// testCopyNetwork: a copy is on the networks it is given, and on no other.
func testCopyNetwork(s *suite) {
	h := s.inspector()
	definition, err := s.h.Definition(s.ctx, s.env.NewVM(s, VM{Network: true}), false)
	s.must(err)
	for _, c := range []struct {
		name string
		as   hypervisor.Isolation
		want []string
	}{
		{"none", hypervisor.Isolation{}, []string{}},
		{"one for all", hypervisor.Isolation{Network: "quiet"}, []string{"quiet"}},
		{"mapped", hypervisor.Isolation{Networks: map[string]string{Network: "quiet"}}, []string{"quiet"}},
		{"another mapped", hypervisor.Isolation{Networks: map[string]string{"other": "quiet"}}, []string{}},
	} {
		c.as.Name, c.as.UUID = "copy-"+uuid.NewString()[:8], switchback.VMUUID(uuid.NewString())
		copied, _, err := h.Isolate(definition, c.as)
		s.must(err)
		dom, err := s.h.Define(s.ctx, copied)
		s.must(err)
		if !slices.Equal(dom.Networks, c.want) {
			s.Errorf("%s: the copy is on %v, want %v", c.name, dom.Networks, c.want)
		}
		s.must(s.h.Undefine(s.ctx, c.as.UUID))
	}
}

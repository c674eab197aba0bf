package conformance

import (
	"context"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

// stepLimit bounds every wait of the suite; it is generous because real
// machines are slow, and reached only by a defect.
const stepLimit = 60 * time.Second

// Run judges h. Its subtests run in parallel and each makes its own machines.
func Run(t *testing.T, h hypervisor.Hypervisor, env Env) {
	for _, test := range []struct {
		name string
		run  func(*suite)
	}{
		{"Host", testHost},
		{"Missing", testMissing},
		{"Describe", testDescribe},
		{"Lifecycle", testLifecycle},
		{"Undefine", testUndefine},
		{"Translate", testTranslate},
		{"Events", testEvents},
		{"Shutdown", testShutdown},
		{"ShutdownRefused", testShutdownRefused},
		{"Backup", testBackup},
		{"BackupDies", testBackupDies},
		{"BackupOff", testBackupOff},
		{"TrackWrites", testTrackWrites},
		{"CheckpointChain", testCheckpointChain},
		{"CheckpointOff", testCheckpointOff},
		{"BitmapKept", testBitmapKept},
		{"BitmapLost", testBitmapLost},
		{"BlockCopy", testBlockCopy},
		{"Collapse", testCollapse},
		{"Cancelled", testCancelled},
		{"Copy", testCopy},
		{"CopyNetwork", testCopyNetwork},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), stepLimit)
			defer cancel()
			test.run(&suite{T: t, ctx: ctx, h: h, env: env})
		})
	}
}

// suite is one running test.
type suite struct {
	*testing.T
	ctx context.Context
	h   hypervisor.Hypervisor
	env Env
}

func (s *suite) must(err error) {
	s.Helper()
	if err != nil {
		s.Fatal(err)
	}
}

// wantCode checks that err is a *switchback.Error with one of the codes.
func (s *suite) wantCode(what string, err error, codes ...switchback.Code) {
	s.Helper()
	got := switchback.CodeOf(err)
	for _, c := range codes {
		if got == c {
			return
		}
	}
	s.Errorf("%s: got error %v (code %q), want code %q", what, err, got, codes)
}

func (s *suite) domain(uuid switchback.VMUUID) hypervisor.Domain {
	s.Helper()
	d, err := s.h.Domain(s.ctx, uuid)
	s.must(err)
	return d
}

func (s *suite) wantState(uuid switchback.VMUUID, want hypervisor.State) {
	s.Helper()
	if got := s.domain(uuid).State; got != want {
		s.Fatalf("domain is %s, want %s", got, want)
	}
}

// started makes a machine and starts it paused.
func (s *suite) started(vm VM) switchback.VMUUID {
	s.Helper()
	uuid := s.env.NewVM(s, vm)
	s.must(s.h.Start(s.ctx, uuid, true))
	return uuid
}

// until waits for a condition.
func (s *suite) until(what string, done func() bool) {
	s.Helper()
	for !done() {
		select {
		case <-s.ctx.Done():
			s.Fatalf("%s: still waiting after %s", what, stepLimit)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

package server

import (
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/store/postgrestest"
	"github.com/switchback-dr/switchback/transport"
)

// TestRotationWaits: a phase ends when every agent has done what it asks for,
// but for those that are revoked; a restart in each phase finds it again.
func TestRotationWaits(t *testing.T) {
	dir := memoryDir(t)
	open := func() *Server {
		s, err := Open(t.Context(), Config{StateDir: dir, Listen: []string{"127.0.0.1:0"}})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	defer func() { s.Close() }()
	ctx, now := t.Context(), time.Now()
	if err := s.store.CreateSite(ctx, store.Site{ID: "berlin", CreatedAt: now}); err != nil {
		t.Fatal(err)
	}
	says := func(id switchback.AgentID, issuer string, believes ...string) {
		t.Helper()
		raw, err := json.Marshal(agentapi.AgentStatus{Trust: agentapi.Trust{Issuer: issuer, Authorities: believes}})
		if err == nil {
			err = s.store.SaveAgent(ctx, store.Agent{ID: id, Site: "berlin", JoinedAt: now, LastSeen: now, Status: raw})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// turn lets the server work, restarts it, and returns how the CA stands then.
	turn := func() transport.Rotation {
		t.Helper()
		if err := s.trustOnce(ctx); err != nil {
			t.Fatal(err)
		}
		was := s.ca.Rotation()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if s = open(); s.ca.Rotation() != was {
			t.Fatalf("after a restart %+v, before %+v", s.ca.Rotation(), was)
		}
		if !s.fits(s.creds, serverTTL) {
			t.Fatal("the server's certificate does not fit the CA")
		}
		return was
	}
	old := s.ca.Fingerprint()
	says("a-1", old, old)
	says("a-2", old, old)
	says("a-bad", old, old)
	text, err := json.Marshal(agentapi.Revocation{Agent: "a-bad", Site: "berlin", At: now, By: "admin"})
	if err == nil {
		_, err = s.store.EnsureSetting(ctx, settingRevoked+"a-bad", string(text))
	}
	if err != nil {
		t.Fatal(err)
	}
	if r := turn(); r.Phase != transport.RotationNone {
		t.Fatalf("it rotates by itself: %+v", r)
	}
	if err := s.advanceCA(ctx, s.ca.Rotation()); err != nil {
		t.Fatal(err)
	}
	fresh := s.ca.Rotation().Other
	for _, step := range []struct {
		name string
		do   func()
		want transport.RotationPhase
		sign string
	}{
		{"nobody has heard", func() {}, transport.RotationIntroducing, old},
		{"one believes both", func() { says("a-1", old, old, fresh) }, transport.RotationIntroducing, old},
		{"all believe both", func() { says("a-2", old, old, fresh) }, transport.RotationReplacing, fresh},
		{"one has a new certificate", func() { says("a-2", fresh, old, fresh) }, transport.RotationReplacing, fresh},
		{"all have", func() { says("a-1", fresh, old, fresh) }, transport.RotationNone, fresh},
	} {
		step.do()
		if r := turn(); r.Phase != step.want || s.ca.Fingerprint() != step.sign {
			t.Fatalf("%s: phase %q, signing %s, want %q and %s", step.name, r.Phase, s.ca.Fingerprint(), step.want, step.sign)
		}
		u, err := s.trustUpdate(ctx, agentapi.AgentStatus{Trust: agentapi.Trust{Issuer: old}})
		if err != nil || u.Renew != (step.sign != old) || len(u.Revoked) != 1 {
			t.Errorf("%s: agents are told %+v, %v", step.name, u, err)
		}
	}
	noted, err := s.store.Audit(ctx, store.AuditFilter{Action: "advance-ca", Limit: 9})
	if err != nil || len(noted) != 3 || !strings.Contains(noted[2].Detail, fresh[:16]) {
		t.Errorf("noted %+v, %v", noted, err)
	}
	if got := s.creds.Authorities(); !slices.Equal(got, []string{fresh}) {
		t.Errorf("the server still believes %v", got)
	}
}

// TestRotationShared: of two servers on one database one goes on with the
// rotation, and the other follows.
func TestRotationShared(t *testing.T) {
	where := postgrestest.Start(t).Database()
	dir := t.TempDir()
	open := func(dir, key string) *Server {
		s, err := Open(t.Context(), Config{StateDir: dir, Store: where, KeyFile: key, Listen: []string{"127.0.0.1:0"}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	a := open(dir, "")
	b := open(t.TempDir(), filepath.Join(dir, keyFile))
	for phase := range 3 {
		from := a.ca.Rotation()
		// Both begin the same phase: one of them has no effect.
		if err := a.advanceCA(t.Context(), from); err != nil {
			t.Fatal(err)
		}
		if err := b.advanceCA(t.Context(), from); err != nil {
			t.Fatal(err)
		}
		for _, s := range []*Server{a, b} {
			if err := s.trustOnce(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if a.ca.Rotation() != b.ca.Rotation() || a.ca.Fingerprint() != b.ca.Fingerprint() || a.ca.Rotation() == from {
			t.Fatalf("phase %d: %+v and %+v", phase, a.ca.Rotation(), b.ca.Rotation())
		}
		if !b.fits(b.creds, serverTTL) {
			t.Errorf("phase %d: the other server's certificate does not fit", phase)
		}
	}
	if a.ca.Rotation().Phase != transport.RotationNone {
		t.Errorf("it ends in %+v", a.ca.Rotation())
	}
}

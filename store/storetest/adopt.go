package storetest

import (
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/store"
)

// protectionAdopted: what others have kept comes with its version, never twice
// and never over what was written meanwhile.
func protectionAdopted(t *testing.T, s *store.Store) {
	p := switchback.Protection{ID: "p-1", VM: "u-1", Name: "web", Phase: switchback.PhaseProtected, Epoch: 4, Version: 17}
	ok(t, s.AdoptProtection(ctx, p, 0))
	same(t, must(s.Protection(ctx, "p-1"))(t), p)
	code(t, s.AdoptProtection(ctx, p, 0), switchback.CodeConflict)
	same(t, must(s.ProtectionVersions(ctx))(t), map[switchback.ProtectionID]int64{"p-1": 17})

	next := must(s.UpdateProtection(ctx, p))(t)
	same(t, next.Version, int64(18))
	p.Epoch, p.Version = 9, 40
	code(t, s.AdoptProtection(ctx, p, 17), switchback.CodeConflict)
	ok(t, s.AdoptProtection(ctx, p, 18))
	same(t, must(s.Protection(ctx, "p-1"))(t), p)

	other := switchback.Protection{ID: "p-2", VM: "u-1", Name: "web", Phase: switchback.PhaseProtected, Version: 1}
	code(t, s.AdoptProtection(ctx, other, 0), switchback.CodeConflict)

	ok(t, s.SetSetting(ctx, "restored", "now"))
	ok(t, s.DeleteSetting(ctx, "restored"))
	ok(t, s.DeleteSetting(ctx, "restored"))
	_, err := s.Setting(ctx, "restored")
	code(t, err, switchback.CodeNotFound)

	// An agent that is known by name only joins later.
	ok(t, s.CreateSite(ctx, store.Site{ID: "east", CreatedAt: t0}))
	ok(t, s.SaveAgent(ctx, store.Agent{ID: "a-1", Site: "east", Address: "x:1"}))
	ok(t, s.SaveAgent(ctx, store.Agent{ID: "a-1", Site: "east", Address: "x:1", JoinedAt: t0}))
	same(t, must(s.Agent(ctx, "a-1"))(t).JoinedAt, t0)
}

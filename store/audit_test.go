package store_test

import (
	"testing"
	"time"

	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/store"
)

// auditTampered edits the database by hand.
func auditTampered(t *testing.T, s *store.Store) {
	ctx := t.Context()
	verify := func() audit.Verdict {
		v, err := s.VerifyAudit(ctx, nil)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for range 6 {
		if _, err := s.AppendAudit(ctx, audit.Entry{At: time.Now(), Who: "alice", Action: "x", Outcome: audit.Done}); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []struct {
		name, do, back string
		at             int64
	}{
		{"changed", "UPDATE audit_log SET who = 'bob' WHERE sequence = 3", "UPDATE audit_log SET who = 'alice' WHERE sequence = 3", 3},
		{"its time changed", "UPDATE audit_log SET at = at + 1 WHERE sequence = 4", "UPDATE audit_log SET at = at - 1 WHERE sequence = 4", 4},
		{"removed", "UPDATE audit_log SET sequence = -1 WHERE sequence = 2", "UPDATE audit_log SET sequence = 2 WHERE sequence = -1", -1},
		{"inserted", "INSERT INTO audit_log SELECT 7, at, request, 'eve', role, via, action, object, outcome, code, detail, hash, hash FROM audit_log WHERE sequence = 6",
			"DELETE FROM audit_log WHERE sequence = 7", 7},
		{"removed at the end", "DELETE FROM audit_log WHERE sequence = 6", "", 6},
	} {
		s.Exec(t, x.do)
		if v := verify(); len(v.Problems) == 0 || v.Problems[0].Sequence != x.at {
			t.Errorf("%s: %+v, want a problem at %d", x.name, v.Problems, x.at)
		}
		if x.back == "" {
			continue
		}
		s.Exec(t, x.back)
		if v := verify(); len(v.Problems) > 0 {
			t.Errorf("%s and back: %+v", x.name, v.Problems)
		}
	}
}

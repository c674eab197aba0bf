package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/audit"

	"github.com/uptrace/bun"
)

// settingAuditHead keeps the head of the audit log apart from it.
const settingAuditHead = "audit-head"

type auditRow struct {
	bun.BaseModel `bun:"table:audit_log"`
	Sequence      int64  `bun:"sequence,pk"`
	At            int64  `bun:"at"`
	Request       string `bun:"request"`
	Who           string `bun:"who"`
	Role          string `bun:"role"`
	Via           string `bun:"via"`
	Action        string `bun:"action"`
	Object        string `bun:"object"`
	Outcome       string `bun:"outcome"`
	Code          string `bun:"code"`
	Detail        string `bun:"detail"`
	Previous      string `bun:"previous"`
	Hash          string `bun:"hash"`
}

func (r auditRow) entry() audit.Entry {
	return audit.Entry{Sequence: r.Sequence, At: instant(r.At), Request: r.Request, Who: r.Who, Role: switchback.AccessRole(r.Role), Via: r.Via,
		Action: r.Action, Object: r.Object, Outcome: r.Outcome, Code: switchback.Code(r.Code), Detail: r.Detail, Previous: r.Previous, Hash: r.Hash}
}

// AppendAudit adds an entry behind the newest and returns it as it stands.
func (s *Store) AppendAudit(ctx context.Context, e audit.Entry) (audit.Entry, error) {
	for attempt := 1; ; attempt++ {
		err := s.transact(ctx, func(ctx context.Context, tx bun.Tx) error {
			var last auditRow
			err := tx.NewSelect().Model(&last).Order("sequence DESC").Limit(1).Scan(ctx)
			if err != nil && !errors.Is(err, sql.ErrNoRows) {
				return err
			}
			e = e.Chained(audit.Head{Sequence: last.Sequence, Hash: last.Hash})
			row := auditRow{Sequence: e.Sequence, At: micros(e.At), Request: e.Request, Who: e.Who, Role: string(e.Role), Via: e.Via, Action: e.Action,
				Object: e.Object, Outcome: e.Outcome, Code: string(e.Code), Detail: e.Detail, Previous: e.Previous, Hash: e.Hash}
			if _, err := tx.NewInsert().Model(&row).Exec(ctx); err != nil {
				return err
			}
			head, err := json.Marshal(audit.Head{Sequence: e.Sequence, Hash: e.Hash})
			if err != nil {
				return fmt.Errorf("encode head: %w", err)
			}
			_, err = tx.NewInsert().Model(&settingRow{Key: settingAuditHead, Value: string(head)}).
				On("CONFLICT (key) DO UPDATE").Set("value = EXCLUDED.value").Exec(ctx)
			return err
		})
		// PostgreSQL lets two writers follow the same entry; one of them does.
		if isUnique(err) && attempt < maxLogAttempts {
			continue
		}
		return e, failure("audit log", err)
	}
}

// AuditFilter chooses entries. Zero fields do not restrict.
type AuditFilter struct {
	Who, Outcome, Request, Action string
	// Object is a part of it.
	Object       string
	Since, Until time.Time
	// After leaves out this sequence and those before; newest first: those behind.
	After int64
	// NewestFirst turns the order round.
	NewestFirst bool
	// Limit is the most to return; 0 means 100.
	Limit int
}

// Audit returns entries in the order of their sequence, or the other way.
func (s *Store) Audit(ctx context.Context, f AuditFilter) ([]audit.Entry, error) {
	var rows []auditRow
	q := s.read.NewSelect().Model(&rows).Limit(100)
	if f.Limit > 0 {
		q.Limit(int64(f.Limit))
	}
	if f.NewestFirst {
		q.Order("sequence DESC")
	} else {
		q.Order("sequence")
	}
	for column, value := range map[string]string{"who": f.Who, "outcome": f.Outcome, "request": f.Request, "action": f.Action} {
		if value != "" {
			q.Where("? = ?", bun.Ident(column), value)
		}
	}
	if f.Object != "" {
		q.Where("object LIKE ? ESCAPE '!'", "%"+likeEscape.Replace(f.Object)+"%")
	}
	if !f.Since.IsZero() {
		q.Where("at >= ?", micros(f.Since))
	}
	if !f.Until.IsZero() {
		q.Where("at < ?", micros(f.Until))
	}
	if f.After != 0 && f.NewestFirst {
		q.Where("sequence < ?", f.After)
	} else if f.After != 0 {
		q.Where("sequence > ?", f.After)
	}
	if err := q.Scan(ctx); err != nil {
		return nil, failure("audit log", err)
	}
	list := make([]audit.Entry, 0, len(rows))
	for _, r := range rows {
		list = append(list, r.entry())
	}
	return list, nil
}

// likeEscape makes a text stand for itself in LIKE.
var likeEscape = strings.NewReplacer("!", "!!", "%", "!%", "_", "!_")

// auditBatch is how many entries are read at once to be verified.
const auditBatch = 1000

// VerifyAudit reads the whole log as it is at one moment.
func (s *Store) VerifyAudit(ctx context.Context, expect []audit.Head) (verdict audit.Verdict, err error) {
	err = s.read.RunInTx(ctx, &sql.TxOptions{ReadOnly: true}, func(ctx context.Context, tx bun.Tx) error {
		if s.Shared() { // SQLite's transactions see one moment anyway
			if _, err := tx.ExecContext(ctx, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"); err != nil {
				return err
			}
		}
		var kept *audit.Head
		setting := settingRow{Key: settingAuditHead}
		switch err := tx.NewSelect().Model(&setting).WherePK().Scan(ctx); {
		case errors.Is(err, sql.ErrNoRows):
		case err != nil:
			return err
		default:
			kept = &audit.Head{}
			if err := json.Unmarshal([]byte(setting.Value), kept); err != nil {
				return switchback.Errorf(switchback.CodeCorrupt, "head of the audit log: %v", err)
			}
		}
		v := audit.Verifier{Expect: expect}
		for after := int64(math.MinInt64); ; {
			var rows []auditRow
			if err := tx.NewSelect().Model(&rows).Where("sequence > ?", after).Order("sequence").Limit(auditBatch).Scan(ctx); err != nil {
				return err
			}
			for _, r := range rows {
				v.Add(r.entry())
				after = r.Sequence
			}
			if len(rows) < auditBatch {
				verdict = v.End(kept)
				return nil
			}
		}
	})
	return verdict, failure("verify the audit log", err)
}

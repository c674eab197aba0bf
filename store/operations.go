package store

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"

	"github.com/uptrace/bun"
)

var _ operation.Store = (*Store)(nil)

type operationRow struct {
	bun.BaseModel   `bun:"table:operations"`
	ID              string `bun:"id,pk"`
	Kind            string `bun:"kind"`
	Protection      string `bun:"protection"`
	Lane            string `bun:"lane"`
	State           string `bun:"state"`
	CancelRequested bool   `bun:"cancel_requested"`
	Irreversible    bool   `bun:"irreversible"`
	LeaseOwner      string `bun:"lease_owner"`
	LeaseEpoch      int64  `bun:"lease_epoch"`
	LeaseUntil      int64  `bun:"lease_until"`
	CreatedAt       int64  `bun:"created_at"`
	RequestKey      string `bun:"request_key"`
	Document        string `bun:"document"`
}

func newOperationRow(rec operation.Record) (operationRow, error) {
	doc, err := json.Marshal(rec)
	if err != nil {
		return operationRow{}, fmt.Errorf("encode operation %s: %w", rec.ID, err)
	}
	return operationRow{
		ID: string(rec.ID), Kind: rec.Kind, Protection: string(rec.Protection), Lane: rec.Lane, State: string(rec.State),
		CancelRequested: rec.CancelRequested, Irreversible: rec.Irreversible,
		LeaseOwner: rec.Lease.Owner, LeaseEpoch: rec.Lease.Epoch, LeaseUntil: micros(rec.Lease.Until),
		CreatedAt: micros(rec.CreatedAt), RequestKey: rec.Request.Key, Document: string(doc),
	}, nil
}

func (r operationRow) record() (operation.Record, error) {
	var rec operation.Record
	if err := json.Unmarshal([]byte(r.Document), &rec); err != nil {
		return rec, switchback.Errorf(switchback.CodeCorrupt, "operation %s: %v", r.ID, err)
	}
	rec.CancelRequested = r.CancelRequested
	rec.Lease = operation.Lease{Owner: r.LeaseOwner, Epoch: r.LeaseEpoch, Until: instant(r.LeaseUntil)}
	return rec, nil
}

// CreateOperation implements operation.Store.
func (s *Store) CreateOperation(ctx context.Context, rec operation.Record) error {
	row, err := newOperationRow(rec)
	if err != nil {
		return err
	}
	if _, err = s.write.NewInsert().Model(&row).Exec(ctx); isUnique(err) {
		return s.busy(ctx, rec)
	}
	return failure("operation "+row.ID, err)
}

// busy says which operation is in the way of rec.
func (s *Store) busy(ctx context.Context, rec operation.Record) error {
	other, err := s.Operations(ctx, operation.Filter{Protection: rec.Protection, Unfinished: true})
	other = slices.DeleteFunc(other, func(o operation.Record) bool { return o.Lane != rec.Lane })
	if err != nil || len(other) == 0 || rec.Protection == "" || other[0].ID == rec.ID {
		return switchback.Errorf(switchback.CodeConflict, "operation %s exists already", rec.ID)
	}
	return switchback.Errorf(switchback.CodeConflict, "operation %s (%s) is at work on this VM", other[0].ID, other[0].Title).
		WithHint("wait for it, or cancel it")
}

// OperationByRequest returns the operation that a request with this key has begun, or CodeNotFound.
func (s *Store) OperationByRequest(ctx context.Context, key string) (operation.Record, error) {
	var row operationRow
	if err := s.read.NewSelect().Model(&row).Where("request_key = ?", key).Where("request_key <> ''").Scan(ctx); err != nil {
		return operation.Record{}, failure("operation of a request", err)
	}
	return row.record()
}

// Operation implements operation.Store.
func (s *Store) Operation(ctx context.Context, id switchback.OperationID) (operation.Record, error) {
	return loadOperation(ctx, s.read, id)
}

func loadOperation(ctx context.Context, db bun.IDB, id switchback.OperationID) (operation.Record, error) {
	row := operationRow{ID: string(id)}
	if err := db.NewSelect().Model(&row).WherePK().Scan(ctx); err != nil {
		return operation.Record{}, failure("operation "+row.ID, err)
	}
	return row.record()
}

// Operations implements operation.Store.
func (s *Store) Operations(ctx context.Context, f operation.Filter) ([]operation.Record, error) {
	var rows []operationRow
	q := s.read.NewSelect().Model(&rows).Order("id DESC").Limit(100)
	if f.Limit > 0 {
		q.Limit(int64(f.Limit))
	}
	if f.Protection != "" {
		q.Where("protection = ?", string(f.Protection))
	}
	if f.Kind != "" {
		q.Where("kind = ?", f.Kind)
	}
	if f.State != "" {
		q.Where("state = ?", string(f.State))
	}
	if f.Unfinished {
		q.Where("state IN (?)", bun.List(operation.UnfinishedStates()))
	}
	if f.Before != "" {
		q.Where("id < ?", string(f.Before))
	}
	if err := q.Scan(ctx); err != nil {
		return nil, failure("list operations", err)
	}
	list := make([]operation.Record, 0, len(rows))
	for _, r := range rows {
		rec, err := r.record()
		if err != nil {
			return nil, err
		}
		list = append(list, rec)
	}
	return list, nil
}

const claimable = "state IN (?) AND (lease_owner = '' OR lease_owner = ? OR lease_until < ?)"

// ClaimableOperations implements operation.Store.
func (s *Store) ClaimableOperations(ctx context.Context, owner string, now time.Time) ([]switchback.OperationID, error) {
	if err := s.refreshClock(ctx); err != nil {
		return nil, failure("read the database's clock", err)
	}
	var ids []switchback.OperationID
	err := s.read.NewSelect().Model((*operationRow)(nil)).Column("id").Order("id").
		Where(claimable, bun.List(operation.ActiveStates()), owner, micros(now)).Scan(ctx, &ids)
	return ids, failure("list claimable operations", err)
}

// ClaimOperation implements operation.Store.
func (s *Store) ClaimOperation(ctx context.Context, id switchback.OperationID, owner string, now, until time.Time) (rec operation.Record, err error) {
	err = s.transact(ctx, func(ctx context.Context, tx bun.Tx) error {
		n, err := changed(tx.NewUpdate().Model((*operationRow)(nil)).
			Set("lease_owner = ?", owner).Set("lease_epoch = lease_epoch + 1").Set("lease_until = ?", micros(until)).
			Where("id = ?", string(id)).
			Where(claimable, bun.List(operation.ActiveStates()), owner, micros(now)).Exec(ctx))
		if err != nil {
			return err
		}
		if rec, err = loadOperation(ctx, tx, id); err != nil {
			return err
		}
		if n == 0 {
			return switchback.Errorf(switchback.CodeConflict, "operation %s (%s) is leased to %q", id, rec.State, rec.Lease.Owner)
		}
		return nil
	})
	return rec, failure("claim operation "+string(id), err)
}

// SaveOperation implements operation.Store.
func (s *Store) SaveOperation(ctx context.Context, rec operation.Record) (cancelRequested bool, err error) {
	row, err := newOperationRow(rec)
	if err != nil {
		return false, err
	}
	err = s.transact(ctx, func(ctx context.Context, tx bun.Tx) error {
		n, err := changed(tx.NewUpdate().Model(&row).
			Column("state", "irreversible", "lease_until", "document").WherePK().
			Where("lease_owner = ?", rec.Lease.Owner).Where("lease_epoch = ?", rec.Lease.Epoch).
			Where("state IN (?)", bun.List(operation.ActiveStates())).
			// An irreversible step and a cancel exclude each other: the first one wins.
			Where("NOT (? AND cancel_requested AND NOT irreversible)", rec.Irreversible).Exec(ctx))
		if err != nil {
			return err
		}
		now, err := loadOperation(ctx, tx, rec.ID)
		if err != nil {
			return err
		}
		cancelRequested = now.CancelRequested
		switch {
		case n > 0:
			return nil
		case now.Lease.Owner != rec.Lease.Owner || now.Lease.Epoch != rec.Lease.Epoch || now.State.Finished():
			return switchback.Errorf(switchback.CodeConflict, "operation %s is leased to %q (epoch %d), not to %q (epoch %d)",
				rec.ID, now.Lease.Owner, now.Lease.Epoch, rec.Lease.Owner, rec.Lease.Epoch)
		}
		return switchback.Errorf(switchback.CodeCancelled, "a cancel of operation %s was requested", rec.ID)
	})
	return cancelRequested, failure("operation "+row.ID, err)
}

// RequestCancel implements operation.Store.
func (s *Store) RequestCancel(ctx context.Context, id switchback.OperationID) error {
	n, err := changed(s.write.NewUpdate().Model((*operationRow)(nil)).Set("cancel_requested = ?", true).
		Where("id = ?", string(id)).Where("NOT irreversible").
		Where("state IN (?)", bun.List([]operation.State{operation.StateQueued, operation.StateRunning})).Exec(ctx))
	if err != nil {
		return failure("cancel operation "+string(id), err)
	}
	if n > 0 {
		return nil
	}
	rec, err := s.Operation(ctx, id)
	if err != nil {
		return err
	}
	if rec.State == operation.StateUndoing || rec.State == operation.StateCancelled {
		return nil
	}
	if err := rec.CanCancel(); err != nil {
		return err
	}
	return switchback.Errorf(switchback.CodeRefused, "operation %s cannot be cancelled: %s", id, rec.State)
}

// ReleaseOperation implements operation.Store.
func (s *Store) ReleaseOperation(ctx context.Context, rec operation.Record) error {
	row, err := newOperationRow(rec)
	if err != nil {
		return err
	}
	n, err := changed(s.write.NewUpdate().Model(&row).Column("state", "cancel_requested", "document").WherePK().
		Where("state = ?", string(operation.StateAwaiting)).Exec(ctx))
	if err != nil {
		return failure("operation "+row.ID, err)
	}
	if n > 0 {
		return nil
	}
	now, err := s.Operation(ctx, rec.ID)
	if err != nil {
		return err
	}
	return switchback.Errorf(switchback.CodeConflict, "operation %s does not await approval: it is %s", rec.ID, now.State)
}

// ReopenOperation implements operation.Store.
func (s *Store) ReopenOperation(ctx context.Context, rec operation.Record) error {
	row, err := newOperationRow(rec)
	if err != nil {
		return err
	}
	superseded := switchback.Errorf(switchback.CodeConflict, "a newer operation has worked on this VM since operation %s failed", rec.ID).
		WithHint("start a new operation")
	var n int64
	err = s.transact(ctx, func(ctx context.Context, tx bun.Tx) (err error) {
		// Once this is written no other operation of the protection can be
		// created: so the look for newer ones comes after it.
		n, err = changed(tx.NewUpdate().Model(&row).
			Column("state", "cancel_requested", "lease_owner", "lease_until", "document").WherePK().
			Where("state = ?", string(operation.StateFailed)).Exec(ctx))
		if err != nil || n == 0 || row.Protection == "" {
			return err
		}
		newer, err := tx.NewSelect().Model((*operationRow)(nil)).
			Where("protection = ?", row.Protection).Where("lane = ?", row.Lane).Where("id > ?", row.ID).Exists(ctx)
		if newer {
			return superseded
		}
		return err
	})
	switch {
	case isUnique(err):
		return s.busy(ctx, rec)
	case err != nil:
		return failure("operation "+row.ID, err)
	case n > 0:
		return nil
	}
	now, err := s.Operation(ctx, rec.ID)
	if err != nil {
		return err
	}
	return switchback.Errorf(switchback.CodeConflict, "operation %s has not failed: %s", rec.ID, now.State)
}

// EndFailed replaces a failed record by one that has ended for good.
// CodeConflict: it is not failed any more.
func (s *Store) EndFailed(ctx context.Context, rec operation.Record) error {
	row, err := newOperationRow(rec)
	if err != nil {
		return err
	}
	n, err := changed(s.write.NewUpdate().Model(&row).Column("state", "document").WherePK().
		Where("state = ?", string(operation.StateFailed)).Exec(ctx))
	if err == nil && n == 0 {
		return switchback.Errorf(switchback.CodeConflict, "operation %s has not failed, or goes on", rec.ID)
	}
	return failure("operation "+row.ID, err)
}

type logRow struct {
	bun.BaseModel `bun:"table:operation_log"`
	Operation     string `bun:"operation,pk"`
	Sequence      int64  `bun:"sequence,pk"`
	Document      string `bun:"document"`
}

// maxLogAttempts is far above the number of goroutines that log to one operation at once.
const maxLogAttempts = 100

// AppendOperationLog implements operation.Store.
func (s *Store) AppendOperationLog(ctx context.Context, id switchback.OperationID, line operation.LogLine) error {
	doc, err := json.Marshal(line)
	if err != nil {
		return fmt.Errorf("encode log line: %w", err)
	}
	for attempt := 1; ; attempt++ {
		_, err = s.write.NewRaw("INSERT INTO operation_log (operation, sequence, document) "+
			"SELECT ?, COALESCE(MAX(sequence), 0) + 1, ? FROM operation_log WHERE operation = ?",
			string(id), string(doc), string(id)).Exec(ctx)
		// PostgreSQL lets two writers count to the same sequence; one of them gets it.
		if !isUnique(err) || attempt == maxLogAttempts {
			break
		}
	}
	if isForeignKey(err) {
		return switchback.Errorf(switchback.CodeNotFound, "operation %s does not exist", id)
	}
	return failure("log of operation "+string(id), err)
}

// OperationLog implements operation.Store.
func (s *Store) OperationLog(ctx context.Context, id switchback.OperationID, after int64) ([]operation.LogLine, error) {
	var rows []logRow
	err := s.read.NewSelect().Model(&rows).Where("operation = ?", string(id)).Where("sequence > ?", after).
		Order("sequence").Scan(ctx)
	if err != nil {
		return nil, failure("log of operation "+string(id), err)
	}
	lines := make([]operation.LogLine, 0, len(rows))
	for _, r := range rows {
		var line operation.LogLine
		if err := json.Unmarshal([]byte(r.Document), &line); err != nil {
			return nil, switchback.Errorf(switchback.CodeCorrupt, "log of operation %s, line %d: %v", id, r.Sequence, err)
		}
		line.Sequence = r.Sequence
		lines = append(lines, line)
	}
	return lines, nil
}

package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"

	"github.com/uptrace/bun"
)

// Snapshot writes the SQLite file at path, as it is at one instant, into a new
// file that it makes durable, readable by the owner only. A server may write to
// it meanwhile. The copy was checked when it returns nil.
func Snapshot(ctx context.Context, path, into string) (err error) {
	if _, err := os.Stat(path); err != nil {
		return switchback.Errorf(switchback.CodeNotFound, "there is no database: %w", err)
	}
	f, err := os.OpenFile(into, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600) // SQLite takes an empty file for a new one
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			err = f.Sync()
		}
		err = errors.Join(err, f.Close())
	}()
	db, err := sql.Open("sqlite", sqliteDSN(path, ""))
	if err != nil {
		return err
	}
	_, err = db.ExecContext(ctx, "VACUUM INTO ?", into)
	if err = errors.Join(failure("copy the database", err), db.Close()); err != nil {
		return err
	}
	return CheckFile(ctx, into)
}

// CheckFile reads a whole SQLite file. CodeCorrupt: it is damaged.
func CheckFile(ctx context.Context, path string) (err error) {
	db, err := sql.Open("sqlite", sqliteDSN(path, "&_pragma=query_only(1)"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var verdict string
	if err := db.QueryRowContext(ctx, "PRAGMA integrity_check(1)").Scan(&verdict); err != nil {
		return failure("check "+path, err)
	}
	if verdict != "ok" {
		return switchback.Errorf(switchback.CodeCorrupt, "database %s: %s", path, verdict)
	}
	return nil
}

// restoredEpochs is far above how often a lease may have been taken since the backup.
const restoredEpochs = 1_000_000

// SuspendOperations makes every operation that a server works on failed with the given
// cause, so that nothing goes on before a person has retried or cancelled it; one
// that nobody has approved is cancelled. Its next lease is newer than any that the
// server which was lost can have had.
func (s *Store) SuspendOperations(ctx context.Context, cause *switchback.Error, now time.Time) (suspended []operation.Record, err error) {
	err = s.transact(ctx, func(ctx context.Context, tx bun.Tx) error {
		suspended = nil
		var rows []operationRow
		if err := tx.NewSelect().Model(&rows).Where("state IN (?)", bun.List(operation.UnfinishedStates())).Order("id").Scan(ctx); err != nil {
			return err
		}
		for _, r := range rows {
			rec, err := r.record()
			if err != nil {
				return err
			}
			state := operation.StateFailed
			if !rec.Approval.Given() {
				state = operation.StateCancelled
			}
			rec = operation.End(rec, state, now.UTC())
			rec.Error = cause
			if state == operation.StateCancelled {
				rec.Error = &switchback.Error{Code: switchback.CodeCancelled, Message: cause.Message + ": nobody had approved it", Hint: "ask for it again"}
			}
			row, err := newOperationRow(rec)
			if err != nil {
				return err
			}
			row.LeaseEpoch += restoredEpochs
			if _, err := tx.NewUpdate().Model(&row).Column("state", "lease_epoch", "document").WherePK().Exec(ctx); err != nil {
				return fmt.Errorf("suspend operation %s: %w", rec.ID, err)
			}
			suspended = append(suspended, rec)
		}
		return nil
	})
	return suspended, failure("suspend operations", err)
}

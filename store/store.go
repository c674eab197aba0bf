// Package store keeps what the server knows: settings, sites, agents, join
// tokens, protections and operations. In one SQLite file, or in PostgreSQL for
// several servers: the same queries and the same migrations, judged by package
// storetest.
//
// Every method is one transaction, durable when it returns nil (SQLite runs
// with synchronous=FULL). Errors are *switchback.Error: CodeNotFound,
// CodeConflict and what a method says; CodeUnavailable when the database is
// busy, away or cannot be written, CodeNoSpace when its disk is full. After
// CodeUnavailable of a lost connection it is unknown whether a write happened,
// so writes are made to be repeated. The store needs no reopening: it works
// again when the database does.
//
// # What both databases owe
//
// A decision and its write are one statement with a condition (UPDATE … WHERE
// version = …), whose loser sees no row changed. That is right in SQLite, which
// has one writer, and in PostgreSQL at READ COMMITTED, where the loser waits for
// the winner's row and looks at the condition again. Text is compared by its bytes
// in both. There is nothing that only one of them understands.
//
// The caller owes: one process per SQLite file (further ones wait for each
// other's writes, they do no harm), and Close.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"github.com/pressly/goose/v3"
	"github.com/uptrace/bun"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Store is a database. It may be used from several goroutines.
type Store struct {
	// SQLite has one writer at a time: write has one connection, so that
	// writers queue here and not in SQLite's busy loop; readers never wait.
	// In PostgreSQL both are the same.
	read, write *bun.DB
	// clock is PostgreSQL's; nil in SQLite, where this machine's is the only one.
	clock *clock
}

// Open opens a store and brings its schema up to date. where is a PostgreSQL
// URL, or the path of a SQLite file, which is created where it is missing.
func Open(ctx context.Context, where string) (*Store, error) {
	if IsPostgres(where) {
		return openPostgres(ctx, where)
	}
	return openSQLite(ctx, where)
}

// IsPostgres reports whether where is the URL of a PostgreSQL database, and not a path.
func IsPostgres(where string) bool {
	return strings.HasPrefix(where, "postgres://") || strings.HasPrefix(where, "postgresql://")
}

// Shared reports whether several servers may work on this store.
func (s *Store) Shared() bool { return s.clock != nil }

func migrate(ctx context.Context, dialect goose.Dialect, db *sql.DB) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	provider, err := goose.NewProvider(dialect, db, files, goose.WithSlog(slog.New(slog.DiscardHandler)))
	if err != nil {
		return err
	}
	_, err = provider.Up(ctx)
	return err
}

// Close waits for what runs and closes the database.
func (s *Store) Close() error {
	if s.read == s.write {
		return s.write.Close()
	}
	return errors.Join(s.read.Close(), s.write.Close())
}

// attempts is how often a transaction that another one broke is tried.
const attempts = 6

// transact runs fn in one transaction, again where the database gave up this
// transaction for another one's sake. fn must have no other effects.
func (s *Store) transact(ctx context.Context, fn func(ctx context.Context, tx bun.Tx) error) error {
	for attempt := 1; ; attempt++ {
		err := s.write.RunInTx(ctx, nil, fn)
		if !isBroken(err) || attempt == attempts {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(rand.N(time.Duration(attempt) * 20 * time.Millisecond)):
		}
	}
}

// failure classifies an error of the database and says what was being done.
func failure(op string, err error) error {
	if err == nil {
		return nil
	}
	var known *switchback.Error
	if errors.As(err, &known) {
		return err
	}
	e := &switchback.Error{Code: switchback.CodeInternal, Op: "store", Message: op, Err: err}
	switch {
	case notConnected(err):
		e.Code, e.Hint = switchback.CodeUnavailable, pgAway
	case errors.Is(err, sql.ErrNoRows):
		e.Code, e.Message, e.Err = switchback.CodeNotFound, op+": does not exist", nil
	case isUnique(err):
		e.Code, e.Message, e.Err = switchback.CodeConflict, op+": exists already", nil
	case errors.Is(err, context.DeadlineExceeded):
		e.Code = switchback.CodeTimeout
	case errors.Is(err, context.Canceled):
		e.Code = switchback.CodeCancelled
	default:
		if code, hint := classifySQLite(err); code != "" {
			e.Code, e.Hint = code, hint
		} else if code, hint := classifyPostgres(err); code != "" {
			e.Code, e.Hint = code, hint
		}
	}
	return e
}

// isUnique reports whether err says that a key or unique index has the row already.
func isUnique(err error) bool { return sqliteUnique(err) || postgresCode(err) == pgUnique }

func isForeignKey(err error) bool { return sqliteForeignKey(err) || postgresCode(err) == pgForeignKey }

// isBroken reports whether the transaction was given up for another one's sake.
func isBroken(err error) bool {
	switch postgresCode(err) {
	case pgSerialization, pgDeadlock:
		return true
	}
	return false
}

// changed returns how many rows a statement has changed.
func changed(res sql.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// micros is how instants are stored; the zero time is 0.
func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

func instant(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

// Package store keeps what the server knows: settings, sites, agents, join
// tokens, protections and operations. Today in one SQLite file; its SQL is only
// what PostgreSQL understands too, and package storetest judges both.
//
// Every method is one transaction, durable when it returns nil (SQLite runs
// with synchronous=FULL). Errors are *switchback.Error: CodeNotFound,
// CodeConflict and what a method says; CodeUnavailable when the database is
// busy or cannot be written, CodeNoSpace when its disk is full.
//
// The caller owes: one process per SQLite file (further ones wait for each
// other's writes, they do no harm), and Close.
package store

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"github.com/pressly/goose/v3"
	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/sqlitedialect"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Store is a database. It may be used from several goroutines.
type Store struct {
	// SQLite has one writer at a time: write has one connection, so that
	// writers queue here and not in SQLite's busy loop; readers never wait.
	read, write *bun.DB
}

// Open opens or creates the SQLite file at path and brings its schema up to date.
func Open(ctx context.Context, path string) (*Store, error) {
	dsn := func(more string) string {
		return "file:" + (&url.URL{Path: path}).EscapedPath() +
			"?_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)" + more
	}
	write, err := sql.Open("sqlite", dsn("&_txlock=immediate"))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	write.SetMaxOpenConns(1)
	if err := migrate(ctx, write); err != nil {
		return nil, errors.Join(failure("open store "+path, err), write.Close())
	}
	read, err := sql.Open("sqlite", dsn("&_pragma=query_only(1)"))
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, err), write.Close())
	}
	read.SetMaxOpenConns(4)
	read.SetMaxIdleConns(4)
	return &Store{
		read:  bun.NewDB(read, sqlitedialect.New()),
		write: bun.NewDB(write, sqlitedialect.New()),
	}, nil
}

func migrate(ctx context.Context, db *sql.DB) error {
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return err
	}
	provider, err := goose.NewProvider(goose.DialectSQLite3, db, files, goose.WithSlog(slog.New(slog.DiscardHandler)))
	if err != nil {
		return err
	}
	_, err = provider.Up(ctx)
	return err
}

// Close waits for what runs and closes the file.
func (s *Store) Close() error { return errors.Join(s.read.Close(), s.write.Close()) }

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
	var lite *sqlite.Error
	switch {
	case errors.Is(err, sql.ErrNoRows):
		e.Code, e.Message, e.Err = switchback.CodeNotFound, op+": does not exist", nil
	case isUnique(err):
		e.Code, e.Message, e.Err = switchback.CodeConflict, op+": exists already", nil
	case errors.Is(err, context.DeadlineExceeded):
		e.Code = switchback.CodeTimeout
	case errors.Is(err, context.Canceled):
		e.Code = switchback.CodeCancelled
	case errors.As(err, &lite):
		switch lite.Code() & 0xff {
		case sqlite3.SQLITE_FULL:
			e.Code, e.Hint = switchback.CodeNoSpace, "free space on the file system of the server's database"
		case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY:
			e.Code = switchback.CodeUnavailable
		case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
			e.Code, e.Hint = switchback.CodeCorrupt, "restore the server's database from a backup"
		}
	}
	return e
}

// isUnique reports whether err says that a key or unique index has the row already.
func isUnique(err error) bool {
	var lite *sqlite.Error
	if !errors.As(err, &lite) {
		return false
	}
	return lite.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || lite.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY
}

func isForeignKey(err error) bool {
	var lite *sqlite.Error
	return errors.As(err, &lite) && lite.Code() == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
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

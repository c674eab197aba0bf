package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"

	switchback "github.com/switchback-dr/switchback"

	"github.com/pressly/goose/v3"
	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/sqlitedialect"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

func sqliteDSN(path, more string) string {
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?_pragma=busy_timeout(10000)" + more
}

func openSQLite(ctx context.Context, path string) (*Store, error) {
	const durable = "&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)"
	write, err := sql.Open("sqlite", sqliteDSN(path, durable+"&_txlock=immediate"))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	write.SetMaxOpenConns(1)
	if err := migrate(ctx, goose.DialectSQLite3, write); err != nil {
		return nil, errors.Join(failure("open store "+path, err), write.Close())
	}
	read, err := sql.Open("sqlite", sqliteDSN(path, durable+"&_pragma=query_only(1)"))
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

func classifySQLite(err error) (switchback.Code, string) {
	var lite *sqlite.Error
	if !errors.As(err, &lite) {
		return "", ""
	}
	switch lite.Code() & 0xff {
	case sqlite3.SQLITE_FULL:
		return switchback.CodeNoSpace, "free space on the file system of the server's database"
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY:
		return switchback.CodeUnavailable, ""
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return switchback.CodeCorrupt, "restore the server's database from a backup: switchback server restore"
	}
	return "", ""
}

func sqliteUnique(err error) bool {
	var lite *sqlite.Error
	return errors.As(err, &lite) &&
		(lite.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || lite.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY)
}

func sqliteForeignKey(err error) bool {
	var lite *sqlite.Error
	return errors.As(err, &lite) && lite.Code() == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY
}

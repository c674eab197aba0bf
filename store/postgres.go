package store

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"net/url"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/uptrace/bun"
	"github.com/uptrace/bun/dialect/pgdialect"
)

// PostgreSQL's error codes, https://www.postgresql.org/docs/15/errcodes-appendix.html.
const (
	pgUnique        = "23505"
	pgForeignKey    = "23503"
	pgSerialization = "40001"
	pgDeadlock      = "40P01"
)

// Limits of a PostgreSQL connection. A server that lost its power holds no row
// longer than idleInTransaction; a query that gets no answer ends.
const (
	connectTimeout    = 5 * time.Second
	statementTimeout  = "10s"
	lockTimeout       = "5s"
	idleInTransaction = "10s"
	maxConnections    = 10
)

// schemaLock is the advisory lock that one server at a time holds to change the schema.
const schemaLock = 0x5357_4241_434b // "SWBACK"

// Redacted returns where without the password it may hold.
func Redacted(where string) string {
	if !IsPostgres(where) {
		return where
	}
	u, err := url.Parse(where)
	if err != nil {
		return "postgres://(not a URL)"
	}
	q := u.Query()
	for _, secret := range []string{"password", "sslpassword"} {
		if q.Has(secret) {
			q.Set(secret, "xxxxx")
			u.RawQuery = q.Encode()
		}
	}
	return u.Redacted()
}

func openPostgres(ctx context.Context, where string) (*Store, error) {
	cfg, err := pgx.ParseConfig(where)
	if err != nil {
		// The parser's message may repeat the URL with its password.
		return nil, switchback.Errorf(switchback.CodeInvalid, "%s is not the URL of a PostgreSQL database", Redacted(where)).
			WithHint("postgres://USER@HOST:PORT/DATABASE?sslmode=verify-full; the password may stand in ~/.pgpass or PGPASSWORD")
	}
	if cfg.ConnectTimeout == 0 || cfg.ConnectTimeout > connectTimeout {
		cfg.ConnectTimeout = connectTimeout
	}
	dialer := &net.Dialer{Timeout: connectTimeout, KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3}}
	cfg.DialFunc = dialer.DialContext
	// bun writes the values into the text: there is nothing to prepare.
	cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	defaultTo(cfg.RuntimeParams, "application_name", "switchback-server")
	cfg.RuntimeParams["standard_conforming_strings"] = "on"
	cfg.RuntimeParams["client_encoding"] = "UTF8"
	cfg.RuntimeParams["default_transaction_isolation"] = "read committed"
	cfg.RuntimeParams["synchronous_commit"] = "on"

	opening := func(err error) error {
		return failure("open store "+Redacted(where), err)
	}
	if err := migratePostgres(ctx, *cfg); err != nil {
		return nil, opening(err)
	}
	defaultTo(cfg.RuntimeParams, "statement_timeout", statementTimeout)
	defaultTo(cfg.RuntimeParams, "lock_timeout", lockTimeout)
	defaultTo(cfg.RuntimeParams, "idle_in_transaction_session_timeout", idleInTransaction)
	db := stdlib.OpenDB(*cfg)
	db.SetMaxOpenConns(maxConnections)
	db.SetMaxIdleConns(maxConnections)
	db.SetConnMaxLifetime(30 * time.Minute)
	both := bun.NewDB(db, pgdialect.New())
	s := &Store{read: both, write: both, clock: &clock{}}
	if err := s.measureClock(ctx); err != nil {
		return nil, errors.Join(opening(err), db.Close())
	}
	return s, nil
}

func defaultTo(params map[string]string, key, value string) {
	if params[key] == "" {
		params[key] = value
	}
}

// bytewise makes every text column compare by bytes, as SQLite does, whatever
// the database's own collation.
const bytewise = `DO $$
DECLARE c record;
BEGIN
	FOR c IN SELECT table_name, column_name FROM information_schema.columns
		WHERE table_schema = current_schema() AND data_type = 'text' AND collation_name IS DISTINCT FROM 'C'
	LOOP
		EXECUTE format('ALTER TABLE %I ALTER COLUMN %I TYPE text COLLATE "C"', c.table_name, c.column_name);
	END LOOP;
END $$`

// migratePostgres brings the schema up to date; of several servers one does it,
// the others wait.
func migratePostgres(ctx context.Context, cfg pgx.ConnConfig) (err error) {
	db := stdlib.OpenDB(cfg)
	defer func() { err = errors.Join(err, db.Close()) }()
	lock, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer lock.Close() // and with its session the lock goes, too: the pool is closed
	if _, err := lock.ExecContext(ctx, "SELECT pg_advisory_lock($1)", int64(schemaLock)); err != nil {
		return err
	}
	if err := migrate(ctx, goose.DialectPostgres, db); err != nil {
		return err
	}
	_, err = lock.ExecContext(ctx, bytewise)
	return err
}

func postgresCode(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}

const pgAway = "see that PostgreSQL runs and can be reached; the server goes on by itself when it does"

// notConnected reports whether there was no answer to a connection, which the
// driver also reports as an ended context.
func notConnected(err error) bool {
	var connect *pgconn.ConnectError
	return errors.As(err, &connect) && postgresCode(err) == "" && !errors.Is(err, context.Canceled)
}

func classifyPostgres(err error) (switchback.Code, string) {
	var network net.Error
	code := postgresCode(err)
	switch {
	case code == "57014": // statement_timeout
		return switchback.CodeTimeout, ""
	case code == "53100":
		return switchback.CodeNoSpace, "free space on the file system of PostgreSQL"
	case code == "53300":
		return switchback.CodeUnavailable, "raise max_connections of PostgreSQL: each server uses up to 10"
	case code == "25006":
		return switchback.CodeUnavailable, "this PostgreSQL is read-only (a standby?): name the primary, or all hosts and target_session_attrs=read-write"
	case strings.HasPrefix(code, "28"):
		return switchback.CodeUnauthorized, "see user, password and pg_hba.conf of PostgreSQL"
	case code == "3D000":
		return switchback.CodeNotFound, "make the database: createdb --owner USER DATABASE"
	case code == "42501":
		return switchback.CodeUnauthorized, "let the server's PostgreSQL user own its database"
	case code == "55P03", code == pgSerialization, code == pgDeadlock:
		return switchback.CodeUnavailable, ""
	case strings.HasPrefix(code, "08"), strings.HasPrefix(code, "53"), strings.HasPrefix(code, "57"), strings.HasPrefix(code, "25P"):
		return switchback.CodeUnavailable, pgAway
	case code != "":
		return "", ""
	case errors.As(err, &network), errors.Is(err, driver.ErrBadConn), errors.Is(err, sql.ErrConnDone),
		errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed), pgconn.SafeToRetry(err):
		return switchback.CodeUnavailable, pgAway
	}
	return "", ""
}

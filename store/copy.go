package store

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"maps"
	"slices"
	"strings"

	switchback "github.com/switchback-dr/switchback"

	"github.com/uptrace/bun"
)

// Table is what a copy says of one table.
type Table struct {
	Name string `json:"name"`
	Rows int64  `json:"rows"`
	// Sum is the SHA-256 over all its rows in the order of their keys, hexadecimal.
	Sum string `json:"sum"`

	columns, key, parents []string
	booleans              []string // of the columns; SQLite keeps them as numbers
}

// CopyOptions says in which settings a copy differs from its source.
type CopyOptions struct {
	LeaveOut []string
	Add      map[string]string
}

// batchRows is how many rows one INSERT of a copy has.
const batchRows = 100

// CopyTo copies everything in this SQLite store into another, empty store, in
// one transaction of the other, which is committed only after it was read back
// and is the same. Nobody may write to this one meanwhile. CodeConflict: the
// other one is not empty.
func (s *Store) CopyTo(ctx context.Context, to *Store, opts CopyOptions) ([]Table, error) {
	tables, err := s.tables(ctx)
	if err != nil {
		return nil, failure("list tables", err)
	}
	leaveOut := append(slices.Collect(maps.Keys(opts.Add)), opts.LeaveOut...)
	err = s.read.RunInTx(ctx, &sql.TxOptions{ReadOnly: true}, func(ctx context.Context, from bun.Tx) error {
		return to.write.RunInTx(ctx, nil, func(ctx context.Context, tx bun.Tx) error {
			if to.Shared() { // a large table takes longer than a query of a server may
				if _, err := tx.ExecContext(ctx, "SET LOCAL statement_timeout = 0"); err != nil {
					return err
				}
			}
			// First of all: a server that begins an installation here at the same moment waits, or is seen.
			for key, value := range opts.Add {
				if _, err := tx.NewInsert().Model(&settingRow{Key: key, Value: value}).Exec(ctx); err != nil {
					return notEmpty(err)
				}
			}
			for i := range tables {
				if err := tables[i].copy(ctx, from, tx, leaveOut); err != nil {
					return fmt.Errorf("copy table %s: %w", tables[i].Name, notEmpty(err))
				}
			}
			return sameTables(ctx, tables, tx, leaveOut)
		})
	})
	return tables, failure("copy the store", err)
}

func notEmpty(err error) error {
	if isUnique(err) {
		return switchback.Errorf(switchback.CodeConflict, "the database holds an installation already").WithHint("name an empty database")
	}
	return err
}

// SameAs reports whether another store holds what CopyTo with these options would leave there.
func (s *Store) SameAs(ctx context.Context, other *Store, opts CopyOptions) ([]Table, error) {
	tables, err := s.tables(ctx)
	if err != nil {
		return nil, failure("list tables", err)
	}
	leaveOut := append(slices.Collect(maps.Keys(opts.Add)), opts.LeaveOut...)
	for i := range tables {
		if tables[i], err = tables[i].sum(ctx, s.read, leaveOut); err != nil {
			return nil, failure("read table "+tables[i].Name, err)
		}
	}
	return tables, failure("compare the stores", sameTables(ctx, tables, other.read, leaveOut))
}

// Empty reports whether nothing was ever stored.
func (s *Store) Empty(ctx context.Context) (bool, error) {
	for _, model := range []any{(*settingRow)(nil), (*siteRow)(nil), (*agentRow)(nil), (*protectionRow)(nil), (*operationRow)(nil)} {
		found, err := s.read.NewSelect().Model(model).Exists(ctx)
		if err != nil || found {
			return false, failure("look into the database", err)
		}
	}
	return true, nil
}

// tables lists the tables of a SQLite store, each after those it refers to.
func (s *Store) tables(ctx context.Context) ([]Table, error) {
	if s.Shared() {
		return nil, switchback.Errorf(switchback.CodeUnsupported, "only an embedded store is copied").
			WithHint("PostgreSQL has its own tools: pg_dump, pg_basebackup")
	}
	var names []string
	err := s.read.NewRaw("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%' AND name <> 'goose_db_version' ORDER BY name").Scan(ctx, &names)
	if err != nil {
		return nil, err
	}
	var open []Table
	for _, name := range names {
		t := Table{Name: name}
		if err := s.read.NewRaw("SELECT name FROM pragma_table_info(?) ORDER BY name", name).Scan(ctx, &t.columns); err != nil {
			return nil, err
		}
		if err := s.read.NewRaw("SELECT name FROM pragma_table_info(?) WHERE pk > 0 ORDER BY pk", name).Scan(ctx, &t.key); err != nil {
			return nil, err
		}
		if err := s.read.NewRaw("SELECT name FROM pragma_table_info(?) WHERE type = 'BOOLEAN'", name).Scan(ctx, &t.booleans); err != nil {
			return nil, err
		}
		if err := s.read.NewRaw("SELECT DISTINCT \"table\" FROM pragma_foreign_key_list(?)", name).Scan(ctx, &t.parents); err != nil {
			return nil, err
		}
		if len(t.key) == 0 {
			return nil, fmt.Errorf("table %s has no primary key", name)
		}
		open = append(open, t)
	}
	var sorted []Table
	for len(open) > 0 {
		i := slices.IndexFunc(open, func(t Table) bool {
			return !slices.ContainsFunc(open, func(o Table) bool { return o.Name != t.Name && slices.Contains(t.parents, o.Name) })
		})
		if i < 0 {
			return nil, errors.New("tables refer to each other in a circle")
		}
		sorted = append(sorted, open[i])
		open = slices.Delete(open, i, i+1)
	}
	return sorted, nil
}

func quoted(names []string) string { return `"` + strings.Join(names, `", "`) + `"` }

// each calls f with every row of the table in the order of its key.
func (t Table) each(ctx context.Context, db bun.IDB, leaveOut []string, f func(row []any) error) (err error) {
	query := fmt.Sprintf(`SELECT %s FROM "%s"`, quoted(t.columns), t.Name)
	args := []any{}
	if t.Name == "settings" && len(leaveOut) > 0 {
		query, args = query+" WHERE key NOT IN (?)", append(args, bun.List(leaveOut))
	}
	rows, err := db.QueryContext(ctx, query+" ORDER BY "+quoted(t.key), args...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, rows.Close()) }()
	row, into := make([]any, len(t.columns)), make([]any, len(t.columns))
	for i := range row {
		into[i] = &row[i]
	}
	for rows.Next() {
		if err := rows.Scan(into...); err != nil {
			return err
		}
		for i, v := range row {
			switch v := v.(type) {
			case []byte:
				row[i] = string(v)
			case int64:
				if slices.Contains(t.booleans, t.columns[i]) {
					row[i] = v != 0
				}
			}
		}
		if err := f(slices.Clone(row)); err != nil {
			return err
		}
	}
	return rows.Err()
}

// add counts a row and adds it to the sum. Values are told apart by their Go
// types, which both databases' drivers give alike.
func (t *Table) add(h hash.Hash, row []any) {
	t.Rows++
	for _, v := range row {
		text := fmt.Sprint(v)
		fmt.Fprintf(h, "%T %d %s\n", v, len(text), text)
	}
}

func (t Table) sum(ctx context.Context, db bun.IDB, leaveOut []string) (Table, error) {
	h := sha256.New()
	t.Rows = 0
	err := t.each(ctx, db, leaveOut, func(row []any) error { t.add(h, row); return nil })
	t.Sum = hex.EncodeToString(h.Sum(nil))
	return t, err
}

func (t *Table) copy(ctx context.Context, from, to bun.IDB, leaveOut []string) error {
	h := sha256.New()
	t.Rows = 0
	var values []any
	place := "(?" + strings.Repeat(", ?", len(t.columns)-1) + ")"
	flush := func() error {
		n := len(values) / len(t.columns)
		if n == 0 {
			return nil
		}
		_, err := to.ExecContext(ctx, fmt.Sprintf(`INSERT INTO "%s" (%s) VALUES %s`, t.Name, quoted(t.columns), place+strings.Repeat(", "+place, n-1)), values...)
		values = values[:0]
		return err
	}
	err := t.each(ctx, from, leaveOut, func(row []any) error {
		t.add(h, row)
		values = append(values, row...)
		if len(values) >= batchRows*len(t.columns) {
			return flush()
		}
		return nil
	})
	if err == nil {
		err = flush()
	}
	t.Sum = hex.EncodeToString(h.Sum(nil))
	return err
}

// sameTables compares counts and content with what db holds.
func sameTables(ctx context.Context, want []Table, db bun.IDB, leaveOut []string) error {
	for _, t := range want {
		got, err := t.sum(ctx, db, leaveOut)
		if err != nil {
			return fmt.Errorf("read table %s back: %w", t.Name, err)
		}
		if got.Rows != t.Rows || got.Sum != t.Sum {
			return switchback.Errorf(switchback.CodeConflict, "table %s of the database has other content: %d rows, not these %d", t.Name, got.Rows, t.Rows).
				WithHint("name an empty database")
		}
	}
	return nil
}

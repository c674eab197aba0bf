package store_test

import (
	"context"
	"path/filepath"
	"sync"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/store/postgrestest"
	"github.com/switchback-dr/switchback/store/storetest"
)

func open(t *testing.T, path string) *store.Store {
	t.Helper()
	s, err := store.Open(context.Background(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestSQLite(t *testing.T) {
	storetest.Run(t, func(t *testing.T) *store.Store {
		return open(t, filepath.Join(t.TempDir(), "a name? with #signs%.db"))
	})
}

func TestAuditTampered(t *testing.T) {
	auditTampered(t, open(t, filepath.Join(t.TempDir(), "switchback.db")))
}

func TestReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "switchback.db")
	s := open(t, path)
	if err := s.SetSetting(t.Context(), "installation", "lab"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	v, err := open(t, path).Setting(t.Context(), "installation")
	if err != nil || v != "lab" {
		t.Fatalf("setting after reopening is %q, %v", v, err)
	}
}

func TestOpenInMissingFolder(t *testing.T) {
	_, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "missing", "x.db"))
	if switchback.CodeOf(err) != switchback.CodeUnavailable {
		t.Fatalf("error is %v (%s)", err, switchback.CodeOf(err))
	}
}

// TestDurable holds what the package promises of SQLite.
func TestDurable(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "switchback.db"))
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2", "foreign_keys": "1"} {
		if got := s.Pragma(t, pragma); got != want {
			t.Errorf("%s is %s, want %s", pragma, got, want)
		}
	}
}

func TestPostgres(t *testing.T) {
	pg := postgrestest.Start(t)
	storetest.Run(t, func(t *testing.T) *store.Store { return open(t, pg.Database()) })
	t.Run("audit log tampered with", func(t *testing.T) { auditTampered(t, open(t, pg.Database())) })
	t.Run("opened by several at once", func(t *testing.T) {
		where := pg.Database()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				s, err := store.Open(context.Background(), where)
				if err != nil {
					t.Error(err)
					return
				}
				if err := s.SetSetting(context.Background(), "installation", "lab"); err != nil {
					t.Error(err)
				}
				s.Close()
			})
		}
		wg.Wait()
	})
	t.Run("sorted by bytes", func(t *testing.T) {
		s := open(t, pg.Database())
		for _, id := range []switchback.SiteID{"b", "A", "a-c", "ab", "B", "a"} {
			if err := s.CreateSite(t.Context(), store.Site{ID: id}); err != nil {
				t.Fatal(err)
			}
		}
		sites, err := s.Sites(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, x := range sites {
			got += string(x.ID) + " "
		}
		if got != "A B a a-c ab b " {
			t.Errorf("order is %s", got)
		}
	})
	t.Run("clock", func(t *testing.T) {
		s := open(t, pg.Database())
		if d := time.Since(s.Now()).Abs(); d > time.Second {
			t.Errorf("PostgreSQL on this machine differs by %v", d)
		}
	})
	t.Run("wrong database", func(t *testing.T) {
		for where, want := range map[string]switchback.Code{
			pg.URL("missing"):           switchback.CodeNotFound,
			"postgres://127.0.0.1:1/x":  switchback.CodeUnavailable,
			"postgres://%zz":            switchback.CodeInvalid,
			"postgres://h/x?sslmode=no": switchback.CodeInvalid,
		} {
			_, err := store.Open(t.Context(), where)
			if switchback.CodeOf(err) != want {
				t.Errorf("%s: %v (%s), want %s", where, err, switchback.CodeOf(err), want)
			}
		}
	})
}

// TestPostgresAway: with the database down every call is CodeUnavailable, and
// the same store works again when it is back.
func TestPostgresAway(t *testing.T) {
	pg := postgrestest.Start(t)
	s := open(t, pg.Database())
	ctx := context.Background()
	if err := s.CreateOperation(ctx, operation.Record{ID: "op-1", State: operation.StateQueued}); err != nil {
		t.Fatal(err)
	}
	for name, stop := range map[string]func(){"stopped": pg.Stop, "crashed": pg.Crash} {
		stop()
		for what, call := range map[string]func() error{
			"read":  func() error { _, err := s.Setting(ctx, "x"); return err },
			"write": func() error { return s.SetSetting(ctx, "x", "y") },
			"transaction": func() error {
				_, err := s.ClaimOperation(ctx, "op-1", "a", time.Now(), time.Now().Add(time.Minute))
				return err
			},
		} {
			for range 12 { // more than there are pooled connections
				if err := call(); switchback.CodeOf(err) != switchback.CodeUnavailable {
					t.Fatalf("%s, %s: %v (%s)", name, what, err, switchback.CodeOf(err))
				}
			}
		}
		pg.Start()
		if err := s.SetSetting(ctx, "x", name); err != nil {
			t.Fatal(err)
		}
		if v, err := s.Setting(ctx, "x"); err != nil || v != name {
			t.Fatalf("%q, %v", v, err)
		}
	}
}

// TestRedacted: no password reaches a log.
func TestRedacted(t *testing.T) {
	for where, want := range map[string]string{
		"/var/lib/x.db":                       "/var/lib/x.db",
		"postgres://a:secret@h/d":             "postgres://a:xxxxx@h/d",
		"postgres://h/d?password=secret&a=b":  "postgres://h/d?a=b&password=xxxxx",
		"postgres://a:sec ret@h:port/d%zz%%%": "postgres://(not a URL)",
	} {
		if got := store.Redacted(where); got != want {
			t.Errorf("%s: %s", where, got)
		}
	}
}

package store_test

import (
	"context"
	"path/filepath"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/store"
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

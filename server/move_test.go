package server

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/store/postgrestest"
)

// TestMigrate moves an installation with a switched VM to PostgreSQL, where the
// loop goes on; the embedded one can no longer be started.
func TestMigrate(t *testing.T) {
	pg := postgrestest.Start(t)
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	failover := f.run(recovery.Failover, api.OperationRequest{})
	before, ca := f.web(), f.s.ca.Fingerprint()
	to := pg.Database()
	config := Config{StateDir: f.dir, Store: to, Listen: []string{"127.0.0.1:0"}}
	refused := func(what string, err error, want switchback.Code, text string) {
		t.Helper()
		if switchback.CodeOf(err) != want || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v (%s), want %s and %q", what, err, switchback.CodeOf(err), want, text)
		}
	}
	_, err := Migrate(t.Context(), config)
	refused("while the server runs", err, switchback.CodeConflict, "a server runs")
	f.close()
	_, err = Open(t.Context(), config)
	refused("a server on PostgreSQL before the move", err, switchback.CodeRefused, "server migrate")

	m, err := Migrate(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]int64{}
	for _, table := range m.Tables {
		rows[table.Name] = table.Rows
	}
	if rows["sites"] != 2 || rows["agents"] != 2 || rows["protections"] != 1 || rows["operations"] != 2 || rows["operation_log"] == 0 {
		t.Errorf("moved %v", rows)
	}
	_, err = Open(t.Context(), Config{StateDir: f.dir, Listen: []string{"127.0.0.1:0"}})
	refused("the embedded server after the move", err, switchback.CodeRefused, "was moved to postgres://")
	_, err = Migrate(t.Context(), config)
	refused("a second move", err, switchback.CodeConflict, "moved")

	f.store = to
	f.open()
	if f.s.ca.Fingerprint() != ca {
		t.Error("the CA is another one")
	}
	if after := f.web(); after.Version != before.Version || after.Phase != before.Phase || after.Epoch != before.Epoch {
		t.Errorf("web was %+v and is %+v", before, after)
	}
	rec, err := f.s.store.Operation(t.Context(), failover.ID)
	if err != nil || rec.State != operation.StateSucceeded {
		t.Errorf("failover is %+v, %v", rec, err)
	}
	f.run(recovery.Commit, api.OperationRequest{})

	other := newFleet(t)
	other.close()
	_, err = Migrate(t.Context(), Config{StateDir: other.dir, Store: to})
	refused("into an installation", err, switchback.CodeConflict, "holds an installation already")
	other.open() // nothing has happened to it
}

// TestMigrateInterrupted: whatever the moment, running it again finishes it.
func TestMigrateInterrupted(t *testing.T) {
	pg := postgrestest.Start(t)
	mark := func(dir string, m move) {
		t.Helper()
		st, err := store.Open(t.Context(), filepath.Join(dir, databaseFile))
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		if err := setMove(t.Context(), st, m); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name   string
		copied bool
	}{{"before the copy", false}, {"after the copy", true}} {
		t.Run(c.name, func(t *testing.T) {
			f := newFleet(t)
			f.close()
			config := Config{StateDir: f.dir, Store: pg.Database(), Listen: []string{"127.0.0.1:0"}}
			if c.copied {
				if _, err := Migrate(t.Context(), config); err != nil {
					t.Fatal(err)
				}
			}
			mark(f.dir, move{To: config.Store, StartedAt: time.Now()}) // as it stands while the copy is made
			for _, where := range []string{"", config.Store} {
				if _, err := Open(t.Context(), Config{StateDir: f.dir, Store: where, Listen: config.Listen}); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "run it again") {
					t.Errorf("a server on %q: %v", where, err)
				}
			}
			m, err := Migrate(t.Context(), config)
			if err != nil || m.Repeated != c.copied {
				t.Errorf("again: %+v, %v", m, err)
			}
			f.store = config.Store
			f.open()
		})
	}
	t.Run("database full of rules", func(t *testing.T) { // the copy fails: nothing has happened
		f := newFleet(t)
		f.close()
		to := pg.Database()
		st, err := store.Open(t.Context(), to)
		if err != nil {
			t.Fatal(err)
		}
		st.Close()
		pg.Do(to, "ALTER TABLE agents ADD CONSTRAINT nobody CHECK (id = 'nobody')")
		if _, err := Migrate(t.Context(), Config{StateDir: f.dir, Store: to}); err == nil {
			t.Error("moved into tables that refuse the rows")
		}
		pg.Do(to, "ALTER TABLE agents DROP CONSTRAINT nobody")
		f.open()
		f.close()
		if _, err := Migrate(t.Context(), Config{StateDir: f.dir, Store: to}); err != nil {
			t.Error(err)
		}
		f.store = to
		f.open()
	})
	if _, err := Migrate(t.Context(), Config{StateDir: t.TempDir(), Store: pg.Database()}); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("nothing moved: %v", err)
	}
	if _, err := Migrate(t.Context(), Config{StateDir: t.TempDir(), Store: os.DevNull}); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("moved to a file: %v", err)
	}
}

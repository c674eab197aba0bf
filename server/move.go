package server

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// settingMoved marks an embedded store that was moved; its value is a move.
const settingMoved = "moved-to"

// move says where an embedded store went.
type move struct {
	// To is the database, without its password; "" = nowhere.
	To        string    `json:"to"`
	StartedAt time.Time `json:"started_at"`
	// DoneAt is zero while nobody knows whether the copy was committed.
	DoneAt time.Time `json:"done_at,omitzero"`
}

func moveOf(ctx context.Context, st *store.Store) (m move, err error) {
	text, err := st.Setting(ctx, settingMoved)
	switch {
	case switchback.CodeOf(err) == switchback.CodeNotFound, err == nil && text == "":
		return move{}, nil
	case err != nil:
		return move{}, err
	}
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		return m, switchback.Errorf(switchback.CodeCorrupt, "setting %s: %w", settingMoved, err)
	}
	return m, nil
}

func setMove(ctx context.Context, st *store.Store, m move) error {
	if m.To == "" {
		return st.SetSetting(ctx, settingMoved, "")
	}
	text, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return st.SetSetting(ctx, settingMoved, string(text))
}

// refused is why a server does not start on the store that was moved; nil where it was not.
func (m move) refused(stateDir string) error {
	switch {
	case m.To == "":
		return nil
	case m.DoneAt.IsZero():
		return switchback.Errorf(switchback.CodeRefused, "the move of this installation to %s was interrupted", m.To).
			WithHint("run it again: switchback server migrate --state %s --to %s", stateDir, m.To)
	}
	return switchback.Errorf(switchback.CodeRefused, "this installation was moved to %s at %s", m.To, m.DoneAt.UTC().Format(time.RFC3339)).
		WithHint("start the server with --store %s", m.To)
}

// Migration is what Migrate did.
type Migration struct {
	To     string        `json:"to"`
	Tables []store.Table `json:"tables"`
	// Repeated: the copy was there already, made by a run that was interrupted.
	Repeated bool `json:"repeated,omitempty"`
	// KeyFile opens the CA in the database; every server needs it.
	KeyFile string `json:"key_file"`
}

// Migrate moves the embedded installation in cfg.StateDir into the empty
// PostgreSQL database cfg.Store: all rows and the CA, in one transaction, read
// back before it is committed. Then the embedded one is marked, and no server
// starts on it any more. It can be run again after an interruption.
//
// CodeConflict: a server runs on it, it was moved before, or the database is not empty.
func Migrate(ctx context.Context, cfg Config) (Migration, error) {
	out := Migration{To: store.Redacted(cfg.Store), KeyFile: cfg.keyFile()}
	if !store.IsPostgres(cfg.Store) {
		return out, switchback.Errorf(switchback.CodeInvalid, "%q is not the URL of a PostgreSQL database", cfg.Store).WithHint("postgres://USER@HOST/DATABASE")
	}
	path := filepath.Join(cfg.StateDir, databaseFile)
	if _, err := os.Stat(path); err != nil {
		return out, switchback.Errorf(switchback.CodeNotFound, "no embedded installation: %w", err).WithHint("name its directory with --state")
	}
	lock, err := lockState(ctx, cfg.StateDir, 0)
	if err != nil {
		return out, err
	}
	defer lock.Close()
	ca, err := transport.OpenCA(filepath.Join(cfg.StateDir, caDir))
	if err != nil {
		return out, err
	}
	from, err := store.Open(ctx, path)
	if err != nil {
		return out, err
	}
	defer from.Close()
	before, err := moveOf(ctx, from)
	if err != nil {
		return out, err
	}
	if !before.DoneAt.IsZero() {
		return out, switchback.Errorf(switchback.CodeConflict, "this installation was moved to %s already, at %s", before.To, before.DoneAt.Format(time.RFC3339))
	}
	to, err := store.Open(ctx, cfg.Store)
	if err != nil {
		return out, err
	}
	defer to.Close()
	sealed, err := cfg.sealCA(ctx, ca)
	if err != nil {
		return out, err
	}
	opts := store.CopyOptions{LeaveOut: []string{settingMoved}, Add: map[string]string{settingCA: sealed}}

	empty, err := to.Empty(ctx)
	if err != nil {
		return out, err
	}
	if !empty {
		if before.To == "" { // not ours
			return out, switchback.Errorf(switchback.CodeConflict, "%s holds an installation already", out.To).WithHint("name an empty database")
		}
		if out.Tables, err = from.SameAs(ctx, to, opts); err != nil {
			return out, err
		}
		if _, err := cfg.sharedCA(ctx, to); err != nil {
			return out, err
		}
		out.Repeated = true
		return out, setMove(ctx, from, move{To: out.To, StartedAt: before.StartedAt, DoneAt: time.Now()})
	}
	m := move{To: out.To, StartedAt: time.Now()}
	if err := setMove(ctx, from, m); err != nil {
		return out, err
	}
	if out.Tables, err = from.CopyTo(ctx, to, opts); err != nil {
		// Where nothing arrived, nothing has happened. Where nobody knows, the mark stays.
		ctx := context.WithoutCancel(ctx)
		if empty, eerr := to.Empty(ctx); eerr == nil && empty {
			err = errors.Join(err, setMove(ctx, from, move{}))
		}
		return out, err
	}
	m.DoneAt = time.Now()
	return out, setMove(ctx, from, m)
}

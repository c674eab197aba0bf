package server

import (
	"context"
	"errors"
	"fmt"
	"github.com/switchback-dr/switchback/internal/durable"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/store"
)

// Names in the state directory.
const (
	databaseFile = "switchback.db"
	lockFile     = "lock"
	replicaFile  = "replica" // this server's name among several on one store
	keyFile      = "installation.key"
	caDir        = "ca"
	serverDir    = "server"
	adminDir     = "admin"
)

// lockWait is how long a server waits for a former one of the same state
// directory to be gone: a killed process is a moment in ending.
const lockWait = 5 * time.Second

// lockState makes this process the only one that uses the state directory, until
// the file is closed or the process ends in whatever way. CodeConflict: another
// one does, for longer than wait.
func lockState(ctx context.Context, dir string, wait time.Duration) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(wait)
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		case !time.Now().Before(deadline):
			return nil, errors.Join(switchback.Errorf(switchback.CodeConflict, "a server runs on the state directory %s", dir).
				WithHint("stop it first"), f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), f.Close())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// replicaName is what this server signs leases with: the same after a restart
// from this state directory on this host, never that of another server.
func replicaName(dir string) (string, error) {
	path := filepath.Join(dir, replicaFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		b = []byte(uuid.NewString()[:8] + "\n")
		err = durable.WriteFile(path, b, 0o600)
	}
	if err != nil {
		return "", err
	}
	host, err := os.Hostname()
	if err != nil {
		return "", err
	}
	return "server-" + host + "-" + strings.TrimSpace(string(b)), nil
}

// openStore opens the store that cfg names: PostgreSQL, or the embedded one. It
// refuses where that would silently begin a second installation.
func openStore(ctx context.Context, cfg Config) (*store.Store, error) {
	path := filepath.Join(cfg.StateDir, databaseFile)
	if cfg.Store == "" {
		st, err := store.Open(ctx, path)
		if err != nil {
			return nil, err
		}
		m, err := moveOf(ctx, st)
		if err == nil {
			err = m.refused(cfg.StateDir)
		}
		if err != nil {
			return nil, errors.Join(err, st.Close())
		}
		return st, nil
	}
	if !store.IsPostgres(cfg.Store) {
		return nil, switchback.Errorf(switchback.CodeInvalid, "--store takes the URL of a PostgreSQL database, not %q", cfg.Store).
			WithHint("postgres://USER@HOST/DATABASE; without --store the server keeps its database in the state directory")
	}
	if _, err := os.Stat(path); err == nil {
		st, err := store.Open(ctx, path)
		if err != nil {
			return nil, err
		}
		m, err := moveOf(ctx, st)
		if err := errors.Join(err, st.Close()); err != nil {
			return nil, err
		}
		switch {
		case m.To == "":
			return nil, switchback.Errorf(switchback.CodeRefused, "%s holds an embedded installation that was not moved to PostgreSQL", cfg.StateDir).
				WithHint("move it: switchback server migrate --state %s --to %s; or use another state directory", cfg.StateDir, store.Redacted(cfg.Store))
		case m.DoneAt.IsZero():
			return nil, m.refused(cfg.StateDir)
		}
	}
	return store.Open(ctx, cfg.Store)
}

package server

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/transport"
)

// settingRecovery is the public half of the installation's recovery key.
const settingRecovery = "recovery-key"

// recoveryFile holds the recovery key in the state directory, until the operator
// moves it away. The server does not read it again.
const recoveryFile = "recovery.key"

// ensureRecoveryKey makes the installation's recovery key where there is none.
// The file is durable before its public half counts.
func (s *Server) ensureRecoveryKey(ctx context.Context) error {
	path := filepath.Join(s.cfg.StateDir, recoveryFile)
	public, err := s.store.Setting(ctx, settingRecovery)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		var key transport.RecoveryKey
		text, rerr := os.ReadFile(path)
		switch {
		case rerr == nil: // of a start that ended right here
			key, err = transport.ParseRecoveryKey(string(text))
		case errors.Is(rerr, fs.ErrNotExist):
			key = transport.NewRecoveryKey(s.ca)
			err = durable.WriteFile(path, key.File(), 0o600)
		default:
			err = rerr
		}
		if err != nil {
			return err
		}
		if public, err = s.store.EnsureSetting(ctx, settingRecovery, key.Public()); err != nil {
			return err
		}
		if public != key.Public() { // another server of this installation was first
			if err := durable.Remove(path); err != nil {
				return err
			}
		}
	}
	if err != nil {
		return err
	}
	s.recovery = public
	if _, err := os.Stat(path); err == nil {
		s.log.Warn("the recovery key lies beside the server: move it to another place, where it survives the loss of this host", "file", path)
	}
	return nil
}

// Initialised is what Init made.
type Initialised struct {
	Installation string `json:"installation"`
	StateDir     string `json:"state"`
	// RecoveryKey is the key with instructions; KeyFile where it lies, "" = nowhere.
	RecoveryKey string `json:"recovery_key,omitempty"`
	KeyFile     string `json:"key_file,omitempty"`
}

// Init makes a new installation without running a server on it. The recovery key
// goes to keyFile, which must not exist, or where that is "" only into the
// answer. CodeConflict: there is an installation already.
func Init(ctx context.Context, cfg Config, keyFile string) (r Initialised, err error) {
	if keyFile != "" {
		if _, err := os.Lstat(keyFile); err == nil {
			return r, switchback.Errorf(switchback.CodeConflict, "%s exists", keyFile).WithHint("choose another name: a key is never overwritten")
		}
	}
	if _, err := os.Stat(filepath.Join(cfg.StateDir, databaseFile)); err == nil {
		return r, switchback.Errorf(switchback.CodeConflict, "%s holds an installation already", cfg.StateDir).
			WithHint("use another state directory; the recovery key of that installation was made with it")
	}
	if len(cfg.Listen) == 0 {
		cfg.Listen = []string{"127.0.0.1:7443"}
	}
	s, err := Open(ctx, cfg)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	path := filepath.Join(cfg.StateDir, recoveryFile)
	r = Initialised{Installation: s.ca.Installation(), StateDir: cfg.StateDir}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, switchback.Errorf(switchback.CodeConflict, "the installation in the database has its recovery key already").
			WithHint("start this server with 'switchback server --store …': it joins the others")
	}
	if err != nil {
		return r, err
	}
	r.RecoveryKey = string(text)
	if keyFile == "" {
		return r, nil // the file stays: what was printed may be lost
	}
	if err := durable.WriteFile(keyFile, text, 0o600); err != nil {
		return r, err
	}
	r.KeyFile = keyFile
	return r, durable.Remove(path)
}

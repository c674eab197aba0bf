package server

import (
	"context"
	"encoding/base64"
	"errors"
	"github.com/switchback-dr/switchback/internal/durable"
	"io/fs"
	"os"
	"path/filepath"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/seal"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// settingCA is the CA in a store that several servers share: transport.CA.PEM,
// wrapped by the installation's key file, in base64.
const settingCA = "ca"

// boundCA is mixed into the wrapping of the CA.
const boundCA = "switchback ca v1"

func (c Config) keyFile() string {
	if c.KeyFile != "" {
		return c.KeyFile
	}
	return filepath.Join(c.StateDir, keyFile)
}

// authority returns the CA of the installation, made where it begins: in the
// state directory of an embedded store, or sealed in a shared one.
func (s *Server) authority(ctx context.Context) (*transport.CA, error) {
	if s.store.Shared() {
		return s.cfg.sharedCA(ctx, s.store)
	}
	dir := filepath.Join(s.cfg.StateDir, caDir)
	ca, err := transport.OpenCA(dir)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return transport.CreateCA(dir, newInstallation())
	}
	return ca, err
}

// sharedCA opens the CA in a shared store. In an empty one it makes it: of
// several servers that do so at once, one wins, and the others refuse to start
// until they have its key file.
func (c Config) sharedCA(ctx context.Context, st *store.Store) (*transport.CA, error) {
	sealed, err := st.Setting(ctx, settingCA)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		var ca *transport.CA
		if ca, err = transport.NewCA(newInstallation()); err != nil {
			return nil, err
		}
		var mine string
		if mine, err = c.sealCA(ctx, ca); err != nil {
			return nil, err
		}
		sealed, err = st.EnsureSetting(ctx, settingCA, mine)
	}
	if err != nil {
		return nil, err
	}
	refuse := func(why error) error {
		return switchback.Errorf(switchback.CodeRefused, "this server cannot open the CA of the installation in the database: %w", why).
			WithHint("copy %s from a server that runs on this database, or from where it is kept, to %s", keyFile, c.keyFile())
	}
	if _, err := os.Stat(c.keyFile()); err != nil {
		return nil, refuse(err)
	}
	key, err := seal.KeyFile(c.keyFile())
	if err != nil {
		return nil, err
	}
	wrapped, err := base64.StdEncoding.DecodeString(sealed)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "the CA in the database: %w", err)
	}
	data, err := key.Unwrap(ctx, wrapped, []byte(boundCA))
	if switchback.CodeOf(err) == switchback.CodeUnauthorized {
		return nil, refuse(errors.New("it was sealed with another key file"))
	}
	if err != nil {
		return nil, err
	}
	return transport.ParseCA(data)
}

// sealCA wraps the CA for a shared store, with a key file made where it is missing.
func (c Config) sealCA(ctx context.Context, ca *transport.CA) (string, error) {
	path := c.keyFile()
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		if err := errors.Join(seal.MakeKeyFile(path), durable.SyncDir(filepath.Dir(path))); err != nil {
			return "", err
		}
	}
	key, err := seal.KeyFile(path)
	if err != nil {
		return "", err
	}
	data, err := ca.PEM()
	if err != nil {
		return "", err
	}
	wrapped, err := key.Wrap(ctx, data, []byte(boundCA))
	return base64.StdEncoding.EncodeToString(wrapped), err
}

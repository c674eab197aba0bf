package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// Config is what a server needs.
type Config struct {
	// StateDir keeps the database, the CA and the credentials.
	StateDir string
	// Listen are the addresses to serve on; Addresses (host:port) are written
	// into join tokens: how agents reach the server. Default: Listen.
	Listen, Addresses []string
	Logger            *slog.Logger
	Version           string
}

// Server is the control plane. Make it with Open, run it with Run.
type Server struct {
	cfg    Config
	log    *slog.Logger
	store  *store.Store
	ca     *transport.CA
	creds  *transport.Credentials
	agents *http.Client
	runner *operation.Runner
}

// certificate lifetimes
const (
	serverTTL = 365 * 24 * time.Hour
	adminTTL  = 365 * 24 * time.Hour
	agentTTL  = 7 * 24 * time.Hour
)

// Open opens or creates the installation in StateDir: database, CA, the
// server's own credentials, and those of the first administrator in
// StateDir/admin.
func Open(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.StateDir == "" || len(cfg.Listen) == 0 {
		return nil, switchback.Errorf(switchback.CodeInvalid, "a server needs a state directory and an address to listen on")
	}
	if len(cfg.Addresses) == 0 {
		cfg.Addresses = cfg.Listen
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, err
	}
	st, err := store.Open(ctx, filepath.Join(cfg.StateDir, "switchback.db"))
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Logger, store: st}
	if err := s.identify(ctx); err != nil {
		st.Close()
		return nil, err
	}
	s.agents = transport.NewHTTPClient(transport.ClientConfig{Credentials: s.creds, Want: func(id transport.Identity) error {
		if id.Role != transport.RoleAgent {
			return switchback.Errorf(switchback.CodeUnauthorized, "%s is not an agent", id)
		}
		return nil
	}})
	host, _ := os.Hostname()
	s.runner, err = operation.NewRunner(operation.Config{Store: st, Definitions: s.definitions(), Owner: "server-" + host, Logger: s.log})
	if err != nil {
		st.Close()
		return nil, err
	}
	return s, nil
}

// identify opens the CA and makes what credentials are missing.
func (s *Server) identify(ctx context.Context) error {
	dir := filepath.Join(s.cfg.StateDir, "ca")
	ca, err := transport.OpenCA(dir)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		ca, err = transport.CreateCA(dir, newInstallation())
	}
	if err != nil {
		return err
	}
	s.ca = ca
	if s.creds, err = s.issueTo(filepath.Join(s.cfg.StateDir, "server"), transport.Identity{Installation: ca.Installation(), Role: transport.RoleServer, ID: "server"}, serverTTL); err != nil {
		return err
	}
	_, err = s.issueTo(filepath.Join(s.cfg.StateDir, "admin"), transport.Identity{Installation: ca.Installation(), Role: transport.RoleAdmin, ID: "admin"}, adminTTL)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.cfg.StateDir, "admin", "server"), []byte(s.cfg.Addresses[0]+"\n"), 0o600)
}

// issueTo returns the credentials in dir, issued anew when missing or near their end.
func (s *Server) issueTo(dir string, id transport.Identity, ttl time.Duration) (*transport.Credentials, error) {
	c, err := transport.LoadCredentials(dir)
	if err == nil && time.Until(c.Expires()) > ttl/3 {
		return c, nil
	}
	if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
		return nil, err
	}
	if c, err = s.ca.Issue(id, ttl); err != nil {
		return nil, err
	}
	return c, transport.SaveCredentials(dir, c)
}

// Run serves the API and runs operations until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	srv := transport.NewHTTPServer(s.creds, s.handler(), s.log)
	srv.BaseContext = func(net.Listener) context.Context { return ctx }
	var wg sync.WaitGroup
	failed := make(chan error, len(s.cfg.Listen)+1)
	for _, addr := range s.cfg.Listen {
		ln, err := transport.Listen(ctx, addr)
		if err != nil {
			srv.Close()
			return err
		}
		s.log.Info("server ready", "listen", ln.Addr().String())
		wg.Go(func() {
			if err := srv.ServeTLS(ln, "", ""); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("serve %s: %w", addr, err)
			}
		})
	}
	wg.Go(func() { s.scheduleDrills(ctx) })
	wg.Go(func() {
		if err := s.runner.Run(ctx); err != nil {
			failed <- err
		}
	})
	wg.Go(func() { s.watchDeadlines(ctx) })
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	cancel()
	srv.Close()
	wg.Wait()
	return err
}

// Close closes the database.
func (s *Server) Close() error { return s.store.Close() }

// newInstallation names a new installation: the trust domain of its certificates.
func newInstallation() string { return "sb-" + uuid.NewString()[:8] }

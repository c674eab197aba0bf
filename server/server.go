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
	"strings"
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
	// StateDir keeps the credentials and, in an embedded installation, database
	// and CA. One server at a time runs on it.
	StateDir string
	// Store is the URL of a PostgreSQL database, on which several servers may
	// run, each with a state directory of its own. "" = SQLite in StateDir.
	Store string
	// KeyFile opens the CA in the PostgreSQL database; "" = StateDir/installation.key.
	// The first server makes it, the others need a copy.
	KeyFile string
	Backup  BackupConfig
	// OIDC is where people log in; nil for nowhere.
	OIDC *OIDC
	// Listen are the addresses to serve on; Addresses (host:port) are written
	// into join tokens: how agents and clients reach the server, and the other
	// servers on its store. Default: Listen.
	Listen, Addresses []string
	// Unreachable: agents cannot dial the server, so it keeps lines to them.
	Unreachable bool
	Logger      *slog.Logger
	Version     string
}

// Server is the control plane. Make it with Open, run it with Run.
type Server struct {
	cfg  Config
	lock *os.File
	// announced are the addresses that agents are told; none where nobody named them.
	announced []string
	log       *slog.Logger
	store     *store.Store
	ca        *transport.CA
	creds     *transport.Credentials
	agents    *http.Client
	addressed *http.Client // of agents that are known by their address only
	inbound   *transport.Inbound
	rotating  sync.Mutex // of steps of the CA's rotation
	runner    *operation.Runner
	recovery  string // public half of the installation's recovery key
	learning  learning
	logins    logins
}

// certificate lifetimes
const (
	serverTTL = 365 * 24 * time.Hour
	adminTTL  = 365 * 24 * time.Hour
	agentTTL  = 7 * 24 * time.Hour
)

// Open opens or creates the installation: database, CA, the server's own
// credentials, and those of the first administrator in StateDir/admin.
func Open(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.StateDir == "" || len(cfg.Listen) == 0 {
		return nil, switchback.Errorf(switchback.CodeInvalid, "a server needs a state directory and an address to listen on")
	}
	announced := cfg.Addresses
	if cfg.Unreachable {
		announced = nil // nobody can dial them
	}
	if len(cfg.Addresses) == 0 {
		cfg.Addresses = cfg.Listen
	}
	if err := cfg.Backup.check(cfg.Store == ""); err != nil {
		return nil, err
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		return nil, err
	}
	lock, err := lockState(ctx, cfg.StateDir, lockWait)
	if err != nil {
		return nil, err
	}
	s := &Server{cfg: cfg, log: cfg.Logger, lock: lock, announced: announced}
	if err := s.open(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

func (s *Server) open(ctx context.Context) (err error) {
	if s.store, err = openStore(ctx, s.cfg); err != nil {
		return err
	}
	if err := s.identify(ctx); err != nil {
		return err
	}
	owner, err := replicaName(s.cfg.StateDir)
	if err != nil {
		return err
	}
	s.connect()
	if err := s.enforce(ctx); err != nil {
		return err
	}
	s.runner, err = operation.NewRunner(operation.Config{Store: s.store, Definitions: s.definitions(), Owner: owner, Now: s.store.Now, Logger: s.log})
	return err
}

// identify opens the CA and makes what credentials are missing.
func (s *Server) identify(ctx context.Context) error {
	ca, err := s.authority(ctx)
	if err != nil {
		return err
	}
	s.ca = ca
	if err := s.ensureRecoveryKey(ctx); err != nil {
		return err
	}
	if s.creds, err = s.issueTo(filepath.Join(s.cfg.StateDir, serverDir), transport.Identity{Installation: ca.Installation(), Role: transport.RoleServer, ID: "server"}, serverTTL); err != nil {
		return err
	}
	_, err = s.issueTo(filepath.Join(s.cfg.StateDir, adminDir), transport.Identity{Installation: ca.Installation(), Role: transport.RoleAdmin, ID: "admin"}, adminTTL)
	if err != nil {
		return err
	}
	clients := s.announced
	if len(clients) == 0 {
		clients = s.cfg.Addresses[:1]
	}
	return os.WriteFile(filepath.Join(s.cfg.StateDir, adminDir, "server"), []byte(strings.Join(clients, "\n")+"\n"), 0o600)
}

// issueTo returns the credentials in dir, issued anew when missing or near their end.
func (s *Server) issueTo(dir string, id transport.Identity, ttl time.Duration) (*transport.Credentials, error) {
	c, err := transport.LoadCredentials(dir)
	if err == nil && s.fits(c, ttl) && c.Identity() == id {
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
	wg.Go(func() { s.keepTrust(ctx) })
	if s.cfg.Unreachable {
		wg.Go(func() { s.keepLines(ctx) })
	}
	wg.Go(func() { s.scheduleDrills(ctx) })
	wg.Go(func() {
		if err := s.runner.Run(ctx); err != nil {
			failed <- err
		}
	})
	wg.Go(func() { s.watchDeadlines(ctx) })
	wg.Go(func() { s.learnFromAgents(ctx) })
	wg.Go(func() { s.expireApprovals(ctx) })
	if s.cfg.Backup.Dir != "" {
		wg.Go(func() { s.backups(ctx) })
	}
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	cancel()
	srv.Close()
	s.inbound.Close()
	wg.Wait()
	return err
}

// Close closes the database and lets another server have the state directory.
func (s *Server) Close() error {
	var err error
	if s.store != nil {
		err = s.store.Close()
	}
	return errors.Join(err, s.lock.Close())
}

// newInstallation names a new installation: the trust domain of its certificates.
func newInstallation() string { return "sb-" + uuid.NewString()[:8] }

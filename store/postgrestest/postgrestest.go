// Package postgrestest starts a PostgreSQL for tests: a cluster of its own in a
// temporary directory, on a free loopback port, without fsync, ended with the
// test. It needs Debian's postgresql-15, which scripts/install-packages.sh test
// installs; the package's own cluster is not touched.
//
// Its databases sort text as people do (ICU, en-US), so that what relies on the
// order of bytes is seen to ask for it.
package postgrestest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
)

const programs = "/usr/lib/postgresql/15/bin"

// Server is a running PostgreSQL. Its methods fail the test where they cannot do it.
type Server struct {
	t         testing.TB
	dir       string
	port      int
	user      *syscall.SysProcAttr
	cmd       *exec.Cmd
	databases atomic.Int32
}

// Start makes a cluster and starts it.
func Start(t testing.TB) *Server {
	t.Helper()
	if _, err := os.Stat(programs); err != nil {
		t.Fatalf("PostgreSQL is missing: run scripts/install-packages.sh test: %v", err)
	}
	parent := "/dev/shm"
	if _, err := os.Stat(parent); err != nil {
		parent = ""
	}
	dir, err := os.MkdirTemp(parent, "switchback-postgres-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := &Server{t: t, dir: dir, user: &syscall.SysProcAttr{Pdeathsig: syscall.SIGQUIT}}
	if os.Getuid() == 0 { // whom PostgreSQL refuses
		uid, gid := unprivileged(t)
		s.user.Credential = &syscall.Credential{Uid: uid, Gid: gid}
		if err := os.Chown(dir, int(uid), int(gid)); err != nil {
			t.Fatal(err)
		}
	}
	cmd := s.command("initdb", "--pgdata", s.data(), "--username", "switchback", "--auth", "trust", "--no-sync", "--no-instructions",
		"--encoding", "UTF8", "--locale", "C.UTF-8", "--locale-provider", "icu", "--icu-locale", "en-US")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.port = ln.Addr().(*net.TCPAddr).Port
	ln.Close()
	t.Cleanup(func() {
		if s.cmd != nil {
			s.end(syscall.SIGINT)
		}
	})
	s.Start()
	return s
}

func unprivileged(t testing.TB) (uid, gid uint32) {
	t.Helper()
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		id, err1 := strconv.ParseUint(u.Uid, 10, 32)
		group, err2 := strconv.ParseUint(u.Gid, 10, 32)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		return uint32(id), uint32(group)
	}
	t.Fatal("there is neither a user postgres nor a user nobody")
	return 0, 0
}

func (s *Server) data() string { return filepath.Join(s.dir, "data") }

func (s *Server) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(programs, program), args...)
	cmd.Dir = s.dir
	cmd.Env = []string{"LC_ALL=C.UTF-8", "PATH=/usr/bin:/bin", "TZ=UTC"}
	cmd.SysProcAttr = s.user
	return cmd
}

// Start starts a server that was stopped, on the same port, and waits until it answers.
func (s *Server) Start() {
	s.t.Helper()
	s.cmd = s.command("postgres", "-D", s.data(), "-p", strconv.Itoa(s.port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=",
		"-c", "fsync=off", "-c", "full_page_writes=off", "-c", "shared_buffers=16MB", "-c", "max_connections=200")
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := do(s.URL("postgres"), "SELECT 1")
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			text, _ := os.ReadFile(filepath.Join(s.dir, "log"))
			s.t.Fatalf("PostgreSQL does not answer: %v\n%s", err, text)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Stop ends the server in order; its connections are cut.
func (s *Server) Stop() { s.t.Helper(); s.end(syscall.SIGINT) }

// Crash ends the server without an end of its transactions.
func (s *Server) Crash() { s.t.Helper(); s.end(syscall.SIGQUIT) }

func (s *Server) end(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Error(err)
	}
	_ = s.cmd.Wait() // its status says how it was ended
	s.cmd = nil
}

// URL returns the URL of a database.
func (s *Server) URL(database string) string {
	return fmt.Sprintf("postgres://switchback@127.0.0.1:%d/%s?sslmode=disable", s.port, url.PathEscape(database))
}

// Do runs a statement in a database, as a superuser.
func (s *Server) Do(where, statement string) {
	s.t.Helper()
	if err := do(where, statement); err != nil {
		s.t.Fatalf("%s: %v", statement, err)
	}
}

func do(where, statement string) (err error) {
	db, err := sql.Open("pgx", where)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	_, err = db.ExecContext(ctx, statement)
	return err
}

// Database makes an empty database and returns its URL.
func (s *Server) Database() string {
	s.t.Helper()
	name := fmt.Sprintf("test%d", s.databases.Add(1))
	s.Do(s.URL("postgres"), "CREATE DATABASE "+name)
	return s.URL(name)
}

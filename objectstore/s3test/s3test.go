// Package s3test runs a real S3 server on loopback for tests.
package s3test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	"github.com/switchback-dr/switchback/objectstore"
)

// Server is a versitygw process, built where it is missing.
type Server struct {
	t    *testing.T
	path string // of its program
	dir  string
	addr string
	cmd  *exec.Cmd
}

// Start starts a server on an address of this machine, such as 127.0.0.1. It ends with the test.
func Start(t *testing.T, host string) *Server {
	t.Helper()
	_, file, _, _ := runtime.Caller(0)
	cmd := exec.Command(filepath.Join(filepath.Dir(file), "../../scripts/install-versitygw.sh"))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("the S3 server cannot be built: %v", err)
	}
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{t: t, path: strings.TrimSpace(string(out)), dir: t.TempDir(), addr: l.Addr().String()}
	l.Close()
	if err := os.MkdirAll(filepath.Join(s.dir, "data"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.dir, "versions"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "credentials"), []byte(`{"access_key": "test", "secret_key": "secretsecret"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Start()
	t.Cleanup(s.Stop)
	return s
}

// Start starts it again after Stop, with what it stored.
func (s *Server) Start() {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	s.cmd = exec.Command(s.path, "--access", "test", "--secret", "secretsecret", "--port", s.addr, "posix",
		"--versioning-dir", filepath.Join(s.dir, "versions"), filepath.Join(s.dir, "data"))
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for range 400 {
		if c, err := net.Dial("tcp", s.addr); err == nil {
			c.Close()
			return
		}
		time.Sleep(25 * time.Millisecond)
	}
	b, _ := os.ReadFile(filepath.Join(s.dir, "log"))
	s.t.Fatalf("the S3 server does not answer on %s: %s", s.addr, b)
}

// Stop kills it.
func (s *Server) Stop() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

// Config names a place in a bucket of the server.
func (s *Server) Config(bucket, prefix string) objectstore.Config {
	return objectstore.Config{Endpoint: "http://" + s.addr, Bucket: bucket, Prefix: prefix, Region: "us-east-1", CredentialsFile: filepath.Join(s.dir, "credentials")}
}

// Dir is the server's own directory.
func (s *Server) Dir() string { return s.dir }

// MakeBucket makes a bucket, with object lock if asked for.
func (s *Server) MakeBucket(bucket string, lock bool) {
	s.t.Helper()
	c, err := minio.New(s.addr, &minio.Options{Creds: credentials.NewStaticV4("test", "secretsecret", ""), Region: "us-east-1"})
	if err == nil {
		err = c.MakeBucket(s.t.Context(), bucket, minio.MakeBucketOptions{Region: "us-east-1", ObjectLocking: lock})
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

package objectstore

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/minio/minio-go/v7"
)

// server is a real S3 server on loopback, built by the tests' own set-up.
type server struct {
	t    *testing.T
	path string // of its program
	dir  string
	addr string
	cmd  *exec.Cmd
}

func startServer(t *testing.T) *server {
	t.Helper()
	cmd := exec.Command("../scripts/install-versitygw.sh")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("the S3 server cannot be built: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{t: t, path: strings.TrimSpace(string(out)), dir: t.TempDir(), addr: l.Addr().String()}
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
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *server) start() {
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

func (s *server) stop() {
	if s.cmd != nil {
		s.cmd.Process.Kill()
		s.cmd.Wait()
		s.cmd = nil
	}
}

func (s *server) config(bucket, prefix string) Config {
	return Config{Endpoint: "http://" + s.addr, Bucket: bucket, Prefix: prefix, Region: "us-east-1", CredentialsFile: filepath.Join(s.dir, "credentials")}
}

// open makes the bucket and opens a place in it.
func (s *server) open(bucket, prefix string, lock bool) *Store {
	s.t.Helper()
	st, err := Open(s.config(bucket, prefix))
	if err != nil {
		s.t.Fatal(err)
	}
	err = st.client.MakeBucket(s.t.Context(), bucket, minio.MakeBucketOptions{Region: "us-east-1", ObjectLocking: lock})
	if err != nil && !strings.Contains(fmt.Sprint(err), "already") {
		s.t.Fatal(err)
	}
	return st
}

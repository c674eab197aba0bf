package server

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/minio/minio-go/v7"
	"github.com/minio/minio-go/v7/pkg/credentials"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/objectstore"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

// TestBackupAndRestore makes a backup while a server works on a failover, and
// goes on from it in another directory: nothing moves before a person says so.
func TestBackupAndRestore(t *testing.T) {
	f := newFleet(t)
	f.run(recovery.Protect, api.OperationRequest{})
	reached, goOn := make(chan struct{}), make(chan struct{})
	var once sync.Once
	f.setHook(func(_ switchback.SiteID, action string) error {
		if action == agentapi.ActionShutdown {
			once.Do(func() { close(reached); <-goOn })
		}
		return nil
	})
	id := f.begin(recovery.Failover, api.OperationRequest{})
	<-reached
	file := filepath.Join(memoryDir(t), "backup")
	made, err := WriteBackup(t.Context(), f.dir, file, "v1")
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(file); err != nil || st.Mode() != 0o600 {
		t.Fatalf("backup is %v, %v", st.Mode(), err)
	}
	if left, err := os.ReadDir(filepath.Dir(file)); err != nil || len(left) != 1 {
		t.Errorf("beside the backup there is %v, %v", left, err)
	}
	if _, err := WriteBackup(t.Context(), f.dir, file, "v1"); switchback.CodeOf(err) != switchback.CodeConflict {
		t.Errorf("a second backup of the same name: %v", err)
	}
	ca := f.s.ca.Fingerprint()
	stopped := make(chan struct{})
	go func() { defer close(stopped); f.close() }() // the server and its machine are lost here
	close(goOn)
	<-stopped
	f.took()

	if _, err := Restore(t.Context(), file, f.dir); switchback.CodeOf(err) != switchback.CodeConflict {
		t.Errorf("restored over an installation: %v", err)
	}
	f.dir = filepath.Join(memoryDir(t), "new", "state")
	restored, err := Restore(t.Context(), file, f.dir)
	if err != nil {
		t.Fatal(err)
	}
	made.Suspended = []switchback.OperationID{id}
	if d := cmp.Diff(made, restored); d != "" {
		t.Errorf("restored (-made +restored):\n%s", d)
	}
	f.open()
	if f.s.ca.Fingerprint() != ca {
		t.Error("the restored server has another CA")
	}
	rec := f.wait(id)
	if rec.State != operation.StateFailed || rec.Error == nil || !strings.Contains(rec.Error.Message, "restored") {
		t.Fatalf("the operation is %s: %v", rec.State, rec.Error)
	}
	if rec.Lease.Epoch < 1000 {
		t.Errorf("a lease that the lost server took after the backup may be newer than %d", rec.Lease.Epoch)
	}
	time.Sleep(200 * time.Millisecond)
	if did := f.took(); did != "" {
		t.Errorf("the restored server did %s", did)
	}
	if p := f.web(); p.Operation != id {
		t.Errorf("web's operation is %q", p.Operation)
	}
	if err := f.s.runner.Retry(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	for f.running() != "riga" {
		time.Sleep(5 * time.Millisecond)
	}
	if rec := f.wait(id); rec.State != operation.StateSucceeded {
		t.Errorf("retried: %s: %v", rec.State, rec.Error)
	}
}

// TestBackupWhileWriting: a backup is of one instant, whatever is written meanwhile.
func TestBackupWhileWriting(t *testing.T) {
	f := newFleet(t)
	ctx, cancel := context.WithCancel(t.Context())
	var writer sync.WaitGroup
	writer.Go(func() { // two settings that are never more than one apart
		for i := 0; ctx.Err() == nil; i++ {
			for _, key := range []string{"first", "second"} {
				if err := f.s.store.SetSetting(context.Background(), key, strings.Repeat("x", i)); err != nil {
					t.Error(err)
					return
				}
			}
		}
	})
	for i := range 5 {
		dir := memoryDir(t)
		file, state := filepath.Join(dir, "backup"), filepath.Join(dir, "state")
		if _, err := WriteBackup(t.Context(), f.dir, file, "v1"); err != nil {
			t.Fatal(err)
		}
		if _, err := Restore(t.Context(), file, state); err != nil {
			t.Fatal(err)
		}
		s, err := Open(t.Context(), Config{StateDir: state, Listen: []string{"127.0.0.1:0"}})
		if err != nil {
			t.Fatal(err)
		}
		one, _ := s.store.Setting(t.Context(), "first")
		two, _ := s.store.Setting(t.Context(), "second")
		if d := len(one) - len(two); i > 0 && len(one) == 0 || d < 0 || d > 1 {
			t.Errorf("the backup holds %d and %d", len(one), len(two))
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	writer.Wait()
}

// TestBackupDamaged: no damaged backup is restored, and nothing is left of the attempt.
func TestBackupDamaged(t *testing.T) {
	f := newFleet(t)
	dir := memoryDir(t)
	file := filepath.Join(dir, "backup")
	if _, err := WriteBackup(t.Context(), f.dir, file, "v1"); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 1
	for name, data := range map[string][]byte{
		"empty": nil, "text": []byte("not a backup"), "cut": good[:len(good)*2/3], "flipped": flipped,
		"changed": repack(t, good, func(name string, content []byte) []byte {
			if name == databaseFile {
				content[len(content)-1] ^= 1
			}
			return content
		}),
		"of the future": repack(t, good, func(name string, content []byte) []byte {
			return bytes.Replace(content, []byte(`"format": 1`), []byte(`"format": 9`), 1)
		}),
		"escaping": repack(t, good, func(name string, content []byte) []byte {
			return bytes.Replace(content, []byte(`"ca/ca.pem"`), []byte(`"../ca.pem"`), 1)
		}),
	} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Restore(t.Context(), file, filepath.Join(dir, "state"))
		want := switchback.CodeCorrupt
		if name == "of the future" {
			want = switchback.CodeUnsupported
		}
		if switchback.CodeOf(err) != want {
			t.Errorf("%s: %v (%s)", name, err, switchback.CodeOf(err))
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
			t.Errorf("%s leaves %v, %v", name, left, err)
		}
	}
	if _, err := Restore(t.Context(), filepath.Join(dir, "missing"), filepath.Join(dir, "state")); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("a missing backup: %v", err)
	}
	if _, err := WriteBackup(t.Context(), dir, file+"2", "v1"); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("a backup of nothing: %v", err)
	}
}

// repack writes an archive anew with changed content.
func repack(t *testing.T, archive []byte, change func(name string, content []byte) []byte) []byte {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var out bytes.Buffer
	zw, err := zstd.NewWriter(&out)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(zw)
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		content = change(h.Name, content)
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	zw.Close()
	return out.Bytes()
}

// TestPeriodicBackups: in their rhythm, also across a restart; only the newest
// are kept, here and in the object store; other files stay.
func TestPeriodicBackups(t *testing.T) {
	objects, client := s3(t)
	dir := memoryDir(t)
	if err := os.WriteFile(filepath.Join(dir, "switchback-notes"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, old := range []string{"switchback-20010101T000000Z.backup", "switchback-20010101T010000Z.backup"} {
		if err := os.WriteFile(filepath.Join(dir, old), []byte("old"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, age := range map[string]time.Duration{".backup-cut-short": 25 * time.Hour, ".backup-at-work": time.Minute} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(filepath.Join(dir, name), time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	state := memoryDir(t)
	run := func(until func() bool) {
		t.Helper()
		s, err := Open(t.Context(), Config{StateDir: state, Listen: []string{"127.0.0.1:0"}, Logger: slog.New(slog.NewTextHandler(t.Output(), nil)),
			Backup: BackupConfig{Dir: dir, Every: time.Hour, Keep: 2, Objects: &objects}})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		deadline := time.Now().Add(20 * time.Second)
		for !until() {
			if time.Now().After(deadline) {
				t.Fatal("it does not come to it")
			}
			time.Sleep(10 * time.Millisecond)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	copies := func() (names []string) {
		for o := range client.ListObjects(t.Context(), "server", minio.ListObjectsOptions{Recursive: true}) {
			names = append(names, o.Key)
		}
		return names
	}
	run(func() bool { return len(copies()) == 2 })
	first, err := listBackups(dir)
	if err != nil || len(first) != 2 || first[0] != "switchback-20010101T010000Z.backup" {
		t.Fatalf("kept are %v, %v", first, err)
	}
	if got := copies(); got[0] != "prod/"+first[0] || got[1] != "prod/"+first[1] {
		t.Errorf("copies are %v", got)
	}
	for name, stays := range map[string]bool{"switchback-notes": true, ".backup-at-work": true, ".backup-cut-short": false} {
		if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != stays {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Restore(t.Context(), filepath.Join(dir, first[1]), filepath.Join(memoryDir(t), "state")); err != nil {
		t.Error(err)
	}
	begin := time.Now()
	run(func() bool { return time.Since(begin) > 1500*time.Millisecond }) // the next is due in an hour
	second, err := listBackups(dir)
	if d := cmp.Diff(first, second); err != nil || d != "" {
		t.Errorf("after a restart: %v\n%s", err, d)
	}
}

func TestBackupConfig(t *testing.T) {
	for name, c := range map[string]struct {
		config   BackupConfig
		embedded bool
		want     switchback.Code
	}{
		"none":              {BackupConfig{}, true, ""},
		"none, shared":      {BackupConfig{}, false, ""},
		"defaults":          {BackupConfig{Dir: filepath.Join(t.TempDir(), "a", "b")}, true, ""},
		"shared":            {BackupConfig{Dir: t.TempDir()}, false, switchback.CodeUnsupported},
		"negative":          {BackupConfig{Dir: t.TempDir(), Every: -1}, true, switchback.CodeInvalid},
		"copies of nothing": {BackupConfig{Objects: &objectstore.Config{}}, true, switchback.CodeInvalid},
		"bad object store":  {BackupConfig{Dir: t.TempDir(), Objects: &objectstore.Config{}}, true, switchback.CodeInvalid},
	} {
		if err := c.config.check(c.embedded); switchback.CodeOf(err) != c.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// s3 starts an S3 server with a bucket named server, and returns a place in it.
func s3(t *testing.T) (objectstore.Config, *minio.Client) {
	t.Helper()
	out, err := exec.Command("../scripts/install-versitygw.sh").Output()
	if err != nil {
		t.Fatalf("the S3 server cannot be built: %v", err)
	}
	dir, address := t.TempDir(), freeAddress(t)
	if err := os.WriteFile(filepath.Join(dir, "credentials"), []byte(`{"access_key": "test", "secret_key": "secretsecret"}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "data", "server"), 0o700); err != nil { // a folder is a bucket
		t.Fatal(err)
	}
	cmd := exec.Command(strings.TrimSpace(string(out)), "--access", "test", "--secret", "secretsecret", "--port", address, "posix", filepath.Join(dir, "data"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	for range 400 {
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close()
			break
		}
		time.Sleep(25 * time.Millisecond)
	}
	client, err := minio.New(address, &minio.Options{Creds: credentials.NewStaticV4("test", "secretsecret", "")})
	if err != nil {
		t.Fatal(err)
	}
	return objectstore.Config{Endpoint: "http://" + address, Bucket: "server", Prefix: "prod", Region: "us-east-1", CredentialsFile: filepath.Join(dir, "credentials")}, client
}

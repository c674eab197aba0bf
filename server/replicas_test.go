package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/store/postgrestest"
	"github.com/switchback-dr/switchback/transport"
)

const childEnv = "SWITCHBACK_SERVER_TEST_CHILD"

// TestMain is also the server that the tests of replicas kill: its
// configuration is in the environment.
func TestMain(m *testing.M) {
	spec := os.Getenv(childEnv)
	if spec == "" {
		os.Exit(m.Run())
	}
	err := func() error {
		var cfg Config
		if err := json.Unmarshal([]byte(spec), &cfg); err != nil {
			return err
		}
		cfg.Logger = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
		s, err := Open(context.Background(), cfg)
		if err != nil {
			return err
		}
		return s.Run(context.Background())
	}()
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// replica is a server in a process of its own.
type replica struct {
	cmd   *exec.Cmd
	dir   string
	owner string // as its leases say
}

// startReplica starts another server on the fleet's database and waits until it answers.
func (f *fleet) startReplica() *replica {
	f.t.Helper()
	r := &replica{dir: memoryDir(f.t)}
	address := freeAddress(f.t)
	spec, err := json.Marshal(Config{StateDir: r.dir, Store: f.store, KeyFile: filepath.Join(f.dir, keyFile), Listen: []string{address}})
	if err != nil {
		f.t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(r.dir, "log"))
	if err != nil {
		f.t.Fatal(err)
	}
	defer log.Close()
	r.cmd = exec.Command(os.Args[0])
	r.cmd.Env = append(os.Environ(), childEnv+"="+string(spec))
	r.cmd.Stderr = log
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		r.kill()
		if text, err := os.ReadFile(log.Name()); err == nil && f.t.Failed() {
			f.t.Logf("log of %s:\n%s", r.owner, text)
		}
	})
	for range 300 {
		if c, err := net.Dial("tcp", address); err == nil {
			c.Close()
			if r.owner, err = replicaName(r.dir); err != nil {
				f.t.Fatal(err)
			}
			return r
		}
		time.Sleep(50 * time.Millisecond)
	}
	text, _ := os.ReadFile(log.Name())
	f.t.Fatalf("the server does not answer:\n%s", text)
	return nil
}

func (r *replica) kill() {
	_ = r.cmd.Process.Kill() // it may be gone
	_ = r.cmd.Wait()         // its status says that it was killed
}

func freeAddress(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().String()
}

// takeover is the longest that another server may take to finish what a dead one began.
const takeover = 15 * time.Second

// TestReplicaKilled kills the one of two servers that works on a failover, or
// stops it for a while, in the middle of a step; the other one finishes it.
func TestReplicaKilled(t *testing.T) {
	pg := postgrestest.Start(t)
	t.Run("cells", func(t *testing.T) {
		for _, action := range []string{agentapi.ActionShutdown, agentapi.ActionActivate, agentapi.ActionStart} {
			t.Run(action+" killed", func(t *testing.T) { t.Parallel(); replicaLost(t, pg, action, syscall.SIGKILL) })
		}
		t.Run("final-point stopped", func(t *testing.T) {
			t.Parallel()
			replicaLost(t, pg, agentapi.ActionFinalPoint, syscall.SIGSTOP)
		})
	})
}

func replicaLost(t *testing.T, pg *postgrestest.Server, in string, by syscall.Signal) {
	f := newFleetOn(t, pg.Database())
	f.run(recovery.Protect, api.OperationRequest{})
	f.stop() // from here on only the replicas work
	f.stop = func() {}
	f.took()
	f.keys = map[string][]string{}
	replicas := []*replica{f.startReplica(), f.startReplica()}

	reached, lost := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var mu sync.Mutex
	busy := ""
	f.setHook(func(site switchback.SiteID, action string) error {
		mu.Lock()
		if busy != "" {
			t.Errorf("%s at %s while %s is at work", action, site, busy)
		}
		busy = action
		mu.Unlock()
		if action == in {
			once.Do(func() {
				close(reached)
				<-lost
			})
		}
		mu.Lock()
		busy = ""
		mu.Unlock()
		return nil
	})
	id := f.begin(recovery.Failover, api.OperationRequest{})
	<-reached
	rec, err := f.s.store.Operation(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	var worker *replica
	for _, r := range replicas {
		if r.owner == rec.Lease.Owner {
			worker = r
		}
	}
	if worker == nil {
		t.Fatalf("leased to %q", rec.Lease.Owner)
	}
	begin := time.Now()
	if err := worker.cmd.Process.Signal(by); err != nil {
		t.Fatal(err)
	}
	close(lost)
	rec = f.wait(id)
	took := time.Since(begin)
	t.Logf("finished by the other server after %s", took.Round(10*time.Millisecond))
	if rec.State != operation.StateSucceeded {
		t.Fatalf("failover is %s: %v", rec.State, rec.Error)
	}
	if took > takeover {
		t.Errorf("the other server took %s", took)
	}
	if rec.Lease.Owner == worker.owner || rec.Lease.Epoch < 2 {
		t.Errorf("ended under the lease %+v of the server that was lost", rec.Lease)
	}
	if by == syscall.SIGSTOP { // it comes back, and must see that it is not its work any more
		if err := worker.cmd.Process.Signal(syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		now, err := f.s.store.Operation(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(rec, now); d != "" {
			t.Errorf("the server that was stopped wrote:\n%s", d)
		}
	}
	if where := f.running(); where != "riga" {
		t.Errorf("web runs at %q", where)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for entry, keys := range f.keys {
		for _, k := range keys {
			if k != keys[0] {
				t.Errorf("%s was asked for under two keys: %v", entry, keys)
			}
		}
		if len(keys) > 1 && !strings.Contains(entry, " "+in+"@") {
			t.Errorf("%s was done %d times, though nothing was lost in it", entry, len(keys))
		}
	}
}

// TestDatabaseAway: without its database a server says so, and when it is back goes on by itself,
// with the operation that was under way.
func TestDatabaseAway(t *testing.T) {
	pg := postgrestest.Start(t)
	f := newFleetOn(t, pg.Database())
	f.run(recovery.Protect, api.OperationRequest{})
	f.stop()
	f.stop = func() {}
	if err := f.s.Close(); err != nil {
		t.Fatal(err)
	}
	address := freeAddress(t)
	var err error
	if f.s, err = Open(t.Context(), Config{StateDir: f.dir, Store: f.store, Listen: []string{address}}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- f.s.Run(ctx) }()
	f.stop = func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	admin, err := api.Dial(filepath.Join(f.dir, adminDir))
	if err != nil {
		t.Fatal(err)
	}
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
	pg.Crash()
	close(goOn)
	for range 3 {
		_, err := admin.Sites(t.Context())
		if switchback.CodeOf(err) != switchback.CodeUnavailable || !strings.Contains(err.Error(), "PostgreSQL") {
			t.Errorf("without a database: %v (%s)", err, switchback.CodeOf(err))
		}
	}
	pg.Start()
	if sites, err := admin.Sites(t.Context()); err != nil || len(sites) != 2 {
		t.Errorf("with the database again: %v, %v", sites, err)
	}
	if rec := f.wait(id); rec.State != operation.StateSucceeded {
		t.Errorf("failover is %s: %v", rec.State, rec.Error)
	}
}

// TestSharedIdentity: servers on one database are one installation, and who
// lacks its key is refused with the remedy.
func TestSharedIdentity(t *testing.T) {
	where := postgrestest.Start(t).Database()
	open := func(dir, key string) (*Server, error) {
		return Open(t.Context(), Config{StateDir: dir, Store: where, KeyFile: key, Listen: []string{"127.0.0.1:0"}})
	}
	one := t.TempDir()
	a, err := open(one, "")
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if _, err := open(t.TempDir(), ""); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), keyFile) {
		t.Errorf("without the key: %v", err)
	}
	stranger := t.TempDir()
	c, err := Open(t.Context(), Config{StateDir: stranger, Store: postgrestest.Start(t).Database(), Listen: []string{"127.0.0.1:0"}})
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
	if _, err := open(stranger, ""); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "another key file") {
		t.Errorf("with another key: %v", err)
	}
	b, err := open(t.TempDir(), filepath.Join(one, keyFile))
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if a.ca.Fingerprint() != b.ca.Fingerprint() || a.creds.Identity() != b.creds.Identity() {
		t.Errorf("%s and %s are not one installation", a.creds.Identity(), b.creds.Identity())
	}
	raw, err := a.store.Setting(t.Context(), settingCA)
	if err != nil || strings.Contains(raw, "PRIVATE") {
		t.Errorf("the CA in the database is %q, %v", raw, err)
	}
	if _, err := open(one, ""); switchback.CodeOf(err) != switchback.CodeConflict {
		t.Errorf("two servers on one state directory: %v", err)
	}
}

// TestAnnounced: agents and clients learn of every server that was named, and
// a client talks to one that answers.
func TestAnnounced(t *testing.T) {
	answering, silent := freeAddress(t), freeAddress(t)
	s, err := Open(t.Context(), Config{StateDir: t.TempDir(), Listen: []string{answering}, Addresses: []string{silent, answering, silent}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	defer func() { cancel(); <-done }()
	for range 100 {
		if c, err := net.Dial("tcp", answering); err == nil {
			c.Close()
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	admin, err := api.Dial(filepath.Join(s.cfg.StateDir, adminDir))
	if err != nil {
		t.Fatal(err)
	}
	if err := admin.CreateSite(t.Context(), "berlin"); err != nil {
		t.Error(err)
	}
	creds, err := s.ca.Issue(transport.Identity{Installation: s.ca.Installation(), Role: transport.RoleAgent, Site: "berlin", ID: "a-1"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.store.SaveAgent(t.Context(), store.Agent{ID: "a-1", Site: "berlin", JoinedAt: time.Now()}); err != nil {
		t.Fatal(err)
	}
	client := transport.NewHTTPClient(transport.ClientConfig{Credentials: creds, Want: transport.AnyServer})
	answer, err := transport.Call[agentapi.ReportAnswer](t.Context(), client, http.MethodPost, "https://"+answering+"/v1/agents/report", agentapi.AgentStatus{})
	if d := cmp.Diff([]string{silent, answering, silent}, answer.Servers); err != nil || d != "" {
		t.Errorf("agents are told %v\n%s", err, d)
	}
}

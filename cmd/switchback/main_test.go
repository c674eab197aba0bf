package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agent"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/replicator"
	"github.com/switchback-dr/switchback/server"
	"github.com/switchback-dr/switchback/store/postgrestest"
	"github.com/switchback-dr/switchback/transport"
)

// TestScripts runs the command line as scripts in testdata. Beside the usual
// commands they have
//
//	switchback STATUS ARGS...   run the program; it must end with that status
//	start-server [URL]          start a server, on that database, and point the program at it
//	stop-server                 end it
//	rename OLD NEW              of a file or folder
//	postgres                    start PostgreSQL; $POSTGRES is an empty database
//	start-agent SITE [VM...]    join a scripted agent of the site, whose hypervisor runs these VMs
//	admit-by-hand SITE DIR      an agent joins that cannot reach the server; its state is in DIR
//	stop-agent SITE             it neither answers nor reports any more
//	agent-fails SITE ACTION     its next such action fails
//	idle                        wait until no operation is under way
//	json PATH VALUE             the last output is JSON, and has the value at the dotted path
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			w := &world{env: env, agents: map[string]*scriptedAgent{}}
			env.Values["world"] = w
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("SWITCHBACK_CONFIG", filepath.Join(env.WorkDir, "server", "admin"))
			env.Defer(w.close)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"switchback": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) == 0 {
					ts.Fatalf("usage: switchback STATUS ARGS...")
				}
				w := ts.Value("world").(*world)
				status := w.run(ts.Stdout(), ts.Stderr(), args[1:]...)
				if fmt.Sprint(status) != args[0] {
					ts.Fatalf("exit status %d, want %s\n%s", status, args[0], &w.stderr)
				}
			},
			"start-server": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(ts.Value("world").(*world).serve(strings.Join(args, "")))
			},
			"stop-server": func(ts *testscript.TestScript, _ bool, _ []string) {
				w := ts.Value("world").(*world)
				w.stopServer()
				w.stopServer = nil
			},
			"rename": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(os.Rename(ts.MkAbs(args[0]), ts.MkAbs(args[1])))
			},
			"postgres": func(ts *testscript.TestScript, _ bool, _ []string) {
				ts.Setenv("POSTGRES", postgrestest.Start(t).Database())
			},
			"start-agent": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(ts.Value("world").(*world).join(args[0], args[1:]))
			},
			"admit-by-hand": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(ts.Value("world").(*world).admitByHand(args[0], args[1]))
			},
			"stop-agent": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Value("world").(*world).agents[args[0]].stop()
			},
			"agent-fails": func(ts *testscript.TestScript, _ bool, args []string) {
				a := ts.Value("world").(*world).agents[args[0]]
				a.mu.Lock()
				defer a.mu.Unlock()
				a.fail = args[1]
			},
			"idle": func(ts *testscript.TestScript, _ bool, _ []string) {
				w := ts.Value("world").(*world)
				admin, err := api.Dial(w.env.Getenv("SWITCHBACK_CONFIG"))
				ts.Check(err)
				for range 500 {
					list, err := admin.Operations(context.Background(), "", true, 1)
					ts.Check(err)
					if len(list) == 0 {
						return
					}
					time.Sleep(10 * time.Millisecond)
				}
				ts.Fatalf("operations do not end")
			},
			"json": func(ts *testscript.TestScript, _ bool, args []string) {
				var v any
				w := ts.Value("world").(*world)
				if err := json.Unmarshal(w.stdout.Bytes(), &v); err != nil {
					ts.Fatalf("not JSON: %v\n%s", err, &w.stdout)
				}
				for _, key := range strings.Split(args[0], ".") {
					switch x := v.(type) {
					case map[string]any:
						v = x[key]
					case []any:
						var i int
						if _, err := fmt.Sscan(key, &i); err != nil || i >= len(x) {
							ts.Fatalf("no %s in a list of %d", key, len(x))
						}
						v = x[i]
					default:
						v = nil
					}
				}
				if got := fmt.Sprint(v); got != args[1] {
					ts.Fatalf("%s is %s, want %s\n%s", args[0], got, args[1], &w.stdout)
				}
			},
		},
	})
}

// world is one script's server and agents.
type world struct {
	env            *testscript.Env
	stdout, stderr bytes.Buffer
	stopServer     func()
	agents         map[string]*scriptedAgent
}

func (w *world) close() {
	for _, a := range w.agents {
		a.stop()
	}
	if w.stopServer != nil {
		w.stopServer()
	}
}

// run runs the program as the shell would, with the script's configuration.
func (w *world) run(stdout, stderr io.Writer, args ...string) int {
	w.stdout.Reset()
	w.stderr.Reset()
	if len(args) > 0 && args[0] != "server" {
		args = append([]string{"--config", w.env.Getenv("SWITCHBACK_CONFIG")}, args...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return Main{Args: args, Stdout: io.MultiWriter(stdout, &w.stdout), Stderr: io.MultiWriter(stderr, &w.stderr)}.Run(ctx)
}

func freeAddress() (string, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return ln.Addr().String(), ln.Close()
}

func (w *world) serve(where string) error {
	address, err := freeAddress()
	if err != nil {
		return err
	}
	s, err := server.Open(context.Background(), server.Config{StateDir: filepath.Join(w.env.WorkDir, "server"), Store: where, Listen: []string{address}, Version: "test"})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	w.stopServer = func() {
		cancel()
		<-done
		s.Close()
	}
	for range 200 {
		var c net.Conn
		if c, err = net.Dial("tcp", address); err == nil {
			return c.Close()
		}
		time.Sleep(5 * time.Millisecond)
	}
	return err
}

// scriptedAgent joins as an agent does, reports, and says yes to everything.
type scriptedAgent struct {
	site string
	id   agent.Identity
	stop func()

	mu      sync.Mutex
	domains []hypervisor.Domain
	points  []switchback.Point
	fail    string
	seen    map[switchback.ProtectionID]bool
}

func (w *world) join(site string, vms []string) error {
	ctx := context.Background()
	admin, err := api.Dial(w.env.Getenv("SWITCHBACK_CONFIG"))
	if err != nil {
		return err
	}
	if err := admin.CreateSite(ctx, switchback.SiteID(site)); err != nil && switchback.CodeOf(err) != switchback.CodeConflict {
		return err
	}
	token, err := admin.MintToken(ctx, switchback.SiteID(site), time.Hour)
	if err != nil {
		return err
	}
	address, err := freeAddress()
	if err != nil {
		return err
	}
	dir := filepath.Join(w.env.WorkDir, "agent-"+site)
	if status := w.run(io.Discard, io.Discard, "agent", "join", "--state", dir, "--address", address, token.Token); status != 0 {
		return fmt.Errorf("agent join: exit status %d: %s", status, &w.stderr)
	}
	a := &scriptedAgent{site: site, seen: map[switchback.ProtectionID]bool{}}
	if a.id, err = agent.LoadIdentity(dir); err != nil {
		return err
	}
	for i, name := range vms {
		a.domains = append(a.domains, hypervisor.Domain{Name: name, UUID: switchback.VMUUID(fmt.Sprintf("00000000-0000-0000-0000-00000000000%d", i)),
			State: hypervisor.StateRunning, Persistent: true,
			Disks: []hypervisor.Disk{{Disk: switchback.Disk{Name: "vda", SizeBytes: 4 << 30, AllocatedBytes: 1 << 30}, Device: "disk"}}})
	}
	ln, err := transport.Listen(ctx, address)
	if err != nil {
		return err
	}
	srv := transport.NewHTTPServer(a.id.Credentials, a.handler(), slog.New(slog.DiscardHandler))
	go srv.ServeTLS(ln, "", "")
	reporting, cancel := context.WithCancel(ctx)
	var reporter sync.WaitGroup
	first := make(chan error, 1)
	reporter.Go(func() {
		client := transport.NewHTTPClient(transport.ClientConfig{Credentials: a.id.Credentials})
		for reporting.Err() == nil {
			_, err := transport.Call[struct{}](reporting, client, http.MethodPost, "https://"+a.id.Server+"/v1/agents/report", a.status())
			select {
			case first <- err:
			default:
			}
			select {
			case <-reporting.Done():
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
	a.stop = sync.OnceFunc(func() { cancel(); srv.Close(); reporter.Wait() })
	w.agents[site] = a
	return <-first
}

func (a *scriptedAgent) status() agentapi.AgentStatus {
	a.mu.Lock()
	defer a.mu.Unlock()
	st := agentapi.AgentStatus{Version: "test", Address: a.id.Address, Time: time.Now(), Storage: agentapi.Storage{Path: "storage", FreeBytes: 5 << 30, SizeBytes: 9 << 30}}
	for id := range a.seen {
		v := agentapi.VMStatus{Protection: id, Power: "running"}
		if n := len(a.points); n > 0 {
			v.Replica = &agentapi.ReplicaStatus{Points: n, Newest: &a.points[n-1], JournalBytes: 2 << 20, FreeBytes: 5 << 30}
		}
		st.VMs = append(st.VMs, v)
	}
	return st
}

func (a *scriptedAgent) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/inventory", func(w http.ResponseWriter, _ *http.Request) {
		transport.WriteJSON(w, http.StatusOK, agentapi.Inventory{Domains: a.domains})
	})
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		transport.WriteJSON(w, http.StatusOK, a.status())
	})
	mux.HandleFunc("GET /v1/points/{protection}", func(w http.ResponseWriter, _ *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		transport.WriteJSON(w, http.StatusOK, a.points)
	})
	mux.HandleFunc("POST /v1/tasks", func(w http.ResponseWriter, r *http.Request) {
		var t agentapi.Task
		if err := transport.ReadJSON(r, &t); err != nil {
			transport.WriteError(w, err)
			return
		}
		result, err := a.do(t)
		st := agentapi.TaskState{Key: t.Key, Done: true}
		if err != nil {
			st.Error = err.(*switchback.Error)
		} else {
			st.Result, _ = json.Marshal(result) // plain structs
		}
		transport.WriteJSON(w, http.StatusOK, st)
	})
	return transport.RequireRole(mux, transport.RoleServer)
}

func (a *scriptedAgent) do(t agentapi.Task) (any, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.fail == t.Action {
		a.fail = ""
		return nil, switchback.Errorf(switchback.CodeConflict, "the script's %s fails", t.Action)
	}
	if !strings.Contains(t.Key, "preflight") {
		a.seen[t.Protection] = true
	}
	point := switchback.Point{Protection: t.Protection, Sequence: switchback.Sequence(len(a.points) + 1), Epoch: t.Epoch, Kind: switchback.CrashConsistent,
		Time: time.Now(), ChangedBytes: 3 << 20, StoredBytes: 1 << 20}
	report := replicator.CycleReport{Point: point, Mode: replicator.ModeSeed, Reason: "the target has no complete copy yet", SentBytes: 1 << 20, ChangedBytes: 3 << 20}
	switch t.Action {
	case agentapi.ActionPrepareReplica:
		var p agentapi.PrepareReplicaParams
		if err := json.Unmarshal(t.Params, &p); err != nil {
			return nil, switchback.Errorf(switchback.CodeInvalid, "%w", err)
		}
		if !p.DryRun {
			a.points = []switchback.Point{point} // as the first copy will leave it
		}
		return agentapi.PrepareReplicaResult{Trusted: true, FreeBytes: 1 << 40}, nil
	case agentapi.ActionDescribe:
		if len(a.domains) == 0 {
			return agentapi.DescribeResult{}, nil
		}
		return agentapi.DescribeResult{Domain: a.domains[0], Definition: "<domain/>"}, nil
	case agentapi.ActionAwaitPoint:
		return agentapi.AwaitPointResult{Point: point, Report: report}, nil
	case agentapi.ActionTakePoint, agentapi.ActionFinalPoint:
		return agentapi.PointResult{Report: report}, nil
	case agentapi.ActionShutdown:
		return agentapi.ShutdownResult{OffAt: time.Now(), WasRunning: true}, nil
	case agentapi.ActionStart:
		return agentapi.StartResult{RunningAt: time.Now().Add(time.Second)}, nil
	case agentapi.ActionCheck:
		return agentapi.CheckResult{Running: true, GuestAgent: "silent"}, nil
	case agentapi.ActionRelease:
		return agentapi.ReleaseResult{Left: []string{"everything at " + a.site}}, nil
	}
	return nil, nil
}

func TestExitStatus(t *testing.T) {
	for code, want := range map[switchback.Code]int{
		switchback.CodeInvalid: 2, switchback.CodeNotFound: 3, switchback.CodeRefused: 4, switchback.CodeConflict: 4,
		switchback.CodeStaleEpoch: 4, switchback.CodeUnsupported: 4, switchback.CodeUnavailable: 5, switchback.CodeTimeout: 5,
		switchback.CodeUnauthorized: 6, switchback.CodeCancelled: 7, switchback.CodeInternal: 1, switchback.CodeCorrupt: 1, switchback.CodeNoSpace: 1,
	} {
		if got := exitStatus(fmt.Errorf("wrapped: %w", switchback.Errorf(code, "x"))); got != want {
			t.Errorf("exit status of %s is %d, want %d", code, got, want)
		}
	}
	if got := exitStatus(errors.New("x")); got != 1 {
		t.Errorf("exit status of any error is %d", got)
	}
}

func TestPrintError(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{errors.New("x"), "error: x\n"},
		{switchback.Errorf(switchback.CodeRefused, "not now"), "error: not now\n"},
		{switchback.Errorf(switchback.CodeRefused, "not now").WithHint("wait"), "error: not now\nremedy: wait\n"},
		{&switchback.Error{Op: "riga", Message: "full", Hint: "make room"}, "error: riga: full\nremedy: make room\n"},
	} {
		var b bytes.Buffer
		printError(&b, c.err)
		if d := cmp.Diff(c.want, b.String()); d != "" {
			t.Error(d)
		}
	}
}

func TestFigures(t *testing.T) {
	for d, want := range map[time.Duration]string{0: "0 ms", 999 * time.Millisecond: "999 ms", 1500 * time.Millisecond: "1.5 s", 90 * time.Second: "1m30s", time.Hour + 400*time.Millisecond: "1h0m0s"} {
		if got := seconds(d); got != want {
			t.Errorf("seconds(%d) = %q, want %q", d, got, want)
		}
	}
	for n, want := range map[int64]string{-1: "0 B", 0: "0 B", 1 << 20: "1.0 MiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("bytesText(%d) = %q, want %q", n, got, want)
		}
	}
	if got := ago(time.Time{}); got != "never" {
		t.Errorf("a time that never was is %q", got)
	}
	for percent, want := range map[float64]string{0: strings.Repeat("·", 20), 50: strings.Repeat("█", 10) + strings.Repeat("·", 10), 100: strings.Repeat("█", 20), 120: strings.Repeat("█", 20)} {
		if got := bar(&operation.Progress{Percent: percent, TotalBytes: 1}); got != "["+want+"]" {
			t.Errorf("bar of %v %%: %s", percent, got)
		}
	}
	if got := progressText(operation.Progress{Message: "opening the view"}); got != "opening the view" {
		t.Errorf("progress without bytes: %q", got)
	}
	if got := progressText(operation.Progress{Percent: 25, TotalBytes: 4 << 30, RateBytesPerSecond: 1 << 20, ETA: 2 * time.Second}); got != "25 % of 4.0 GiB, 1.0 MiB/s, ETA 2.0 s" {
		t.Errorf("progress: %q", got)
	}
}

func TestPrintPlan(t *testing.T) {
	var b bytes.Buffer
	printPlan(&b, api.Plan{Kind: "failover", VM: "web", Steps: []api.PlanStep{{Title: "hold replication"}, {Title: "shut the guest down"}},
		Changes: []string{"this"}, Keeps: []string{"that"}, Bytes: 3 << 20, Basis: "the last cycle", Time: 15 * time.Second, Outage: 10 * time.Second})
	want := `failover web would do this (nothing has been done):
   1. hold replication
   2. shut the guest down
  changes: this
  keeps:   that
  network: about 3.0 MiB (the last cycle)
  time:    about 15.0 s, outage about 10.0 s
`
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Error(d)
	}
}

func TestDefaultConfigDir(t *testing.T) {
	t.Setenv("SWITCHBACK_CONFIG", "here")
	if got := defaultConfigDir(); got != "here" {
		t.Errorf("configuration in %q", got)
	}
	os.Unsetenv("SWITCHBACK_CONFIG")
	t.Setenv("XDG_CONFIG_HOME", "/somewhere")
	if got := defaultConfigDir(); got != "/somewhere/switchback" {
		t.Errorf("configuration in %q", got)
	}
}

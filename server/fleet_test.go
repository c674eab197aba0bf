package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/replicator"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// fleet is a server with two sites, berlin and riga, whose agents are scripted:
// real HTTP over mutual TLS, no hypervisor. VM web runs at berlin.
type fleet struct {
	t      *testing.T
	dir    string
	store  string // as Config.Store
	s      *Server
	agents map[switchback.SiteID]*fakeAgent
	stop   func()

	mu sync.Mutex
	// did lists what the agents were asked for: "site action@epoch".
	did     []string
	keys    map[string][]string // by entry of did
	deleted []string
	points  []switchback.Point
	checks  []switchback.CheckResult // how checks of guests end
	proofs  []agentapi.DrillMarkParams
	marks   map[switchback.Sequence]switchback.Mark
	// roots of the hash trees that the sites find; "same" where none is named.
	roots map[switchback.SiteID]string
	// hook is called before an action has its effect; an error is its answer.
	hook func(site switchback.SiteID, action string) error
}

// fakeAgent does for web what an agent does, as far as the server can tell.
type fakeAgent struct {
	f     *fleet
	site  switchback.SiteID
	id    switchback.AgentID
	addr  string
	state hypervisor.State // of web here; "" = not defined
	epoch switchback.Epoch
	// run is the point web runs from here; snapshots are what runs before have written.
	run       switchback.Sequence
	snapshots []agentapi.Snapshot
	// override: web was let start here by hand.
	override *agentapi.Override
	// holds is what it says that it holds, as itself where no agent is named.
	holds agentapi.Holdings
}

const webUUID = "11111111-2222-3333-4444-555555555555"

// memoryDir is a directory in memory where there is one: the store's fsyncs only cost time here.
func memoryDir(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "server-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newFleet(t *testing.T) *fleet { t.Helper(); return newFleetOn(t, "") }

func newFleetOn(t *testing.T, where string) *fleet {
	t.Helper()
	f := &fleet{t: t, dir: memoryDir(t), store: where, agents: map[switchback.SiteID]*fakeAgent{}, keys: map[string][]string{},
		hook: func(switchback.SiteID, string) error { return nil }}
	f.open()
	t.Cleanup(func() { f.close() })
	for _, site := range []switchback.SiteID{"berlin", "riga"} {
		f.join(site)
	}
	f.agents["berlin"].state = hypervisor.StateRunning
	return f
}

// open starts the server, with the short waits of a test.
func (f *fleet) open() {
	f.t.Helper()
	var err error
	if f.s, err = Open(context.Background(), Config{StateDir: f.dir, Store: f.store, Listen: []string{"127.0.0.1:0"}}); err != nil {
		f.t.Fatal(err)
	}
	f.s.runner, err = operation.NewRunner(operation.Config{Store: f.s.store, Definitions: f.s.definitions(), Owner: "server-test",
		RetryMin: time.Millisecond, RetryMax: 10 * time.Millisecond, Now: f.s.store.Now, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	runner := f.s.runner
	go func() { done <- runner.Run(ctx) }()
	f.stop = func() {
		cancel()
		if err := <-done; err != nil {
			f.t.Error(err)
		}
	}
}

// close stops the server, unless it is.
func (f *fleet) close() {
	if f.s == nil {
		return
	}
	f.stop()
	if err := f.s.Close(); err != nil {
		f.t.Error(err)
	}
	f.s = nil
}

func (f *fleet) join(site switchback.SiteID) {
	f.t.Helper()
	ctx := context.Background()
	a := &fakeAgent{f: f, site: site, id: switchback.AgentID("a-" + site)}
	creds, err := f.s.ca.Issue(transport.Identity{Installation: f.s.ca.Installation(), Role: transport.RoleAgent, Site: site, ID: string(a.id)}, time.Hour)
	if err != nil {
		f.t.Fatal(err)
	}
	ln, err := transport.Listen(ctx, "127.0.0.1:0")
	if err != nil {
		f.t.Fatal(err)
	}
	a.addr = ln.Addr().String()
	srv := transport.NewHTTPServer(creds, a.handler(), slog.New(slog.DiscardHandler))
	go srv.ServeTLS(ln, "", "")
	f.t.Cleanup(func() { srv.Close() })
	now := time.Now()
	if err := f.s.store.CreateSite(ctx, store.Site{ID: site, Name: string(site), CreatedAt: now}); err != nil {
		f.t.Fatal(err)
	}
	if err := f.s.store.SaveAgent(ctx, store.Agent{ID: a.id, Site: site, Address: a.addr, JoinedAt: now}); err != nil {
		f.t.Fatal(err)
	}
	f.agents[site] = a
}

func (a *fakeAgent) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/inventory", func(w http.ResponseWriter, _ *http.Request) {
		a.f.mu.Lock()
		defer a.f.mu.Unlock()
		inv := agentapi.Inventory{}
		if a.state != "" {
			inv.Domains = append(inv.Domains, a.domain())
		}
		transport.WriteJSON(w, http.StatusOK, inv)
	})
	mux.HandleFunc("GET /v1/points/{protection}", func(w http.ResponseWriter, _ *http.Request) {
		a.f.mu.Lock()
		defer a.f.mu.Unlock()
		list := []switchback.MarkedPoint{}
		for _, p := range a.f.points {
			list = append(list, switchback.MarkedPoint{Point: p, Mark: a.f.marks[p.Sequence]})
		}
		transport.WriteJSON(w, http.StatusOK, list)
	})
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		list, err := a.f.s.store.Protections(context.Background())
		if err != nil {
			transport.WriteError(w, err)
			return
		}
		a.f.mu.Lock()
		defer a.f.mu.Unlock()
		transport.WriteJSON(w, http.StatusOK, a.status(list))
	})
	mux.HandleFunc("GET /v1/holdings", func(w http.ResponseWriter, _ *http.Request) {
		a.f.mu.Lock()
		defer a.f.mu.Unlock()
		h := a.holds
		if h.Agent.Agent == "" {
			h.Agent = recovery.Keeper{Agent: a.id, Site: a.site, Address: a.addr}
		}
		transport.WriteJSON(w, http.StatusOK, h)
	})
	mux.HandleFunc("POST /v1/tasks", func(w http.ResponseWriter, r *http.Request) {
		var t agentapi.Task
		if err := transport.ReadJSON(r, &t); err != nil {
			transport.WriteError(w, err)
			return
		}
		st := agentapi.TaskState{Key: t.Key, Done: true}
		result, err := a.do(t)
		if err != nil {
			st.Error = &switchback.Error{Code: switchback.CodeOf(err), Message: err.Error()}
		} else if st.Result, err = json.Marshal(result); err != nil {
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, st)
	})
	mux.HandleFunc("DELETE /v1/tasks/{key...}", func(w http.ResponseWriter, r *http.Request) {
		a.f.mu.Lock()
		defer a.f.mu.Unlock()
		a.f.deleted = append(a.f.deleted, r.PathValue("key"))
		w.WriteHeader(http.StatusNoContent)
	})
	return transport.RequireRole(mux, transport.RoleServer)
}

func webDisks() []switchback.Disk {
	return []switchback.Disk{{Name: "vda", SizeBytes: 4 << 30, AllocatedBytes: 1 << 30, Format: "qcow2"}}
}

func (a *fakeAgent) domain() hypervisor.Domain {
	d := hypervisor.Domain{Name: "web", UUID: webUUID, State: a.state, Persistent: true}
	for _, x := range webDisks() {
		d.Disks = append(d.Disks, hypervisor.Disk{Disk: x, Device: "disk"})
	}
	return d
}

// note adds to what was done.
func (f *fleet) note(site switchback.SiteID, t agentapi.Task, more string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	entry := fmt.Sprintf("%s %s@%d%s", site, t.Action, t.Epoch, more)
	f.did = append(f.did, entry)
	f.keys[entry] = append(f.keys[entry], t.Key)
}

func (a *fakeAgent) do(t agentapi.Task) (any, error) {
	f := a.f
	params := func(into any) {
		if err := json.Unmarshal(t.Params, into); err != nil {
			f.t.Errorf("%s: parameters: %v", t.Action, err)
		}
	}
	var prepare agentapi.PrepareReplicaParams
	dry := ""
	switch t.Action {
	case agentapi.ActionPrepareReplica:
		if params(&prepare); prepare.DryRun {
			dry = " dry"
		}
	case agentapi.ActionDrillPreflight:
		dry = " dry"
	case agentapi.ActionRetire:
		var p agentapi.RetireParams
		if params(&p); p.Undefine {
			dry = " undefine"
		}
	case agentapi.ActionRelease:
		var p agentapi.ReleaseParams
		if params(&p); p.RemoveData {
			dry = " remove"
		}
	case agentapi.ActionStart:
		var p agentapi.StartParams
		params(&p)
		dry = fmt.Sprintf(" point %d", p.Sequence)
		if p.Definition != "<web/>" {
			f.t.Errorf("started from the definition %q", p.Definition)
		}
	case agentapi.ActionChangePoint:
		var p agentapi.ChangePointParams
		params(&p)
		dry = fmt.Sprintf(" point %d", p.Sequence)
		if p.Snapshot != "" {
			dry += " snapshot " + p.Snapshot
		}
		if p.DryRun {
			dry += " dry"
		}
	case agentapi.ActionDropSnapshot:
		var p agentapi.DropSnapshotParams
		params(&p)
		dry = " " + p.Name
	case agentapi.ActionExportSnapshot:
		var p agentapi.ExportParams
		params(&p)
		dry = " " + p.Snapshot
	case agentapi.ActionCheckSnapshot:
		var p agentapi.CheckReplicaParams
		params(&p)
		dry = " " + p.Snapshot
	case agentapi.ActionKeepPoints:
		var p agentapi.KeepPointsParams
		if params(&p); p.DryRun {
			dry = " dry"
		}
	case agentapi.ActionSettleSnapshots:
		var p agentapi.SettleSnapshotsParams
		params(&p)
		dry = fmt.Sprintf(" keep=%v", p.Keep)
	case agentapi.ActionReinstate:
		var p agentapi.ReinstateParams
		if params(&p); !p.Start {
			dry = " off"
		}
	}
	hashing := t.Action == agentapi.ActionHashRest || t.Action == agentapi.ActionHashPoint // both sides at once
	if t.Action != agentapi.ActionDescribe && !hashing {
		f.note(a.site, t, dry)
	}
	if err := f.hook(a.site, t.Action); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if t.Action == agentapi.ActionCheckReplica {
		return agentapi.ReplicaCheck{Points: len(f.points)}, nil
	}
	if t.Epoch < a.epoch && t.Action != agentapi.ActionDrillClean {
		return nil, switchback.Errorf(switchback.CodeStaleEpoch, "epoch %d is over, %s knows %d", t.Epoch, a.site, a.epoch)
	}
	point := func() switchback.Point {
		p := switchback.Point{Protection: t.Protection, Sequence: switchback.Sequence(len(f.points) + 1), Epoch: t.Epoch, Time: time.Now(), ChangedBytes: 1 << 20}
		f.points = append(f.points, p)
		return p
	}
	if hashing {
		root := f.roots[a.site]
		if root == "" {
			root = "same"
		}
		return agentapi.HashResult{Disks: []agentapi.DiskHash{{Name: "vda", SizeBytes: 4 << 30, Root: root, Leaves: []string{"", root, ""}}}}, nil
	}
	switch t.Action {
	case agentapi.ActionDescribe:
		if a.state == "" {
			return agentapi.DescribeResult{}, nil
		}
		return agentapi.DescribeResult{Domain: a.domain(), Definition: "<web/>"}, nil
	case agentapi.ActionPrepareReplica:
		if dry == "" {
			a.epoch, f.points = t.Epoch, nil
		}
		return agentapi.PrepareReplicaResult{Dir: "replica", Trusted: true, FreeBytes: 1 << 40}, nil
	case agentapi.ActionAwaitPoint:
		if len(f.points) == 0 {
			point()
		}
		return agentapi.AwaitPointResult{Point: f.points[len(f.points)-1], Report: replicator.CycleReport{Mode: replicator.ModeSeed, SentBytes: 700, ChangedBytes: 900}}, nil
	case agentapi.ActionTakePoint, agentapi.ActionFinalPoint:
		if final := t.Action == agentapi.ActionFinalPoint; final != (a.state == hypervisor.StateOff) {
			return nil, switchback.Errorf(switchback.CodeConflict, "%s while web is %s", t.Action, a.state)
		}
		return agentapi.PointResult{Report: replicator.CycleReport{Point: point(), SentBytes: 70, ChangedBytes: 90}}, nil
	case agentapi.ActionShutdown:
		r := agentapi.ShutdownResult{OffAt: time.Now(), WasRunning: a.state != hypervisor.StateOff}
		a.state = hypervisor.StateOff
		return r, nil
	case agentapi.ActionFence, agentapi.ActionActivate:
		a.epoch = t.Epoch
	case agentapi.ActionStart:
		f.oneActive(a)
		a.state = hypervisor.StateRunning
		var p agentapi.StartParams
		params(&p)
		a.run = p.Sequence
		return agentapi.StartResult{RunningAt: time.Now()}, nil
	case agentapi.ActionChangePoint:
		var p agentapi.ChangePointParams
		params(&p)
		if p.DryRun {
			return agentapi.ChangePointResult{}, nil
		}
		kept := fmt.Sprintf("epoch-%d-from-point-%d", a.epoch, a.run)
		if t.Epoch > a.epoch {
			for i := range a.snapshots {
				a.snapshots[i].InUse = a.snapshots[i].Name == p.Snapshot
			}
			a.snapshots = append(a.snapshots, agentapi.Snapshot{Name: kept, Point: a.run, Epoch: a.epoch, SizeBytes: 1 << 20, WholeBytes: 5 << 20})
		}
		a.epoch, a.run, a.state = t.Epoch, p.Sequence, hypervisor.StateRunning
		return agentapi.ChangePointResult{OffAt: time.Now().Add(-time.Second), RunningAt: time.Now(), Sequence: p.Sequence, SetAside: kept}, nil
	case agentapi.ActionKeepPoints:
		return agentapi.KeepPointsResult{Bytes: 3 << 20, Points: int(a.run)}, nil
	case agentapi.ActionDropSnapshot:
		var p agentapi.DropSnapshotParams
		params(&p)
		a.dropSnapshot(p.Name)
	case agentapi.ActionSettleSnapshots:
		var p agentapi.SettleSnapshotsParams
		params(&p)
		var r agentapi.SettleSnapshotsResult
		for i := range a.snapshots {
			if a.snapshots[i].SelfContained = true; p.Keep {
				r.Kept, r.Bytes = append(r.Kept, a.snapshots[i].Name), r.Bytes+4<<20
			}
		}
		if !p.Keep {
			a.snapshots = nil
		}
		return r, nil
	case agentapi.ActionCheck:
		return agentapi.CheckResult{Running: true, GuestAgent: "answered"}, nil
	case agentapi.ActionAbandon:
		a.epoch = t.Epoch
		if a.state != "" {
			a.state = hypervisor.StateOff
		}
	case agentapi.ActionReinstate:
		a.epoch = t.Epoch
		if dry == "" {
			f.oneActive(a)
			a.state = hypervisor.StateRunning
		}
	case agentapi.ActionDrillStart:
		return agentapi.DrillStartResult{Name: "web-drill-1", RunningAt: time.Now()}, nil
	case agentapi.ActionGuestChecks:
		return agentapi.GuestChecksResult{Results: f.checks}, nil
	case agentapi.ActionDrillMark:
		var p agentapi.DrillMarkParams
		params(&p)
		f.proofs = append(f.proofs, p)
	case agentapi.ActionDrillScreen:
		return agentapi.DrillScreenResult{PNG: []byte("picture"), Width: 2, Height: 1}, nil
	case agentapi.ActionDrillClean:
		return agentapi.DrillCleanResult{BytesWritten: 4096, Removed: []string{"domain web-drill-1"}}, nil
	case agentapi.ActionFold:
		return agentapi.FoldResult{Bytes: 111}, nil
	case agentapi.ActionCollapse:
		return agentapi.CollapseResult{CopiedBytes: 222, Live: true}, nil
	case agentapi.ActionSettle:
		return agentapi.SettleResult{Disks: webDisks()}, nil
	case agentapi.ActionRetire:
		if dry != "" {
			a.state = ""
		}
		return agentapi.RetireResult{Seeds: webDisks()}, nil
	case agentapi.ActionRelease:
		a.epoch = 0
		return agentapi.ReleaseResult{Left: []string{"left at " + string(a.site)}}, nil
	}
	return nil, nil
}

// oneActive fails the test where web would run twice. f.mu is held.
func (f *fleet) oneActive(starting *fakeAgent) {
	for _, a := range f.agents {
		if a != starting && a.state == hypervisor.StateRunning {
			f.t.Errorf("web is started at %s while it runs at %s", starting.site, a.site)
		}
	}
}

// status is how the agent stands. f.mu is held.
func (a *fakeAgent) status(list []switchback.Protection) agentapi.AgentStatus {
	f := a.f
	st := agentapi.AgentStatus{Address: a.addr, Time: time.Now()}
	for _, p := range list {
		v := agentapi.VMStatus{Protection: p.ID, Snapshots: a.snapshots, Ownership: &agentapi.Ownership{Override: a.override}}
		if n := len(f.points); p.TargetAgent == a.id && n > 0 {
			v.Replica = &agentapi.ReplicaStatus{Points: n, Newest: &f.points[n-1]}
		}
		st.VMs = append(st.VMs, v)
	}
	return st
}

func (a *fakeAgent) dropSnapshot(name string) {
	a.snapshots = slices.DeleteFunc(a.snapshots, func(s agentapi.Snapshot) bool { return s.Name == name })
}

// report makes both agents report as they stand.
func (f *fleet) report() {
	f.t.Helper()
	list, err := f.s.store.Protections(context.Background())
	if err != nil {
		f.t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, a := range f.agents {
		st := a.status(list)
		raw, err := json.Marshal(st)
		if err != nil {
			f.t.Fatal(err)
		}
		if err := f.s.store.TouchAgent(context.Background(), a.id, a.addr, "test", time.Now(), raw); err != nil {
			f.t.Fatal(err)
		}
	}
}

// ask asks for an operation on web.
func (f *fleet) ask(kind recovery.Kind, req api.OperationRequest) (api.OperationAnswer, error) {
	f.t.Helper()
	f.report()
	return f.s.request(context.Background(), "tester", "web", kind, req)
}

// begin asks for an operation that must be begun.
func (f *fleet) begin(kind recovery.Kind, req api.OperationRequest) switchback.OperationID {
	f.t.Helper()
	if kind == recovery.Protect && req.To == "" {
		req.To = "riga"
	}
	a, err := f.ask(kind, req)
	if err != nil {
		f.t.Fatalf("%s: %v", kind, err)
	}
	return a.Operation.ID
}

// wait waits for the end of an operation.
func (f *fleet) wait(id switchback.OperationID) operation.Record {
	f.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		rec, err := f.s.runner.Get(context.Background(), id)
		if err != nil {
			f.t.Fatal(err)
		}
		if rec.State.Finished() {
			return rec
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("operation %s does not end: %+v; done so far: %v", id, rec, f.took())
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// run does an operation that must succeed.
func (f *fleet) run(kind recovery.Kind, req api.OperationRequest) operation.Record {
	f.t.Helper()
	rec := f.wait(f.begin(kind, req))
	if rec.State != operation.StateSucceeded {
		f.t.Fatalf("%s is %s: %v", kind, rec.State, rec.Error)
	}
	return rec
}

// took returns what was done since the last call, one line each.
func (f *fleet) took() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	did := strings.Join(f.did, "\n")
	f.did = nil
	return did
}

// web returns the protection.
func (f *fleet) web() switchback.Protection {
	f.t.Helper()
	p, err := f.s.find(context.Background(), "web")
	if err != nil {
		f.t.Fatal(err)
	}
	return p
}

// running is where web runs; "" = nowhere.
func (f *fleet) running() switchback.SiteID {
	f.mu.Lock()
	defer f.mu.Unlock()
	for site, a := range f.agents {
		if a.state == hypervisor.StateRunning {
			return site
		}
	}
	return ""
}

// setHook replaces the hook while agents may be working.
func (f *fleet) setHook(hook func(site switchback.SiteID, action string) error) { f.hook = hook }

package lab

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/lab/process"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/witness"
)

// The tests of this package hold the product to its word on real guests, under
// faults. They share one lab; each brings its own guests. What is true is read
// from disks, consoles, processes and counters (package witness, virsh,
// qemu-img); the product's answers only say when to look. What breaks the lab for
// all runs by itself; the rest runs at once, after it.

// bed is the shared lab.
type bed struct {
	*Lab
	client *api.Client
	watch  *witness.Watch
	// small is a file system of smallBytes that both sites see under this path.
	small string
	// agentArgs are further arguments of a site's agent.
	agentArgs map[string][]string
}

const smallBytes = 640 << 20

var shared bed

var seed = flag.Uint64("fault.seed", uint64(time.Now().UnixNano()), "seed of the moments at which faults strike")

var logs = flag.Bool("fault.logs", false, "print the lab's logs after a success, too")

// random is the source of moments.
var (
	random   *rand.Rand
	randomMu sync.Mutex
)

func randomUpTo(n int64) int64 {
	randomMu.Lock()
	defer randomMu.Unlock()
	return random.Int64N(n)
}

func TestMain(m *testing.M) {
	flag.Parse()
	random = rand.New(rand.NewPCG(*seed, 1))
	os.Exit(func() int {
		if f := flag.Lookup("test.list"); f.Value.String() != "" {
			return m.Run()
		}
		clearRemains()
		dir, err := os.MkdirTemp("/var/tmp", fmt.Sprintf("switchback-fault-%d-", os.Getpid()))
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer clearBed(dir)
		// Signals and the test's own time limit must not leave a lab behind.
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		go func() {
			s := <-stop
			clearBed(dir)
			fmt.Fprintln(os.Stderr, "ended by", s)
			os.Exit(1)
		}()
		if limit := flag.Lookup("test.timeout").Value.(flag.Getter).Get().(time.Duration); limit > time.Minute {
			time.AfterFunc(limit-20*time.Second, func() { syscall.Kill(os.Getpid(), syscall.SIGTERM) })
		}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		if err := shared.up(ctx, dir); err != nil {
			fmt.Fprintln(os.Stderr, "the lab does not come up:", err)
			return 1
		}
		fmt.Printf("lab up in %s, -fault.seed=%d\n", dir, *seed)
		code := m.Run()
		if code != 0 || *logs {
			keepLogs(dir)
		}
		return code
	}())
}

func (b *bed) up(ctx context.Context, dir string) error {
	exe := filepath.Join(dir, "switchback")
	build := exec.CommandContext(ctx, "go", "build", "-o", exe, "../cmd/switchback")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", err, out)
	}
	b.small = filepath.Join(dir, "small")
	if err := os.Mkdir(b.small, 0o700); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d", smallBytes), "small", b.small).CombinedOutput(); err != nil {
		return fmt.Errorf("mount: %w: %s", err, out)
	}
	if _, err := Image(ctx); err != nil {
		return err
	}
	var err error
	if b.Lab, err = Up(ctx, Config{Dir: filepath.Join(dir, "lab"), Executable: exe}); err != nil {
		return err
	}
	if b.client, err = b.Client(); err != nil {
		return err
	}
	b.watch = &witness.Watch{}
	go b.watch.Run(ctx)
	return nil
}

// clearBed ends and removes everything below dir.
func clearBed(dir string) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	err := Down(ctx, filepath.Join(dir, "lab"))
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		err = nil
	}
	small := filepath.Join(dir, "small")
	for range 50 { // processes of the lab may still be going
		if uerr := syscall.Unmount(small, syscall.MNT_DETACH); uerr == nil || uerr == syscall.EINVAL || uerr == syscall.ENOENT {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err = errors.Join(err, os.RemoveAll(dir)); err != nil {
		fmt.Fprintln(os.Stderr, "left behind:", err)
	}
}

// clearRemains takes down labs whose test was killed.
func clearRemains() {
	dirs, _ := filepath.Glob("/var/tmp/switchback-fault-*")
	for _, d := range dirs {
		var pid int
		if n, _ := fmt.Sscanf(filepath.Base(d), "switchback-fault-%d-", &pid); n == 1 && syscall.Kill(pid, 0) == syscall.ESRCH {
			clearBed(d)
		}
	}
}

func keepLogs(dir string) {
	files, _ := filepath.Glob(filepath.Join(dir, "lab", "log", "*.log"))
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil {
			fmt.Printf("--- %s\n%s\n", filepath.Base(f), lastLines(string(b), 150))
		}
	}
}

// fixture is one guest of one test.
type fixture struct {
	*bed
	Guest
	t *testing.T
}

// addGuest makes a small guest at the primary site and waits until it writes.
// Whatever becomes of it, it and its protection are gone after the test.
func addGuest(t *testing.T, g Guest) *fixture {
	t.Helper()
	f := bootGuest(t, g)
	f.awaitLine(Primary, 0, "SB ACK")
	return f
}

// bootGuest is addGuest without the waiting.
func bootGuest(t *testing.T, g Guest) *fixture {
	t.Helper()
	if len(g.Disks) == 0 {
		g.Disks = []int64{4 << 30}
	}
	if g.ContentBytes == 0 {
		g.ContentBytes = 24 << 20
	}
	g.CheckBytes = 4 << 20
	// UUIDs come from names, and other labs may run on this machine.
	g.Name = fmt.Sprintf("%s-%d", g.Name, os.Getpid())
	if g.Pace == 0 {
		g.Pace = 5 * time.Millisecond
	}
	f := &fixture{bed: &shared, Guest: g, t: t}
	t.Cleanup(f.remove)
	f.must(f.AddGuest(t.Context(), g))
	return f
}

func (f *fixture) remove() {
	t := f.t
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	if d := f.watch.DoubleActive(f.UUID()); d > 0 {
		t.Errorf("two QEMUs ran %s at once, for %v: %+v", f.Name, d, f.watch.Lifetimes(f.UUID()))
	}
	if t.Failed() {
		if v, err := f.client.VM(ctx, f.Name); err == nil {
			t.Logf("%s was left as %s, active at %s under epoch %d; conditions %+v", f.Name, v.Phase, v.Source, v.Epoch, v.Conditions)
			if v.Current != nil {
				b, _ := json.Marshal(v.Current)
				t.Logf("%s", b)
			}
		}
	}
	points, _ := f.client.Points(ctx, f.Name) // none where the VM is not protected any more
	for _, p := range points {
		if p.Mark.Locked {
			if _, err := f.client.MarkPoint(ctx, f.Name, fmt.Sprint(p.Sequence), api.MarkRequest{Locked: new(bool)}); err != nil {
				t.Logf("point %d of %s stays locked: %v", p.Sequence, f.Name, err)
			}
		}
	}
	for range 2 { // a switched VM is cancelled first
		for _, kind := range []recovery.Kind{recovery.Cancel, recovery.Unprotect} {
			if a, err := f.client.Request(ctx, f.Name, kind, api.OperationRequest{RemoveData: true}); err == nil && a.Operation != nil {
				f.client.Watch(ctx, a.Operation.ID, func(operation.Record) {})
			}
		}
	}
	if _, err := f.client.VM(ctx, f.Name); switchback.CodeOf(err) != switchback.CodeNotFound {
		t.Errorf("%s cannot be unprotected: %v", f.Name, err)
	}
	for _, site := range []string{Primary, Recovery} {
		f.Virsh(ctx, site, "destroy", f.Name)
		f.Virsh(ctx, site, "undefine", f.Name, "--checkpoints-metadata")
	}
}

func (f *fixture) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

// awaitLine waits for a line on the guest's console after an offset.
func (f *fixture) awaitLine(site string, from int64, prefix string) {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 90*time.Second)
	defer cancel()
	_, _, err := witness.AwaitLine(ctx, f.Console(site, f.Name), from, prefix)
	f.must(err)
}

// eventually polls until ok says so, which returns an explanation otherwise.
func (f *fixture) eventually(within time.Duration, what string, ok func() (bool, string)) {
	f.t.Helper()
	f.poll(150*time.Millisecond, within, what, ok)
}

// poll is eventually with a pace. What asks the agents costs processor time that
// the guests need.
func (f *fixture) poll(every, within time.Duration, what string, ok func() (bool, string)) {
	f.t.Helper()
	deadline := time.Now().Add(within)
	for {
		done, why := ok()
		if done {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("not within %v: %s: %s", within, what, why)
		}
		time.Sleep(every)
	}
}

func (f *fixture) vm() api.VM {
	f.t.Helper()
	var v api.VM
	f.eventually(120*time.Second, "the server answers", func() (bool, string) {
		var err error
		v, err = f.client.VM(f.t.Context(), f.Name)
		return err == nil, fmt.Sprint(err)
	})
	return v
}

// begin asks for an operation and returns its ID. It is asked again while the
// fault before still shows.
func (f *fixture) begin(kind recovery.Kind, req api.OperationRequest) switchback.OperationID {
	f.t.Helper()
	var id switchback.OperationID
	f.eventually(120*time.Second, string(kind)+" is accepted", func() (bool, string) {
		a, err := f.client.Request(f.t.Context(), f.Name, kind, req)
		if err == nil {
			id = a.Operation.ID
		}
		return err == nil, fmt.Sprint(err)
	})
	return id
}

// end waits for an operation's end.
func (f *fixture) end(id switchback.OperationID) operation.Record {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 3*time.Minute)
	defer cancel()
	var rec operation.Record
	if err := f.client.Watch(ctx, id, func(r operation.Record) { rec = r }); err != nil {
		f.t.Fatalf("operation %s does not end: %v; it is %+v", id, err, rec)
	}
	return rec
}

// operate runs an operation that must succeed.
func (f *fixture) operate(kind recovery.Kind, req api.OperationRequest) api.Summary {
	f.t.Helper()
	return f.succeeded(f.end(f.begin(kind, req)))
}

func (f *fixture) succeeded(rec operation.Record) api.Summary {
	f.t.Helper()
	var sum api.Summary
	if rec.State != operation.StateSucceeded {
		f.t.Fatalf("%s is %s: %v", rec.Title, rec.State, rec.Error)
	}
	if len(rec.Result) > 0 {
		f.must(json.Unmarshal(rec.Result, &sum))
	}
	return sum
}

// refused asks for an operation that must not be done.
func (f *fixture) refused(kind recovery.Kind, req api.OperationRequest, code switchback.Code, text string) {
	f.t.Helper()
	a, err := f.client.Request(f.t.Context(), f.Name, kind, req)
	checkRefusal(f.t, err, code, text)
	if err == nil && a.Operation != nil {
		f.end(a.Operation.ID)
	}
}

func checkRefusal(t *testing.T, err error, code switchback.Code, text string) {
	t.Helper()
	if err == nil {
		t.Errorf("not refused; expected %s, %q", code, text)
	} else if switchback.CodeOf(err) != code || !strings.Contains(err.Error(), text) {
		t.Errorf("refused as %s: %v; expected %s, %q", switchback.CodeOf(err), err, code, text)
	}
}

func testPolicy() *switchback.Policy {
	return &switchback.Policy{Interval: time.Second, KeepPoints: 30, Compression: "auto"}
}

func (f *fixture) protect() api.Summary {
	f.t.Helper()
	return f.operate(recovery.Protect, api.OperationRequest{To: Recovery, Policy: testPolicy()})
}

func (f *fixture) points() []switchback.MarkedPoint {
	f.t.Helper()
	var points []switchback.MarkedPoint
	f.eventually(120*time.Second, "the points are listed", func() (bool, string) {
		var err error
		points, err = f.client.Points(f.t.Context(), f.Name)
		return err == nil, fmt.Sprint(err)
	})
	return points
}

// newest is the sequence number of the newest point; 0 if there is none.
func (f *fixture) newest() switchback.Sequence {
	f.t.Helper()
	if p := f.points(); len(p) > 0 {
		return p[len(p)-1].Sequence
	}
	return 0
}

// morePoints waits for n points after the newest and returns them.
func (f *fixture) morePoints(n int) []switchback.MarkedPoint {
	f.t.Helper()
	return f.pointsAfter(f.newest(), n)
}

func (f *fixture) pointsAfter(seq switchback.Sequence, n int) []switchback.MarkedPoint {
	f.t.Helper()
	var after []switchback.MarkedPoint
	f.eventually(120*time.Second, fmt.Sprintf("%d points after %d", n, seq), func() (bool, string) {
		after = nil
		points := f.points()
		for _, p := range points {
			if p.Sequence > seq {
				after = append(after, p)
			}
		}
		return len(after) >= n, fmt.Sprintf("%d so far", len(after))
	})
	return after
}

// incremental fails the test if one of the points is a resync.
func (f *fixture) incremental(points []switchback.MarkedPoint) {
	f.t.Helper()
	for _, p := range points {
		if p.Resync {
			f.t.Errorf("point %d is a resync: %s", p.Sequence, p.ResyncReason)
		}
	}
}

// writes fails the test unless the guest runs and its writer goes on.
func (f *fixture) writes(site string) {
	f.t.Helper()
	console := f.Console(site, f.Name)
	from := witness.ConsoleSize(console)
	ctx, cancel := context.WithTimeout(f.t.Context(), 90*time.Second) // it may have to boot
	defer cancel()
	if _, _, err := witness.AwaitLine(ctx, console, from, "SB ACK"); err != nil {
		state, verr := f.Virsh(f.t.Context(), site, "domstate", "--reason", f.Name)
		f.t.Fatalf("%s does not write at %s: %v; it is %s %v", f.Name, site, err, state, verr)
	}
	parsed, err := witness.ParseConsole(console)
	f.must(err)
	if last := parsed.Last(); last == nil || len(last.EIO)+len(last.Failures) > 0 {
		f.t.Errorf("%s met errors at %s: %+v", f.Name, site, last)
	}
}

func (f *fixture) dirty(site, disk string, bytes int64) {
	f.t.Helper()
	c, err := f.Control(f.t.Context(), site, f.Name)
	f.must(err)
	defer c.Close()
	_, err = c.Dirty(f.t.Context(), guest.Changes{Disk: disk, Bytes: bytes, Seed: uint64(randomUpTo(1 << 62)), Span: 256 << 20, Noise: true})
	f.must(err)
}

func (f *fixture) virsh(site string, args ...string) string {
	f.t.Helper()
	out, err := f.Virsh(f.t.Context(), site, args...)
	f.must(err)
	return out
}

// qemu is the process that runs the guest now; 0 if none does.
func (f *fixture) qemu() int {
	for _, l := range f.watch.Lifetimes(f.UUID()) {
		if l.End.IsZero() {
			return l.PID
		}
	}
	return 0
}

// disks are the images that the VM's definition names at a site.
func (f *fixture) disks(site string) []string {
	f.t.Helper()
	var paths []string
	for line := range strings.Lines(f.virsh(site, "domblklist", "--inactive", f.Name)) {
		if w := strings.Fields(line); len(w) == 2 && strings.HasPrefix(w[1], "/") {
			paths = append(paths, f.Site(site).HostPath(w[1]))
		}
	}
	if len(paths) != len(f.Disks) {
		f.t.Fatalf("%s has the disks %v at %s", f.Name, paths, site)
	}
	return paths
}

// plain fails the test unless live and inactive definition name plain images.
func (f *fixture) plain(site string) {
	f.t.Helper()
	for _, args := range [][]string{{"dumpxml", f.Name}, {"dumpxml", "--inactive", f.Name}} {
		xml := f.virsh(site, args...)
		if strings.Contains(xml, "<backingStore type") || strings.Contains(xml, "nbd") || strings.Contains(xml, "overlay") {
			f.t.Errorf("%s is not on plain disks at %s: %s", f.Name, site, xml)
		}
	}
	for _, d := range f.disks(site) {
		out, err := exec.CommandContext(f.t.Context(), "qemu-img", "info", "-U", "--output=json", d).Output()
		f.must(err)
		if strings.Contains(string(out), "backing-filename") {
			f.t.Errorf("%s has a backing image: %s", d, out)
		}
	}
}

func (f *fixture) shas(names ...string) []string {
	f.t.Helper()
	var sums []string
	for _, n := range names {
		h, err := witness.SHA256OfDisk(f.t.Context(), n, witness.SkipHoles)
		f.must(err)
		sums = append(sums, h.SHA256)
	}
	return sums
}

// export serves a point as anybody could, and calls look with the disks' URIs.
func (f *fixture) export(site, replica string, point switchback.Sequence, look func(uris []string)) {
	f.t.Helper()
	socket := "/run/switchback/look." + f.Name
	cmd := f.Site(site).Command(f.t.Context(), f.cfg.Executable, "export", "--replica", replica, "--point", fmt.Sprint(point), "--socket", socket)
	var said strings.Builder
	cmd.Stderr = &said
	f.must(cmd.Start())
	host := f.Site(site).HostPath(socket)
	defer func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		os.Remove(host)
	}()
	f.eventually(120*time.Second, "the export", func() (bool, string) { _, err := os.Stat(host); return err == nil, said.String() })
	look(f.uris(host))
}

func (f *fixture) uris(socket string) []string {
	var uris []string
	for i := range f.Disks {
		uris = append(uris, fmt.Sprintf("nbd+unix:///%s?socket=%s", diskName(i), socket))
	}
	return uris
}

// view are the disks that the switched VM was started from.
func (f *fixture) view(site string) []string {
	return f.uris(f.Site(site).HostPath("/run/switchback/" + string(f.vm().ID) + ".view"))
}

var ring = witness.Ring{Offset: guest.RecordOffset, Slots: guest.Slots}

// cutOver judges a switch that has just been made: the disks at rest at the old
// side are those of the view, and hold every record that its last boot acknowledged.
func (f *fixture) cutOver(from, to string) {
	f.t.Helper()
	old, new := f.disks(from), f.view(to)
	if a, b := f.shas(old...), f.shas(new...); !slices.Equal(a, b) {
		f.t.Errorf("disks differ at the cut-over: %v at %s, %v at %s", a, from, b, to)
		for i := range old {
			c, err := witness.ChangedBlocks(f.t.Context(), old[i], new[i], 4096)
			f.t.Logf("disk %d: %+v %v", i, c, err)
		}
	}
	f.nothingLost(from, new...)
}

// nothingLost holds the records on disks against what the last boot at a site acknowledged.
func (f *fixture) nothingLost(site string, disks ...string) {
	f.t.Helper()
	console, err := witness.ParseConsole(f.Console(site, f.Name))
	f.must(err)
	records, err := witness.VerifyRecords(f.t.Context(), ring, disks...)
	f.must(err)
	if !records.OK() {
		f.t.Errorf("records are damaged: %+v", records)
	}
	boot := console.Last()
	loss := witness.AcknowledgedLost(boot, records)
	if loss.Lost > 0 || loss.Acknowledged == 0 {
		f.t.Errorf("%d of %d acknowledged records are lost, the first is %d", loss.Lost, loss.Acknowledged, loss.FirstLost)
	}
}

// checkpoints are those of ours that the domain has.
func (f *fixture) checkpoints(site string) []string {
	f.t.Helper()
	return strings.Fields(f.virsh(site, "checkpoint-list", "--name", f.Name))
}

func (b *bed) wanSent(t *testing.T, site string) int64 {
	t.Helper()
	c, err := b.Network().Counters(site)
	if err != nil {
		t.Fatal(err)
	}
	return int64(c.TxBytes)
}

// throttle limits what a site sends over the WAN; 0 ends that.
func (b *bed) throttle(t *testing.T, site string, bytesPerSecond int64) {
	t.Helper()
	args := []string{"qdisc", "del", "dev", "wan", "root"}
	if bytesPerSecond > 0 {
		args = []string{"qdisc", "replace", "dev", "wan", "root", "tbf", "rate", fmt.Sprintf("%dbit", 8*bytesPerSecond), "burst", "512kb", "latency", "300ms"}
	}
	if out, err := b.Site(site).Command(context.Background(), "tc", args...).CombinedOutput(); err != nil && bytesPerSecond > 0 {
		t.Fatalf("tc %v: %v: %s", args, err, out)
	}
}

// server names the victim that is no agent.
const theServer = "server"

// crash kills a process -9 and starts it again.
func (b *bed) crash(t *testing.T, victim string) {
	t.Helper()
	b.kill(t, victim)
	b.start(t, victim)
}

func (b *bed) kill(t *testing.T, victim string) {
	t.Helper()
	p := b.state.Server
	if victim != theServer {
		p = b.state.Agents[victim]
	}
	if err := p.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	// A process is a zombie before the last of its threads has let go of its sockets.
	for range 1000 {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", p.PID)); err != nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("process %d of %s is not reaped", p.PID, victim)
}

func (b *bed) start(t *testing.T, victim string, args ...string) {
	t.Helper()
	var err error
	if len(args) == 0 {
		args = b.agentArgs[victim]
	}
	switch {
	case victim == theServer:
		err = b.StartServer(context.Background())
	case len(args) == 0:
		err = b.StartAgent(context.Background(), victim)
	default:
		args = append([]string{"agent", "--listen", fmt.Sprintf("0.0.0.0:%d", agentPort), "--libvirt-pid", "/run/libvirt/libvirtd.pid"}, args...)
		var p process.Process
		p, err = process.Start(b.Site(victim).Command(context.Background(), b.cfg.Executable, args...), filepath.Join(b.cfg.Dir, "log", "agent-"+victim+".log"))
		b.state.Agents[victim] = p
		err = errors.Join(err, b.save())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// awaitAgent waits until the server has heard from a site's agent anew.
func (b *bed) awaitAgent(t *testing.T, site string) {
	t.Helper()
	since := time.Now()
	for time.Since(since) < 120*time.Second {
		agents, err := b.client.Agents(context.Background())
		for _, a := range agents {
			if err == nil && string(a.Site) == site && a.Healthy && a.LastSeen.After(since) {
				return
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatalf("the agent of %s does not come back", site)
}

// commands are the command lines of all processes of a site.
func (f *fixture) commands(site string) [][]string {
	f.t.Helper()
	pids, err := f.Site(site).Processes()
	f.must(err)
	var all [][]string
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err == nil && len(b) > 0 {
			all = append(all, strings.Split(strings.TrimRight(string(b), "\x00"), "\x00"))
		}
	}
	return all
}

package simlab_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/simulated"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/lab/simlab"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/recovery"
)

var executable string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "switchback-simlab-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		executable = filepath.Join(dir, "switchback")
		if out, err := exec.Command("go", "build", "-o", executable, "../../cmd/switchback").CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "build: %v: %s\n", err, out)
			return 1
		}
		return m.Run()
	}())
}

// bed is a lab with one machine.
type bed struct {
	*simlab.Lab
	t       testing.TB
	client  *api.Client
	machine simlab.Machine
	at      situation
	kills   string // specs of kill points, a folder per process
}

// memoryDir makes a directory in memory where the system has one.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sb")
	if err != nil {
		dir, err = os.MkdirTemp("", "sb")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newBed(t testing.TB) *bed {
	t.Helper()
	dir := memoryDir(t)
	kills := filepath.Join(dir, "k")
	for _, name := range []string{simlab.Server, simlab.Primary, simlab.Recovery} {
		if err := os.MkdirAll(filepath.Join(kills, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	l, err := simlab.Up(context.Background(), simlab.Config{Dir: filepath.Join(dir, "l"), Executable: executable,
		Environment: func(name string) []string { return []string{killpoint.Environment + "=" + filepath.Join(kills, name)} }})
	if err != nil {
		t.Fatal(err)
	}
	b := &bed{Lab: l, t: t, kills: kills}
	t.Cleanup(func() {
		if t.Failed() {
			b.keepLogs()
		}
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if b.client, err = l.Client(); err != nil {
		t.Fatal(err)
	}
	b.machine = simlab.Machine{Name: "vm", Disks: []int64{16 << 20, 8 << 20}, Program: simulated.Program{Reacts: true, Agent: true, Boot: 20 * time.Millisecond, Rate: 50, Seed: 7}}
	b.must(l.Add(t.Context(), simlab.Primary, b.machine))
	return b
}

func (b *bed) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bed) keepLogs() {
	files, _ := filepath.Glob(filepath.Join(b.LogDir(), "*.log"))
	for _, f := range files {
		if text, err := os.ReadFile(f); err == nil {
			lines := strings.Split(string(text), "\n")
			b.t.Logf("--- %s\n%s", filepath.Base(f), strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	}
	if text, err := os.ReadFile(b.PowerLog()); err == nil {
		b.t.Logf("--- power log\n%s", text)
	}
}

// until polls for a minute.
func (b *bed) until(what string, done func() (bool, string)) {
	b.t.Helper()
	b.eventually(time.Minute, what, done)
}

func (b *bed) eventually(limit time.Duration, what string, done func() (bool, string)) {
	b.t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		ok, why := done()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("%s: not within %v: %s", what, limit, why)
		}
	}
}

func (b *bed) vm() api.VM {
	b.t.Helper()
	var v api.VM
	b.until("the server answers", func() (bool, string) {
		var err error
		v, err = b.client.VM(b.t.Context(), b.machine.Name)
		return err == nil || switchback.CodeOf(err) == switchback.CodeNotFound, fmt.Sprint(err)
	})
	return v
}

// begin asks for an operation, again while what was before still shows.
func (b *bed) begin(kind recovery.Kind, req api.OperationRequest) switchback.OperationID {
	b.t.Helper()
	var id switchback.OperationID
	b.until(string(kind)+" is accepted", func() (bool, string) {
		a, err := b.client.Request(b.t.Context(), b.machine.Name, kind, req)
		if err == nil {
			id = a.Operation.ID
		}
		return err == nil, fmt.Sprint(err)
	})
	return id
}

// end waits for an operation's end.
func (b *bed) end(id switchback.OperationID) operation.Record {
	b.t.Helper()
	var rec operation.Record
	b.until("the operation ends", func() (bool, string) {
		var err error
		rec, err = b.client.Operation(b.t.Context(), id)
		return err == nil && rec.State.Finished(), fmt.Sprintf("%v %s: %s", err, rec.State, steps(rec))
	})
	return rec
}

// operate runs an operation that must succeed.
func (b *bed) operate(kind recovery.Kind, req api.OperationRequest) operation.Record {
	b.t.Helper()
	rec := b.end(b.begin(kind, req))
	if rec.State != operation.StateSucceeded {
		b.t.Fatalf("%s is %s: %v", rec.Title, rec.State, rec.Error)
	}
	return rec
}

func (b *bed) console(site string) simulated.Console {
	b.t.Helper()
	c, err := simulated.ReadConsole(simulated.ConsolePath(b.HostDir(site), b.machine.UUID()))
	b.must(err)
	return c
}

func (b *bed) domain(site string) (hypervisor.Domain, error) {
	return b.Driver(site).Domain(b.t.Context(), b.machine.UUID())
}

// runsAt fails the test unless the machine runs and writes at a site, and there only.
func (b *bed) runsAt(site string) {
	b.t.Helper()
	acked := func() uint64 {
		boots := b.console(site).Boots
		if len(boots) == 0 {
			return 0
		}
		return boots[len(boots)-1].Acked
	}
	from := acked()
	b.until("it writes at "+site, func() (bool, string) { return acked() > from, fmt.Sprint(from) })
	for _, s := range simlab.Sites {
		d, err := b.domain(s)
		want := hypervisor.StateOff
		if s == site {
			want = hypervisor.StateRunning
		} else if switchback.CodeOf(err) == switchback.CodeNotFound {
			continue
		}
		if err != nil || d.State != want {
			b.t.Errorf("at %s it is %q (%v), want %s", s, d.State, err, want)
		}
	}
	events, err := simulated.ReadPowerLog(b.PowerLog())
	b.must(err)
	for _, o := range simulated.Overlaps(events) {
		b.t.Errorf("two copies ran at once: %+v", o)
	}
}

// cutOver judges a planned switch: nothing that was acknowledged is lost, what
// was there is whole, and disks at rest and view are the same.
func (b *bed) cutOver(from, to string) {
	b.t.Helper()
	var old, new []simulated.Boot
	b.until("it boots at "+to, func() (bool, string) { new = b.console(to).Boots; return len(new) > 0, "" })
	old = b.console(from).Boots
	was, is := old[len(old)-1], new[len(new)-1]
	if is.Found.Damaged > 0 || is.Found.Highest < was.Acked || was.Acked == 0 {
		b.t.Errorf("at %s it found %+v, at %s record %d was acknowledged", to, is.Found, from, was.Acked)
	}
	d, err := b.domain(from)
	b.must(err)
	view := filepath.Join(b.RunDir(to), string(b.vm().ID)+".view")
	for _, disk := range d.Disks {
		b.same(disk.Path, "qcow2", fmt.Sprintf("nbd+unix:///%s?socket=%s", disk.Name, view), "raw")
	}
}

// same fails the test unless two images have the same content.
func (b *bed) same(x, xFormat, y, yFormat string) {
	b.t.Helper()
	if out, err := exec.Command("qemu-img", "compare", "-U", "-f", xFormat, "-F", yFormat, x, y).CombinedOutput(); err != nil {
		b.t.Errorf("%s and %s differ: %v: %s", x, y, err, out)
	}
}

// fast are parameters of protect for short tests.
func fast() api.OperationRequest {
	p := switchback.DefaultPolicy()
	p.Interval = time.Second
	p.Commit = switchback.CommitPolicy{Action: switchback.CommitCommit, After: time.Hour}
	return api.OperationRequest{From: simlab.Primary, To: simlab.Recovery, Policy: &p}
}

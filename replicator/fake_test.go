package replicator

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/nbd"
)

const bitmapGrain = 64 << 10

// fakeVM is a hypervisor with one VM whose disks, checkpoints and dirty bitmaps
// are in memory; a backup job serves them over NBD as QEMU does. Methods that a
// cycle has no business with are those of the nil interface: they panic.
type fakeVM struct {
	hypervisor.Hypervisor

	mu          sync.Mutex
	disks       map[string][]byte
	checkpoints []fakeCheckpoint
	lost        map[string]bool // checkpoints without a valid bitmap
	state       hypervisor.State
	reason      hypervisor.PauseReason
	job         *fakeJob
	// frozen is what the disks held at the instant of the newest job.
	frozen map[string][]byte
	// dead makes every call fail: the agent that would make them is no more.
	dead bool
	// records are of writes, by name and disk; noRecords: it keeps none.
	records   map[string]map[string]extent.Set
	noRecords bool
	calls     []string
	begun     int
	resumed   int
}

type fakeCheckpoint struct {
	name  string
	dirty map[string]extent.Set
}

type fakeJob struct {
	ln    net.Listener
	disks map[string][]byte
	dirty map[string]extent.Set
	wrote map[string]extent.Set // by name of the export
	wg    sync.WaitGroup

	mu    sync.Mutex
	conns []net.Conn
}

func newFakeVM(disks []switchback.Disk) *fakeVM {
	vm := &fakeVM{disks: map[string][]byte{}, lost: map[string]bool{}, state: hypervisor.StateRunning}
	for _, d := range disks {
		vm.disks[d.Name] = make([]byte, d.SizeBytes)
	}
	return vm
}

// write is a write of the guest; the newest bitmap notes it.
func (vm *fakeVM) write(disk string, off int64, p []byte) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	copy(vm.disks[disk][off:], p)
	for _, r := range vm.records {
		s := r[disk]
		s.Add(off, int64(len(p)))
		r[disk] = s.Align(hypervisor.FineUnit).Clip(0, int64(len(vm.disks[disk])))
	}
	if n := len(vm.checkpoints); n > 0 {
		s := vm.checkpoints[n-1].dirty[disk]
		s.Add(off, int64(len(p)))
		vm.checkpoints[n-1].dirty[disk] = s.Align(bitmapGrain)
	}
}

// kill makes the agent that uses the hypervisor do nothing any more.
func (vm *fakeVM) kill() {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	vm.dead = true
}

func (vm *fakeVM) clone() map[string][]byte {
	out := map[string][]byte{}
	for name, b := range vm.disks {
		out[name] = bytes.Clone(b)
	}
	return out
}

// call notes a call; the caller holds nothing.
func (vm *fakeVM) call(what string) (func(), error) {
	vm.mu.Lock()
	if vm.dead {
		vm.mu.Unlock()
		return nil, switchback.Errorf(switchback.CodeUnavailable, "%s: this agent was killed", what)
	}
	vm.calls = append(vm.calls, what)
	return vm.mu.Unlock, nil
}

func (vm *fakeVM) Domain(context.Context, switchback.VMUUID) (hypervisor.Domain, error) {
	done, err := vm.call("domain")
	if err != nil {
		return hypervisor.Domain{}, err
	}
	defer done()
	return hypervisor.Domain{Name: "web", State: vm.state, PauseReason: vm.reason}, nil
}

func (vm *fakeVM) HasBackup(context.Context, switchback.VMUUID) (bool, error) {
	done, err := vm.call("has-backup")
	if err != nil {
		return false, err
	}
	defer done()
	return vm.job != nil, nil
}

func (vm *fakeVM) Resume(context.Context, switchback.VMUUID) error {
	done, err := vm.call("resume")
	if err != nil {
		return err
	}
	defer done()
	vm.state, vm.reason = hypervisor.StateRunning, ""
	vm.resumed++
	return nil
}

func (vm *fakeVM) Checkpoints(context.Context, switchback.VMUUID) ([]hypervisor.Checkpoint, error) {
	done, err := vm.call("checkpoints")
	if err != nil {
		return nil, err
	}
	defer done()
	var list []hypervisor.Checkpoint
	for _, c := range vm.checkpoints {
		list = append(list, hypervisor.Checkpoint{Name: c.name})
	}
	return list, nil
}

func (vm *fakeVM) names() []string {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	var out []string
	for _, c := range vm.checkpoints {
		out = append(out, c.name)
	}
	return out
}

func (vm *fakeVM) find(name string) int {
	return slices.IndexFunc(vm.checkpoints, func(c fakeCheckpoint) bool { return c.name == name })
}

func (vm *fakeVM) DeleteCheckpoint(_ context.Context, _ switchback.VMUUID, name string) error {
	done, err := vm.call("delete " + name)
	if err != nil {
		return err
	}
	defer done()
	i := vm.find(name)
	if i < 0 {
		return nil
	}
	if i > 0 { // its changes merge into its parent
		for disk, set := range vm.checkpoints[i].dirty {
			vm.checkpoints[i-1].dirty[disk] = vm.checkpoints[i-1].dirty[disk].Union(set)
		}
	}
	vm.checkpoints = slices.Delete(vm.checkpoints, i, i+1)
	return nil
}

func (vm *fakeVM) BeginBackup(_ context.Context, _ switchback.VMUUID, spec hypervisor.BackupSpec) error {
	done, err := vm.call("begin " + spec.Checkpoint)
	if err != nil {
		return err
	}
	defer done()
	if vm.job != nil || vm.find(spec.Checkpoint) >= 0 || vm.state == hypervisor.StateOff {
		return switchback.Errorf(switchback.CodeConflict, "a job, a checkpoint %s, or off", spec.Checkpoint)
	}
	job := &fakeJob{disks: vm.clone(), dirty: map[string]extent.Set{}}
	for _, d := range spec.Disks {
		if d.Incremental == "" {
			continue
		}
		from := vm.find(d.Incremental)
		if from < 0 || vm.lost[d.Incremental] {
			return switchback.Errorf(switchback.CodeBitmapLost, "no bitmap %s", d.Incremental)
		}
		for _, c := range vm.checkpoints[from:] {
			job.dirty[d.Name] = job.dirty[d.Name].Union(c.dirty[d.Name])
		}
	}
	os.Remove(spec.Socket)
	if job.ln, err = net.Listen("unix", spec.Socket); err != nil {
		return err
	}
	vm.checkpoints = append(vm.checkpoints, fakeCheckpoint{spec.Checkpoint, map[string]extent.Set{}})
	vm.job, vm.frozen = job, job.disks
	vm.begun++
	job.wg.Go(job.serve)
	return nil
}

func (vm *fakeVM) TrackWrites(_ context.Context, _ switchback.VMUUID, record, keep string, disks []string) (map[string]string, error) {
	done, err := vm.call("track")
	if err != nil {
		return nil, err
	}
	defer done()
	if vm.noRecords {
		return nil, switchback.Errorf(switchback.CodeUnsupported, "no records here")
	}
	kept := map[string]string{}
	old := vm.records[keep]
	vm.records = map[string]map[string]extent.Set{record: {}}
	if old != nil {
		vm.records[keep] = old
		for _, d := range disks {
			kept[d] = keep
		}
	}
	return kept, nil
}

func (vm *fakeVM) ExportWrites(_ context.Context, _ switchback.VMUUID, record string, kept map[string]string) error {
	done, err := vm.call("export " + record)
	if err != nil {
		return err
	}
	defer done()
	vm.job.mu.Lock()
	defer vm.job.mu.Unlock()
	vm.job.wrote = map[string]extent.Set{}
	for d := range kept {
		vm.job.wrote[hypervisor.FineExport(d)] = vm.records[record][d].Clone()
	}
	return nil
}

func (vm *fakeVM) ForgetWrites(context.Context, switchback.VMUUID) error {
	done, err := vm.call("forget")
	if err != nil {
		return err
	}
	defer done()
	vm.records = nil
	return nil
}

func (vm *fakeVM) EndBackup(context.Context, switchback.VMUUID) error {
	done, err := vm.call("end")
	if err != nil {
		return err
	}
	defer done()
	if vm.job != nil {
		vm.job.close()
		vm.job = nil
	}
	return nil
}

func (j *fakeJob) close() {
	j.ln.Close()
	j.mu.Lock()
	for _, c := range j.conns {
		c.Close()
	}
	j.mu.Unlock()
	j.wg.Wait()
}

func (j *fakeJob) serve() {
	for {
		c, err := j.ln.Accept()
		if err != nil {
			return
		}
		j.mu.Lock()
		j.conns = append(j.conns, c)
		j.mu.Unlock()
		j.wg.Go(func() {
			defer c.Close()
			_ = j.talk(c) // the client left, or is told so by a broken connection
		})
	}
}

var be = binary.BigEndian

// talk speaks as much NBD as a client of package nbd asks for; see the
// protocol document of the NBD project.
func (j *fakeJob) talk(c net.Conn) error {
	const reply = 0x0003e889045565a9
	b := be.AppendUint64(nil, 0x4e42444d41474943)
	b = be.AppendUint64(b, 0x49484156454f5054)
	if _, err := c.Write(be.AppendUint16(b, 3)); err != nil {
		return err
	}
	if _, err := io.CopyN(io.Discard, c, 4); err != nil {
		return err
	}
	answer := func(option, kind uint32, data []byte) error {
		b := be.AppendUint64(nil, reply)
		b = be.AppendUint32(be.AppendUint32(be.AppendUint32(b, option), kind), uint32(len(data)))
		_, err := c.Write(append(b, data...))
		return err
	}
	context := ""
	for {
		head := make([]byte, 16)
		if _, err := io.ReadFull(c, head); err != nil {
			return err
		}
		option := be.Uint32(head[8:])
		data := make([]byte, be.Uint32(head[12:]))
		if _, err := io.ReadFull(c, data); err != nil {
			return err
		}
		var err error
		switch option {
		case 8: // structured replies
			err = answer(option, 1, nil)
		case 10: // metadata contexts: one is asked for
			name := data[4+be.Uint32(data):]
			context = string(name[8 : 8+be.Uint32(name[4:])])
			err = errors.Join(answer(option, 4, append(be.AppendUint32(nil, 5), context...)), answer(option, 1, nil))
		case 7: // go
			disk := string(data[4 : 4+be.Uint32(data)])
			content, ok := j.disks[strings.TrimPrefix(disk, hypervisor.FineExport(""))]
			if !ok {
				return answer(option, 1<<31+6, nil)
			}
			info := be.AppendUint64(be.AppendUint16(nil, 0), uint64(len(content)))
			if err := errors.Join(answer(option, 3, be.AppendUint16(info, 3)), answer(option, 1, nil)); err != nil {
				return err
			}
			return j.transmit(c, disk, context)
		default:
			err = answer(option, 1<<31+1, nil)
		}
		if err != nil {
			return err
		}
	}
}

func (j *fakeJob) transmit(c net.Conn, disk, context string) error {
	for {
		req := make([]byte, 28)
		if _, err := io.ReadFull(c, req); err != nil {
			return err
		}
		off, length := int64(be.Uint64(req[16:])), int64(be.Uint32(req[24:]))
		chunk := func(kind uint16, data []byte) error {
			b := be.AppendUint16(be.AppendUint16(be.AppendUint32(nil, 0x668e33ef), 1), kind)
			b = be.AppendUint32(append(b, req[8:16]...), uint32(len(data)))
			_, err := c.Write(append(b, data...))
			return err
		}
		var err error
		switch be.Uint16(req[6:]) {
		case 0:
			err = chunk(1, append(be.AppendUint64(nil, uint64(off)), j.disks[disk][off:off+length]...))
		case 7:
			data := be.AppendUint32(nil, 5)
			for _, x := range j.status(disk, context, off, length) {
				data = be.AppendUint32(be.AppendUint32(data, uint32(x.Length)), x.Flags)
			}
			err = chunk(5, data)
		default:
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (j *fakeJob) status(disk, context string, off, length int64) []nbd.Extent {
	if context == nbd.ContextAllocation {
		d := &memoryDisk{b: j.disks[disk], grain: bitmapGrain}
		list, _ := d.BlockStatus(nil, context, off, length) // a map in memory: never fails
		return list
	}
	set := j.dirty[disk]
	switch context {
	case nbd.ContextDirtyPrefix + "backup-" + disk:
	case hypervisor.FineContext:
		j.mu.Lock()
		set = j.wrote[disk]
		j.mu.Unlock()
	default:
		return []nbd.Extent{{Offset: off, Length: length}}
	}
	var list []nbd.Extent
	end := off + length
	for _, r := range set.Clip(off, length).Ranges() {
		if r.Offset > off {
			list = append(list, nbd.Extent{Offset: off, Length: r.Offset - off})
		}
		list = append(list, nbd.Extent{Offset: r.Offset, Length: r.Length, Flags: nbd.StateDirty})
		off = r.End()
	}
	if off < end {
		list = append(list, nbd.Extent{Offset: off, Length: end - off})
	}
	return list
}

// openOffline is Config.OpenOffline of the VM at rest.
func (vm *fakeVM) openOffline(_ context.Context, d switchback.Disk, bitmaps []string) (DiskReader, extent.Set, error) {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	var dirty extent.Set
	for _, name := range bitmaps {
		i := vm.find(name)
		if i < 0 || vm.lost[name] {
			return nil, dirty, switchback.Errorf(switchback.CodeBitmapLost, "no bitmap %s", name)
		}
		dirty = dirty.Union(vm.checkpoints[i].dirty[d.Name])
	}
	vm.frozen = vm.clone()
	return &memoryDisk{b: vm.frozen[d.Name], grain: bitmapGrain}, dirty, nil
}

// when says whether a call fails before or after its effect.
type when int

const (
	never  when = iota
	before      // nothing of it arrived
	during      // the connection broke in the middle
	after       // it was done, the answer was lost
)

// fakeTarget is a real replica behind calls that can be made to fail.
type fakeTarget struct {
	t       testing.TB
	dir     string
	replica *journal.Replica
	session string
	// checkpoint is what a base of kept disks continues from.
	checkpoint string
	bases      map[string]journal.BaseWriter
	epoch      switchback.Epoch // newer than the replica's; 0 = the replica's

	mu sync.Mutex
	// fail is asked before each call.
	fail func(call string) when
	// done is told of each call that had its effect.
	done  func(call string)
	calls []string
	// body counts the bytes of all seed segments and points that arrived.
	body int64
}

type rawBase struct{ *os.File }

func (b rawBase) WriteZeroes(off, n int64) error {
	_, err := b.WriteAt(make([]byte, n), off)
	return err
}
func (b rawBase) Flush() error { return nil }

// newFakeTarget makes a replica over files: empty ones to be seeded, or with
// kept disks the VM's own.
func newFakeTarget(t testing.TB, disks []switchback.Disk, kept map[string][]byte) *fakeTarget {
	t.Helper()
	dir := tempDir(t)
	f := &fakeTarget{t: t, dir: filepath.Join(dir, "replica"), session: "session", bases: map[string]journal.BaseWriter{}, fail: func(string) when { return never }, done: func(string) {}}
	spec := journal.Spec{Protection: testProtection, Name: "web", Epoch: 1, BaseIsOriginal: kept != nil}
	for _, d := range disks {
		path := filepath.Join(dir, d.Name+".raw")
		file, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { file.Close() })
		if kept != nil {
			if _, err := file.WriteAt(kept[d.Name], 0); err != nil {
				t.Fatal(err)
			}
		}
		if err := file.Truncate(d.SizeBytes); err != nil {
			t.Fatal(err)
		}
		f.bases[d.Name] = rawBase{file}
		spec.Disks = append(spec.Disks, journal.ReplicaDisk{Name: d.Name, SizeBytes: d.SizeBytes, BasePath: path, BaseFormat: "raw"})
	}
	var err error
	if f.replica, err = (journal.Options{ReserveBytes: -1}).Create(f.dir, spec); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.replica.Close() })
	return f
}

var errLost = switchback.Errorf(switchback.CodeUnavailable, "the network failed")

// call runs do, or fails around it.
func (f *fakeTarget) call(name string, body io.Reader, do func(body io.Reader) error) error {
	f.mu.Lock()
	w := f.fail(name)
	f.calls = append(f.calls, name)
	f.mu.Unlock()
	switch w {
	case before:
		return errLost
	case during:
		if body != nil {
			io.CopyN(io.Discard, body, 100)
		}
		return errLost
	}
	counted := &countingReader{r: body}
	err := do(counted)
	f.mu.Lock()
	f.body += counted.n
	f.mu.Unlock()
	if err == nil {
		f.done(name)
	}
	if err == nil && w == after {
		return errLost
	}
	return err
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func (f *fakeTarget) State(context.Context) (s TargetState, err error) {
	err = f.call("state", nil, func(io.Reader) error {
		m := f.replica.Manifest()
		s = TargetState{Epoch: max(m.Epoch, f.epoch), Seeded: !m.Seeding, Session: f.session, Head: f.replica.Head()}
		if s.Head.Sequence == 0 {
			s.Head.Checkpoint = f.checkpoint
		}
		return nil
	})
	return s, err
}

func (f *fakeTarget) SendPoint(ctx context.Context, epoch switchback.Epoch, body io.Reader) (p switchback.Point, err error) {
	err = f.call("point", body, func(body io.Reader) error {
		var err error
		p, err = f.replica.Receive(ctx, epoch, body)
		return err
	})
	return p, err
}

func (f *fakeTarget) SendSeed(ctx context.Context, _ switchback.Epoch, session string, body io.Reader) error {
	return f.call("seed", body, func(body io.Reader) error {
		if session != f.session {
			return switchback.Errorf(switchback.CodeConflict, "session %s is over", session)
		}
		return f.replica.ApplySeed(ctx, body, f.bases)
	})
}

func (f *fakeTarget) FlushSeed(context.Context, switchback.Epoch, string) error {
	return f.call("flush", nil, func(io.Reader) error { return nil })
}

func (f *fakeTarget) FinishSeed(_ context.Context, _ switchback.Epoch, _ string, p switchback.Point) error {
	return f.call("finish", nil, func(io.Reader) error { return f.replica.FinishSeed(p) })
}

// content reads the newest point's view.
func (f *fakeTarget) content() map[string][]byte {
	f.t.Helper()
	view, err := journal.OpenView(f.dir, f.replica.Head().Sequence)
	if err != nil {
		f.t.Fatal(err)
	}
	defer view.Close()
	out := map[string][]byte{}
	for _, d := range view.Disks() {
		b := make([]byte, d.Size())
		if _, err := d.ReadAt(b, 0); err != nil {
			f.t.Fatal(err)
		}
		out[d.Name()] = b
	}
	return out
}

// differing returns the whole blocks, by disk, in which a and b differ.
func differing(a, b map[string][]byte) map[string]extent.Set {
	out := map[string]extent.Set{}
	for _, name := range slices.Sorted(maps.Keys(a)) {
		var s extent.Set
		for off := 0; off < len(a[name]); off += BlockSize {
			end := min(off+BlockSize, len(a[name]))
			if !bytes.Equal(a[name][off:end], b[name][off:end]) {
				s.Add(int64(off), int64(end-off))
			}
		}
		out[name] = s
	}
	return out
}

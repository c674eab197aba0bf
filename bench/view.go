package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
	"github.com/switchback-dr/switchback/nbd"
	"github.com/switchback-dr/switchback/qemu"
)

// view is a recovery point with segments above its base, and plain copies of its content.
type view struct {
	dir      string // of the replica, inside the recovery site
	point    switchback.Sequence
	segments int
	raw      string // copies, inside the recovery site
	qcow2    string
}

// replica is what the target reports of our guest's.
func (b *bed) replica(ctx context.Context) (*agentapi.ReplicaStatus, error) {
	vm, err := b.api.VM(ctx, b.ours.name)
	if err != nil {
		return nil, err
	}
	if vm.AtTarget == nil || vm.AtTarget.Replica == nil || vm.AtTarget.Replica.Newest == nil {
		return nil, fmt.Errorf("the target agent reports no replica")
	}
	return vm.AtTarget.Replica, nil
}

// makeView takes points, each after a change, until there are that many, proves
// that the newest one's view has the content of our guest's disk, and makes the
// plain copies.
func (b *bed) makeView(ctx context.Context, points int, change int64) (*view, error) {
	if err := b.ensureProtected(ctx); err != nil {
		return nil, err
	}
	r, err := b.replica(ctx)
	if err != nil {
		return nil, err
	}
	for n := r.Points - 1; n < points; n++ {
		b.seed++
		if _, err := b.ours.control.Dirty(ctx, guest.Changes{Disk: diskName, Bytes: change, Span: b.sizes.span, Seed: b.seed}); err != nil {
			return nil, err
		}
		if _, err := b.takePoint(ctx); err != nil {
			return nil, err
		}
	}
	if r, err = b.replica(ctx); err != nil {
		return nil, err
	}
	v := &view{dir: r.Dir, point: r.Newest.Sequence, segments: r.Points - 1, raw: guest.ImageDir + "/plain.raw", qcow2: guest.ImageDir + "/plain.qcow2"}
	stop, err := b.export(ctx, v)
	if err != nil {
		return nil, err
	}
	defer func() { stop() }()
	want, err := b.scan(ctx)
	if err != nil {
		return nil, err
	}
	got, err := scanNBD(ctx, b.exportSocket(), diskName)
	if err != nil {
		return nil, err
	}
	if n := want.differing(got); n > 0 {
		return nil, fmt.Errorf("the view of point %d differs from the guest's disk in %d bytes", v.point, n)
	}
	site := b.lab.Site(lab.Recovery)
	uri := fmt.Sprintf("nbd+unix:///%s?socket=%s", diskName, exportSocket)
	if err := command(site.Command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "raw", uri, v.raw)); err != nil {
		return nil, err
	}
	return v, command(site.Command(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", v.raw, v.qcow2))
}

func (b *bed) dropView(v *view) {
	if v != nil {
		os.Remove(b.recoveryPath(v.raw))
		os.Remove(b.recoveryPath(v.qcow2))
	}
}

const exportSocket = "/run/switchback/bench-view"

func (b *bed) recoveryPath(inside string) string { return b.lab.Site(lab.Recovery).HostPath(inside) }
func (b *bed) exportSocket() string              { return b.recoveryPath(exportSocket) }

// export serves the view by the command that a failover uses.
func (b *bed) export(ctx context.Context, v *view) (stop func(), err error) {
	os.Remove(b.exportSocket())
	cmd := b.lab.Site(lab.Recovery).Command(context.WithoutCancel(ctx), filepath.Join(b.cfg.dir, "switchback"),
		"export", "--replica", v.dir, "--point", fmt.Sprint(v.point), "--socket", exportSocket)
	var said strings.Builder
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
		os.Remove(b.exportSocket())
	}
	if err := waitNBD(ctx, b.exportSocket(), diskName); err != nil {
		stop()
		return nil, fmt.Errorf("switchback export: %w: %s", err, said.String())
	}
	return stop, nil
}

func waitNBD(ctx context.Context, socket, export string) error {
	for attempt := 0; ; attempt++ {
		c, err := nbd.Dial(ctx, "unix", socket, nbd.Options{Export: export})
		if err == nil {
			return c.Close()
		}
		if ctx.Err() != nil || attempt == 500 {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func measureView(ctx context.Context, b *bed) ([]entry, error) {
	return b.measureView(ctx, b.sizes.viewPoints, b.sizes.viewPointChange, "")
}

func measureView100(ctx context.Context, b *bed) ([]entry, error) {
	return b.measureView(ctx, 100, b.sizes.viewPointChange/8, "_100")
}

// measureView reads a view and a qemu-nbd with the same clients.
func (b *bed) measureView(ctx context.Context, points int, change int64, suffix string) ([]entry, error) {
	v, err := b.makeView(ctx, points, change)
	defer b.dropView(v)
	if err != nil {
		return nil, err
	}
	stop, err := b.export(ctx, v)
	if err != nil {
		return nil, err
	}
	defer stop()
	socket := b.recoveryPath("/run/switchback/bench-plain")
	plain, err := qemu.StartNBD(ctx, qemu.NBDOptions{Path: b.recoveryPath(v.raw), Format: "raw", Socket: socket, Export: diskName, ReadOnly: true})
	if err != nil {
		return nil, err
	}
	defer plain.Stop(context.WithoutCancel(ctx))
	data, err := dataRanges(ctx, socket)
	if err != nil {
		return nil, err
	}
	var bytes int64
	for _, x := range data {
		bytes += x.Length
	}

	var seq, random samples
	sequential := func(socket string, into *[]float64) func(context.Context) error {
		return func(ctx context.Context) error {
			begin := time.Now()
			if err := command(exec.CommandContext(ctx, "nbdcopy", fmt.Sprintf("nbd+unix:///%s?socket=%s", diskName, socket), "null:")); err != nil {
				return err
			}
			*into = append(*into, float64(bytes)/1e6/time.Since(begin).Seconds())
			return nil
		}
	}
	scattered := func(socket string, into *[]float64) func(context.Context) error {
		return func(ctx context.Context) error {
			iops, err := randomReads(ctx, socket, data, b.sizes.randomReads, uint64(len(*into)))
			*into = append(*into, iops)
			return err
		}
	}
	for _, x := range []struct {
		s     *samples
		which func(string, *[]float64) func(context.Context) error
	}{{&seq, sequential}, {&random, scattered}} {
		ours, peer := x.which(b.exportSocket(), &x.s.Ours), x.which(socket, &x.s.Peer)
		// Once unmeasured, so that both find all in the machine's cache.
		if err := alternate(ctx, 1, nil, ours, peer); err != nil {
			return nil, err
		}
		*x.s = samples{}
		if err := alternate(ctx, b.cfg.runs, nil, ours, peer); err != nil {
			return nil, err
		}
		b.say("ours %.0f, peer %.0f", x.s.Ours, x.s.Peer)
	}
	detail := fmt.Sprintf("%d segments over the base, %d MB of data, warm", v.segments, bytes/1e6)
	const peer = "qemu-nbd on a raw file with the same content"
	return []entry{
		newEntry("view_seq"+suffix, "MB/s", peer+", nbdcopy to null:", oursByPeer, seq, detail),
		newEntry("view_rand4k"+suffix, "reads/s", peer+", depth 16", oursByPeer, random, ""),
	}, nil
}

// dataRanges are the parts of the disk that hold data, of at least one block.
func dataRanges(ctx context.Context, socket string) (list []nbd.Extent, err error) {
	c, err := nbd.Dial(ctx, "unix", socket, nbd.Options{Export: diskName, MetaContexts: []string{nbd.ContextAllocation}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	all, err := c.BlockStatus(ctx, nbd.ContextAllocation, 0, c.Size())
	for _, x := range all {
		if !x.Zero() && x.Length >= blockSize {
			list = append(list, x)
		}
	}
	return list, err
}

// randomReads does n reads of 4 KiB, 16 at a time on one connection, and returns
// how many there were a second. The same round gives the same places.
func randomReads(ctx context.Context, socket string, data []nbd.Extent, n int, round uint64) (perSecond float64, err error) {
	const depth = 16
	var places []int64
	rnd := rand.New(rand.NewPCG(2, round))
	var starts []int64 // of each range, in blocks from the first
	var total int64
	for _, x := range data {
		starts = append(starts, total)
		total += x.Length / blockSize
	}
	for range n {
		k := rnd.Int64N(total)
		i := len(starts) - 1
		for lo, hi := 0, len(starts); lo < hi; {
			if m := (lo + hi) / 2; starts[m] <= k {
				i, lo = m, m+1
			} else {
				hi = m
			}
		}
		places = append(places, (data[i].Offset+blockSize-1)/blockSize*blockSize+(k-starts[i])*blockSize)
	}
	c, err := nbd.Dial(ctx, "unix", socket, nbd.Options{Export: diskName})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	errs := make([]error, depth)
	var wg sync.WaitGroup
	begin := time.Now()
	for i := range depth {
		wg.Go(func() {
			buf := make([]byte, blockSize)
			for j := i; j < n && errs[i] == nil; j += depth {
				_, errs[i] = c.ReadAtContext(ctx, buf, min(places[j], c.Size()-blockSize))
			}
		})
	}
	wg.Wait()
	return float64(n) / time.Since(begin).Seconds(), errors.Join(errs...)
}

// forget drops a file from the machine's page cache.
func forget(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return err
	}
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

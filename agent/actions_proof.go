package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"path/filepath"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/nbd"
	"github.com/switchback-dr/switchback/qemu"
	"github.com/switchback-dr/switchback/replicator"
)

// disk is one that is hashed: content, and which parts of it are zeros.
type hashedDisk struct {
	name string
	size int64
	io.ReaderAt
	// zeros calls f with ranges that are zeros without being stored.
	zeros func(ctx context.Context, f func(off, length int64)) error
	close func() error
}

// hashTree reads a disk in order; stored zeros and holes have the same leaf.
func hashTree(ctx context.Context, d hashedDisk, leaves bool, read func(int64)) (agentapi.DiskHash, error) {
	h := agentapi.DiskHash{Name: d.name, SizeBytes: d.size}
	count := (d.size + agentapi.LeafBytes - 1) / agentapi.LeafBytes
	stored := make([]int64, count) // bytes of a leaf that are not known to be zero
	for i := range stored {
		stored[i] = min(agentapi.LeafBytes, d.size-int64(i)*agentapi.LeafBytes)
	}
	err := d.zeros(ctx, func(off, length int64) {
		for length > 0 {
			i := off / agentapi.LeafBytes
			n := min(length, (i+1)*agentapi.LeafBytes-off)
			stored[i] -= n
			off, length = off+n, length-n
		}
	})
	if err != nil {
		return h, err
	}
	root := sha256.New()
	var size [8]byte
	binary.LittleEndian.PutUint64(size[:], uint64(d.size))
	root.Write(size[:])
	buf := make([]byte, agentapi.LeafBytes)
	zero := make([]byte, agentapi.LeafBytes)
	for i := range stored {
		if err := ctx.Err(); err != nil {
			return h, context.Cause(ctx)
		}
		off := int64(i) * agentapi.LeafBytes
		p := buf[:min(agentapi.LeafBytes, d.size-off)]
		var leaf [sha256.Size]byte
		text := ""
		if stored[i] > 0 {
			if n, err := d.ReadAt(p, off); n < len(p) {
				return h, err
			}
			if !bytes.Equal(p, zero[:len(p)]) {
				leaf = sha256.Sum256(p)
				text = hex.EncodeToString(leaf[:])
			}
			read(int64(len(p)))
		} else {
			read(0)
		}
		root.Write(leaf[:])
		if leaves {
			h.Leaves = append(h.Leaves, text)
		}
	}
	h.Root = hex.EncodeToString(root.Sum(nil))
	return h, nil
}

func hashAll(ctx context.Context, t *task, leaves bool, disks []hashedDisk) (agentapi.HashResult, error) {
	var r agentapi.HashResult
	began := time.Now()
	var total, done int64
	for _, d := range disks {
		total += d.size
	}
	for _, d := range disks {
		start, n := done, int64(0)
		h, err := hashTree(ctx, d, leaves, func(read int64) {
			r.ReadBytes += read
			n++
			done = start + min(d.size, n*agentapi.LeafBytes)
			t.Report("hashing disk "+d.name, rates(began, done, total))
		})
		if err != nil {
			return r, switchback.Errorf(switchback.CodeOf(err), "hash disk %s: %w", d.name, err)
		}
		r.Disks = append(r.Disks, h)
	}
	r.Took = time.Since(began)
	return r, nil
}

// hashRest hashes the disks of a VM that left this site, as they are since its
// last point. It takes no lock: a VM that is started again here goes first, and
// makes what was read worthless, which is found by the files' identity.
func (a *Agent) hashRest(ctx context.Context, t *task, req agentapi.Task, p agentapi.HashParams) (_ any, err error) {
	v, err := a.vm(req.Protection)
	if err != nil {
		return nil, err
	}
	as := v.assignment()
	untouched := func() error {
		as := v.assignment()
		if as.Role != agentapi.RoleFenced || as.Rest == nil {
			return switchback.Errorf(switchback.CodeConflict, "the disks of %s are not at rest here: its role is %s", as.Name, as.Role)
		}
		now, err := identifyAll(as.Disks)
		if err != nil {
			return err
		}
		for name, id := range now {
			if id != as.Rest.Files[name] {
				return switchback.Errorf(switchback.CodeConflict, "disk %s of %s was changed since its last point", name, as.Name)
			}
		}
		return nil
	}
	if err := untouched(); err != nil {
		return nil, err
	}
	var disks []hashedDisk
	defer func() {
		for _, d := range disks {
			err = errors.Join(err, d.close())
		}
	}()
	for _, x := range as.Disks {
		d, err := a.openShared(ctx, string(as.Protection), x)
		if err != nil {
			return nil, err
		}
		disks = append(disks, d)
	}
	r, err := hashAll(ctx, t, p.Leaves, disks)
	if err != nil {
		return nil, err
	}
	return r, untouched()
}

// openShared opens a disk at rest without keeping others from it.
func (a *Agent) openShared(ctx context.Context, id string, x switchback.Disk) (hashedDisk, error) {
	socket := filepath.Join(a.cfg.RunDir, id+"."+x.Name+".hash")
	os.Remove(socket)
	s, err := qemu.StartNBD(ctx, qemu.NBDOptions{Path: x.Path, Format: "qcow2", Socket: socket, Export: x.Name, ReadOnly: true, ForceShare: true})
	if err != nil {
		return hashedDisk{}, err
	}
	stop := func() error { return s.Stop(context.Background()) }
	c, err := nbd.Dial(ctx, "unix", socket, nbd.Options{Export: x.Name, MetaContexts: []string{nbd.ContextAllocation}})
	if err != nil {
		return hashedDisk{}, errors.Join(err, stop())
	}
	return hashedDisk{name: x.Name, size: c.Size(), ReaderAt: c,
		zeros: func(ctx context.Context, f func(off, length int64)) error {
			list, err := c.BlockStatus(ctx, nbd.ContextAllocation, 0, c.Size())
			for _, e := range list {
				if e.Zero() {
					f(e.Offset, e.Length)
				}
			}
			return err
		},
		close: func() error { return errors.Join(c.Close(), stop()) }}, nil
}

// hashPoint hashes the disks at a point, through the very view a VM runs from.
func (a *Agent) hashPoint(ctx context.Context, t *task, v *vm, replica *journal.Replica, req agentapi.Task, p agentapi.HashParams) (_ any, err error) {
	view, err := journal.OpenView(replica.Dir(), p.Sequence)
	if err != nil {
		return nil, err
	}
	defer view.Close()
	var disks []hashedDisk
	for _, d := range view.Disks() {
		disks = append(disks, hashedDisk{name: d.Name(), size: d.Size(), ReaderAt: d, zeros: func(_ context.Context, f func(off, length int64)) error {
			for off := int64(0); off < d.Size(); {
				list, err := d.Extents(off, min(1<<34, d.Size()-off))
				if err != nil {
					return err
				}
				for _, e := range list {
					if off = e.Offset + e.Length; e.Zero {
						f(e.Offset, e.Length)
					}
				}
			}
			return nil
		}})
	}
	t.Report("hashing", &replicator.Progress{})
	return hashAll(ctx, t, p.Leaves, disks)
}

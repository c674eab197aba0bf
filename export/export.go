// Package export copies a recovery point, or a snapshot, out of its replica, into forms that
// need nothing of Switchback: raw images, qcow2 images, or a directory that any
// QEMU starts from.
//
// What is being written has a name of its own, PATH.partial, until all of it is
// durable; then it is renamed. So a file under the name that was asked for is
// complete. An interrupted export is begun anew. What is there already is
// compared: if it is the point's content, nothing is left to do; if not, it is
// refused and never overwritten.
//
// The caller owes: the point stays as long as Run does (a pin).
package export

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/nbd"
	"github.com/switchback-dr/switchback/qcow2"
	"github.com/switchback-dr/switchback/qemu"
)

// Format is the form of what is written.
type Format string

const (
	Raw   Format = "raw"   // images of the disks' bytes, sparse
	QCOW2 Format = "qcow2" // images for QEMU
	// Dir is a directory with qcow2 images, run.sh, and the domain's
	// definition where one is known.
	Dir Format = "dir"
)

// ParseFormat returns the format called name.
func ParseFormat(name string) (Format, error) {
	switch f := Format(name); f {
	case Raw, QCOW2, Dir:
		return f, nil
	}
	return "", switchback.Errorf(switchback.CodeInvalid, "unknown format %q", name).WithHint("raw, qcow2 or dir")
}

// Request says what is exported to where.
type Request struct {
	// Replica is the replica's directory.
	Replica string
	Point   switchback.Sequence
	// Snapshot is exported instead of a point where it names one.
	Snapshot string
	Format   Format
	// To is an absolute path that does not exist: of the image for a VM of one
	// disk, else (and always for Dir) of a directory that gets an image per disk.
	To string
	// Definition is the domain's, for Dir; "" = run.sh has defaults. Rewrite
	// points its disks at the images; nil leaves the definition out.
	Definition string
	Rewrite    func(definition string, images map[string]string) (string, error)
	// ReserveBytes of the target's file system stay free.
	ReserveBytes int64
	// SocketDir holds sockets of qemu-nbd; its path must be short.
	SocketDir string
	// Progress, if not nil, is told the bytes done and in total: of content, without zeros.
	Progress func(done, total int64)
}

// Result is what was written.
type Result struct {
	// Point is the one exported, or the one that Snapshot has left.
	Point    switchback.Point `json:"point"`
	Snapshot string           `json:"snapshot,omitempty"`
	Path     string           `json:"path"`
	Files    []string         `json:"files"`
	// Bytes is the content copied; SizeBytes that of the disks.
	Bytes     int64 `json:"bytes"`
	SizeBytes int64 `json:"size_bytes"`
	// Existed: it was there before, and is the point's content.
	Existed bool          `json:"existed,omitempty"`
	Took    time.Duration `json:"took"`
}

const chunk = 1 << 20

// piece is a range of a disk that is not known to be zero.
type piece struct{ offset, length int64 }

type source struct {
	*journal.DiskView
	pieces []piece
}

// run is one export.
type run struct {
	Request
	disks       []source
	done, total int64
}

// Run exports. An error leaves nothing behind but, when this process dies, PATH.partial.
func Run(ctx context.Context, req Request) (Result, error) {
	began := time.Now()
	res := Result{Path: req.To, Snapshot: req.Snapshot}
	if !filepath.IsAbs(req.To) {
		return res, switchback.Errorf(switchback.CodeInvalid, "path %q is not absolute", req.To)
	}
	view, err := journal.OpenNamed(req.Replica, req.Point, req.Snapshot)
	if err != nil {
		return res, err
	}
	defer view.Close()
	res.Point = view.Point()
	r := &run{Request: req}
	for _, d := range view.Disks() {
		s := source{DiskView: d}
		for off := int64(0); off < d.Size(); {
			list, err := d.Extents(off, min(1<<32, d.Size()-off))
			if err != nil {
				return res, err
			}
			for _, e := range list {
				off = e.Offset + e.Length
				if e.Zero {
					continue
				}
				for at := e.Offset; at < off; at += chunk - at%chunk {
					s.pieces = append(s.pieces, piece{at, min(off-at, chunk-at%chunk)})
				}
				r.total += e.Length
			}
		}
		res.SizeBytes += d.Size()
		r.disks = append(r.disks, s)
	}
	names := r.names()
	for _, d := range r.disks {
		res.Files = append(res.Files, filepath.Join(req.To, names[d.Name()]))
	}
	if _, err := os.Lstat(req.To); err == nil {
		if err := r.compare(ctx); err != nil {
			return res, err
		}
		res.Existed, res.Took = true, time.Since(began)
		return res, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return res, err
	}
	if err := r.room(); err != nil {
		return res, err
	}
	partial := req.To + ".partial"
	if err := os.RemoveAll(partial); err != nil {
		return res, err
	}
	if err := r.write(ctx, partial); err != nil {
		return res, errors.Join(err, os.RemoveAll(partial))
	}
	if err := os.Rename(partial, req.To); err != nil {
		return res, err
	}
	res.Bytes, res.Took = r.total, time.Since(began)
	return res, syncDir(filepath.Dir(req.To))
}

// names are the files of the disks below To; "" where To is the file itself.
func (r *run) names() map[string]string {
	out := map[string]string{}
	for _, d := range r.disks {
		switch {
		case r.Format == Dir:
			out[d.Name()] = d.Name() + ".qcow2"
		case len(r.disks) == 1:
			out[d.Name()] = ""
		default:
			out[d.Name()] = d.Name() + "." + string(r.Format)
		}
	}
	return out
}

// room refuses what would not fit.
func (r *run) room() error {
	parent := filepath.Dir(r.To)
	var st unix.Statfs_t
	if err := unix.Statfs(parent, &st); err != nil {
		return switchback.Errorf(switchback.CodeNotFound, "directory %s: %w", parent, err).WithHint("make it first")
	}
	free := int64(st.Bavail) * st.Bsize
	need := r.total + r.total/512 + r.ReserveBytes + 1<<20
	if free < need {
		return switchback.Errorf(switchback.CodeNoSpace, "the export needs %d MiB, %s has %d MiB free, of which %d MiB are kept in reserve",
			(need-r.ReserveBytes)>>20, parent, free>>20, r.ReserveBytes>>20).WithHint("make room there, or export to another place")
	}
	return nil
}

func (r *run) tell(n int64) {
	r.done += n
	if r.Progress != nil {
		r.Progress(r.done, r.total)
	}
}

func (r *run) write(ctx context.Context, partial string) error {
	names := r.names()
	if names[r.disks[0].Name()] != "" {
		if err := os.Mkdir(partial, 0o755); err != nil {
			return err
		}
	}
	for _, d := range r.disks {
		path := filepath.Join(partial, names[d.Name()])
		var err error
		if r.Format == Raw {
			err = r.raw(ctx, d, path)
		} else {
			err = r.qcow2(ctx, d, path)
		}
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.Name(), err)
		}
	}
	if r.Format == Dir {
		if err := r.describe(partial); err != nil {
			return err
		}
	}
	if names[r.disks[0].Name()] != "" {
		return syncDir(partial)
	}
	return nil
}

// copyTo reads the disk in order and writes what is not zero through put, which
// may be called from several goroutines.
func (r *run) copyTo(ctx context.Context, d source, put func(p []byte, off int64) error) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	told := make(chan int64, 64)
	counted := make(chan struct{})
	go func() {
		defer close(counted)
		for n := range told {
			r.tell(n)
		}
	}()
	for _, x := range d.pieces {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error {
			if err := gctx.Err(); err != nil {
				return err
			}
			p := make([]byte, x.length)
			if n, err := d.ReadAt(p, x.offset); n < len(p) {
				return err
			}
			if !allZero(p) {
				if err := put(p, x.offset); err != nil {
					return err
				}
			}
			told <- x.length
			return nil
		})
	}
	err := g.Wait()
	close(told)
	<-counted
	if ctx.Err() != nil {
		return switchback.Errorf(switchback.CodeCancelled, "export: %w", context.Cause(ctx))
	}
	return err
}

func (r *run) raw(ctx context.Context, d source, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(d.Size()); err != nil {
		return err
	}
	err = r.copyTo(ctx, d, func(p []byte, off int64) error {
		_, err := f.WriteAt(p, off)
		return noSpace(err)
	})
	if err != nil {
		return err
	}
	return f.Sync()
}

func (r *run) qcow2(ctx context.Context, d source, path string) (err error) {
	if err := qemu.Create(ctx, path, qemu.CreateOptions{Format: "qcow2", SizeBytes: d.Size()}); err != nil {
		return err
	}
	socket := filepath.Join(r.SocketDir, fmt.Sprintf("export-%d-%d.sock", os.Getpid(), time.Now().UnixNano()%1e9))
	server, err := qemu.StartNBD(ctx, qemu.NBDOptions{Path: path, Format: "qcow2", Socket: socket, Export: d.Name(), Cache: "writeback"})
	if err != nil {
		return err
	}
	defer func() {
		if e := server.Stop(context.WithoutCancel(ctx)); err == nil {
			err = e
		}
		os.Remove(socket)
		if err == nil {
			err = syncFile(path)
		}
	}()
	c, err := nbd.Dial(ctx, "unix", socket, nbd.Options{Export: d.Name()})
	if err != nil {
		return err
	}
	defer c.Close()
	err = r.copyTo(ctx, d, func(p []byte, off int64) error {
		_, err := c.WriteAtContext(ctx, p, off)
		return err
	})
	if err != nil {
		return err
	}
	return c.Flush(ctx)
}

// describe writes the definition and run.sh.
func (r *run) describe(partial string) error {
	images := map[string]string{}
	for _, d := range r.disks {
		images[d.Name()] = filepath.Join(r.To, d.Name()+".qcow2")
	}
	if r.Definition != "" && r.Rewrite != nil {
		text, err := r.Rewrite(r.Definition, images)
		if err != nil {
			return err
		}
		if err := writeFile(filepath.Join(partial, "domain.xml"), []byte(text), 0o600); err != nil {
			return err
		}
	}
	var names []string
	for _, d := range r.disks {
		names = append(names, d.Name())
	}
	script, err := Script(r.Definition, names)
	if err != nil {
		return err
	}
	return writeFile(filepath.Join(partial, "run.sh"), []byte(script), 0o755)
}

// compare refuses what is there unless it is the point's content.
func (r *run) compare(ctx context.Context) error {
	exists := func(why string, args ...any) error {
		return switchback.Errorf(switchback.CodeConflict, "%s exists and is not this point: %s", r.To, fmt.Sprintf(why, args...)).
			WithHint("name another path, or remove it")
	}
	names := r.names()
	for _, d := range r.disks {
		path := filepath.Join(r.To, names[d.Name()])
		var have interface {
			io.ReaderAt
			io.Closer
		}
		var size int64
		if r.Format == Raw {
			f, err := os.Open(path)
			if err != nil {
				return exists("%v", err)
			}
			st, err := f.Stat()
			if err != nil || !st.Mode().IsRegular() {
				f.Close()
				return exists("%s is no file", path)
			}
			have, size = f, st.Size()
		} else {
			im, err := qcow2.Open(path)
			if err != nil {
				return exists("%v", err)
			}
			have, size = im, im.Size()
		}
		err := func() error {
			defer have.Close()
			if size != d.Size() {
				return exists("disk %s has %d bytes there", d.Name(), size)
			}
			a, b := make([]byte, chunk), make([]byte, chunk)
			var stored extent.Set
			for _, x := range d.pieces {
				stored.Add(x.offset, x.length)
			}
			for off := int64(0); off < size; off += chunk {
				if ctx.Err() != nil {
					return switchback.Errorf(switchback.CodeCancelled, "export: %w", context.Cause(ctx))
				}
				n := min(chunk, size-off)
				if stored.Clip(off, n).IsEmpty() {
					clear(a)
				} else if m, err := d.ReadAt(a[:n], off); int64(m) < n {
					return err
				}
				if m, err := have.ReadAt(b[:n], off); int64(m) < n {
					return exists("disk %s at %d: %v", d.Name(), off, err)
				}
				if !bytes.Equal(a[:n], b[:n]) {
					return exists("disk %s differs at %d", d.Name(), off)
				}
			}
			return nil
		}()
		if err != nil {
			return err
		}
	}
	if r.Format == Dir {
		if _, err := os.Stat(filepath.Join(r.To, "run.sh")); err != nil {
			return exists("%v", err)
		}
	}
	return nil
}

var zeros [chunk]byte

func allZero(p []byte) bool { return bytes.Equal(p, zeros[:len(p)]) }

func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return switchback.Errorf(switchback.CodeNoSpace, "export: %w", err).WithHint("make room there, or export to another place")
	}
	return err
}

func writeFile(path string, b []byte, mode fs.FileMode) error {
	if err := os.WriteFile(path, b, mode); err != nil {
		return noSpace(err)
	}
	return syncFile(path)
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return noSpace(f.Sync())
}

func syncDir(path string) error { return syncFile(path) }

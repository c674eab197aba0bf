package guest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"github.com/switchback-dr/switchback/lab/guest/manifest"
)

// Where things lie on a disk; see the package comment.
const (
	MinDiskBytes = 4 << 30
	RecordOffset = 2 << 30
	Slots        = 4096
	DirtyOffset  = RecordOffset + 64<<20
)

// fakeTime is what e2fsprogs takes for now, so that equal disks are equal.
const fakeTime = "1700000000"

// Content says what MakeDisk puts on a disk.
type Content struct {
	// Bytes of files in an ext4 file system at the start of the disk; 0 for no
	// file system at all. At most RecordOffset less a tenth.
	Bytes int64
	// Seed decides the content: equal seeds, sizes and tools give equal disks.
	Seed uint64
	// RecordOffset, if not 0, is where the file system must end at the latest.
	RecordOffset int64
	// RawFormat makes a sparse raw file instead of a qcow2 image.
	RawFormat bool
}

// MakeDisk writes a disk image of the given virtual size. It is sparse: holes
// stay holes. 256 MiB of content take about a second and a half.
func MakeDisk(ctx context.Context, path string, size int64, c Content) (err error) {
	if c.RecordOffset == 0 {
		c.RecordOffset = RecordOffset
	}
	fsBytes := (c.Bytes + c.Bytes/10 + 32<<20) &^ (1<<20 - 1)
	if size < MinDiskBytes || size%(1<<20) != 0 {
		return fmt.Errorf("disk of %d bytes: need whole MiB and at least %d", size, int64(MinDiskBytes))
	}
	if fsBytes > c.RecordOffset {
		return fmt.Errorf("%d bytes of content do not fit before %d", c.Bytes, c.RecordOffset)
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".makedisk-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	raw := filepath.Join(dir, "raw")
	if err := os.WriteFile(raw, nil, 0o644); err != nil {
		return err
	}
	if err := os.Truncate(raw, size); err != nil {
		return err
	}
	if c.Bytes > 0 {
		tree := filepath.Join(dir, "tree")
		if err := makeFiles(tree, c.Bytes, c.Seed); err != nil {
			return err
		}
		id := fmt.Sprintf("%08x-0000-4000-8000-%012x", uint32(c.Seed>>32), c.Seed&0xffffffffffff)
		_, err := run(ctx, "", "env", "E2FSPROGS_FAKE_TIME="+fakeTime,
			"mkfs.ext4", "-q", "-F", "-b", "4096", "-U", id, "-E", "hash_seed="+id+",lazy_itable_init=0,nodiscard,root_owner=0:0", "-J", "size=4",
			"-d", tree, raw, fmt.Sprint(fsBytes/4096))
		if err != nil {
			return err
		}
		if err := fixTimes(ctx, dir, raw, tree); err != nil {
			return err
		}
	}
	if c.RawFormat {
		return os.Rename(raw, path)
	}
	_, err = run(ctx, "", "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
	return err
}

// fixTimes gives all files of the file system one time. mkfs copies the times of
// the tree, and a file's change time cannot be set in the tree itself.
func fixTimes(ctx context.Context, dir, raw, tree string) error {
	files, err := os.ReadDir(tree)
	if err != nil {
		return err
	}
	var script strings.Builder
	for _, name := range append([]string{""}, names(files)...) {
		for _, field := range []string{"atime", "mtime", "ctime"} {
			fmt.Fprintf(&script, "set_inode_field /%s %s @%s\n", name, field, fakeTime)
			fmt.Fprintf(&script, "set_inode_field /%s %s_extra 0\n", name, field)
		}
	}
	cmds := filepath.Join(dir, "times")
	if err := os.WriteFile(cmds, []byte(script.String()), 0o644); err != nil {
		return err
	}
	_, err = run(ctx, "", "env", "E2FSPROGS_FAKE_TIME="+fakeTime, "debugfs", "-w", "-f", cmds, raw)
	return err
}

func names(es []os.DirEntry) (ns []string) {
	for _, e := range es {
		ns = append(ns, e.Name())
	}
	return ns
}

// makeFiles writes files of up to 8 MiB, some compressible and some not, and
// their manifest.
func makeFiles(dir string, total int64, seed uint64) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	var s [32]byte
	for i := range 8 {
		s[i] = byte(seed >> (8 * i))
	}
	source := rand.NewChaCha8(s)
	rnd := rand.New(source)
	var list []byte
	buf := make([]byte, 1<<20)
	for i := 0; total > 0; i++ {
		e := manifest.Entry{Path: fmt.Sprintf("file-%04d", i), Size: min(total, 1<<20+rnd.Int64N(7<<20))}
		total -= e.Size
		f, err := os.Create(filepath.Join(dir, e.Path))
		if err != nil {
			return err
		}
		h := manifest.NewHash()
		for left, kind := e.Size, i%3; left > 0; {
			b := buf[:min(left, int64(len(buf)))]
			fill(b, source, kind)
			h.Write(b)
			if _, err := f.Write(b); err != nil {
				f.Close()
				return err
			}
			left -= int64(len(b))
		}
		if err := f.Close(); err != nil {
			return err
		}
		e.Sum = h.Sum()
		list = e.Append(list)
	}
	return os.WriteFile(filepath.Join(dir, manifest.Name), list, 0o644)
}

// fill makes content like that of real disks: noise (kind 0), text (1), or
// records with some noise among much that repeats (2).
func fill(b []byte, noise *rand.ChaCha8, kind int) {
	switch kind {
	case 0:
		noise.Read(b)
	case 1:
		words := [...]string{"disk ", "site ", "recovery ", "point ", "journal ", "epoch ", "agent ", "the ", "of ", "a ", "policy ", "replica\n", "is ", "and ", "server ", "home\n"}
		for len(b) > 0 {
			for x, i := noise.Uint64(), 0; i < 16 && len(b) > 0; i++ {
				b = b[copy(b, words[x>>(4*i)&15]):]
			}
		}
	default:
		for len(b) > 0 {
			n := min(len(b), 512)
			noise.Read(b[:min(n, 128)])
			for i := 128; i < n; i++ {
				b[i] = byte(i)
			}
			b = b[n:]
		}
	}
}

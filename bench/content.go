package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/switchback-dr/switchback/lab/guest"
)

// sizes of everything; the quick ones are for development.
type sizes struct {
	disk, content   int64 // of each guest's disk
	files, check    int64 // of the file system that a booting guest checks
	span            int64 // of the area that changes go to
	small, mixed    int64 // changes before a cycle
	latencyWrites   int   // of one sample
	randomReads     int
	viewPoints      int   // segments under the view, at least
	viewPointChange int64 // changed by each
	drills          int   // in a row
	manyPoints      int   // that opening a view must not depend on
}

func sizesOf(quick bool) sizes {
	if quick {
		return sizes{disk: guest.MinDiskBytes, content: 320 << 20, files: 96 << 20, check: 72 << 20, span: 256 << 20,
			small: 1 << 20, mixed: 8 << 20, latencyWrites: 500, randomReads: 5000, viewPoints: 4, viewPointChange: 4 << 20, drills: 2, manyPoints: 200}
	}
	return sizes{disk: 8 << 30, content: 2560 << 20, files: 160 << 20, check: 72 << 20, span: 2 << 30,
		small: 1 << 20, mixed: 64 << 20, latencyWrites: 8000, randomReads: 100000, viewPoints: 32, viewPointChange: 32 << 20, drills: 10, manyPoints: 1000}
}

const (
	runLength = 64 << 20 // of content between two holes
	holeAfter = 12 << 20
)

// makeDisk makes a guest's disk: the lab's file system at its start, and from
// guest.DirtyOffset on mixed content with holes: what lies in /usr, and data that
// compresses by half.
func makeDisk(ctx context.Context, path string, z sizes) (err error) {
	raw := path + ".raw"
	defer os.Remove(raw)
	if err := guest.MakeDisk(ctx, raw, z.disk, guest.Content{Bytes: z.files, Seed: 2, RawFormat: true}); err != nil {
		return err
	}
	f, err := os.OpenFile(raw, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	next, stop := iter.Pull(usrFiles)
	defer stop()
	src := &mixture{rnd: rand.NewChaCha8([32]byte{2}), next: next}
	defer src.close()
	off := int64(guest.DirtyOffset)
	for left := z.content - z.files; left > 0; {
		n := min(left, runLength)
		if off+n > z.disk {
			return fmt.Errorf("%d bytes of content do not fit into the disk", z.content)
		}
		if _, err := io.CopyN(io.NewOffsetWriter(f, off), src, n); err != nil {
			return err
		}
		off, left = off+n+holeAfter, left-n
	}
	out, err := exec.CommandContext(ctx, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path).CombinedOutput()
	if err != nil {
		return fmt.Errorf("qemu-img convert: %w: %s", err, out)
	}
	return nil
}

// mixture alternates between real files and generated data, 8 MiB of each; when
// the files are used up all is generated.
type mixture struct {
	rnd  *rand.ChaCha8
	next func() (path string, ok bool)
	file *os.File
	pos  int64
}

func (m *mixture) close() {
	if m.file != nil {
		m.file.Close()
	}
}

func (m *mixture) Read(p []byte) (int, error) {
	const turn = 8 << 20
	p = p[:min(int64(len(p)), turn-m.pos%turn)]
	n := 0
	if m.pos/turn%2 == 0 {
		n = m.readFiles(p)
	}
	if n == 0 {
		n = m.generate(p)
	}
	m.pos += int64(n)
	return n, nil
}

// readFiles reads on in the current file, or the next ones; each ends at a whole
// 4 KiB, as in a file system. 0 when there are no more.
func (m *mixture) readFiles(p []byte) int {
	for {
		if m.file == nil {
			path, ok := m.next()
			if !ok {
				return 0
			}
			f, err := os.Open(path)
			if err != nil {
				continue
			}
			m.file = f
		}
		n, err := io.ReadFull(m.file, p)
		if err == nil {
			return n
		}
		m.close()
		m.file = nil
		if n > 0 {
			end := min((n+4095)&^4095, len(p))
			clear(p[n:end])
			return end
		}
	}
}

// generate fills p so that each 4 KiB are noise and repetition, half of each.
func (m *mixture) generate(p []byte) int {
	m.rnd.Read(p)
	for b := p; len(b) > 0; b = b[min(len(b), 4096):] {
		for i := 2048; i < min(len(b), 4096); i++ {
			b[i] = "switchback bench "[i%17]
		}
	}
	return len(p)
}

// usrFiles goes through the regular files under /usr in their lexical order.
func usrFiles(yield func(string) bool) {
	filepath.WalkDir("/usr", func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !yield(path) {
			return fs.SkipAll
		}
		return nil
	})
}

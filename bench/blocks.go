package main

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/zeebo/xxh3"
	"golang.org/x/sync/errgroup"

	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/nbd"
	"github.com/switchback-dr/switchback/qemu"
)

const (
	blockSize = 4096
	scanPiece = 4 << 20 // one read
)

// blocks are the hashes of a disk's 4 KiB blocks; 0 is a block of zeros.
type blocks []uint64

// differing returns the bytes of the blocks in which two states differ.
func (a blocks) differing(b blocks) (n int64) {
	for i := range a {
		if a[i] != b[i] {
			n += blockSize
		}
	}
	return n
}

func hashBlock(p []byte) uint64 {
	zero := true
	for _, c := range p {
		if c != 0 {
			zero = false
			break
		}
	}
	if zero {
		return 0
	}
	return xxh3.Hash(p) | 1
}

// scanNBD hashes an export whose size is a multiple of the block size.
func scanNBD(ctx context.Context, socket, export string) (out blocks, err error) {
	c, err := nbd.Dial(ctx, "unix", socket, nbd.Options{Export: export, MetaContexts: []string{nbd.ContextAllocation}})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Close()) }()
	extents, err := c.BlockStatus(ctx, nbd.ContextAllocation, 0, c.Size())
	if err != nil {
		return nil, err
	}
	out = make(blocks, c.Size()/blockSize)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(4)
	for _, x := range extents {
		if x.Zero() {
			continue
		}
		end := (x.End() + blockSize - 1) / blockSize * blockSize
		for off := x.Offset / blockSize * blockSize; off < end; off += scanPiece {
			g.Go(func() error {
				buf := make([]byte, min(scanPiece, end-off))
				if _, err := c.ReadAtContext(gctx, buf, off); err != nil {
					return err
				}
				for i := int64(0); i < int64(len(buf)); i += blockSize {
					out[(off+i)/blockSize] = hashBlock(buf[i : i+blockSize])
				}
				return nil
			})
		}
	}
	return out, g.Wait()
}

// scan hashes the disk of our guest, which runs but must not be writing.
func (b *bed) scan(ctx context.Context) (out blocks, err error) {
	socket := filepath.Join(b.lab.Site(lab.Primary).Config().RunDir, "scan")
	s, err := qemu.StartNBD(ctx, qemu.NBDOptions{Path: b.hostPath(b.ours.disk), Format: "qcow2", Socket: socket, ReadOnly: true, ForceShare: true})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.Stop(context.WithoutCancel(ctx))) }()
	return scanNBD(ctx, socket, "")
}

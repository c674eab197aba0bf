package qcow2

import (
	"bytes"
	"compress/flate"
	"io"

	"github.com/klauspost/compress/zstd"
)

// inflatedCache keeps the clusters that were decompressed last; guests read a
// cluster in several pieces. It is guarded by Image.mu.
type inflatedCache struct {
	entries [16]struct {
		entry uint64
		data  []byte
	}
	next int
}

func (c *inflatedCache) get(entry uint64) []byte {
	for _, e := range c.entries {
		if e.entry == entry && e.data != nil {
			return e.data
		}
	}
	return nil
}

func (c *inflatedCache) put(entry uint64, data []byte) {
	c.entries[c.next].entry, c.entries[c.next].data = entry, data
	c.next = (c.next + 1) % len(c.entries)
}

// readCompressed reads a part of a compressed cluster [compressed clusters
// descriptor].
func (im *Image) readCompressed(p []byte, r run) error {
	im.mu.Lock()
	data := im.inflated.get(r.entry)
	im.mu.Unlock()
	if data == nil {
		var err error
		if data, err = im.inflate(r); err != nil {
			return err
		}
		im.mu.Lock()
		im.inflated.put(r.entry, data)
		im.mu.Unlock()
	}
	copy(p, data[r.offset&(1<<im.clusterBits-1):])
	return nil
}

func (im *Image) inflate(r run) ([]byte, error) {
	x := 62 - (im.clusterBits - 8)
	host := int64(r.entry & (1<<x - 1))
	sectors := int64(r.entry&(1<<62-1)>>x) + 1
	stored := make([]byte, sectors*512-host&511)
	n, err := im.f.ReadAt(stored, host)
	if n == 0 || err != nil && err != io.EOF {
		return nil, corrupt("compressed cluster of guest offset %d: %w", r.offset, err)
	}
	stored = stored[:n] // the last sector may be cut short
	data := make([]byte, 1<<im.clusterBits)
	if im.zstd {
		var d *zstd.Decoder
		d, err = zstd.NewReader(bytes.NewReader(stored), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(16<<20))
		if err == nil {
			_, err = io.ReadFull(d, data)
			d.Close()
		}
	} else {
		_, err = io.ReadFull(flate.NewReader(bytes.NewReader(stored)), data)
	}
	if err != nil {
		return nil, corrupt("compressed cluster of guest offset %d: %w", r.offset, err)
	}
	return data, nil
}

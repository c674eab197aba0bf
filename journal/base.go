package journal

import (
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/qcow2"
)

// Extent is a part of a disk that reads as zeros without being stored, or that
// is not known to.
type Extent struct {
	Offset int64
	Length int64
	Zero   bool
}

// baseReader is a base image open for reading.
type baseReader interface {
	Size() int64
	io.ReaderAt
	// Extents describes [off, off+length), clipped to Size, without gaps.
	Extents(off, length int64) ([]qcow2.Extent, error)
	Close() error
}

func openBase(d ReplicaDisk) (baseReader, error) {
	if d.BaseFormat == "raw" {
		f, err := os.Open(d.BasePath)
		if errors.Is(err, os.ErrNotExist) {
			return nil, switchback.Errorf(switchback.CodeNotFound, "base of disk %s: %w", d.Name, err)
		} else if err != nil {
			return nil, fault(err, "base of disk %s", d.Name)
		}
		size, err := f.Seek(0, io.SeekEnd) // also right for block devices
		if err != nil {
			f.Close()
			return nil, fault(err, "base of disk %s", d.Name)
		}
		return &rawBase{f, size}, nil
	}
	im, err := qcow2.Open(d.BasePath)
	if err != nil {
		e := switchback.Errorf(switchback.CodeOf(err), "base of disk %s: %w", d.Name, err)
		return nil, e
	}
	return im, nil
}

// rawBase is a raw image or block device.
type rawBase struct {
	*os.File
	size int64
}

func (b *rawBase) Size() int64 { return b.size }

// Extents finds holes with SEEK_DATA and SEEK_HOLE. The file offset these move
// is not otherwise used, so concurrent calls do no harm.
func (b *rawBase) Extents(off, length int64) ([]qcow2.Extent, error) {
	end := min(off+length, b.size)
	var out []qcow2.Extent
	for off < end {
		data, err := unix.Seek(int(b.Fd()), off, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO): // no data up to the end
			data = end
		case err != nil: // a device or file system that does not know
			return append(out, qcow2.Extent{Offset: off, Length: end - off}), nil
		}
		if data > off {
			n := min(data, end) - off
			out = append(out, qcow2.Extent{Offset: off, Length: n, Zero: true})
			off += n
			continue
		}
		hole, err := unix.Seek(int(b.Fd()), off, unix.SEEK_HOLE)
		if err != nil || hole <= off {
			hole = end
		}
		n := min(hole, end) - off
		out = append(out, qcow2.Extent{Offset: off, Length: n})
		off += n
	}
	return out, nil
}

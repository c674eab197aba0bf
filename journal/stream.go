package journal

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"

	"github.com/zeebo/xxh3"

	"github.com/switchback-dr/switchback"
)

// segmentStream reads a segment from front to back and verifies all of it with
// bounded memory: one frame, and the index.
type segmentStream struct {
	header Header
	head   []byte // the header's bytes
	r      *bufio.Reader
	offset int64
	frames []frame // that passed
	raw    []byte
	// keep, if set, is given the content of each frame that passed; raw is only
	// valid during the call.
	keep func(disk int, raw []byte) error
	// denseBytes counts raw bytes in frames that look random.
	denseBytes int64
}

// openStream reads the header.
func openStream(r io.Reader) (*segmentStream, error) {
	s := &segmentStream{r: bufio.NewReaderSize(r, 256<<10), raw: make([]byte, maxFrame)}
	fixed := make([]byte, headerFixed)
	if err := s.fill(fixed); err != nil {
		return nil, err
	}
	n, err := headerLength(fixed)
	if err != nil {
		return nil, err
	}
	s.head = make([]byte, n)
	copy(s.head, fixed)
	if err := s.fill(s.head[headerFixed:]); err != nil {
		return nil, err
	}
	s.header, err = decodeHeader(s.head)
	return s, err
}

// fill reads len(b) bytes. A stream that ends is corrupt, a reader that fails
// is unavailable, unless its error says otherwise.
func (s *segmentStream) fill(b []byte) error {
	n, err := io.ReadFull(s.r, b)
	s.offset += int64(n)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return corrupt("segment ends early, after %d bytes", s.offset)
	}
	return readFault(err)
}

func readFault(err error) error {
	var typed *switchback.Error
	if errors.As(err, &typed) {
		return err
	}
	if errors.Is(err, context.Canceled) {
		return switchback.Errorf(switchback.CodeCancelled, "receiving a segment: %w", err)
	}
	return switchback.Errorf(switchback.CodeUnavailable, "receiving a segment: %w", err)
}

// copyTo reads the rest of the segment, verifies it and writes the whole of it,
// header included, to w. It returns the index, the footer and the length.
func (s *segmentStream) copyTo(ctx context.Context, w io.Writer) (*index, footer, int64, error) {
	fail := func(err error) (*index, footer, int64, error) { return nil, footer{}, 0, err }
	if _, err := w.Write(s.head); err != nil {
		return fail(err)
	}
	record := make([]byte, frameHeadSize+maxFrame)
	for {
		if err := ctx.Err(); err != nil {
			return fail(readFault(err))
		}
		if err := s.fill(record[:frameHeadSize]); err != nil {
			return fail(err)
		}
		if record[0] == indexTag {
			break
		}
		n, err := s.frame(record)
		if err != nil {
			return fail(err)
		}
		if _, err := w.Write(record[:n]); err != nil {
			return fail(err)
		}
	}

	indexOffset := s.offset - frameHeadSize
	if err := s.fill(record[frameHeadSize:indexHeadSize]); err != nil {
		return fail(err)
	}
	h, err := decodeIndexHead(record[:indexHeadSize], indexOffset-int64(len(s.head)))
	if err != nil {
		return fail(err)
	}
	if h.frames != int64(len(s.frames)) {
		return fail(corrupt("segment index of %d frames after %d", h.frames, len(s.frames)))
	}
	packed := make([]byte, h.length())
	copy(packed, record[:indexHeadSize])
	if err := s.fill(packed[indexHeadSize:]); err != nil {
		return fail(err)
	}
	ix, err := decodeIndex(packed, int64(len(s.head)), indexOffset, s.header.Disks)
	if err != nil {
		return fail(err)
	}
	for i := range s.frames {
		if ix.frames[i] != s.frames[i] {
			return fail(corrupt("disk %s: frame %d is not the one that the index names", s.header.Disks[ix.frames[i].disk].Name, i))
		}
	}
	end := make([]byte, footerSize)
	if err := s.fill(end); err != nil {
		return fail(err)
	}
	foot, err := decodeFooter(end, s.offset)
	if err != nil {
		return fail(err)
	}
	if err := foot.matches(s.head, packed, ix, indexOffset); err != nil {
		return fail(err)
	}
	if _, err := s.r.ReadByte(); err == nil {
		return fail(corrupt("bytes follow the end of the segment"))
	} else if !errors.Is(err, io.EOF) {
		return fail(readFault(err))
	}
	if _, err := w.Write(packed); err != nil {
		return fail(err)
	}
	if _, err := w.Write(end); err != nil {
		return fail(err)
	}
	return ix, foot, s.offset, nil
}

// matches verifies the footer against the parts it speaks of.
func (f footer) matches(head, packed []byte, ix *index, indexOffset int64) error {
	data, zero := ix.totals()
	if f.indexOffset != indexOffset || f.indexLength != int64(len(packed)) || f.dataBytes != data || f.zeroBytes != zero {
		return corrupt("segment footer does not match its index")
	}
	if digest(head, packed) != f.digest {
		return corrupt("segment does not match its digest %x", f.digest[:6])
	}
	return nil
}

// frame reads the frame whose head is in record into record, verifies it and
// returns its length with head.
func (s *segmentStream) frame(record []byte) (int, error) {
	at := s.offset - frameHeadSize
	if record[0] != frameTag {
		return 0, corrupt("byte %d of the segment is no frame and no index", at)
	}
	f := frame{
		codec: Codec(record[1]), disk: binary.LittleEndian.Uint16(record[2:]), sectors: record[4],
		stored: uint32(record[5]) | uint32(record[6])<<8 | uint32(record[7])<<16,
	}
	if err := f.check(len(s.header.Disks)); err != nil {
		return 0, corrupt("byte %d of the segment: %w", at, err)
	}
	end := frameHeadSize + int(f.stored)
	if err := s.fill(record[frameHeadSize:end]); err != nil {
		return 0, err
	}
	disk := s.header.Disks[f.disk].Name
	raw := s.raw[:f.rawLength()]
	if err := decompress(raw, record[frameHeadSize:end], f.codec); err != nil {
		return 0, corrupt("disk %s: frame %d at byte %d of the segment: %w", disk, len(s.frames), at, err)
	}
	f.offset, f.sum = at+frameHeadSize, xxh3.Hash128(raw).Bytes()
	if !bytes.Equal(f.sum[8:], record[8:16]) {
		return 0, corrupt("disk %s: frame %d at byte %d of the segment does not match its checksum", disk, len(s.frames), at)
	}
	s.frames = append(s.frames, f)
	if s.keep == nil && dense(raw) {
		s.denseBytes += int64(len(raw))
	}
	if s.keep != nil {
		if err := s.keep(int(f.disk), raw); err != nil {
			return 0, err
		}
	}
	return end, nil
}

package journal

import (
	"encoding/binary"
	"math"
	"slices"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// frame is where a frame lies in its segment file and what it must contain.
type frame struct {
	offset  int64  // of the stored bytes
	stored  uint32 // their length
	disk    uint16
	sectors uint8 // raw length in sectors, less 1
	codec   Codec
	sum     [sumSize]byte // xxh3-128 of the raw content
}

func (f *frame) rawLength() int { return (int(f.sectors) + 1) * sector }

// diskIndex is what a segment holds of one disk.
type diskIndex struct {
	data []extent.Range // in the order of the stream
	zero []extent.Range // in any order
	// frames are the numbers of the disk's frames, in order, and starts the
	// position of each in the disk's stream. They are derived.
	frames []uint32
	starts []int64
}

// index is the decoded index of a segment.
type index struct {
	frames []frame
	disks  []diskIndex
}

// plainLimit bounds what an index with this many frames may decompress to: a
// frame holds at most 128 extents of 20 bytes, and zero extents get the rest.
func plainLimit(frames int64) int64 { return 64<<20 + 4096*frames }

// appendExtent adds a range, growing the last one when it continues it.
func appendExtent(list []extent.Range, r extent.Range) []extent.Range {
	if n := len(list); n > 0 && list[n-1].End() == r.Offset {
		list[n-1].Length += r.Length
		return list
	}
	return append(list, r)
}

// check verifies what encode and the readers rely on: extents are inside their
// disks and disjoint, and as long as the frames. It fills frames and starts.
func (ix *index) check(disks []DiskGeometry) error {
	if len(ix.disks) != len(disks) {
		return switchback.Errorf(switchback.CodeInvalid, "index of %d disks for %d", len(ix.disks), len(disks))
	}
	if len(ix.frames) > math.MaxUint32 {
		return switchback.Errorf(switchback.CodeInvalid, "%d frames in one segment", len(ix.frames))
	}
	length := make([]int64, len(disks))
	for i := range ix.frames {
		f := &ix.frames[i]
		d := &ix.disks[f.disk]
		d.frames = append(d.frames, uint32(i))
		d.starts = append(d.starts, length[f.disk])
		length[f.disk] += int64(f.rawLength())
	}
	for i := range ix.disks {
		d := &ix.disks[i]
		sorted := slices.Concat(d.data, d.zero)
		slices.SortFunc(sorted, func(a, b extent.Range) int {
			if a.Offset < b.Offset {
				return -1
			} else if a.Offset > b.Offset {
				return 1
			}
			return 0
		})
		var end int64
		for _, r := range sorted {
			if r.Offset < 0 || r.Length <= 0 || r.Length > disks[i].SizeBytes || r.Offset > disks[i].SizeBytes-r.Length || r.Offset%sector != 0 || r.Length%sector != 0 {
				return switchback.Errorf(switchback.CodeInvalid, "disk %s: range %v is not on a disk of %d bytes", disks[i].Name, r, disks[i].SizeBytes)
			}
			if r.Offset < end {
				return switchback.Errorf(switchback.CodeInvalid, "disk %s: range %v was given twice", disks[i].Name, r)
			}
			end = r.End()
		}
		var data int64
		for _, r := range d.data {
			data += r.Length
		}
		if data != length[i] {
			return switchback.Errorf(switchback.CodeInvalid, "disk %s: extents of %d bytes over frames of %d", disks[i].Name, data, length[i])
		}
	}
	return nil
}

// totals returns the data and the zero bytes.
func (ix *index) totals() (data, zero int64) {
	for _, d := range ix.disks {
		for _, r := range d.data {
			data += r.Length
		}
		for _, r := range d.zero {
			zero += r.Length
		}
	}
	return data, zero
}

// changed returns the ranges of one disk that the segment holds.
func (ix *index) changed(disk int) extent.Set {
	return extent.NewSet(slices.Concat(ix.disks[disk].data, ix.disks[disk].zero)...)
}

// plain returns the packed part of the index before compression.
func (ix *index) plain() []byte {
	n := len(ix.frames)
	b := make([]byte, 0, 16+7*n)
	b = binary.AppendUvarint(b, uint64(len(ix.disks)))
	for i := range ix.frames {
		b = binary.LittleEndian.AppendUint16(b, ix.frames[i].disk)
	}
	for i := range ix.frames {
		b = append(b, byte(ix.frames[i].codec))
	}
	for i := range ix.frames {
		b = append(b, ix.frames[i].sectors)
	}
	for i := range ix.frames {
		s := ix.frames[i].stored
		b = append(b, byte(s), byte(s>>8), byte(s>>16))
	}
	for _, d := range ix.disks {
		for _, list := range [][]extent.Range{d.data, d.zero} {
			b = binary.AppendUvarint(b, uint64(len(list)))
			var end int64
			for _, r := range list {
				b = binary.AppendVarint(b, (r.Offset-end)/sector)
				b = binary.AppendUvarint(b, uint64(r.Length/sector))
				end = r.End()
			}
		}
	}
	return b
}

// encode returns the index's bytes. check must have passed.
func (ix *index) encode() ([]byte, error) {
	plain := ix.plain()
	if int64(len(plain)) > plainLimit(int64(len(ix.frames))) {
		return nil, switchback.Errorf(switchback.CodeInvalid, "segment has too many extents: index of %d bytes", len(plain)).
			WithHint("send larger zero extents")
	}
	b := make([]byte, indexHeadSize, indexHeadSize+len(plain)/2+sumSize*len(ix.frames)+64)
	b[0] = indexTag
	b = indexEncoder().EncodeAll(plain, b)
	binary.LittleEndian.PutUint64(b[8:], uint64(len(b)-indexHeadSize))
	binary.LittleEndian.PutUint64(b[16:], uint64(len(plain)))
	binary.LittleEndian.PutUint64(b[24:], uint64(len(ix.frames)))
	for i := range ix.frames {
		b = append(b, ix.frames[i].sum[:]...)
	}
	return b, nil
}

// indexHead is the fixed part at the start of an index.
type indexHead struct{ packed, plain, frames int64 }

func (h indexHead) length() int64 { return indexHeadSize + h.packed + sumSize*h.frames }

// decodeIndexHead reads and bounds the fixed part. frameBytes is the room that
// frames have between header and index; each takes more than frameHeadSize.
func decodeIndexHead(b []byte, frameBytes int64) (indexHead, error) {
	h := indexHead{
		packed: int64(binary.LittleEndian.Uint64(b[8:])),
		plain:  int64(binary.LittleEndian.Uint64(b[16:])),
		frames: int64(binary.LittleEndian.Uint64(b[24:])),
	}
	zero := b[1] | b[2] | b[3] | b[4] | b[5] | b[6] | b[7]
	if b[0] != indexTag || zero != 0 || h.frames < 0 || h.frames > frameBytes/frameHeadSize ||
		h.plain < 0 || h.plain > plainLimit(h.frames) || h.packed < 0 || h.packed > h.plain+h.plain/8+1024 {
		return h, corrupt("segment index has a damaged head")
	}
	return h, nil
}

// decodeIndex reads the whole index b of a segment whose header is headerSize
// bytes long and whose index begins at indexOffset. It allocates in proportion
// to what b claims only after the claim is bounded by the size of the segment.
func decodeIndex(b []byte, headerSize, indexOffset int64, disks []DiskGeometry) (*index, error) {
	if len(b) < indexHeadSize {
		return nil, corrupt("segment index of %d bytes", len(b))
	}
	h, err := decodeIndexHead(b, indexOffset-headerSize)
	if err != nil {
		return nil, err
	}
	if h.length() != int64(len(b)) {
		return nil, corrupt("segment index of %d bytes claims %d", len(b), h.length())
	}
	plain, err := decoder().DecodeAll(b[indexHeadSize:indexHeadSize+h.packed], make([]byte, 0, h.plain))
	if err != nil {
		return nil, corrupt("segment index: %w", err)
	}
	if int64(len(plain)) != h.plain {
		return nil, corrupt("segment index has %d bytes, claims %d", len(plain), h.plain)
	}
	p := parser{b: plain}
	if n := p.uvarint(); n != uint64(len(disks)) {
		return nil, corrupt("segment index of %d disks for %d", n, len(disks))
	}
	n := int(h.frames)
	columns := p.take(7 * n)
	if p.bad {
		return nil, corrupt("segment index ends early")
	}
	ix := &index{frames: make([]frame, n), disks: make([]diskIndex, len(disks))}
	sums := b[indexHeadSize+h.packed:]
	offset := headerSize
	for i := range ix.frames {
		f := &ix.frames[i]
		f.disk = binary.LittleEndian.Uint16(columns[2*i:])
		f.codec = Codec(columns[2*n+i])
		f.sectors = columns[3*n+i]
		s := columns[4*n+3*i:]
		f.stored = uint32(s[0]) | uint32(s[1])<<8 | uint32(s[2])<<16
		copy(f.sum[:], sums[sumSize*i:])
		f.offset = offset + frameHeadSize
		offset = f.offset + int64(f.stored)
		if err := f.check(len(disks)); err != nil {
			return nil, err
		}
	}
	if offset != indexOffset {
		return nil, corrupt("frames end at %d, index begins at %d", offset, indexOffset)
	}
	for i := range ix.disks {
		for _, list := range []*[]extent.Range{&ix.disks[i].data, &ix.disks[i].zero} {
			count := p.uvarint()
			if count > uint64(len(p.b)) { // each takes at least two bytes
				return nil, corrupt("segment index claims %d extents", count)
			}
			*list = make([]extent.Range, 0, count)
			var end int64
			for range count {
				gap, length := p.varint(), p.uvarint()
				const most = math.MaxInt64 / sector / 4
				if gap < -most || gap > most || length > most {
					return nil, corrupt("segment index has an extent out of bounds")
				}
				r := extent.Range{Offset: end + gap*sector, Length: int64(length) * sector}
				if r.Offset < 0 || r.Offset > math.MaxInt64/2 {
					return nil, corrupt("segment index has an extent out of bounds")
				}
				*list = append(*list, r)
				end = r.End()
			}
		}
	}
	if p.bad || len(p.b) != 0 {
		return nil, corrupt("segment index is malformed")
	}
	if err := ix.check(disks); err != nil {
		return nil, corrupt("segment index: %w", err)
	}
	return ix, nil
}

// check verifies the fields that are small enough to be wrong.
func (f *frame) check(disks int) error {
	switch {
	case int(f.disk) >= disks:
		return corrupt("frame of disk %d of %d", f.disk, disks)
	case f.codec > CodecZstd:
		return corrupt("frame with unknown %v", f.codec)
	case f.rawLength() > maxFrame || f.stored == 0 || f.stored > maxFrame:
		return corrupt("frame of %d bytes stored in %d", f.rawLength(), f.stored)
	case f.codec == CodecNone && int(f.stored) != f.rawLength():
		return corrupt("uncompressed frame of %d bytes stored in %d", f.rawLength(), f.stored)
	}
	return nil
}

// parser takes values from the front of b; bad is set by the first that is not there.
type parser struct {
	b   []byte
	bad bool
}

func (p *parser) take(n int) []byte {
	if n < 0 || n > len(p.b) {
		p.bad, p.b = true, nil
		return nil
	}
	out := p.b[:n]
	p.b = p.b[n:]
	return out
}

func (p *parser) uvarint() uint64 {
	v, n := binary.Uvarint(p.b)
	if n <= 0 {
		p.bad, p.b = true, nil
		return 0
	}
	p.b = p.b[n:]
	return v
}

func (p *parser) varint() int64 {
	v, n := binary.Varint(p.b)
	if n <= 0 {
		p.bad, p.b = true, nil
		return 0
	}
	p.b = p.b[n:]
	return v
}

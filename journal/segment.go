package journal

import (
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/zeebo/xxh3"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// Damage is one place where stored data is not what it must be. It is the
// cause (errors.As) of errors with CodeCorrupt that come from stored segments.
type Damage struct {
	// Segment is the sequence of the damaged segment, 0 for a base or another
	// file; File is its path.
	Segment switchback.Sequence `json:"segment"`
	File    string              `json:"file"`
	// Disk and Ranges say whose bytes are affected; Disk is empty when the
	// whole segment is.
	Disk   string         `json:"disk,omitempty"`
	Ranges []extent.Range `json:"ranges,omitempty"`
	Reason string         `json:"reason"`
	// Branch is the name of the branch whose segment is damaged; Segment is 0 then.
	Branch string `json:"branch,omitempty"`
	// From and To are the first and last point that read it, as far as was
	// found out (Check does); To may be NewestPoint.
	From switchback.Sequence `json:"from,omitempty"`
	To   switchback.Sequence `json:"to,omitempty"`
}

func (d Damage) Error() string {
	where := fmt.Sprintf("segment %d (%s)", d.Segment, d.File)
	switch {
	case d.Branch != "":
		where = fmt.Sprintf("branch %s (%s)", d.Branch, d.File)
	case d.Segment == 0:
		where = d.File
	}
	if d.Disk != "" {
		where += ", disk " + d.Disk
		for i, r := range d.Ranges {
			if i == 4 {
				where += fmt.Sprintf(" and %d more ranges", len(d.Ranges)-i)
				break
			}
			where += " " + r.String()
		}
	}
	return where + ": " + d.Reason
}

// corrupt wraps d in an Error.
func (d Damage) corrupt() error {
	return &switchback.Error{Code: switchback.CodeCorrupt, Err: d,
		Hint: "points from this one on cannot be trusted in this range; older ones can; a resync repairs newer ones"}
}

const (
	segmentDir    = "segments"
	segmentSuffix = ".seg"
	tempSuffix    = ".tmp"
)

func segmentPath(dir string, seq switchback.Sequence) string {
	return filepath.Join(dir, segmentDir, fmt.Sprintf("%016d%s", seq, segmentSuffix))
}

// segmentSequence returns the sequence in the name of a segment's file or reference.
func segmentSequence(name string) (switchback.Sequence, bool) {
	base, ok := strings.CutSuffix(name, segmentSuffix)
	if !ok {
		base, ok = strings.CutSuffix(name, referenceSuffix)
	}
	if !ok || len(base) < 16 {
		return 0, false
	}
	n, err := strconv.ParseUint(base, 10, 64)
	return switchback.Sequence(n), err == nil
}

// segment is a segment file that is open for reading. It stays readable after
// the file is removed.
type segment struct {
	path   string
	file   segmentFile
	id     os.FileInfo // tells this state of the segment from a later one
	head   []byte
	header Header
	foot   footer
	size   int64
	point  switchback.Point
	index  *index // nil until loadIndex
	forgot bool   // the index has no extents any more
}

// forgetExtents frees what only the making of overlays needs.
func (s *segment) forgetExtents() {
	for i := range s.index.disks {
		s.index.disks[i].data, s.index.disks[i].zero = nil, nil
	}
	s.forgot = true
}

// openSegment opens a segment, wherever it is, and reads header and footer, not
// the index.
func (st *storage) openSegment(seq switchback.Sequence) (*segment, error) {
	path := segmentPath(st.dir, seq)
	f, ends, id, err := st.openFile(seq)
	s := &segment{path: path, file: f, id: id}
	if err == nil {
		err = s.begin(ends, func(h *Header) error {
			if h.Sequence != seq || h.Seed || h.Branch != nil {
				return corrupt("the file holds segment %d", h.Sequence)
			}
			return nil
		})
	}
	if switchback.CodeOf(err) == switchback.CodeCorrupt {
		return nil, Damage{Segment: seq, File: path, Reason: err.Error()}.corrupt()
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// begin reads header and footer, unless they are in ends, and has is judge the
// header. After an error the file is closed.
func (s *segment) begin(ends *segmentEnds, is func(*Header) error) (err error) {
	s.size = s.file.Size()
	if ends == nil {
		ends, err = s.readEnds()
	}
	if err == nil {
		err = s.decodeEnds(ends, is)
	}
	if err != nil {
		s.file.Close()
	}
	return err
}

// damage is what is wrong with the segment as a whole.
func (s *segment) damage(reason string) Damage {
	if b := s.header.Branch; b != nil {
		return Damage{Branch: b.Name, File: s.path, Reason: reason}
	}
	return Damage{Segment: s.header.Sequence, File: s.path, Reason: reason}
}

// readEnds reads header and footer.
func (s *segment) readEnds() (*segmentEnds, error) {
	fixed := make([]byte, headerFixed)
	if err := s.readAt(fixed, 0); err != nil {
		return nil, err
	}
	n, err := headerLength(fixed)
	if err != nil {
		return nil, err
	}
	ends := &segmentEnds{Head: make([]byte, n), Foot: make([]byte, footerSize), Size: s.size}
	if err := s.readAt(ends.Head, 0); err != nil {
		return nil, err
	}
	return ends, s.readAt(ends.Foot, s.size-footerSize)
}

// ends are the header and footer as they are stored.
func (s *segment) ends() segmentEnds {
	return segmentEnds{Head: s.head, Foot: s.foot.encode(), Size: s.size}
}

func (s *segment) decodeEnds(ends *segmentEnds, is func(*Header) error) (err error) {
	if len(ends.Head) < headerFixed+sumSize {
		return corrupt("segment header of %d bytes", len(ends.Head))
	}
	n, err := headerLength(ends.Head)
	if err != nil {
		return err
	}
	if n != len(ends.Head) {
		return corrupt("segment header of %d bytes claims %d", len(ends.Head), n)
	}
	s.head = ends.Head
	if s.header, err = decodeHeader(s.head); err != nil {
		return err
	}
	if err := is(&s.header); err != nil {
		return err
	}
	if s.foot, err = decodeFooter(ends.Foot, s.size); err != nil {
		return err
	}
	if s.foot.indexOffset < int64(len(s.head)) {
		return corrupt("segment index begins inside the header")
	}
	s.point = s.header.Point(s.foot.summary(s.size))
	return nil
}

// readAt reads len(b) bytes; a file that is too short is corrupt.
func (s *segment) readAt(b []byte, off int64) error {
	if off < 0 || off+int64(len(b)) > s.size {
		return corrupt("the file has only %d bytes", s.size)
	}
	n, err := s.file.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if unreachable(err) || switchback.CodeOf(err) == switchback.CodeCorrupt {
		return err
	}
	return corrupt("read %d bytes at %d: %w", len(b), off, err)
}

// loadIndex reads and verifies the index.
func (s *segment) loadIndex() error {
	if s.index != nil {
		return nil
	}
	err := func() error {
		packed := make([]byte, s.foot.indexLength)
		if err := s.readAt(packed, s.foot.indexOffset); err != nil {
			return err
		}
		if got := digest(s.head, packed); got != s.foot.digest {
			return corrupt("header and index have digest %x, want %x", got[:6], s.foot.digest[:6])
		}
		ix, err := decodeIndex(packed, int64(len(s.head)), s.foot.indexOffset, s.header.Disks)
		if err != nil {
			return err
		}
		if err := s.foot.matches(s.head, packed, ix, s.foot.indexOffset); err != nil {
			return err
		}
		s.index = ix
		return nil
	}()
	if unreachable(err) {
		return err
	}
	if err != nil {
		return s.damage(err.Error()).corrupt()
	}
	return nil
}

// load reads frame n into raw, whose length is that of the frame, and verifies it.
func (s *segment) load(n uint32, raw []byte) error {
	stored := storedPool.Get().(*[maxFrame]byte)
	defer storedPool.Put(stored)
	return s.loadStored(n, raw, stored[:s.index.frames[n].stored])
}

// loadStored is load that also leaves the frame's stored bytes in stored, whose
// length is theirs.
func (s *segment) loadStored(n uint32, raw, stored []byte) error {
	f := &s.index.frames[n]
	err := s.readAt(stored, f.offset)
	if err == nil {
		err = decompress(raw, stored, f.codec)
	}
	return s.judge(n, raw, err)
}

// verify is loadStored for who wants to know only that the frame is whole.
func (s *segment) verify(n uint32, stored []byte) error {
	f := &s.index.frames[n]
	room := roomPool.Get().(*[zstdRoom]byte)
	defer roomPool.Put(room)
	var raw []byte
	err := s.readAt(stored, f.offset)
	if err == nil {
		raw, err = expand(room, stored, f.rawLength(), f.codec)
	}
	return s.judge(n, raw, err)
}

// judge says whether raw, or the error that came instead of it, is frame n.
func (s *segment) judge(n uint32, raw []byte, err error) error {
	if unreachable(err) {
		return err
	}
	if err != nil {
		return s.frameDamage(n, err.Error())
	}
	if sum := s.index.frames[n].sum; xxh3.Hash128(raw).Bytes() != sum {
		return s.frameDamage(n, "content does not match its checksum "+hex.EncodeToString(sum[:4]))
	}
	return nil
}

// checkFrame reads frame n and its head and verifies both; raw, of maxFrame
// bytes, is for its content.
func (s *segment) checkFrame(n uint32, raw []byte) error {
	f := &s.index.frames[n]
	if err := s.load(n, raw[:f.rawLength()]); err != nil {
		return err
	}
	var head, want [frameHeadSize]byte
	f.putHead(want[:])
	if err := s.readAt(head[:], f.offset-frameHeadSize); err != nil {
		return err
	}
	if head != want {
		return s.frameDamage(n, "frame head is not what the index says")
	}
	return nil
}

// frameDamage names the ranges that frame n holds.
func (s *segment) frameDamage(n uint32, reason string) error {
	f := &s.index.frames[n]
	d := &s.index.disks[f.disk]
	data := d.data
	if s.forgot {
		again := segment{path: s.path, file: s.file, head: s.head, header: s.header, foot: s.foot, size: s.size}
		if again.loadIndex() == nil {
			data = again.index.disks[f.disk].data
		}
	}
	var start int64
	for i, m := range d.frames {
		if m == n {
			start = d.starts[i]
		}
	}
	end := start + int64(f.rawLength())
	damage := s.damage(reason)
	damage.Disk = s.header.Disks[f.disk].Name
	var pos int64
	for _, r := range data {
		from, to := max(start, pos), min(end, pos+r.Length)
		if from < to {
			damage.Ranges = append(damage.Ranges, extent.Range{Offset: r.Offset + from - pos, Length: to - from})
		}
		pos += r.Length
	}
	return damage.corrupt()
}

// disk returns the number of the disk called name in this segment, or -1.
func (s *segment) disk(name string) int {
	for i, d := range s.header.Disks {
		if d.Name == name {
			return i
		}
	}
	return -1
}

func (s *segment) close() { s.file.Close() }

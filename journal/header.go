package journal

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/zeebo/blake3"
	"github.com/zeebo/xxh3"

	"github.com/switchback-dr/switchback"
)

const (
	headerMagic   = "SBSEGMNT"
	footerMagic   = "SBSEGEND"
	formatVersion = 1

	sector        = 512
	maxFrame      = 64 << 10 // raw bytes in a frame
	maxMeta       = 1 << 20
	maxDisks      = 1024
	headerFixed   = 16 // before the meta data
	sumSize       = 16
	frameHeadSize = 16
	indexHeadSize = 32
	footerSize    = 80

	frameTag = 'F'
	indexTag = 'I'
)

// DiskGeometry is one disk of the VM as it was at a point.
type DiskGeometry struct {
	Name      string `json:"name"`
	SizeBytes int64  `json:"size_bytes"`
}

// Header is the meta data of a segment, written before anything is known of
// its content.
type Header struct {
	Protection switchback.ProtectionID `json:"protection"`
	Epoch      switchback.Epoch        `json:"epoch"`
	Sequence   switchback.Sequence     `json:"sequence"`
	Kind       switchback.PointKind    `json:"kind"`
	// Time is the instant of the state at the source's clock.
	Time time.Time `json:"time"`
	// Checkpoint is the hypervisor checkpoint that records what follows.
	Checkpoint string `json:"checkpoint,omitempty"`
	// Parent is the digest of the point before; empty for the first.
	Parent       string `json:"parent,omitempty"`
	Resync       bool   `json:"resync,omitempty"`
	ResyncReason string `json:"resync_reason,omitempty"`
	// Seed marks a batch of the first full copy, which is written to the base
	// (ApplySeed) and is no point.
	Seed bool `json:"seed,omitempty"`
	// Merged is set in a segment that has taken in the points before it
	// (Replica.Merge); such a segment is never sent.
	Merged *Merged `json:"merged,omitempty"`
	// Branch is set in a segment that is no point; see Branch.
	Branch *Branch `json:"branch,omitempty"`
	// Disks are all disks of the VM at the point; SegmentWriter.Data and Zero
	// name them by their index here. A disk that the point before has and this
	// one has not is gone; if its name comes back, it starts as zeros.
	Disks []DiskGeometry `json:"disks"`
}

// Merged says what a merged segment is and what it has taken in. Everything else
// in its Header is that of the point, as it was received, Parent too.
type Merged struct {
	// Digest is the identity of the point: the digest of its segment as it was
	// received, which the next segment's Parent names. The digest in the footer
	// is that of this file.
	Digest string `json:"digest"`
	// Continues and ContinuesDigest name the point that the segment follows now.
	// The points between are gone.
	Continues       switchback.Sequence `json:"continues"`
	ContinuesDigest string              `json:"continues_digest,omitempty"`
	// Fresh names disks that one of the points taken in did not have: nothing
	// that older segments or the base hold of them counts.
	Fresh []string `json:"fresh,omitempty"`
}

// continues returns the sequence and the digest of the point that the segment follows.
func (h *Header) continues() (switchback.Sequence, string) {
	if h.Merged != nil {
		return h.Merged.Continues, h.Merged.ContinuesDigest
	}
	return h.Sequence - 1, h.Parent
}

// fresh reports whether nothing older counts for the disk called name.
func (h *Header) fresh(name string) bool {
	return h.Branch != nil && h.Branch.Whole || h.Merged != nil && slices.Contains(h.Merged.Fresh, name)
}

// Point returns the recovery point that the segment with this header and
// summary makes.
func (h Header) Point(s Summary) switchback.Point {
	identity := s.Digest
	if h.Merged != nil {
		identity = h.Merged.Digest
	}
	return switchback.Point{
		Protection: h.Protection, Sequence: h.Sequence, Epoch: h.Epoch, Kind: h.Kind, Time: h.Time,
		Checkpoint: h.Checkpoint, Digest: identity, Parent: h.Parent,
		Resync: h.Resync, ResyncReason: h.ResyncReason,
		ChangedBytes: s.ChangedBytes, StoredBytes: s.StoredBytes,
	}
}

// Validate reports what a segment cannot have.
func (h Header) Validate() error {
	if len(h.Disks) == 0 || len(h.Disks) > maxDisks {
		return switchback.Errorf(switchback.CodeInvalid, "segment of %d disks", len(h.Disks))
	}
	seen := map[string]bool{}
	for _, d := range h.Disks {
		if d.Name == "" || seen[d.Name] {
			return switchback.Errorf(switchback.CodeInvalid, "disk name %q is empty or not unique", d.Name)
		}
		seen[d.Name] = true
		if d.SizeBytes > maxDisk {
			return switchback.Errorf(switchback.CodeInvalid, "disk %s has %d bytes, more than %d TiB", d.Name, d.SizeBytes, maxDisk>>40)
		}
		if d.SizeBytes <= 0 || d.SizeBytes%sector != 0 {
			return switchback.Errorf(switchback.CodeInvalid, "disk %s has %d bytes, not a multiple of %d", d.Name, d.SizeBytes, sector)
		}
	}
	if h.Sequence == 0 && !h.Seed {
		return switchback.Errorf(switchback.CodeInvalid, "sequence 0 is no point")
	}
	if m := h.Merged; m != nil && (h.Seed || m.Digest == "" || m.Continues >= h.Sequence) {
		return switchback.Errorf(switchback.CodeInvalid, "segment %d cannot be merged with what follows point %d", h.Sequence, m.Continues)
	}
	if b := h.Branch; b != nil && (h.Seed || h.Merged != nil || !pinName.MatchString(b.Name)) {
		return switchback.Errorf(switchback.CodeInvalid, "segment %d cannot be branch %q", h.Sequence, b.Name)
	}
	return nil
}

// encodeHeader returns the header's bytes, checksum included.
func encodeHeader(h Header) ([]byte, error) {
	if err := h.Validate(); err != nil {
		return nil, err
	}
	meta, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	if len(meta) > maxMeta {
		return nil, switchback.Errorf(switchback.CodeInvalid, "segment meta data of %d bytes", len(meta))
	}
	b := make([]byte, 0, headerFixed+len(meta)+sumSize)
	b = append(b, headerMagic...)
	b = binary.LittleEndian.AppendUint32(b, formatVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(meta)))
	b = append(b, meta...)
	sum := xxh3.Hash128(b).Bytes()
	return append(b, sum[:]...), nil
}

// headerLength returns how long the header is that starts with the headerFixed
// bytes fixed.
func headerLength(fixed []byte) (int, error) {
	if string(fixed[:8]) != headerMagic {
		return 0, corrupt("not a segment: it starts with %q", fixed[:8])
	}
	if v := binary.LittleEndian.Uint32(fixed[8:]); v != formatVersion {
		return 0, switchback.Errorf(switchback.CodeUnsupported, "segment format version %d", v).
			WithHint("this build knows version %d; upgrade it", formatVersion)
	}
	n := binary.LittleEndian.Uint32(fixed[12:])
	if n > maxMeta {
		return 0, corrupt("segment header claims %d bytes", n)
	}
	return headerFixed + int(n) + sumSize, nil
}

// decodeHeader is the inverse of encodeHeader.
func decodeHeader(b []byte) (Header, error) {
	body, sum := b[:len(b)-sumSize], b[len(b)-sumSize:]
	if want := xxh3.Hash128(body).Bytes(); !bytes.Equal(want[:], sum) {
		return Header{}, corrupt("segment header does not match its checksum")
	}
	var h Header
	if err := json.Unmarshal(body[headerFixed:], &h); err != nil {
		return Header{}, corrupt("segment header: %w", err)
	}
	if err := h.Validate(); err != nil {
		return Header{}, corrupt("segment header: %w", err)
	}
	return h, nil
}

// footer is the last footerSize bytes of a segment.
type footer struct {
	indexOffset, indexLength int64
	dataBytes, zeroBytes     int64
	digest                   [32]byte
}

func (f footer) encode() []byte {
	b := make([]byte, 0, footerSize)
	b = append(b, footerMagic...)
	for _, n := range []int64{f.indexOffset, f.indexLength, f.dataBytes, f.zeroBytes} {
		b = binary.LittleEndian.AppendUint64(b, uint64(n))
	}
	b = append(b, f.digest[:]...)
	return binary.LittleEndian.AppendUint64(b, xxh3.Hash(b))
}

// decodeFooter reads the footer of a segment of size bytes; the index lies
// between end of header and footer when it returns no error.
func decodeFooter(b []byte, size int64) (footer, error) {
	var f footer
	if len(b) != footerSize || string(b[:8]) != footerMagic {
		return f, corrupt("segment does not end with a footer")
	}
	if binary.LittleEndian.Uint64(b[72:]) != xxh3.Hash(b[:72]) {
		return f, corrupt("segment footer does not match its checksum")
	}
	for i, p := range []*int64{&f.indexOffset, &f.indexLength, &f.dataBytes, &f.zeroBytes} {
		*p = int64(binary.LittleEndian.Uint64(b[8+8*i:]))
	}
	copy(f.digest[:], b[40:])
	if f.indexOffset < headerFixed+sumSize || f.indexLength < indexHeadSize || f.indexOffset > size || f.indexLength > size ||
		f.indexOffset+f.indexLength+footerSize != size || f.dataBytes < 0 || f.zeroBytes < 0 {
		return f, corrupt("segment footer does not fit a file of %d bytes", size)
	}
	return f, nil
}

func (f footer) summary(size int64) Summary {
	return Summary{
		Digest: hex.EncodeToString(f.digest[:]), StoredBytes: size,
		DataBytes: f.dataBytes, ZeroBytes: f.zeroBytes, ChangedBytes: f.dataBytes + f.zeroBytes,
	}
}

// digest is what identifies a segment.
func digest(header, index []byte) (sum [32]byte) {
	h := blake3.New()
	h.Write(header)
	h.Write(index)
	h.Sum(sum[:0])
	return sum
}

// corrupt makes the error for data that is not what its form or checksum says.
func corrupt(format string, args ...any) *switchback.Error {
	return switchback.Errorf(switchback.CodeCorrupt, format, args...)
}

// shortDigest is a digest as messages show it.
func shortDigest(d string) string {
	if d == "" {
		return "none"
	}
	return fmt.Sprintf("%.12s", d)
}

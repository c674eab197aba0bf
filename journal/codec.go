package journal

import (
	"fmt"
	"sync"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"

	"github.com/switchback-dr/switchback"
)

// Codec says how the content of a frame is compressed. A frame that does not
// shrink is stored with CodecNone whatever was asked.
type Codec uint8

// The values are part of the format.
const (
	CodecNone Codec = 0
	CodecS2   Codec = 1
	CodecZstd Codec = 2
)

func (c Codec) String() string {
	switch c {
	case CodecNone:
		return "none"
	case CodecS2:
		return "s2"
	case CodecZstd:
		return "zstd"
	}
	return fmt.Sprintf("codec(%d)", uint8(c))
}

// ParseCodec returns the codec called name: none, s2 or zstd.
func ParseCodec(name string) (Codec, error) {
	for _, c := range []Codec{CodecNone, CodecS2, CodecZstd} {
		if c.String() == name {
			return c, nil
		}
	}
	return 0, switchback.Errorf(switchback.CodeInvalid, "unknown compression %q", name).WithHint("none, s2 or zstd")
}

// The coders keep large tables; all segments of the process share them. Their
// ...All methods may be called concurrently.
var (
	frameEncoder = sync.OnceValue(func() *zstd.Encoder {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false), zstd.WithWindowSize(maxFrame))
		if err != nil {
			panic(err) // only wrong options
		}
		return e
	})
	indexEncoder = sync.OnceValue(func() *zstd.Encoder {
		e, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(2), zstd.WithEncoderCRC(false))
		if err != nil {
			panic(err)
		}
		return e
	})
	// decoder never writes more than the capacity of the slice it is given.
	decoder = sync.OnceValue(func() *zstd.Decoder {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			panic(err)
		}
		return d
	})
)

// compress appends raw to dst, in a form of codec c if that is shorter, and
// returns the codec used.
func compress(dst, raw []byte, c Codec) ([]byte, Codec) {
	head := len(dst)
	switch c {
	case CodecS2:
		room := s2.MaxEncodedLen(len(raw))
		if cap(dst)-head < room {
			grown := make([]byte, head, head+room)
			copy(grown, dst)
			dst = grown
		}
		packed := s2.Encode(dst[head:head+room], raw)
		if len(packed) < len(raw) {
			return dst[:head+len(packed)], CodecS2
		}
	case CodecZstd:
		packed := frameEncoder().EncodeAll(raw, dst)
		if len(packed)-head < len(raw) {
			return packed, CodecZstd
		}
	}
	return append(dst[:head], raw...), CodecNone
}

// decompress fills raw, whose length is the raw length, from stored.
func decompress(raw, stored []byte, c Codec) error {
	if c == CodecS2 {
		return expandS2(raw, stored)
	}
	// The decoder's fast loop needs room behind what it writes; a copy is
	// cheaper than the loop that does without.
	room := roomPool.Get().(*[zstdRoom]byte)
	defer roomPool.Put(room)
	out, err := expand(room, stored, len(raw), c)
	copy(raw, out)
	return err
}

// expand returns the length bytes that stored stands for: in room, or, where
// they are not compressed, stored itself.
func expand(room *[zstdRoom]byte, stored []byte, length int, c Codec) ([]byte, error) {
	switch c {
	case CodecNone:
		if len(stored) != length {
			return nil, fmt.Errorf("%d bytes stored for %d", len(stored), length)
		}
		return stored, nil
	case CodecS2:
		return room[:length], expandS2(room[:length], stored)
	case CodecZstd:
		out, err := decoder().DecodeAll(stored, room[:0])
		if err != nil {
			return nil, err
		}
		if len(out) != length {
			return nil, fmt.Errorf("%d bytes after decompression, want %d", len(out), length)
		}
		return out, nil
	}
	return nil, fmt.Errorf("unknown %v", c)
}

func expandS2(raw, stored []byte) error {
	n, err := s2.DecodedLen(stored)
	if err != nil {
		return err
	}
	if n != len(raw) {
		return fmt.Errorf("%d bytes after decompression, want %d", n, len(raw))
	}
	_, err = s2.Decode(raw, stored)
	return err
}

// zstdRoom is a frame and what the decoder wants to be free behind it: a block of
// 128 KiB and a little more.
const zstdRoom = maxFrame + 132<<10

var roomPool = sync.Pool{New: func() any { return new([zstdRoom]byte) }}

// storedPool holds buffers for the stored form of a frame.
var storedPool = sync.Pool{New: func() any { return new([maxFrame]byte) }}

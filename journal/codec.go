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
	switch c {
	case CodecNone:
		if len(stored) != len(raw) {
			return fmt.Errorf("%d bytes stored for %d", len(stored), len(raw))
		}
		copy(raw, stored)
		return nil
	case CodecS2:
		n, err := s2.DecodedLen(stored)
		if err != nil {
			return err
		}
		if n != len(raw) {
			return fmt.Errorf("%d bytes after decompression, want %d", n, len(raw))
		}
		_, err = s2.Decode(raw, stored)
		return err
	case CodecZstd:
		out, err := decoder().DecodeAll(stored, raw[:0:len(raw)])
		if err != nil {
			return err
		}
		if len(out) != len(raw) {
			return fmt.Errorf("%d bytes after decompression, want %d", len(out), len(raw))
		}
		if len(out) > 0 && &out[0] != &raw[0] {
			copy(raw, out)
		}
		return nil
	}
	return fmt.Errorf("unknown %v", c)
}

// storedPool holds buffers for the stored form of a frame.
var storedPool = sync.Pool{New: func() any { return new([maxFrame]byte) }}

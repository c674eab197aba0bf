package seal

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"sync"

	"github.com/switchback-dr/switchback"
)

const (
	magic      = "SBSEALED"
	version    = 1
	keyIDSize  = 16
	saltSize   = 32
	headerSize = 64
	chunkSize  = 64 << 10
	tagSize    = 16
	keySize    = 32
	purpose    = "switchback file v1 "
)

// Sealed reports whether a file that begins with b is sealed. b needs 8 bytes.
func Sealed(b []byte) bool { return bytes.HasPrefix(b, []byte(magic)) }

// SealedSize is the size of a sealed file of n bytes of content.
func SealedSize(n int64) int64 {
	chunks := max(1, (n+chunkSize-1)/chunkSize)
	return headerSize + n + chunks*tagSize
}

func fileCipher(key, header []byte, name string) (cipher.AEAD, error) {
	k, err := hkdf.Key(sha256.New, key, header[headerSize-saltSize:headerSize], purpose+name, keySize)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(k)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func nonce(chunk int64, last bool) []byte {
	n := make([]byte, 12)
	binary.BigEndian.PutUint64(n[3:11], uint64(chunk))
	if last {
		n[11] = 1
	}
	return n
}

// Writer seals what is written to it. Close writes the end; a file without it is
// refused by every reader.
type Writer struct {
	w      io.Writer
	aead   cipher.AEAD
	header []byte
	buffer []byte // content of the chunk being gathered, room for the tag
	chunk  int64
	err    error
	closed bool
}

// NewWriter seals to w, under the newest data key and the name that a reader
// will have to give.
func (k *Keys) NewWriter(w io.Writer, name string) (*Writer, error) {
	header := make([]byte, headerSize)
	copy(header, magic)
	binary.LittleEndian.PutUint32(header[8:], version)
	copy(header[16:], k.newest[:])
	if _, err := rand.Read(header[headerSize-saltSize:]); err != nil {
		return nil, err
	}
	return k.writer(w, name, header)
}

func (k *Keys) writer(w io.Writer, name string, header []byte) (*Writer, error) {
	aead, err := fileCipher(k.keys[k.newest], header, name)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(header); err != nil {
		return nil, err
	}
	return &Writer{w: w, aead: aead, header: header, buffer: make([]byte, 0, chunkSize+tagSize)}, nil
}

// Write implements io.Writer.
func (w *Writer) Write(p []byte) (int, error) {
	done := 0
	for len(p) > 0 && w.err == nil {
		if len(w.buffer) == chunkSize { // more follows: it is not the last
			w.flush(false)
			continue
		}
		n := min(len(p), chunkSize-len(w.buffer))
		w.buffer = append(w.buffer, p[:n]...)
		p, done = p[n:], done+n
	}
	return done, w.err
}

func (w *Writer) flush(last bool) {
	out := w.aead.Seal(w.buffer[:0], nonce(w.chunk, last), w.buffer, w.header)
	_, w.err = w.w.Write(out)
	w.buffer, w.chunk = w.buffer[:0], w.chunk+1
}

// Close writes the last chunk. It does not close the writer below. Idempotent.
func (w *Writer) Close() error {
	if !w.closed && w.err == nil {
		w.closed = true
		w.flush(true)
	}
	return w.err
}

// Reader reads a sealed file. ReadAt may be called concurrently.
type Reader struct {
	r      io.ReaderAt
	aead   cipher.AEAD
	header []byte
	size   int64 // of the content
	chunks int64
}

// NewReader reads the sealed file r of size bytes that was written under name.
// It verifies the end, so that Size is authentic.
func (k *Keys) NewReader(r io.ReaderAt, size int64, name string) (*Reader, error) {
	header := make([]byte, headerSize)
	if size < headerSize+tagSize {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "a sealed file of %d bytes is too short", size)
	}
	if err := readFull(r, header, 0); err != nil {
		return nil, err
	}
	if !Sealed(header) {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "not a sealed file")
	}
	if v := binary.LittleEndian.Uint32(header[8:]); v != version {
		return nil, switchback.Errorf(switchback.CodeUnsupported, "sealed file of version %d", v).WithHint("this build knows version %d; upgrade it", version)
	}
	id := KeyID(header[16 : 16+keyIDSize])
	key, ok := k.keys[id]
	if !ok {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "the file is sealed with data key %v, which the key ring does not hold", id).
			WithHint("restore the key ring that belongs to these files")
	}
	aead, err := fileCipher(key, header, name)
	if err != nil {
		return nil, err
	}
	body := size - headerSize
	f := &Reader{r: r, aead: aead, header: header, chunks: (body + chunkSize + tagSize - 1) / (chunkSize + tagSize)}
	f.size = body - f.chunks*tagSize
	if f.size < 0 || f.size == 0 && f.chunks != 1 || f.size > 0 && f.size <= (f.chunks-1)*chunkSize {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "a sealed file cannot have %d bytes", size)
	}
	b := buffers.Get().(*[chunkSize + tagSize]byte)
	defer buffers.Put(b)
	_, err = f.open(b[:], f.chunks-1)
	return f, err
}

// Size is the size of the content.
func (f *Reader) Size() int64 { return f.size }

var buffers = sync.Pool{New: func() any { return new([chunkSize + tagSize]byte) }}

// open reads and verifies a chunk into b and returns its content.
func (f *Reader) open(b []byte, chunk int64) ([]byte, error) {
	length := min(chunkSize, f.size-chunk*chunkSize) + tagSize
	at := headerSize + chunk*(chunkSize+tagSize)
	if err := readFull(f.r, b[:length], at); err != nil {
		return nil, err
	}
	out, err := f.aead.Open(b[:0], nonce(chunk, chunk == f.chunks-1), b[:length], f.header)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "bytes %d to %d of the sealed file are not what was sealed", chunk*chunkSize, chunk*chunkSize+length-tagSize)
	}
	return out, nil
}

// ReadAt implements io.ReaderAt.
func (f *Reader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, switchback.Errorf(switchback.CodeInvalid, "read at %d", off)
	}
	b := buffers.Get().(*[chunkSize + tagSize]byte)
	defer buffers.Put(b)
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if at >= f.size {
			return done, io.EOF
		}
		content, err := f.open(b[:], at/chunkSize)
		if err != nil {
			return done, err
		}
		done += copy(p[done:], content[at%chunkSize:])
	}
	return done, nil
}

// readFull reads len(b) bytes; a file that is too short is corrupt.
func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == io.EOF {
		return switchback.Errorf(switchback.CodeCorrupt, "the sealed file ends early: %d of %d bytes at %d", n, len(b), off)
	}
	return err
}

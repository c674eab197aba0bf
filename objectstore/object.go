package objectstore

import (
	"container/list"
	"context"
	"io"
	"sync"

	"github.com/minio/minio-go/v7"
)

const (
	blockSize   = 256 << 10
	cacheBlocks = 64 // 16 MiB for each open object
)

// Object is open for reading at random. Blocks of 256 KiB are fetched and the
// last 16 MiB kept. Its methods may be called concurrently.
type Object struct {
	store *Store
	key   string
	etag  string
	size  int64

	mu     sync.Mutex
	blocks map[int64]*block
	recent *list.List // of *block, newest first
}

type block struct {
	number int64
	ready  chan struct{} // closed when data and err are set
	data   []byte
	err    error
	where  *list.Element
}

// Open looks the object up. CodeNotFound: there is none.
func (s *Store) Open(ctx context.Context, key string) (*Object, error) {
	st, err := s.client.StatObject(ctx, s.cfg.Bucket, s.name(key), minio.StatObjectOptions{})
	if err != nil {
		return nil, s.fault(err, "look at object %s", key)
	}
	return &Object{store: s, key: key, etag: st.ETag, size: st.Size, blocks: map[int64]*block{}, recent: list.New()}, nil
}

// Size is the object's size in bytes.
func (o *Object) Size() int64 { return o.size }

// Close releases nothing that the collector would not; it is there for io.Closer.
func (o *Object) Close() error { return nil }

// ReadAt implements io.ReaderAt. A store that does not answer is tried for a
// while by the client library, then CodeUnavailable.
func (o *Object) ReadAt(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if at >= o.size {
			return done, io.EOF
		}
		b, err := o.block(at / blockSize)
		if err != nil {
			return done, err
		}
		done += copy(p[done:], b[at%blockSize:])
	}
	return done, nil
}

func (o *Object) block(number int64) ([]byte, error) {
	o.mu.Lock()
	b := o.blocks[number]
	if b != nil {
		o.recent.MoveToFront(b.where)
		o.mu.Unlock()
		<-b.ready
		return b.data, b.err
	}
	b = &block{number: number, ready: make(chan struct{})}
	o.blocks[number], b.where = b, o.recent.PushFront(b)
	if o.recent.Len() > cacheBlocks {
		o.forget(o.recent.Back().Value.(*block))
	}
	o.mu.Unlock()
	b.data, b.err = o.fetch(number)
	close(b.ready)
	if b.err != nil { // the next reader tries again
		o.mu.Lock()
		if o.blocks[number] == b {
			o.forget(b)
		}
		o.mu.Unlock()
	}
	return b.data, b.err
}

// forget is called with o.mu held.
func (o *Object) forget(b *block) {
	o.recent.Remove(b.where)
	delete(o.blocks, b.number)
}

func (o *Object) fetch(number int64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 4*answerLimit)
	defer cancel()
	from := number * blockSize
	to := min(from+blockSize, o.size)
	opts := minio.GetObjectOptions{}
	if err := opts.SetRange(from, to-1); err != nil {
		return nil, err
	}
	if err := opts.SetMatchETag(o.etag); err != nil {
		return nil, err
	}
	body, err := o.store.client.GetObject(ctx, o.store.cfg.Bucket, o.store.name(o.key), opts)
	if err != nil {
		return nil, o.store.fault(err, "read object %s", o.key)
	}
	defer body.Close()
	data := make([]byte, to-from)
	if _, err := io.ReadFull(body, data); err != nil {
		return nil, o.store.fault(err, "read object %s at %d", o.key, from)
	}
	return data, nil
}

package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/objectstore"
	"github.com/switchback-dr/switchback/seal"
)

// Storage says how the segments of a replica are stored beyond plain files. It
// holds no secret. The zero value is plain files.
type Storage struct {
	// Keyring has the data keys, once segments have been sealed.
	Keyring *seal.Keyring `json:"keyring,omitempty"`
	// KeySource unwraps them.
	KeySource *seal.Source `json:"key_source,omitempty"`
	// Seal: new segments are sealed. Those that are there stay as they are.
	Seal bool `json:"seal,omitempty"`
	// Objects is where segments are moved to by Offload.
	Objects *objectstore.Config `json:"objects,omitempty"`
}

func storagePath(dir string) string { return filepath.Join(dir, "storage.json") }

// storage opens the segments of one replica.
type storage struct {
	dir        string
	protection switchback.ProtectionID
	config     Storage
	keys       *seal.Keys         // nil without a key ring
	objects    *objectstore.Store // nil without a place
}

// openStorage reads how the replica in dir is stored and unwraps its keys.
func openStorage(dir string, protection switchback.ProtectionID) (*storage, error) {
	st := &storage{dir: dir, protection: protection}
	err := readDocument(storagePath(dir), &st.config)
	if errors.Is(err, os.ErrNotExist) {
		return st, nil
	}
	if err != nil {
		return nil, err
	}
	return st, st.open()
}

// open makes what config says usable.
func (st *storage) open() error {
	st.keys, st.objects = nil, nil
	if r := st.config.Keyring; r != nil {
		if st.config.KeySource == nil {
			return corrupt("%s: a key ring without a key source", storagePath(st.dir))
		}
		w, err := st.config.KeySource.Wrapper()
		if err == nil {
			st.keys, err = r.Unwrap(context.Background(), w)
		}
		if err != nil {
			return fmt.Errorf("replica %s is encrypted: %w", st.dir, err)
		}
	}
	if o := st.config.Objects; o != nil {
		var err error
		if st.objects, err = objectstore.Open(*o); err != nil {
			return fmt.Errorf("replica %s has segments in an object store: %w", st.dir, err)
		}
	}
	return nil
}

// sealName is the name that a segment is sealed under: it opens nowhere else,
// and nowhere in another replica.
func sealName(seq switchback.Sequence) string { return fmt.Sprintf("%016d", seq) }

// sealer returns what seals a segment under name on its way to w, or w itself. end
// writes what is left; it does not close w.
func (st *storage) sealer(w io.Writer, name string) (out io.Writer, end func() error, err error) {
	if !st.config.Seal {
		return w, func() error { return nil }, nil
	}
	s, err := st.keys.NewWriter(w, string(st.protection)+"/"+name)
	if err != nil {
		return nil, nil, err
	}
	return s, s.Close, nil
}

// segmentFile is a stored segment: a file or an object, its content unsealed.
type segmentFile interface {
	io.ReaderAt
	Size() int64
	Close() error
}

type localFile struct {
	*os.File
	size int64
}

func (f localFile) Size() int64 { return f.size }

// unsealed reads through the sealing of a segmentFile.
type unsealed struct {
	*seal.Reader
	below segmentFile
}

func (u unsealed) Close() error { return u.below.Close() }

// unseal returns f, or what is sealed in it.
func (st *storage) unseal(f segmentFile, name string) (segmentFile, error) {
	var magic [8]byte
	if n, err := f.ReadAt(magic[:], 0); n < len(magic) && err != io.EOF {
		return nil, err
	}
	if !seal.Sealed(magic[:]) {
		return f, nil
	}
	if st.keys == nil {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "segment %s is sealed, and %s names no keys", name, storagePath(st.dir)).
			WithHint("put storage.json back from a backup of the replica's directory")
	}
	r, err := st.keys.NewReader(f, f.Size(), string(st.protection)+"/"+name)
	if err != nil {
		return nil, err
	}
	return unsealed{r, f}, nil
}

// openFile opens the segment seq wherever it is: as a file, else as an object.
// id tells this state of it from a later one. Neither being there is os.ErrNotExist.
func (st *storage) openFile(seq switchback.Sequence) (f segmentFile, ends *segmentEnds, id os.FileInfo, err error) {
	path := segmentPath(st.dir, seq)
	local, err := os.Open(path)
	if err == nil {
		if id, err = local.Stat(); err == nil {
			f = localFile{local, id.Size()}
		}
	} else if errors.Is(err, os.ErrNotExist) {
		f, ends, id, err = st.openObject(seq)
	}
	if err != nil {
		return nil, nil, nil, err
	}
	if ends != nil {
		return f, ends, id, nil // unsealed when first read
	}
	plain, err := st.unseal(f, sealName(seq))
	if err != nil {
		f.Close()
		return nil, nil, nil, err
	}
	return plain, nil, id, nil
}

// state identifies the present state of the segment seq; nil if it is not there.
func (st *storage) state(seq switchback.Sequence) os.FileInfo {
	for _, path := range []string{segmentPath(st.dir, seq), referencePath(st.dir, seq)} {
		if id, err := os.Stat(path); err == nil {
			return id
		}
	}
	return nil
}

// SetSealing turns the sealing of new segments on or off. The first time it
// makes the key ring, wrapped by source; a source other than the present one
// wraps the keys anew. Data is not rewritten.
func (r *Replica) SetSealing(ctx context.Context, on bool, source *seal.Source) error {
	return r.changeStorage(ctx, func(next *Storage) error {
		next.Seal = on
		if !on || source == nil {
			if on && next.Keyring == nil {
				return switchback.Errorf(switchback.CodeInvalid, "sealing needs a key source")
			}
			return nil
		}
		w, err := source.Wrapper()
		if err != nil {
			return err
		}
		if next.Keyring == nil {
			ring, err := seal.NewKeyring(ctx, w, string(r.manifest.Protection), time.Now())
			if err != nil {
				return err
			}
			next.Keyring, next.KeySource = &ring, source
			return nil
		}
		if next.KeySource.Equal(*source) {
			return nil
		}
		old, err := next.KeySource.Wrapper()
		if err != nil {
			return err
		}
		ring, err := next.Keyring.Rewrap(ctx, old, w)
		if err != nil {
			return err
		}
		next.Keyring, next.KeySource = &ring, source
		return nil
	})
}

// RotateKey makes a new data key; segments from now on are sealed under it.
func (r *Replica) RotateKey(ctx context.Context) error {
	return r.changeStorage(ctx, func(next *Storage) error {
		if next.Keyring == nil {
			return switchback.Errorf(switchback.CodeRefused, "replica %s is not encrypted", r.manifest.Protection)
		}
		w, err := next.KeySource.Wrapper()
		if err != nil {
			return err
		}
		ring, err := next.Keyring.Rotate(ctx, w, time.Now())
		next.Keyring = &ring
		return err
	})
}

// Storage returns how the replica is stored.
func (r *Replica) Storage() Storage {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.storage.config
}

// changeStorage changes storage.json durably and uses what it says. A key is
// durable before anything is sealed with it.
func (r *Replica) changeStorage(ctx context.Context, change func(*Storage) error) error {
	r.maintenance.Lock()
	defer r.maintenance.Unlock()
	r.mu.Lock()
	next := &storage{dir: r.dir, protection: r.manifest.Protection, config: r.storage.config}
	r.mu.Unlock()
	before := next.config
	if err := change(&next.config); err != nil {
		return err
	}
	if reflect.DeepEqual(before, next.config) {
		return nil
	}
	if err := next.open(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return switchback.Errorf(switchback.CodeInternal, "replica is closed")
	}
	if err := writeDocument(r.fs, storagePath(r.dir), next.config); err != nil {
		return err
	}
	r.storage = next
	return nil
}

// segmentEnds are the header and footer of a segment that is elsewhere.
type segmentEnds struct {
	Head []byte `json:"head"`
	Foot []byte `json:"foot"`
	Size int64  `json:"size"` // of the plain segment
}

func (e segmentEnds) equal(o segmentEnds) bool {
	return e.Size == o.Size && bytes.Equal(e.Foot, o.Foot) && bytes.Equal(e.Head, o.Head)
}

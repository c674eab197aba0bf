package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/objectstore"
)

// reference stands for a segment that was moved to the object store: NNN.ref
// beside the segment files. It holds what is needed to know the point without
// asking the store.
type reference struct {
	Sequence switchback.Sequence `json:"sequence"`
	Object   string              `json:"object"`
	Ends     segmentEnds         `json:"ends"`
	// Held: the store was asked to refuse its removal.
	Held bool `json:"held,omitempty"`
}

const (
	referenceSuffix = ".ref"
	// garbageSuffix is on references whose objects nothing needs any more.
	garbageSuffix = ".garbage"
)

func referencePath(dir string, seq switchback.Sequence) string {
	return strings.TrimSuffix(segmentPath(dir, seq), segmentSuffix) + referenceSuffix
}

// readReference returns os.ErrNotExist (errors.Is) if there is none.
func readReference(dir string, seq switchback.Sequence) (reference, error) {
	var ref reference
	path := referencePath(dir, seq)
	err := readDocument(path, &ref)
	if err == nil && (ref.Sequence != seq || ref.Object == "") {
		err = corrupt("%s stands for segment %d", path, ref.Sequence)
	}
	return ref, err
}

// openObject opens a segment that was moved to the object store; it does not
// ask the store before the first read.
func (st *storage) openObject(seq switchback.Sequence) (segmentFile, *segmentEnds, os.FileInfo, error) {
	ref, err := readReference(st.dir, seq)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil, os.ErrNotExist
	}
	if err != nil {
		return nil, nil, nil, err
	}
	id, err := os.Stat(referencePath(st.dir, seq))
	if err != nil {
		return nil, nil, nil, err
	}
	if st.objects == nil {
		return nil, nil, nil, switchback.Errorf(switchback.CodeUnauthorized, "segment %d is in an object store that %s does not name", seq, storagePath(st.dir)).
			WithHint("put storage.json back from a backup of the replica's directory")
	}
	return &farFile{storage: st, ref: ref}, &ref.Ends, id, nil
}

// farFile is a segment in the object store, looked up when first read.
type farFile struct {
	storage *storage
	ref     reference
	mu      sync.Mutex
	opened  segmentFile
}

func (f *farFile) Size() int64 { return f.ref.Ends.Size }

func (f *farFile) Close() error { return nil } // objects need none

func (f *farFile) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	if f.opened == nil {
		o, err := f.storage.objects.Open(context.Background(), f.ref.Object)
		if err == nil {
			f.opened, err = f.storage.unseal(o, sealName(f.ref.Sequence))
		}
		if err != nil {
			f.mu.Unlock()
			return 0, err
		}
	}
	opened := f.opened
	f.mu.Unlock()
	return opened.ReadAt(p, off)
}

// unreachable reports whether err says nothing about the data, only that it
// cannot be had now.
func unreachable(err error) bool {
	switch switchback.CodeOf(err) {
	case switchback.CodeUnavailable, switchback.CodeUnauthorized, switchback.CodeTimeout, switchback.CodeCancelled:
		return true
	}
	return false
}

// SetObjects says where Offload moves segments to; nil forgets the place, which
// is refused while segments are there. The store is asked whether it can be used.
func (r *Replica) SetObjects(ctx context.Context, place *objectstore.Config) error {
	if place != nil {
		s, err := objectstore.Open(*place)
		if err != nil {
			return err
		}
		if _, err := s.Check(ctx); err != nil {
			return err
		}
	}
	return r.changeStorage(ctx, func(next *Storage) error {
		if old := next.Objects; old != nil && (place == nil || old.Endpoint != place.Endpoint || old.Bucket != place.Bucket || old.Prefix != place.Prefix) {
			refs, garbage, err := listReferences(r.dir)
			if err != nil {
				return err
			}
			if len(refs)+len(garbage) > 0 {
				return switchback.Errorf(switchback.CodeRefused, "%d segments are in %s/%s", len(refs)+len(garbage), old.Bucket, old.Prefix).
					WithHint("they must be dropped or fetched back before the place can be changed")
			}
		}
		next.Objects = place
		return nil
	})
}

// listReferences returns the paths of references and of garbage.
func listReferences(dir string) (refs, garbage []string, err error) {
	entries, err := os.ReadDir(filepath.Join(dir, segmentDir))
	if err != nil {
		return nil, nil, fault(err, "list segments")
	}
	for _, e := range entries {
		path := filepath.Join(dir, segmentDir, e.Name())
		switch filepath.Ext(e.Name()) {
		case referenceSuffix:
			refs = append(refs, path)
		case garbageSuffix:
			garbage = append(garbage, path)
		}
	}
	return refs, garbage, nil
}

// Offload moves the segments of the points up to upTo from local files to the
// object store, oldest first, and returns how many it moved. They read the same
// as before. A local file goes only when the store has acknowledged its object
// and the reference is durable; a crash on the way leaves one or both. While
// the store does not answer (CodeUnavailable) everything stays where it is.
func (r *Replica) Offload(ctx context.Context, upTo switchback.Sequence, bytesPerSecond int64) (moved int, err error) {
	ctx = withPace(ctx, bytesPerSecond)
	r.mu.Lock()
	var points []switchback.Point
	for _, s := range r.segments {
		if s.point.Sequence <= upTo {
			points = append(points, s.point)
		}
	}
	r.mu.Unlock()
	for _, p := range points {
		done, err := r.offload(ctx, p.Sequence)
		if err != nil {
			return moved, err
		}
		if done {
			moved++
		}
	}
	return moved, nil
}

func (r *Replica) offload(ctx context.Context, seq switchback.Sequence) (bool, error) {
	r.maintenance.Lock() // no fold, merge or drop meanwhile
	defer r.maintenance.Unlock()
	r.mu.Lock()
	st, locked := r.storage, r.marks[seq].Locked
	_, there := r.findSegment(seq)
	r.mu.Unlock()
	if st.objects == nil {
		return false, switchback.Errorf(switchback.CodeRefused, "replica %s has no object store", r.dir)
	}
	path := segmentPath(r.dir, seq)
	f, err := os.Open(path)
	if !there || errors.Is(err, os.ErrNotExist) {
		return false, nil // dropped, or there already
	} else if err != nil {
		return false, fault(err, "move segment %d", seq)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, fault(err, "move segment %d", seq)
	}
	s, err := st.openSegment(seq)
	if err != nil {
		return false, err
	}
	ref := reference{Sequence: seq, Ends: s.ends(), Held: locked}
	s.close()
	ref.Object = fmt.Sprintf("%s/%016d-%x.seg", st.protection, seq, s.foot.digest[:12])
	if err := pace(ctx, info.Size()); err != nil {
		return false, switchback.Errorf(switchback.CodeCancelled, "move segment %d: %w", seq, err)
	}
	if err := st.objects.Put(ctx, ref.Object, f, info.Size()); err != nil {
		return false, err
	}
	if locked {
		if err := st.objects.Hold(ctx, ref.Object, true); switchback.CodeOf(err) == switchback.CodeUnsupported {
			ref.Held = false
		} else if err != nil {
			return false, err
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false, switchback.Errorf(switchback.CodeInternal, "replica is closed")
	}
	if err := writeDocument(r.fs, referencePath(r.dir, seq), ref); err != nil {
		return false, err
	}
	if err := r.fs.remove(path); err != nil {
		return false, fault(err, "move segment %d", seq)
	}
	return true, fault(r.fs.syncDir(filepath.Dir(path)), "move segment %d", seq)
}

// discardReference makes the reference of seq garbage, if there is one. The
// caller syncs the directory.
func (r *Replica) discardReference(seq switchback.Sequence) error {
	from := referencePath(r.dir, seq)
	ref, err := readReference(r.dir, seq)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case switchback.CodeOf(err) == switchback.CodeCorrupt: // its object cannot be named
		return fault(r.fs.remove(from), "remove segment %d", seq)
	case err != nil:
		return err
	}
	to := filepath.Join(r.dir, segmentDir, strings.TrimSuffix(filepath.Base(ref.Object), segmentSuffix)+garbageSuffix)
	return fault(r.fs.rename(from, to), "remove segment %d", seq)
}

// settleReference makes a reference garbage that stands for an earlier state of
// the segment s, which is a file now: a merge was interrupted.
func (r *Replica) settleReference(s *segment) error {
	seq := s.header.Sequence
	if _, far := s.file.(*farFile); far {
		return nil
	}
	ref, err := readReference(r.dir, seq)
	if errors.Is(err, os.ErrNotExist) || err == nil && ref.Ends.equal(s.ends()) {
		return nil // Offload ends what it began
	}
	if err := r.discardReference(seq); err != nil {
		return err
	}
	return fault(r.fs.syncDir(filepath.Join(r.dir, segmentDir)), "remove segments")
}

// TendObjects removes objects that nothing needs any more and brings the holds
// of the others in line with the locks of their points. It is repeated until it
// succeeds; nothing waits for it. While there are pins no object is removed:
// unlike a file, it cannot be read on by who has it open.
func (r *Replica) TendObjects(ctx context.Context) error {
	r.maintenance.Lock()
	defer r.maintenance.Unlock()
	r.mu.Lock()
	st, pinned := r.storage, len(r.pins) > 0
	locked := map[switchback.Sequence]bool{}
	for seq, m := range r.marks {
		locked[seq] = m.Locked
	}
	r.mu.Unlock()
	refs, garbage, err := listReferences(r.dir)
	if err != nil || st.objects == nil {
		return err
	}
	if pinned {
		garbage = nil // a view that was opened before may read them
	}
	for _, path := range garbage {
		var ref reference
		if err := readDocument(path, &ref); err == nil {
			if err := removeObject(ctx, st.objects, ref); err != nil {
				return err
			}
		} else if switchback.CodeOf(err) != switchback.CodeCorrupt {
			return err
		}
		if err := r.fs.remove(path); err != nil {
			return fault(err, "remove %s", path)
		}
	}
	for _, path := range refs {
		var ref reference
		if err := readDocument(path, &ref); err != nil {
			continue // damaged: Open names it
		}
		if want := locked[ref.Sequence]; want != ref.Held {
			err := st.objects.Hold(ctx, ref.Object, want)
			if switchback.CodeOf(err) == switchback.CodeUnsupported {
				continue
			}
			ref.Held = want
			if err == nil {
				err = writeDocument(r.fs, path, ref)
			}
			if err != nil {
				return err
			}
		}
	}
	if len(garbage) > 0 {
		return fault(r.fs.syncDir(filepath.Join(r.dir, segmentDir)), "remove segments")
	}
	return nil
}

func removeObject(ctx context.Context, objects *objectstore.Store, ref reference) error {
	if ref.Held {
		if err := objects.Hold(ctx, ref.Object, false); err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
			return err
		}
	}
	return objects.Remove(ctx, ref.Object)
}

// RemoveObjects deletes the objects of all segments of the replica in dir, which
// cannot be read any more afterwards. It does nothing where there are none.
func RemoveObjects(ctx context.Context, dir string) error {
	refs, garbage, err := listReferences(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil || len(refs)+len(garbage) == 0 {
		return err
	}
	var config Storage
	if err := readDocument(storagePath(dir), &config); err != nil {
		return err
	}
	if config.Objects == nil {
		return corrupt("%s names no object store, but %d segments are in one", storagePath(dir), len(refs)+len(garbage))
	}
	objects, err := objectstore.Open(*config.Objects)
	if err != nil {
		return err
	}
	for _, path := range append(refs, garbage...) {
		var ref reference
		if err := readDocument(path, &ref); err != nil {
			continue // its object cannot be named any more
		}
		if err := removeObject(ctx, objects, ref); err != nil {
			return fmt.Errorf("object %s stays: %w", ref.Object, err)
		}
	}
	return nil
}

// HasLocal reports whether the data of a point up to upTo is in a local file.
func (r *Replica) HasLocal(upTo switchback.Sequence) bool {
	files, _ := filepath.Glob(filepath.Join(r.dir, segmentDir, "*"+segmentSuffix)) // the pattern is well formed
	for _, f := range files {
		if seq, ok := segmentSequence(filepath.Base(f)); ok && seq <= upTo {
			return true
		}
	}
	return false
}

// StorageStatus says whether new points are sealed, and how many points' data is
// in which object store.
func (r *Replica) StorageStatus() (sealed bool, offloaded int, place string) {
	r.mu.Lock()
	st := r.storage
	r.mu.Unlock()
	if st.objects != nil {
		refs, _, _ := listReferences(r.dir) // for display
		offloaded, place = len(refs), st.objects.String()
	}
	return st.config.Seal, offloaded, place
}

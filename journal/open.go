package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/switchback-dr/switchback"
)

// Create makes a new replica in dir, which must not exist or be empty, and
// opens it. The base images are made by the caller.
func Create(dir string, spec Spec) (*Replica, error) { return Options{}.Create(dir, spec) }

// Open opens the replica in dir for this process alone; it completes what a
// crash left. A replica that is open elsewhere is refused with CodeConflict. A
// damaged segment does not prevent it: points before it are there, and Damaged
// names it.
func Open(dir string) (*Replica, error) { return Options{}.Open(dir) }

func manifestPath(dir string) string { return filepath.Join(dir, "manifest.json") }

// Create is the function Create with these options.
func (o Options) Create(dir string, spec Spec) (*Replica, error) {
	o = o.withDefaults()
	if err := spec.validate(); err != nil {
		return nil, err
	}
	if entries, err := os.ReadDir(dir); err == nil {
		for _, e := range entries {
			if e.Name() == "manifest.json" {
				return nil, switchback.Errorf(switchback.CodeConflict, "%s holds a replica already", dir).WithHint("open or remove it")
			}
			switch e.Name() { // what a crashed Create may have left
			case "lock", segmentDir, pinDir, branchDir, sumDir, "manifest.json.tmp":
			default:
				return nil, switchback.Errorf(switchback.CodeConflict, "%s is not empty: it holds %s", dir, e.Name())
			}
		}
	}
	for _, d := range []string{dir, filepath.Join(dir, segmentDir), filepath.Join(dir, pinDir), filepath.Join(dir, branchDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fault(err, "create replica")
		}
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	r := &Replica{dir: dir, opts: o, fs: o.fs, lock: lock, pins: map[string]Pin{}, branches: map[string]BranchInfo{}, storage: &storage{dir: dir, protection: spec.Protection}, marks: map[switchback.Sequence]switchback.Mark{}}
	r.manifest = Manifest{Spec: spec, Seeding: !spec.BaseIsOriginal}
	r.manifest.Base = switchback.Point{Protection: spec.Protection, Epoch: spec.Epoch}
	for _, d := range spec.Disks {
		if err == nil && !spec.BaseIsOriginal { // empty images: zeros
			err = createSums(dir, d.Name, d.SizeBytes, true)
		}
	}
	if err == nil {
		err = writeDocument(r.fs, manifestPath(dir), r.manifest)
	}
	if err == nil {
		err = fault(r.fs.syncDir(filepath.Dir(dir)), "create replica")
	}
	if err != nil {
		lock.Close()
		return nil, err
	}
	return r, nil
}

// lockDir takes the exclusive lock of a replica.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault(err, "lock replica")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		holder := make([]byte, 32)
		n, _ := f.ReadAt(holder, 0)
		f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, switchback.Errorf(switchback.CodeConflict, "replica %s is open already, by process %s", dir, strings.TrimSpace(string(holder[:n]))).
				WithHint("only one agent may have a replica open; stop the other one")
		}
		return nil, fault(err, "lock replica")
	}
	f.Truncate(0) // the number is for people only
	f.WriteAt(fmt.Appendf(nil, "%d\n", os.Getpid()), 0)
	return f, nil
}

// readManifest reads and validates the manifest in dir.
func readManifest(dir string) (Manifest, error) {
	var m Manifest
	if err := readDocument(manifestPath(dir), &m); err != nil {
		return m, err
	}
	if err := m.Spec.validate(); err != nil && !m.Detached {
		return m, corrupt("%s: %w", manifestPath(dir), err)
	}
	return m, nil
}

// Open is the function Open with these options.
func (o Options) Open(dir string) (*Replica, error) {
	o = o.withDefaults()
	if _, err := os.Stat(manifestPath(dir)); errors.Is(err, os.ErrNotExist) {
		return nil, switchback.Errorf(switchback.CodeNotFound, "no replica in %s", dir)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	r := &Replica{dir: dir, opts: o, fs: o.fs, lock: lock}
	if err := r.load(); err != nil {
		lock.Close()
		return nil, err
	}
	return r, nil
}

func (r *Replica) load() (err error) {
	if r.manifest, err = readManifest(r.dir); err != nil {
		return err
	}
	for _, d := range []string{".", segmentDir, pinDir, branchDir} {
		if err := r.removeTemps(filepath.Join(r.dir, d)); err != nil {
			return err
		}
		// What a killed process has renamed is read here, and may not be durable yet.
		if err := r.fs.syncDir(filepath.Join(r.dir, d)); err != nil {
			return fault(err, "open replica")
		}
	}
	if r.pins, err = readPins(r.dir); err != nil {
		return err
	}
	if r.storage, err = openStorage(r.dir, r.manifest.Protection); err != nil {
		return err
	}
	r.marks, r.marksDamage = readMarks(r.dir)
	if err := r.finishDrop(); err != nil {
		return err
	}
	if err := r.removeFolded(); err != nil {
		return err
	}
	if err := r.loadBranches(); err != nil {
		return err
	}
	return r.loadSegments()
}

// loadSegments finds the points. A segment that a merged one has taken in, and
// that a crash has left, is removed.
func (r *Replica) loadSegments() error {
	sequences, err := listSegments(r.dir)
	if err != nil {
		return err
	}
	type found struct {
		sequence switchback.Sequence
		segment  *segment // closed; nil when damaged
		damage   Damage
	}
	var all []found
	var after, upTo switchback.Sequence // the merged segment upTo has taken in what is between
	removed := false
	for _, seq := range slices.Backward(sequences) {
		if after < seq && seq < upTo {
			if err := r.removeSegment(seq); err != nil {
				return err
			}
			removed = true
			continue
		}
		s, err := r.storage.openSegment(seq)
		if err == nil {
			if s.header.Merged != nil {
				// Nothing is removed for a segment that could not replace it.
				if err = s.loadIndex(); err == nil {
					after, upTo = s.header.Merged.Continues, seq
				}
				s.index = nil
			}
			if err == nil {
				err = r.settleReference(s)
			}
			s.close()
		}
		f := found{sequence: seq, segment: s}
		if err != nil {
			if !errors.As(err, &f.damage) {
				return fault(err, "open segment %d", seq)
			}
			f.segment = nil
		}
		all = append(all, f)
	}
	if removed {
		if err := r.fs.syncDir(filepath.Join(r.dir, segmentDir)); err != nil {
			return fault(err, "remove segments")
		}
	}
	last := r.manifest.Base
	for _, f := range slices.Backward(all) {
		if f.segment == nil {
			r.broken = append(r.broken, f.damage)
			continue
		}
		s := f.segment
		if seq, digest := s.header.continues(); len(r.broken) > 0 || seq != last.Sequence || digest != last.Digest {
			r.broken = append(r.broken, Damage{Segment: f.sequence, File: s.path,
				Reason: fmt.Sprintf("continues %d, %s, but the point before is %d, %s", seq, shortDigest(digest), last.Sequence, shortDigest(last.Digest))})
			continue
		}
		r.segments = append(r.segments, segmentInfo{s.point, s.header.Disks})
		last = s.point
	}
	return nil
}

// listSegments returns the sequences of the segments in dir, ascending, be they
// files or references.
func listSegments(dir string) ([]switchback.Sequence, error) {
	entries, err := os.ReadDir(filepath.Join(dir, segmentDir))
	if err != nil {
		return nil, fault(err, "list segments")
	}
	var out []switchback.Sequence
	for _, e := range entries {
		if seq, ok := segmentSequence(e.Name()); ok {
			out = append(out, seq)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

func (r *Replica) removeTemps(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fault(err, "list %s", dir)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tempSuffix) {
			if err := r.fs.remove(filepath.Join(dir, e.Name())); err != nil {
				return fault(err, "remove what a crash left")
			}
		}
	}
	return nil
}

// Remove deletes the replica in dir: manifest, segments, pins, not the bases.
// It is refused while the replica is open or pinned, and does nothing when
// there is none.
func Remove(dir string) error {
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	lock, err := lockDir(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	pins, err := readPins(dir)
	if err != nil {
		return err
	}
	for _, p := range pins {
		return switchback.Errorf(switchback.CodeRefused, "replica %s is pinned at point %d by %s", dir, p.Sequence, p.Name).
			WithHint("end what uses it first")
	}
	if err := RemoveObjects(context.Background(), dir); err != nil {
		return err
	}
	// The manifest goes first, so that a crash leaves no half of a replica.
	fs := osFileSystem{}
	err = fs.remove(manifestPath(dir))
	if err == nil {
		err = fs.syncDir(dir)
	} else if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	for _, name := range []string{segmentDir, pinDir, branchDir, sumDir, "marks.json", "storage.json", "definition.json", samplesFile, checkFile, "manifest.json.tmp", "lock"} {
		if err == nil {
			err = os.RemoveAll(filepath.Join(dir, name))
		}
	}
	if err != nil {
		return fault(err, "remove replica %s", dir)
	}
	os.Remove(dir) // stays when somebody else keeps files in it
	return nil
}

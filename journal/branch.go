package journal

import (
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/switchback-dr/switchback"
)

// Branch is set in the header of a segment that is no point but holds what was
// written to a VM that ran from one: it follows its parent point beside the
// chain, and nothing follows it. Sequence and Parent of the header are those
// that the next point would have.
type Branch struct {
	Name string `json:"name"`
	// Pin is the name of the pin that keeps the parent point.
	Pin string `json:"pin,omitempty"`
	// Whole: the segment holds all of the disks, and nothing of the parent counts.
	Whole bool `json:"whole,omitempty"`
}

// BranchInfo is what is known of a branch.
type BranchInfo struct {
	Branch
	// Point is the parent, 0 being original disks, and Epoch the run's that left it.
	Point switchback.Sequence `json:"point"`
	Epoch switchback.Epoch    `json:"epoch"`
	// Time is when the run ended.
	Time   time.Time `json:"time"`
	Digest string    `json:"digest"`
	File   string    `json:"file"`
	// StoredBytes is the size of the segment, ChangedBytes what it holds of the disks.
	StoredBytes  int64          `json:"stored_bytes"`
	ChangedBytes int64          `json:"changed_bytes"`
	Disks        []DiskGeometry `json:"disks"`
	// Damaged: the segment cannot be opened; all but Name and File is unknown.
	Damaged bool `json:"damaged,omitempty"`
}

const branchDir = "branches"

func branchPath(dir, name string) string {
	return filepath.Join(dir, branchDir, name+segmentSuffix)
}

func branchSealName(name string) string { return "branch/" + name }

func branchMissing(dir, name string) error {
	return switchback.Errorf(switchback.CodeNotFound, "replica %s has no snapshot %s", dir, name)
}

// openBranch opens the segment of a branch; one that is not there is os.ErrNotExist.
func (st *storage) openBranch(name string) (*segment, error) {
	if !pinName.MatchString(name) {
		return nil, switchback.Errorf(switchback.CodeInvalid, "%q names no snapshot", name)
	}
	path := branchPath(st.dir, name)
	local, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	id, err := local.Stat()
	var plain segmentFile
	if err == nil {
		plain, err = st.unseal(localFile{local, id.Size()}, branchSealName(name))
	}
	if err != nil {
		local.Close()
	}
	s := &segment{path: path, file: plain, id: id}
	if err == nil {
		err = s.begin(nil, func(h *Header) error {
			if h.Branch == nil || h.Branch.Name != name || h.Protection != st.protection {
				return corrupt("the file holds another segment")
			}
			return nil
		})
	}
	if switchback.CodeOf(err) == switchback.CodeCorrupt {
		return nil, Damage{Branch: name, File: path, Reason: err.Error()}.corrupt()
	}
	if err != nil {
		return nil, err
	}
	return s, nil
}

// branchInfo describes an open branch.
func (s *segment) branchInfo() BranchInfo {
	parent, _ := s.header.continues()
	return BranchInfo{Branch: *s.header.Branch, Point: parent, Epoch: s.header.Epoch, Time: s.header.Time, Digest: s.point.Digest, File: s.path,
		StoredBytes: s.size, ChangedBytes: s.foot.dataBytes + s.foot.zeroBytes, Disks: s.header.Disks}
}

// listBranches returns the names of the branches in dir.
func listBranches(dir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(dir, branchDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault(err, "list branches")
	}
	var out []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), segmentSuffix); ok && pinName.MatchString(name) {
			out = append(out, name)
		}
	}
	return out, nil
}

// readBranches describes all branches; those that cannot be opened are in damage, too.
func (st *storage) readBranches() (all []BranchInfo, damage []Damage, err error) {
	names, err := listBranches(st.dir)
	if err != nil {
		return nil, nil, err
	}
	for _, name := range names {
		s, err := st.openBranch(name)
		var d Damage
		switch {
		case err == nil:
			all = append(all, s.branchInfo())
			s.close()
		case errors.Is(err, os.ErrNotExist): // dropped meanwhile
		case errors.As(err, &d):
			damage = append(damage, d)
			all = append(all, BranchInfo{Branch: Branch{Name: name}, File: branchPath(st.dir, name), Damaged: true})
		default:
			return nil, nil, fault(err, "open branch %s", name)
		}
	}
	return all, damage, nil
}

func (r *Replica) loadBranches() error {
	all, _, err := r.storage.readBranches()
	r.branches = map[string]BranchInfo{}
	for _, b := range all {
		r.branches[b.Name] = b
	}
	return err
}

// Branches returns all branches, by name.
func (r *Replica) Branches() []BranchInfo {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.SortedFunc(maps.Values(r.branches), func(a, b BranchInfo) int { return strings.Compare(a.Name, b.Name) })
}

// BranchBytes is the size of the segments of all branches.
func (r *Replica) BranchBytes() (n int64) {
	for _, b := range r.Branches() {
		n += b.StoredBytes
	}
	return n
}

// DropBranch durably removes a branch; one that is not there is no error. Its
// pin stays, for the caller to remove.
func (r *Replica) DropBranch(name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return switchback.Errorf(switchback.CodeInternal, "replica is closed")
	}
	if _, ok := r.branches[name]; !ok {
		return nil
	}
	err := r.fs.remove(branchPath(r.dir, name))
	if err == nil || errors.Is(err, os.ErrNotExist) {
		err = r.fs.syncDir(filepath.Join(r.dir, branchDir))
	}
	if err != nil {
		return fault(err, "remove branch %s", name)
	}
	delete(r.branches, name)
	return nil
}

// OpenNamed opens the branch called name, or the point seq where that is empty.
func OpenNamed(dir string, seq switchback.Sequence, name string) (*View, error) {
	if name != "" {
		return OpenBranch(dir, name)
	}
	return OpenView(dir, seq)
}

// OpenBranch opens a branch over its parent point, as OpenView opens a point;
// the parent must be pinned, which it is while the branch is there.
func OpenBranch(dir, name string) (*View, error) { return ViewOptions{}.OpenBranch(dir, name) }

// OpenBranch is the function OpenBranch with these options.
func (o ViewOptions) OpenBranch(dir, name string) (*View, error) {
	m, segments, err := openBranchChain(dir, name)
	if err != nil {
		return nil, fault(err, "open snapshot %s of replica %s", name, dir)
	}
	return o.view(dir, m, segments)
}

// openBranchChain reads the manifest and opens the segments that make a branch,
// its own being the last.
func openBranchChain(dir, name string) (Manifest, []*segment, error) {
	for attempt := 0; ; attempt++ {
		m, segments, err := tryBranch(dir, name)
		if !errors.Is(err, errMoved) || attempt == 100 {
			return m, segments, err
		}
	}
}

func tryBranch(dir, name string) (m Manifest, segments []*segment, err error) {
	if m, err = readManifest(dir); err != nil {
		return m, nil, err
	}
	st, err := openStorage(dir, m.Protection)
	if err != nil {
		return m, nil, err
	}
	s, err := st.openBranch(name)
	if errors.Is(err, os.ErrNotExist) {
		err = branchMissing(dir, name)
	}
	if err != nil {
		return m, nil, err
	}
	defer func() {
		if err != nil {
			for _, s := range append(segments, s) {
				s.close()
			}
			segments = nil
		}
	}()
	if err := s.loadIndex(); err != nil {
		return m, nil, err
	}
	if s.header.Branch.Whole {
		return m, []*segment{s}, nil
	}
	if m.FoldedBranch != "" && m.FoldedBranch != name {
		return m, nil, m.noPoints()
	}
	seq, want := s.header.continues()
	if segments, err = st.openSegments(m.Base, seq); err != nil {
		return m, nil, err
	}
	parent := m.Base
	if n := len(segments); n > 0 {
		parent = segments[n-1].point
	}
	if parent.Sequence != seq || parent.Digest != want || seq < m.oldest() {
		if st.moved(m.Base, segments) {
			return m, segments, errMoved
		}
		return m, segments, Damage{Branch: name, File: s.path, Reason: "the point that it follows is gone"}.corrupt()
	}
	return m, append(segments, s), nil
}

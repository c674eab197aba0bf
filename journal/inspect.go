package journal

import (
	"errors"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/switchback-dr/switchback"
)

// PointDetail is everything that a replica knows of one of its points.
type PointDetail struct {
	switchback.MarkedPoint
	// InBase: the bases stand for it; there is no segment.
	InBase bool `json:"in_base,omitempty"`
	// File is its segment.
	File string `json:"file,omitempty"`
	// Disks are those of the VM at the point, with what it changes.
	Disks []DiskDetail `json:"disks"`
	// Pins are the names of those at this point.
	Pins []string `json:"pins,omitempty"`
	// Frames counts those of the segment.
	Frames int `json:"frames,omitempty"`
}

// DiskDetail is what a point changes of one disk.
type DiskDetail struct {
	DiskGeometry
	ChangedBytes int64 `json:"changed_bytes"`
	DataBytes    int64 `json:"data_bytes"`
	ZeroBytes    int64 `json:"zero_bytes"`
	Extents      int   `json:"extents"`
}

// Inspection is what the files of a replica say.
type Inspection struct {
	Dir      string   `json:"dir"`
	Manifest Manifest `json:"manifest"`
	// Open is the process that has the replica open; "" when none has.
	Open   string                   `json:"open_by_process,omitempty"`
	Points []switchback.MarkedPoint `json:"points"`
	Pins   []Pin                    `json:"pins,omitempty"`
	// Damage is what was met; Check finds more.
	Damage []Damage `json:"damage,omitempty"`
	// SegmentBytes is the size of all segments of points.
	SegmentBytes int64 `json:"segment_bytes"`
	// Branches are what runs wrote that left their point, kept.
	Branches []BranchInfo `json:"branches,omitempty"`
}

// Inspect reads what a replica's files say of it. It needs no lock and changes
// nothing, so it may be used while an agent has the replica open. What cannot be
// read is in Damage; err is not nil when there is no replica, or nothing can be said.
func Inspect(dir string) (Inspection, error) {
	in := Inspection{Dir: dir}
	var err error
	if in.Manifest, err = readManifest(dir); err != nil {
		return in, err
	}
	in.Open = lockHolder(dir)
	note := func(path string, err error) error {
		if switchback.CodeOf(err) != switchback.CodeCorrupt {
			return err
		}
		in.Damage = append(in.Damage, Damage{File: path, Reason: err.Error()})
		return nil
	}
	marks, err := readMarks(dir)
	if err != nil {
		if err := note(marksPath(dir), err); err != nil {
			return in, err
		}
	}
	pins, err := readPins(dir)
	if err != nil {
		return in, err
	}
	for _, p := range pins {
		in.Pins = append(in.Pins, p)
		if p.Damaged {
			in.Damage = append(in.Damage, Damage{File: pinPath(dir, p.Name), Reason: "pin " + p.Name + " cannot be read"})
		}
	}
	slices.SortFunc(in.Pins, func(a, b Pin) int { return strings.Compare(a.Name, b.Name) })
	if in.Manifest.Seeding {
		return in, nil
	}
	files, err := openStorage(dir, in.Manifest.Protection)
	if err != nil {
		return in, err
	}
	branches, damage, err := files.readBranches()
	if err != nil {
		return in, err
	}
	in.Branches, in.Damage = branches, append(in.Damage, damage...)
	if in.Manifest.noPoints() != nil {
		return in, nil
	}
	oldest := in.Manifest.oldest()
	if base := in.Manifest.Base; base.Sequence > 0 && in.Manifest.Folding == 0 {
		in.Points = append(in.Points, switchback.MarkedPoint{Point: base, Mark: marks[base.Sequence]})
	}
	sequences, err := listSegments(dir)
	if err != nil {
		return in, err
	}
	for _, seq := range sequences {
		if seq <= in.Manifest.Base.Sequence || in.Manifest.Dropping != nil && seq > *in.Manifest.Dropping {
			continue
		}
		s, err := files.openSegment(seq)
		if errors.Is(err, os.ErrNotExist) {
			continue // folded or dropped meanwhile
		}
		var d Damage
		if errors.As(err, &d) {
			d.From, d.To = seq, NewestPoint
			in.Damage = append(in.Damage, d)
			continue
		}
		if err != nil {
			return in, fault(err, "open segment %d", seq)
		}
		in.SegmentBytes += s.size
		if seq >= oldest {
			in.Points = append(in.Points, switchback.MarkedPoint{Point: s.point, Mark: marks[seq]})
		}
		s.close()
	}
	if n := len(in.Points); n > 0 {
		if seq := in.Points[n-1].Sequence; seq > in.Manifest.Base.Sequence {
			_, chain, err := openPoint(dir, seq)
			for _, s := range chain {
				s.close()
			}
			var d Damage
			if errors.As(err, &d) && !slices.ContainsFunc(in.Damage, func(x Damage) bool { return x.Segment == d.Segment }) {
				d.From, d.To = d.Segment, NewestPoint
				in.Damage = append(in.Damage, d)
			}
		}
	}
	return in, nil
}

// lockHolder returns the process that holds the lock of a replica, as it noted
// itself; "" when nobody does, as far as can be told without taking it.
func lockHolder(dir string) string {
	b, err := os.ReadFile(dir + "/lock")
	if err != nil {
		return ""
	}
	pid := strings.TrimSpace(string(b))
	if pid == "" {
		return ""
	}
	links, err := os.ReadDir("/proc/" + pid + "/fd")
	if err != nil {
		return ""
	}
	want, err := os.Stat(dir + "/lock")
	if err != nil {
		return ""
	}
	for _, l := range links {
		if got, err := os.Stat("/proc/" + pid + "/fd/" + l.Name()); err == nil && os.SameFile(want, got) {
			return pid
		}
	}
	return ""
}

// InspectPoint returns everything of one point; it needs no lock. CodeNotFound:
// there is none of that number.
func InspectPoint(dir string, seq switchback.Sequence) (PointDetail, error) {
	for attempt := 0; ; attempt++ {
		d, err := inspectPoint(dir, seq)
		if errors.Is(err, os.ErrNotExist) && attempt < 10 {
			time.Sleep(time.Millisecond) // folded between reading the manifest and opening the segment
			continue
		}
		return d, fault(err, "look at point %d", seq)
	}
}

func inspectPoint(dir string, seq switchback.Sequence) (PointDetail, error) {
	var d PointDetail
	m, err := readManifest(dir)
	if err != nil {
		return d, err
	}
	marks, err := readMarks(dir)
	if err != nil {
		return d, err
	}
	pins, err := readPins(dir)
	if err != nil {
		return d, err
	}
	for _, p := range pins {
		if p.Sequence == seq {
			d.Pins = append(d.Pins, p.Name)
		}
	}
	slices.Sort(d.Pins)
	d.Mark = marks[seq]
	if err := m.noPoints(); err != nil {
		return d, err
	}
	if seq > 0 && seq == m.Base.Sequence && m.Folding == 0 {
		d.Point, d.InBase = m.Base, true
		for _, g := range m.geometry() {
			d.Disks = append(d.Disks, DiskDetail{DiskGeometry: g})
		}
		return d, nil
	}
	missing := switchback.Errorf(switchback.CodeNotFound, "replica %s has no point %d", m.Protection, seq).WithHint("the oldest is %d", m.oldest())
	if m.Seeding || seq < m.oldest() || seq <= m.Base.Sequence || m.Dropping != nil && seq > *m.Dropping {
		return d, missing
	}
	files, err := openStorage(dir, m.Protection)
	if err != nil {
		return d, err
	}
	s, err := files.openSegment(seq)
	if errors.Is(err, os.ErrNotExist) {
		if now, e := readManifest(dir); e == nil && now.Base.Sequence < seq {
			return d, missing
		}
		return d, err
	} else if err != nil {
		return d, err
	}
	defer s.close()
	if err := s.loadIndex(); err != nil {
		return d, err
	}
	d.Point, d.File, d.Frames = s.point, s.path, len(s.index.frames)
	for i, g := range s.header.Disks {
		d.Disks = append(d.Disks, s.index.detail(i, g))
	}
	return d, nil
}

// detail says what the segment changes of a disk.
func (ix *index) detail(disk int, g DiskGeometry) DiskDetail {
	x := DiskDetail{DiskGeometry: g, Extents: len(ix.disks[disk].data) + len(ix.disks[disk].zero)}
	for _, r := range ix.disks[disk].data {
		x.DataBytes += r.Length
	}
	for _, r := range ix.disks[disk].zero {
		x.ZeroBytes += r.Length
	}
	x.ChangedBytes = x.DataBytes + x.ZeroBytes
	return x
}

// RestoreManifest writes the manifest that is in memory again, where the file
// is damaged. It reports whether it was.
func (r *Replica) RestoreManifest() (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := readManifest(r.dir); err == nil || switchback.CodeOf(err) != switchback.CodeCorrupt {
		return false, err
	}
	return true, r.update(func(*Manifest) {})
}

// InspectBranch returns what the files say of a branch; it needs no lock.
func InspectBranch(dir, name string) (BranchDetail, error) {
	var d BranchDetail
	m, err := readManifest(dir)
	if err != nil {
		return d, err
	}
	st, err := openStorage(dir, m.Protection)
	if err != nil {
		return d, err
	}
	s, err := st.openBranch(name)
	if errors.Is(err, os.ErrNotExist) {
		return d, branchMissing(dir, name)
	}
	if err != nil {
		return d, err
	}
	defer s.close()
	if err := s.loadIndex(); err != nil {
		return d, err
	}
	d.BranchInfo, d.Frames = s.branchInfo(), len(s.index.frames)
	for i, g := range s.header.Disks {
		d.Changes = append(d.Changes, s.index.detail(i, g))
	}
	return d, nil
}

// BranchDetail is everything that a replica knows of one of its branches.
type BranchDetail struct {
	BranchInfo
	Frames  int          `json:"frames"`
	Changes []DiskDetail `json:"changes"`
}

package journal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
)

// CheckOptions say how a replica is checked. The zero value checks everything,
// without pause.
type CheckOptions struct {
	// Point limits the report to damage that a reader of that point would meet,
	// and the reading to what can cause it. 0 means the whole replica.
	Point switchback.Sequence
	// Branch limits it to damage that a reader of that branch would meet, and stands
	// alone. Without both, branches are checked with all else.
	Branch string
	// BytesPerSecond bounds the reading; 0 means as fast as it goes.
	BytesPerSecond int64
	// State is where an interrupted check goes on; the zero value is the beginning.
	State CheckState
	// Progress, if not nil, is called between pieces of at most a few MiB with
	// the state reached; it may be kept, to go on from there.
	Progress func(CheckState)
}

// CheckState is how far a check is and what it has found. It is durable where
// its owner makes it so.
type CheckState struct {
	// Segment is the newest segment that is done; Disk and Offset are how far the bases are.
	// Branch is the last branch that is done.
	Segment switchback.Sequence `json:"segment,omitempty"`
	Branch  string              `json:"branch,omitempty"`
	Disk    string              `json:"disk,omitempty"`
	Offset  int64               `json:"offset,omitempty"`

	DoneBytes  int64 `json:"done_bytes"`
	TotalBytes int64 `json:"total_bytes"`
	// Segments and Points count what was looked at; BaseBytes is what of the bases was read.
	Segments  int   `json:"segments"`
	Branches  int   `json:"branches,omitempty"`
	Points    int   `json:"points"`
	BaseBytes int64 `json:"base_bytes"`
	// UnprovenBytes is what of the bases could only be read: there was nothing
	// to compare it with.
	UnprovenBytes int64    `json:"unproven_bytes"`
	Damage        []Damage `json:"damage,omitempty"`
}

// Check reads what is stored in the replica in dir and compares it with its
// checksums: manifest, pins, marks, every segment and the bases. It needs no
// lock and changes nothing; points may be received and folded meanwhile. Damage
// is in the state that is returned, each with the points it affects; err is about
// Check itself.
func Check(ctx context.Context, dir string, o CheckOptions) (CheckState, error) {
	return (&checker{dir: dir, o: o, st: o.State, began: time.Now()}).run(ctx)
}

// Check is the function Check on an open replica. In the bases what is not
// proven yet is from then on: its checksums are recorded.
func (r *Replica) Check(ctx context.Context, o CheckOptions) (CheckState, error) {
	return (&checker{dir: r.dir, o: o, st: o.State, replica: r, began: time.Now()}).run(ctx)
}

// checker is one run of Check.
type checker struct {
	dir     string
	o       CheckOptions
	st      CheckState
	replica *Replica // nil: only read
	began   time.Time
	read    int64 // in this run

	manifest Manifest
	segments []*segment // that can be opened, ascending, with their indexes
	branches []*segment // by name
	// limited: only what a reader of the point upTo reads, and the branch asked for.
	limited bool
	upTo    switchback.Sequence
}

func (c *checker) run(ctx context.Context) (CheckState, error) {
	defer func() {
		for _, s := range slices.Concat(c.segments, c.branches) {
			s.close()
		}
	}()
	c.limited, c.upTo = c.o.Point > 0, c.o.Point
	var err error
	if c.manifest, err = readManifest(c.dir); err != nil {
		return c.st, c.document(manifestPath(c.dir), err)
	}
	if c.manifest.Seeding {
		return c.st, switchback.Errorf(switchback.CodeRefused, "replica %s is being seeded: it has no point yet", c.manifest.Protection).
			WithHint("wait for the first point")
	}
	resumed := c.st.DoneBytes > 0
	if !resumed {
		if err := c.documents(); err != nil {
			return c.st, err
		}
	}
	if err := c.openBranches(); err != nil {
		return c.st, err
	}
	if c.manifest.noPoints() == nil {
		if err := c.openAll(resumed); err != nil {
			return c.st, err
		}
	}
	if err := c.total(resumed); err != nil {
		return c.st, err
	}
	for _, s := range c.segments {
		if s.header.Sequence <= c.st.Segment || c.limited && s.header.Sequence > c.upTo {
			continue
		}
		if err := c.segment(ctx, s); err != nil {
			return c.st, err
		}
		c.st.Segment = s.header.Sequence
		c.st.Segments++
		c.tell()
	}
	for _, s := range c.branches {
		if s.header.Branch.Name <= c.st.Branch {
			continue
		}
		if err := c.segment(ctx, s); err != nil {
			return c.st, err
		}
		c.st.Branch = s.header.Branch.Name
		c.st.Branches++
		c.tell()
	}
	if err := c.bases(ctx); err != nil {
		return c.st, err
	}
	if c.limited {
		c.st.Damage = slices.DeleteFunc(c.st.Damage, func(d Damage) bool {
			return !d.Affects(c.upTo) && (d.Branch == "" || d.Branch != c.o.Branch)
		})
	}
	c.st.DoneBytes = c.st.TotalBytes
	c.tell()
	return c.st, nil
}

func (c *checker) tell() {
	if c.o.Progress != nil {
		st := c.st
		st.Damage = slices.Clone(st.Damage)
		c.o.Progress(st)
	}
}

// spend counts bytes read and waits where a rate is to be kept.
func (c *checker) spend(ctx context.Context, n int64) error {
	c.read += n
	c.st.DoneBytes = min(c.st.DoneBytes+n, c.st.TotalBytes)
	if rate := c.o.BytesPerSecond; rate > 0 {
		due := time.Duration(float64(c.read) / float64(rate) * float64(time.Second))
		if wait := due - time.Since(c.began); wait > time.Millisecond {
			t := time.NewTimer(wait)
			defer t.Stop()
			select {
			case <-t.C:
			case <-ctx.Done():
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return switchback.Errorf(switchback.CodeCancelled, "check: %w", err)
	}
	return nil
}

// found adds damage, once.
func (c *checker) found(d Damage) {
	for _, old := range c.st.Damage {
		if old.File == d.File && old.Disk == d.Disk && old.Reason == d.Reason && slices.Equal(old.Ranges, d.Ranges) {
			return
		}
	}
	c.st.Damage = append(c.st.Damage, d)
}

// document turns corruption of a small file into a report and passes every other error on.
func (c *checker) document(path string, err error) error {
	if switchback.CodeOf(err) != switchback.CodeCorrupt {
		return err
	}
	c.found(Damage{File: path, Reason: err.Error(), To: NewestPoint})
	return nil
}

// documents checks pins and marks; the manifest was read before.
func (c *checker) documents() error {
	if _, err := readMarks(c.dir); err != nil {
		if switchback.CodeOf(err) != switchback.CodeCorrupt {
			return err
		}
		// No point is affected, but what was said of them is lost.
		c.found(Damage{File: marksPath(c.dir), Reason: err.Error()})
	}
	if _, err := ReadDefinition(c.dir); switchback.CodeOf(err) == switchback.CodeCorrupt {
		// The source sends it again.
		c.found(Damage{File: definitionPath(c.dir), Reason: err.Error()})
	}
	pins, err := readPins(c.dir)
	if err != nil {
		return err
	}
	for _, p := range pins {
		if p.Damaged {
			c.found(Damage{File: pinPath(c.dir, p.Name), Reason: "pin " + p.Name + " cannot be read"})
		}
	}
	return nil
}

// openBranches opens the branches that are to be checked, and tells which cannot be.
func (c *checker) openBranches() error {
	if c.limited {
		return nil
	}
	st, err := openStorage(c.dir, c.manifest.Protection)
	if err != nil {
		return err
	}
	names := []string{c.o.Branch}
	if c.o.Branch == "" {
		if names, err = listBranches(c.dir); err != nil {
			return err
		}
	}
	for _, name := range names {
		s, err := st.openBranch(name)
		if errors.Is(err, os.ErrNotExist) {
			if c.o.Branch != "" {
				return branchMissing(c.dir, name)
			}
			continue // dropped meanwhile
		}
		if err == nil {
			if err = s.loadIndex(); err != nil {
				s.close()
			}
		}
		var d Damage
		if errors.As(err, &d) {
			c.found(d)
			c.limited = c.limited || c.o.Branch != "" // of its parent nothing is known
			continue
		}
		if err != nil {
			return fault(err, "open branch %s", name)
		}
		c.branches = append(c.branches, s)
		if c.o.Branch != "" {
			c.limited = true
			if c.upTo, _ = s.header.continues(); s.header.Branch.Whole {
				c.upTo = 0
			}
		}
	}
	return nil
}

// openAll opens every segment that is there and tells which cannot be.
func (c *checker) openAll(resumed bool) error {
	files, err := openStorage(c.dir, c.manifest.Protection)
	if err != nil {
		return err
	}
	sequences, err := listSegments(c.dir)
	if err != nil {
		return err
	}
	for _, seq := range sequences {
		if seq <= c.manifest.Base.Sequence {
			continue // folded; its file is about to be removed
		}
		s, err := files.openSegment(seq)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err == nil {
			if err = s.loadIndex(); err != nil {
				s.close()
			}
		}
		var d Damage
		if errors.As(err, &d) {
			d.From, d.To = seq, NewestPoint
			c.found(d)
			continue
		}
		if err != nil {
			return fault(err, "open segment %d", seq)
		}
		c.segments = append(c.segments, s)
	}
	c.st.Points = len(c.segments)
	if c.manifest.Base.Sequence > 0 {
		c.st.Points++
	}
	if len(sequences) == 0 || resumed {
		return nil
	}
	// What a reader needs beside whole files: that they are one chain. Ask for the newest.
	newest := sequences[len(sequences)-1]
	if c.limited {
		newest = c.upTo
	}
	if newest <= c.manifest.Base.Sequence {
		return nil
	}
	_, chain, err := openPoint(c.dir, newest)
	for _, s := range chain {
		s.close()
	}
	var d Damage
	if errors.As(err, &d) {
		d.From, d.To = d.Segment, NewestPoint
		c.found(d)
		return nil
	}
	if switchback.CodeOf(err) == switchback.CodeNotFound && !c.limited {
		return nil // folded or dropped meanwhile
	}
	return err
}

// total says how much there is to read.
func (c *checker) total(resumed bool) error {
	c.st.TotalBytes = 0
	for _, s := range c.segments {
		if !c.limited || s.header.Sequence <= c.upTo {
			c.st.TotalBytes += s.size
		}
	}
	for _, s := range c.branches {
		c.st.TotalBytes += s.size
	}
	for _, d := range c.manifest.Disks {
		if !d.Absent {
			c.st.TotalBytes += d.SizeBytes
		}
	}
	if !resumed {
		c.st.DoneBytes = 0
	}
	return nil
}

// segment reads every frame of a segment.
func (c *checker) segment(ctx context.Context, s *segment) error {
	raw := make([]byte, maxFrame)
	var ranges = map[string][]extent.Range{} // by disk and reason
	for n := range s.index.frames {
		f := &s.index.frames[n]
		if err := s.checkFrame(uint32(n), raw); err != nil {
			var d Damage
			if !errors.As(err, &d) {
				return fault(err, "check segment %d", s.header.Sequence)
			}
			if d.Branch == "" {
				d.From, d.To = d.Segment, c.hidden(d.Disk, d.Ranges, d.Segment)
			}
			ranges[d.Disk] = append(ranges[d.Disk], d.Ranges...)
			c.found(d)
		}
		if err := c.spend(ctx, int64(f.stored)+frameHeadSize); err != nil {
			return err
		}
	}
	return nil
}

// hidden returns the newest point that still reads one of the ranges of a disk
// from what stands for the point after: later segments may have overwritten them.
func (c *checker) hidden(disk string, ranges []extent.Range, after switchback.Sequence) switchback.Sequence {
	left := extent.NewSet(ranges...)
	for _, s := range c.segments {
		if s.header.Sequence <= after {
			continue
		}
		i := s.disk(disk)
		if i >= 0 {
			left = left.Subtract(s.index.changed(i))
		}
		if i < 0 || left.IsEmpty() {
			return s.header.Sequence - 1
		}
	}
	return NewestPoint
}

// NewestPoint as the end of a damage's points: all that are there and will follow.
const NewestPoint = switchback.Sequence(1<<63 - 1)

// Affects reports whether a reader of the point meets the damage.
func (d Damage) Affects(p switchback.Sequence) bool { return p >= d.From && p <= d.To }

// Points says in words which points the damage affects.
func (d Damage) Points() string {
	switch {
	case d.Branch != "":
		return "snapshot " + d.Branch
	case d.To == 0:
		return "no point"
	case d.To == NewestPoint && d.From == 0:
		return "all points"
	case d.To == NewestPoint:
		return fmt.Sprintf("points from %d on", d.From)
	case d.From == d.To:
		return fmt.Sprintf("point %d", d.From)
	}
	return fmt.Sprintf("points %d to %d", d.From, d.To)
}

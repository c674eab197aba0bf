package journal

import (
	"context"
	"errors"
	"os"
	"slices"

	"github.com/switchback-dr/switchback"
)

// Verify reads every stored segment and checks it against its checksums. It
// returns the damage found; err is about Verify itself. progress, if not nil,
// is called with the bytes done and in total. Points may be received and folded
// meanwhile. Bases are not looked at: Check does that.
func (r *Replica) Verify(ctx context.Context, progress func(done, total int64)) ([]Damage, error) {
	r.mu.Lock()
	damages := slices.Clone(r.broken)
	var points []switchback.Point
	var done, total int64
	for _, s := range r.segments {
		points = append(points, s.point)
		total += s.point.StoredBytes
	}
	r.mu.Unlock()
	for _, p := range points {
		found, err := r.verifySegment(ctx, p)
		if err != nil {
			return damages, err
		}
		damages = append(damages, found...)
		done += p.StoredBytes
		if progress != nil {
			progress(done, total)
		}
	}
	return damages, nil
}

func (r *Replica) verifySegment(ctx context.Context, p switchback.Point) (damages []Damage, err error) {
	path := segmentPath(r.dir, p.Sequence)
	// collect turns corruption into a report and passes everything else on.
	collect := func(err error) error {
		var d Damage
		if !errors.As(err, &d) {
			return fault(err, "verify segment %d", p.Sequence)
		}
		damages = append(damages, d)
		return nil
	}
	r.mu.Lock()
	st := r.storage
	r.mu.Unlock()
	s, err := st.openSegment(p.Sequence)
	if errors.Is(err, os.ErrNotExist) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if slices.ContainsFunc(r.segments, func(s segmentInfo) bool { return s.point.Digest == p.Digest }) {
			damages = append(damages, Damage{Segment: p.Sequence, File: path, Reason: "the file is missing"})
		}
		return damages, nil // otherwise folded or dropped meanwhile
	} else if err != nil {
		return damages, collect(err)
	}
	defer s.close()
	if s.point.Digest != p.Digest {
		damages = append(damages, Damage{Segment: p.Sequence, File: path, Reason: "the file holds another segment"})
		return damages, nil
	}
	if err := s.loadIndex(); err != nil {
		return damages, collect(err)
	}
	raw := make([]byte, maxFrame)
	for n := range s.index.frames {
		if err := ctx.Err(); err != nil {
			return damages, switchback.Errorf(switchback.CodeCancelled, "verify: %w", err)
		}
		if err := s.checkFrame(uint32(n), raw); err != nil {
			if err := collect(err); err != nil {
				return damages, err
			}
		}
	}
	return damages, nil
}

package agent

import (
	"fmt"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/anomaly"
	"github.com/switchback-dr/switchback/journal"
)

// judge marks a point that was just received if what it changes stands out.
func (v *vm) judge(replica *journal.Replica, p switchback.Point) {
	list := replica.Samples()
	var history []anomaly.Sample
	for i, s := range list {
		x := anomaly.Sample{Sequence: s.Sequence, Time: s.Time, DataBytes: s.DataBytes, DenseBytes: s.DenseBytes, Resync: s.Resync, Suspicious: s.Suspicious}
		if s.Digest != p.Digest {
			history = append(history, x)
			continue
		}
		why := anomaly.Judge(history, x)
		if why == "" || s.Suspicious {
			return
		}
		replica.MarkSample(list[i], true)
		err := replica.SetMark(p.Sequence, func(m *switchback.Mark) error { m.Suspicious = why; return nil })
		v.agent.log.Warn("suspicious change", "protection", p.Protection, "point", p.Sequence, "why", why, "mark_error", err)
		return
	}
}

// suspicions is the condition of a replica with suspicious points.
func suspicions(replica *journal.Replica, vm string) []switchback.Condition {
	var first, last switchback.MarkedPoint
	var before switchback.Sequence
	count := 0
	for _, p := range replica.MarkedPoints() {
		if p.Mark.Suspicious == "" {
			if count == 0 {
				before = p.Sequence
			}
			continue
		}
		if count++; count == 1 {
			first = p
		}
		last = p
	}
	if count == 0 {
		return nil
	}
	cause := fmt.Sprintf("point %d: %s", first.Sequence, first.Mark.Suspicious)
	if count > 1 {
		cause = fmt.Sprintf("%d points from %d to %d, the first: %s", count, first.Sequence, last.Sequence, first.Mark.Suspicious)
	}
	remedy := fmt.Sprintf("look at what the guest has written; if it is well: switchback points dismiss %s %d", vm, first.Sequence)
	if before > 0 {
		remedy += fmt.Sprintf("; if not: the last point before is %d, lock it (switchback points lock %s %d) and fail over to it", before, vm, before)
	}
	return []switchback.Condition{{Name: "suspicious-change", Severity: switchback.SeverityWarning, Cause: cause, Remedy: remedy, Since: first.Time}}
}

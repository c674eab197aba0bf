package demo

import (
	"fmt"
	"slices"
)

// judge lists what did not hold.
func (d *demo) judge() []string {
	var bad []string
	r := d.report
	must := func(ok bool, format string, args ...any) {
		if !ok {
			bad = append(bad, fmt.Sprintf(format, args...))
		}
	}
	for _, s := range []struct {
		name string
		s    Switch
	}{{"failover", r.Failover.Switch}, {"failback", r.Failback.Switch}} {
		must(s.s.AcknowledgedWritesLost == 0, "%s: %d acknowledged writes lost", s.name, s.s.AcknowledgedWritesLost)
		must(s.s.AcknowledgedWrites >= 1000, "%s: only %d acknowledged writes to judge by", s.name, s.s.AcknowledgedWrites)
		must(s.s.LastAckSeconds <= 1, "%s: the last acknowledgement was %.1f s before power-off", s.name, s.s.LastAckSeconds)
		must(s.s.OrderViolations == 0, "%s: %d order violations", s.name, s.s.OrderViolations)
		must(s.s.DisksIdentical && len(s.s.Disks) > 0, "%s: disks are not identical", s.name)
		must(s.s.OutageSeconds > 0, "%s: no outage was measured", s.name)
	}
	must(r.DoubleActiveSeconds == 0, "two copies of one VM ran for %.2f s", r.DoubleActiveSeconds)
	must(r.Failover.BootRatio > 0 && r.Failover.BootRatio <= 1.15, "boot ratio %.2f", r.Failover.BootRatio)
	must(r.Failover.AgentKilledIOErrors == 0, "%d I/O errors while the agent was killed", r.Failover.AgentKilledIOErrors)
	must(r.Commit.PlainDisks, "after the commit the disks are not plain")
	must(r.Commit.RunsWithoutAgent, "a guest noticed that its agent was stopped")
	must(r.Cycles.Count > 0, "no cycles")
	must(r.Drill.Passed, "the drill did not pass")
	must(r.Drill.PointsMeanwhile > 0, "no points came during the drill")
	must(r.Change.RecordAtPoint > 0 && r.Change.RecordAtPoint < r.Change.RecordBefore, "change of point: record %d at the older point, %d before", r.Change.RecordAtPoint, r.Change.RecordBefore)
	must(r.Change.RecordAfter >= r.Change.RecordBefore, "change of point: record %d after going back to %d", r.Change.RecordAfter, r.Change.RecordBefore)
	must(!r.Drill.Left, "the drill left its domain behind")
	for i, f := range r.Failback.VMs {
		must(f.BytesChanged >= 64_000_000 && f.BytesChanged <= r.VMs[i].DiskBytes/20, "failback of %s: %d bytes changed, the test wants 64 MB to 5 %% of %d", f.Name, f.BytesChanged, r.VMs[i].DiskBytes)
		limit := f.BytesChanged*110/100 + 1<<20
		must(f.BytesSent <= limit, "failback of %s sent %d bytes for %d that differ, more than %d", f.Name, f.BytesSent, f.BytesChanged, limit)
	}
	for _, v := range r.VMs {
		must(v.DiskBytes >= 4<<30, "%s has only %d bytes of disks", v.Name, v.DiskBytes)
	}
	return bad
}

func median(v []float64) float64 {
	s := slices.Clone(v)
	slices.Sort(s)
	return s[len(s)/2]
}

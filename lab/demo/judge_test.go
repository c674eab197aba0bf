package demo

import (
	"strings"
	"testing"
)

// good is a report in which everything holds.
func good() Report {
	s := Switch{OutageSeconds: 5, AcknowledgedWrites: 1500, LastAckSeconds: 0.02, DisksIdentical: true, Disks: []Disk{{VM: "app", Disk: "vda"}}}
	return Report{
		VMs:      []VM{{Name: "app", DiskBytes: 4 << 30}},
		Cycles:   Cycles{Count: 9},
		Drill:    Drill{Passed: true, PointsMeanwhile: 4},
		Change:   Change{RecordBefore: 900, RecordAtPoint: 500, RecordAfter: 950},
		Failover: Failover{Switch: s, BootRatio: 1.05},
		Commit:   Commit{PlainDisks: true, RunsWithoutAgent: true},
		Failback: Failback{Switch: s, VMs: []FailbackVM{{Name: "app", BytesSent: 70_000_000, BytesChanged: 90_000_000}}},
	}
}

// TestJudge proves that each thing the demo promises can fail it.
func TestJudge(t *testing.T) {
	if bad := (&demo{report: good()}).judge(); len(bad) != 0 {
		t.Fatalf("a good report fails: %v", bad)
	}
	for name, c := range map[string]struct {
		spoil func(*Report)
		want  string
	}{
		"a lost write":               {func(r *Report) { r.Failover.AcknowledgedWritesLost = 1 }, "failover: 1 acknowledged writes lost"},
		"a lost write home":          {func(r *Report) { r.Failback.AcknowledgedWritesLost = 2 }, "failback: 2 acknowledged writes lost"},
		"too few writes":             {func(r *Report) { r.Failover.AcknowledgedWrites = 900 }, "only 900"},
		"a writer that stopped":      {func(r *Report) { r.Failback.LastAckSeconds = 3 }, "3.0 s before power-off"},
		"a torn copy":                {func(r *Report) { r.Failover.OrderViolations = 1 }, "order violations"},
		"a differing disk":           {func(r *Report) { r.Failback.DisksIdentical = false }, "not identical"},
		"disks nobody compared":      {func(r *Report) { r.Failover.Disks = nil }, "not identical"},
		"no outage measured":         {func(r *Report) { r.Failover.OutageSeconds = 0 }, "no outage"},
		"two copies":                 {func(r *Report) { r.DoubleActiveSeconds = 0.3 }, "two copies"},
		"a slow boot":                {func(r *Report) { r.Failover.BootRatio = 1.3 }, "boot ratio"},
		"no boot measured":           {func(r *Report) { r.Failover.BootRatio = 0 }, "boot ratio"},
		"I/O errors":                 {func(r *Report) { r.Failover.AgentKilledIOErrors = 4 }, "4 I/O errors"},
		"a chain left":               {func(r *Report) { r.Commit.PlainDisks = false }, "not plain"},
		"a guest needing agents":     {func(r *Report) { r.Commit.RunsWithoutAgent = false }, "noticed"},
		"no cycles":                  {func(r *Report) { r.Cycles.Count = 0 }, "no cycles"},
		"a failed drill":             {func(r *Report) { r.Drill.Passed = false }, "did not pass"},
		"a drill that held RPO":      {func(r *Report) { r.Drill.PointsMeanwhile = 0 }, "no points came"},
		"an older point that is not": {func(r *Report) { r.Change.RecordAtPoint = 900 }, "change of point"},
		"kept writes that are lost":  {func(r *Report) { r.Change.RecordAfter = 899 }, "going back"},
		"a drill left over":          {func(r *Report) { r.Drill.Left = true }, "left its domain"},
		"too much sent":              {func(r *Report) { r.Failback.VMs[0].BytesSent = 110_000_000 }, "sent 110000000"},
		"too little changed":         {func(r *Report) { r.Failback.VMs[0].BytesChanged = 1 << 20 }, "the test wants"},
		"a small disk":               {func(r *Report) { r.VMs[0].DiskBytes = 3 << 30 }, "only"},
	} {
		t.Run(name, func(t *testing.T) {
			r := good()
			c.spoil(&r)
			bad := strings.Join((&demo{report: r}).judge(), "\n")
			if !strings.Contains(bad, c.want) {
				t.Errorf("judged %q, want %q in it", bad, c.want)
			}
		})
	}
}

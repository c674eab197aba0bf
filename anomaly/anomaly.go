// Package anomaly tells a change of a VM's content that stands out from how the
// VM usually changes. It is pure: no I/O, no clock.
//
// What it looks for is mass encryption: suddenly much is written that does not
// compress. Compressed files look the same, so that a first large download, or
// an archive that is made, may be named, too: a suspicion, not a verdict. A burst
// of other content, as of a backup of a database or of an upgrade, is not named,
// nor one of a size that the VM has had before.
package anomaly

import (
	"fmt"
	"math"
	"slices"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Sample is what the content of one point looks like from outside.
type Sample struct {
	Sequence switchback.Sequence
	Time     time.Time
	// DataBytes have changed, DenseBytes of them look random.
	DataBytes, DenseBytes int64
	// Resync: the point is a comparison of whole disks; it says nothing of a time.
	Resync bool
	// Suspicious: it was named before, and is no measure for others.
	Suspicious bool
}

const (
	// minBytes is the least that is worth a word.
	minBytes = 24 << 20
	// minHistory is how many samples must be there to know what is usual.
	minHistory = 12
	// share is how much of the change must look random.
	share = 0.5
	// deviations and factor are by how much the usual must be exceeded.
	deviations, factor = 8, 6
	// window is how many samples count as recent.
	window = 512
)

// Judge returns why the sample stands out among those before it, with figures;
// "" = it does not. history is in the order of the points.
func Judge(history []Sample, s Sample) string {
	if s.Resync || s.DenseBytes < minBytes || float64(s.DenseBytes) < share*float64(s.DataBytes) {
		return ""
	}
	var usual []float64
	var largest int64
	recent := history[max(0, len(history)-window):]
	for _, h := range recent {
		if !h.Resync && !h.Suspicious {
			usual = append(usual, float64(h.DenseBytes))
			largest = max(largest, h.DenseBytes)
		}
	}
	if len(usual) < minHistory {
		return ""
	}
	m, d := medianAndDeviation(usual)
	// A point after a pause carries what several would have carried.
	x := float64(s.DenseBytes) / stretch(recent, s)
	if x < 2*float64(largest) || x < m+deviations*d || x < factor*m {
		return ""
	}
	const mib = 1 << 20
	return fmt.Sprintf("%.0f MiB of %.0f MiB changed do not compress; usual are %.1f MiB a point (median of %d), at most %.1f MiB",
		float64(s.DenseBytes)/mib, float64(s.DataBytes)/mib, m/mib, len(usual), float64(largest)/mib)
}

// stretch is how many usual intervals have passed since the point before s; at least 1.
func stretch(history []Sample, s Sample) float64 {
	var gaps []float64
	for i := 1; i < len(history); i++ {
		gaps = append(gaps, history[i].Time.Sub(history[i-1].Time).Seconds())
	}
	if len(gaps) == 0 {
		return 1
	}
	slices.Sort(gaps)
	usual, gap := middle(gaps), s.Time.Sub(history[len(history)-1].Time).Seconds()
	if usual <= 0 {
		return 1
	}
	return max(1, gap/usual)
}

// medianAndDeviation returns the median and the median absolute deviation from
// it, scaled to the standard deviation of a normal distribution.
func medianAndDeviation(list []float64) (median, deviation float64) {
	slices.Sort(list)
	median = middle(list)
	off := make([]float64, len(list))
	for i, x := range list {
		off[i] = math.Abs(x - median)
	}
	slices.Sort(off)
	return median, 1.4826 * middle(off)
}

func middle(sorted []float64) float64 {
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

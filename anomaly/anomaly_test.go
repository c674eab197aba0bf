package anomaly

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

const mib = 1 << 20

// day is a history of points, one each minute, of a server that writes some
// text-like data and a little that is dense.
func day(points int) []Sample {
	rng := rand.New(rand.NewPCG(1, 2))
	var list []Sample
	for i := range points {
		data := int64((2 + 3*rng.Float64()) * mib)
		list = append(list, Sample{Sequence: switchback.Sequence(i + 1), Time: time.Unix(int64(i)*60, 0), DataBytes: data, DenseBytes: int64(rng.Float64() * 0.2 * float64(data))})
	}
	return list
}

// play judges each sample after those before it, and returns which stand out.
func play(list []Sample) (named []switchback.Sequence) {
	for i := range list {
		if why := Judge(list[:i], list[i]); why != "" {
			list[i].Suspicious = true
			named = append(named, list[i].Sequence)
		}
	}
	return named
}

func TestHistories(t *testing.T) {
	at := func(list []Sample, i int, data, dense int64) []Sample {
		list[i].DataBytes, list[i].DenseBytes = data*mib, dense*mib
		return list
	}
	for _, c := range []struct {
		name string
		list []Sample
		want int // how many stand out
	}{
		{"a normal day", day(1440), 0},
		{"a backup of a database in the night: much, but it compresses", at(at(day(1440), 700, 4000, 120), 701, 3000, 90), 0},
		{"an upgrade: packages are half dense, and unpacked", at(day(1440), 900, 900, 300), 0},
		{"an idle VM whose first burst is small", at(make([]Sample, 100), 90, 20, 20), 0},
		{"the first points of a VM: nothing is usual yet", at(day(40), 5, 800, 800), 0},
		{"a resync reads all disks", func() []Sample { l := at(day(100), 50, 9000, 9000); l[50].Resync = true; return l }(), 0},
		{"mass encryption", at(at(at(day(1440), 1000, 600, 590), 1001, 700, 690), 1002, 500, 500), 3},
		{"mass encryption of an idle VM", at(make([]Sample, 100), 90, 100, 100), 1},
		{"slow encryption, 64 MiB a minute", func() []Sample {
			l := day(1440)
			for i := 1000; i < 1010; i++ {
				at(l, i, 66, 64)
			}
			return l
		}(), 10},
		{"an archive each hour, as large as ever", func() []Sample {
			l := day(1440)
			for i := 6; i < 1440; i += 60 {
				at(l, i, 200, 200)
			}
			return l
		}(), 0},
		{"a media server: much is dense all the time", func() []Sample {
			l := day(1440)
			for i := range l {
				at(l, i, 100+int64(i%37), 95+int64(i%37))
			}
			return l
		}(), 0},
		{"a media server whose replication was paused for an hour", func() []Sample {
			l := day(1440)
			for i := range l {
				at(l, i, 100+int64(i%37), 95+int64(i%37))
				if i >= 800 {
					l[i].Time = l[i].Time.Add(time.Hour)
				}
			}
			return at(l, 800, 6500, 6300)
		}(), 0},
		{"mass encryption after a pause", func() []Sample {
			l := day(1440)
			for i := 800; i < len(l); i++ {
				l[i].Time = l[i].Time.Add(10 * time.Minute)
			}
			return at(l, 800, 3000, 2900)
		}(), 1},
	} {
		for i := range c.list {
			c.list[i].Sequence = switchback.Sequence(i + 1)
		}
		if got := play(c.list); len(got) != c.want {
			t.Errorf("%s: %v stand out, want %d", c.name, got, c.want)
		}
	}
}

func TestReasonHasFigures(t *testing.T) {
	why := Judge(day(100), Sample{DataBytes: 600 * mib, DenseBytes: 590 * mib})
	for _, s := range []string{"590 MiB of 600 MiB", "median of 100"} {
		if !strings.Contains(why, s) {
			t.Errorf("%q does not say %q", why, s)
		}
	}
}

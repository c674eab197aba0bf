package switchback_test

import (
	"testing"
	"time"

	"github.com/switchback-dr/switchback"
)

func TestTiers(t *testing.T) {
	const text = "all:1h,5m:1d,1h:7d,1d:30d"
	tiers, err := switchback.ParseTiers("all:1h, 5m:24h,1h:7d,1d:30d")
	if err != nil {
		t.Fatal(err)
	}
	if got := switchback.FormatTiers(tiers); got != text {
		t.Errorf("%s, want %s", got, text)
	}
	if got := switchback.FormatTiers(switchback.DefaultTiers()); got != text {
		t.Errorf("default %s, want %s", got, text)
	}
	for _, bad := range []string{"", "all", "5m", "all:", "0s:1h", "x:1h", "5m:1y", "all:1h,,1h:7d", "-5m:1h", "1d:99999d"} {
		tiers, err := switchback.ParseTiers(bad)
		if err == nil {
			err = switchback.Retention{Tiers: tiers}.Validate()
		}
		if switchback.CodeOf(err) != switchback.CodeInvalid {
			t.Errorf("%q: %v, %v", bad, tiers, err)
		}
	}
}

func TestFormatAge(t *testing.T) {
	for d, want := range map[time.Duration]string{0: "0s", time.Second: "1s", 90 * time.Second: "90s", 5 * time.Minute: "5m", 24 * time.Hour: "1d",
		36 * time.Hour: "36h", 1500 * time.Millisecond: "1.5s"} {
		if got := switchback.FormatAge(d); got != want {
			t.Errorf("%v: %s, want %s", d, got, want)
		}
		if back, err := switchback.ParseAge(want); err != nil || back != d {
			t.Errorf("%s: %v, %v", want, back, err)
		}
	}
}

func TestRetentionValidate(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*switchback.Policy)
		ok     bool
	}{
		"newest instead of tiers":   {func(p *switchback.Policy) { p.KeepPoints, p.Retention = 2, switchback.Retention{} }, true},
		"neither":                   {func(p *switchback.Policy) { p.Retention = switchback.Retention{} }, false},
		"fewer than none":           {func(p *switchback.Policy) { p.KeepPoints = -1 }, false},
		"coarse before fine":        {func(p *switchback.Policy) { p.Retention.Tiers[1].Every = 2 * time.Hour }, false},
		"interval longer than age":  {func(p *switchback.Policy) { p.Retention.Tiers = []switchback.RetentionTier{{Every: 2, For: 1}} }, false},
		"negative minimum":          {func(p *switchback.Policy) { p.Retention.MinPoints = -1 }, false},
		"a journal of a few blocks": {func(p *switchback.Policy) { p.Retention.MaxBytes = 4096 }, false},
		"a journal of 20 GiB":       {func(p *switchback.Policy) { p.Retention.MaxBytes = 20 << 30 }, true},
	} {
		p := switchback.DefaultPolicy()
		c.change(&p)
		if err := p.Validate(); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

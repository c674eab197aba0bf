package server

import (
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

func TestDrillDue(t *testing.T) {
	at := func(s string) time.Time {
		x, err := time.ParseInLocation("2006-01-02 15:04", s, time.Local)
		if err != nil {
			t.Fatal(err)
		}
		return x
	}
	for _, c := range []struct {
		name, schedule string
		served         time.Time
		now            string
		begin, due     bool
	}{
		{"none", "", at("2026-01-01 00:00"), "2026-01-05 00:00", false, false},
		{"new", "0 3 * * *", time.Time{}, "2026-01-05 04:00", true, false},
		{"not yet", "0 3 * * *", at("2026-01-05 03:00"), "2026-01-06 02:59", false, false},
		{"now", "0 3 * * *", at("2026-01-05 03:00"), "2026-01-06 03:00", false, true},
		{"once after many days of downtime", "0 3 * * *", at("2026-01-05 03:00"), "2026-02-05 12:00", false, true},
		{"served after the downtime", "0 3 * * *", at("2026-02-05 12:00"), "2026-02-05 12:01", false, false},
		{"clock set back", "@daily", at("2026-02-05 12:00"), "2026-01-05 12:01", false, false},
	} {
		begin, due, err := drillDue(c.schedule, c.served, at(c.now))
		if begin != c.begin || due != c.due || err != nil {
			t.Errorf("%s: begin %v, due %v, %v", c.name, begin, due, err)
		}
	}
	if _, _, err := drillDue("every day", time.Now(), time.Now()); err == nil {
		t.Error("a schedule that is none")
	}
}

func TestTaggedForDrill(t *testing.T) {
	points := make([]switchback.MarkedPoint, 6)
	for i := range points {
		points[i].Sequence = switchback.Sequence(i + 1)
	}
	points[1].Mark.Tag = "boot-a"
	points[3].Mark.Tag = "boot-b"
	points[4].Mark.Tag = "other"
	for _, c := range []struct{ after, want switchback.Sequence }{{0, 4}, {3, 4}, {4, 0}} {
		if got := taggedForDrill(points, "boot-", c.after); got != c.want {
			t.Errorf("after %d: %d", c.after, got)
		}
	}
	points[3].Mark.Boot = &switchback.BootProof{}
	if got := taggedForDrill(points, "boot-", 0); got != 2 {
		t.Errorf("with 4 proven: %d", got)
	}
}

func TestValidateGuestPolicy(t *testing.T) {
	for _, c := range []struct {
		policy switchback.Policy
		ok     bool
	}{
		{switchback.Policy{}, true},
		{switchback.Policy{Drill: &switchback.DrillPolicy{Schedule: "30 2 * * 0", Interval: time.Hour}}, true},
		{switchback.Policy{Drill: &switchback.DrillPolicy{Schedule: "2:30"}}, false},
		{switchback.Policy{Drill: &switchback.DrillPolicy{Interval: -1}}, false},
		{switchback.Policy{Checks: []switchback.GuestCheck{{Kind: "ping"}}}, false},
	} {
		if err := validateGuestPolicy(c.policy); (err == nil) != c.ok || err != nil && switchback.CodeOf(err) != switchback.CodeInvalid {
			t.Errorf("%+v: %v", c.policy, err)
		}
	}
}

package fencing

import (
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

func TestRule(t *testing.T) {
	p := switchback.Protection{Epoch: 5, Source: "home", Target: "away"}
	p.Switch = &switchback.Switch{From: "home", To: "away", Epoch: 4}
	if r := Rule(p); r != (Ruling{}) {
		t.Errorf("whose the newest epoch is, is not in the record: %+v", r)
	}
	for name, c := range map[string]struct {
		sw   *switchback.Switch
		want switchback.SiteID
	}{
		"no switch":          {nil, "home"},
		"before the fence":   {&switchback.Switch{From: "home", To: "away"}, "home"},
		"minted for the new": {&switchback.Switch{From: "home", To: "away", Epoch: 5}, "away"},
		"being undone":       {&switchback.Switch{From: "home", To: "away", Epoch: 4, UndoEpoch: 5}, "home"},
	} {
		p.Switch = c.sw
		if r := Rule(p); r != (Ruling{5, c.want}) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func TestHearAndAnswer(t *testing.T) {
	for _, c := range []struct {
		name string
		s    Standing
		r    Ruling
		want Hearing
		// what the peer at "away" is told afterwards that asks under epoch 5
		answer Ruling
	}{
		{"confirmed", Standing{Site: "home", Role: RoleSource, Epoch: 5}, Ruling{5, "home"}, HeardConfirmed, Ruling{5, "home"}},
		{"too old", Standing{Site: "home", Role: RoleSource, Epoch: 5}, Ruling{4, "away"}, HeardNothing, Ruling{5, "home"}},
		{"superseded", Standing{Site: "home", Role: RoleSource, Epoch: 4}, Ruling{5, "away"}, HeardSuperseded, Ruling{5, "away"}},
		{"a command is under way", Standing{Site: "home", Role: RoleSource, Epoch: 5}, Ruling{6, "home"}, HeardPending, Ruling{6, "home"}},
		{"a target is about to be activated", Standing{Site: "home", Role: RoleTarget, Epoch: 5}, Ruling{6, "home"}, HeardPending, Ruling{6, "home"}},
		{"a target hears of its source", Standing{Site: "home", Role: RoleTarget, Epoch: 5}, Ruling{5, "away"}, HeardNothing, Ruling{5, "away"}},
		{"newer, and nobody says whose", Standing{Site: "home", Role: RoleActive, Epoch: 5}, Ruling{6, ""}, HeardNothing, Ruling{6, ""}},
	} {
		next, got := c.s.Hear(c.r)
		if got != c.want && c.r.Site != "" {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
		if a := next.Answer("away", 5); a != c.answer {
			t.Errorf("%s: answers %+v, want %+v", c.name, a, c.answer)
		}
		if next.Admit(c.r.Epoch-1) == nil && c.r.Epoch-1 < next.Newest() {
			t.Errorf("%s: a command of epoch %d is admitted", c.name, c.r.Epoch-1)
		}
	}
}

func TestTakeoverOutlivesLease(t *testing.T) {
	for _, lease := range []time.Duration{10 * time.Second, time.Minute, time.Hour} {
		wait := TakeoverWait(switchback.FencingPolicy{Lease: lease})
		// The old side's clock is slow and the new one's fast, by half of Drift each.
		ends := float64(lease+StopWithin) * (1 + 0.5/Drift)
		starts := float64(wait) * (1 - 0.5/Drift)
		if starts <= ends {
			t.Errorf("a lease of %v may last %v, the other side starts after %v", lease, time.Duration(ends), time.Duration(starts))
		}
	}
	take := Takeover{Boot: "1", Since: Instant(50 * time.Second), Wait: 20 * time.Second}
	if left := take.Remaining("1", 0, Instant(55*time.Second)); left != 15*time.Second {
		t.Errorf("%v are left", left)
	}
	if left := take.Remaining("2", Instant(5*time.Second), Instant(10*time.Second)); left != 15*time.Second {
		t.Errorf("%v are left after a reboot", left)
	}
}

func TestGrantRenews(t *testing.T) {
	old := Grant{Epoch: 2, Boot: "b", Until: 100, By: "server"}
	for name, c := range map[string]struct {
		g    Grant
		want bool
	}{
		"longer":               {Grant{2, "b", 120, "server"}, true},
		"overtaken":            {Grant{2, "b", 90, "peer"}, false},
		"another epoch":        {Grant{3, "b", 90, "server"}, true},
		"another boot":         {Grant{2, "c", 90, "server"}, true},
		"the policy has ended": {Grant{2, "b", 0, "server"}, true},
	} {
		if got := c.g.Renews(old); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestDecide(t *testing.T) {
	source := Standing{Site: "home", Role: RoleSource, Epoch: 5}
	with := func(f func(*Standing)) Standing { s := source; f(&s); return s }
	leased := func(end switchback.LeaseEnd) Standing {
		return with(func(s *Standing) { s.Policy = switchback.FencingPolicy{Lease: time.Minute, OnLeaseEnd: end} })
	}
	patient := with(func(s *Standing) { s.Policy.StartUnconfirmedAfter = 10 * time.Minute })
	good := Grant{Epoch: 5, Boot: "b", By: "server"}
	until := func(i Instant) Grant { g := good; g.Until = i; return g }
	minute := Instant(time.Minute)
	for _, c := range []struct {
		name  string
		s     Standing
		m     Moment
		state State
		act   Act
		may   bool
	}{
		{"granted", source, Moment{Boot: "b", Grant: good, Running: true}, StateGranted, ActNone, true},
		{"after a reboot", source, Moment{Boot: "c", Grant: good}, StateHeld, ActNone, false},
		{"no grant, and it runs: it goes on", source, Moment{Boot: "b", Running: true}, StateHeld, ActNone, false},
		{"held for a while", patient, Moment{Boot: "b", Up: minute, Now: 10 * minute}, StateHeld, ActNone, false},
		{"held long enough", patient, Moment{Boot: "b", Up: minute, Now: 11 * minute}, StateHeld, ActGrant, false},
		{"unconfirmed", patient, Moment{Boot: "b", Grant: Grant{Epoch: 5, Boot: "b", By: ByPolicy}}, StateGranted, ActNone, true},
		{"leased", leased(""), Moment{Boot: "b", Now: minute - 1, Grant: until(minute), Running: true}, StateGranted, ActNone, true},
		{"lease ended", leased(""), Moment{Boot: "b", Now: minute, Grant: until(minute), Running: true}, StateLeaseEnded, ActStop, false},
		{"lease ended, to be paused", leased(switchback.LeaseEndSuspend), Moment{Boot: "b", Now: minute, Grant: until(minute), Running: true}, StateLeaseEnded, ActSuspend, false},
		{"a grant without end is no lease", leased(""), Moment{Boot: "b", Grant: good, Running: true}, StateHeld, ActStop, false},
		{"a lease of the epoch before lets it run, not start", with(func(s *Standing) { s.Epoch, s.Policy.Lease = 6, time.Minute }), Moment{Boot: "b", Now: minute - 1, Grant: until(minute), Running: true}, StateHeld, ActNone, false},
		{"the same, and it has ended", with(func(s *Standing) { s.Epoch, s.Policy.Lease = 6, time.Minute }), Moment{Boot: "b", Now: minute, Grant: until(minute), Running: true}, StateLeaseEnded, ActStop, false},
		{"superseded under a lease", with(func(s *Standing) { s.Heard, s.Policy.Lease = Ruling{6, "away"}, time.Minute }), Moment{Boot: "b", Grant: until(minute), Running: true}, StateSuperseded, ActStop, false},
		{"superseded", with(func(s *Standing) { s.Heard = Ruling{6, "away"} }), Moment{Boot: "b", Grant: good, Running: true}, StateSuperseded, ActStop, false},
		{"fenced", with(func(s *Standing) { s.Role = RoleFenced }), Moment{Boot: "b", Grant: good, Running: true}, StateElsewhere, ActStop, false},
		{"contested", with(func(s *Standing) { s.Role, s.Contested = RoleFenced, true }), Moment{Boot: "b"}, StateContested, ActGrant, true},
		{"leaving", with(func(s *Standing) { s.Leaving = true }), Moment{Boot: "b", Grant: good, Running: true}, StateLeaving, ActNone, false},
		{"taking over", with(func(s *Standing) { s.Takeover = &Takeover{Boot: "b", Wait: time.Minute} }), Moment{Boot: "b", Grant: good}, StateTakingOver, ActNone, false},
		{"taken over", with(func(s *Standing) { s.Takeover = &Takeover{Boot: "b", Wait: time.Minute} }), Moment{Boot: "b", Now: minute, Grant: good}, StateGranted, ActNone, true},
	} {
		d := Decide(c.s, c.m)
		if d.State != c.state || d.Act != c.act || d.MayStart != c.may || !d.MayStart && d.Why == "" {
			t.Errorf("%s: %+v", c.name, d)
		}
	}
}

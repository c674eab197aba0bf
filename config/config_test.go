package config

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
)

func TestParseRefuses(t *testing.T) {
	vm := "kind: VM\nname: web\nhome: a\nto: b\n"
	for name, c := range map[string]struct{ text, want string }{
		"unknown kind":         {"kind: Vm\nname: web\n", `line 1: unknown kind "Vm"`},
		"no kind":              {"\nname: web\n", "line 2: a document without kind"},
		"unknown field":        {vm + "polcy: {}\n", `line 5: unknown field "polcy" in VM`},
		"unknown nested field": {vm + "policy:\n  interval: 5s\n  retention:\n    tier: []\n", `line 8: unknown field "tier" in retention`},
		"second document":      {"kind: Site\nname: a\n---\nkind: Site\nnam: b\n", `line 5: unknown field "nam" in Site`},
		"twice":                {"kind: Site\nname: a\n---\nkind: Site\nname: a\n", "line 4: Site a is in the file twice, first in line 1"},
		"field twice":          {vm + "to: c\n", `line 5: field "to" is in VM twice`},
		"no duration":          {vm + "policy:\n  interval: soon\n", `line 6: interval: "soon" is no duration`},
		"no bool":              {vm + "paused: 1\n", `line 5: paused: "1" is neither true nor false`},
		"no check":             {vm + "policy:\n  checks: [tcp:nowhere]\n", "line 6: checks:"},
		"no tier":              {vm + "policy:\n  retention: {tiers: [1h]}\n", "line 6: tiers:"},
		"impossible policy":    {vm + "policy: {interval: 10ms}\n", "line 1: policy of VM web: interval 10ms is shorter than 1 s"},
		"one site":             {"kind: VM\nname: web\nhome: a\n", "line 1: VM web needs two sites"},
		"not YAML":             {"kind: [\n", "line 1"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse([]byte(c.text))
			if switchback.CodeOf(err) != switchback.CodeInvalid || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// full is a policy of which every field is set to something else than the default.
func full() switchback.Policy {
	p := switchback.DefaultPolicy()
	p.Interval, p.KeepPoints, p.Compression, p.Encrypt = 90*time.Second, 7, "zstd", true
	p.OffloadAfter, p.AppConsistentEvery, p.VerifyEvery = 48*time.Hour, 10*time.Minute, -time.Second
	p.Retention = switchback.Retention{Tiers: []switchback.RetentionTier{{Every: 0, For: time.Hour}, {Every: time.Hour, For: 48 * time.Hour}},
		Newest: 5, AppConsistentFor: time.Hour, TaggedFor: time.Minute, MinPoints: 3, MaxBytes: 20 << 30}
	p.Checks = []switchback.GuestCheck{{Kind: switchback.CheckTCP, Target: "10.0.0.1:22", Timeout: time.Minute, Optional: true}, {Kind: switchback.CheckAgent}}
	p.Drill = &switchback.DrillPolicy{Schedule: "0 3 * * 0", Interval: 30 * 24 * time.Hour, OnTag: "release", Network: "isolated"}
	p.Commit = switchback.CommitPolicy{Action: switchback.CommitUndo, After: time.Hour, KeepPoints: true}
	return p
}

func TestRoundTrip(t *testing.T) {
	zero := switchback.DefaultPolicy()
	zero.Retention.MinPoints, zero.Retention.AppConsistentFor = 0, 0
	for name, policy := range map[string]switchback.Policy{"default": switchback.DefaultPolicy(), "full": full(), "zeros": zero} {
		t.Run(name, func(t *testing.T) {
			was := OfVM(switchback.Protection{Name: "web", Home: "a", Source: "b", Target: "a", Networks: map[string]string{"lan": "lan-b"}, Paused: true, Policy: policy})
			var file bytes.Buffer
			if err := Write(&file, []Document{{Site: &Site{Kind: KindSite, Name: "a"}}, was}); err != nil {
				t.Fatal(err)
			}
			docs, err := Parse(file.Bytes())
			if err != nil {
				t.Fatalf("%v\n%s", err, &file)
			}
			if len(docs) != 2 {
				t.Fatalf("%d documents:\n%s", len(docs), &file)
			}
			if d := cmp.Diff(*was.VM, *docs[1].VM); d != "" {
				t.Errorf("%s\n%s", d, &file)
			}
			if changes, err := Diff([]Document{{Site: docs[0].Site}, was}, docs); err != nil || len(changes) != 0 {
				t.Errorf("what was written changes %v, %v", changes, err)
			}
		})
	}
}

func TestDiff(t *testing.T) {
	docs, err := Parse([]byte("kind: VM\nname: web\nhome: a\nto: b\npolicy:\n  interval: 10s\n  retention: {max_bytes: 1GiB}\n---\nkind: Site\nname: b\n"))
	if err != nil {
		t.Fatal(err)
	}
	current := []Document{OfVM(switchback.Protection{Name: "web", Home: "a", Source: "a", Target: "b", Policy: switchback.DefaultPolicy(), Networks: map[string]string{"lan": "x"}})}
	changes, err := Diff(current, docs)
	if err != nil {
		t.Fatal(err)
	}
	if len(changes) != 2 || changes[0].Kind != KindSite || changes[0].Action != Create || changes[1].Action != Modify {
		t.Fatalf("%+v", changes)
	}
	want := []Field{{"networks.lan", "x", ""}, {"policy.interval", "5s", "10s"}, {"policy.retention.max_bytes", "0", "1GiB"}}
	if d := cmp.Diff(want, changes[1].Fields); d != "" {
		t.Error(d)
	}
	current[0].VM.To = "c"
	if _, err := Diff(current, docs); switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "cannot be changed") {
		t.Errorf("another target: %v", err)
	}
}

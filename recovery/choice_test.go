package recovery

import (
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

var noon = time.Date(2026, 5, 4, 12, 0, 0, 0, time.UTC)

// somePoints are minutes apart: 1 at 12:01 to 6 at 12:06; 5 was taken after the clock had jumped back.
func somePoints() []switchback.MarkedPoint {
	var list []switchback.MarkedPoint
	for n := 1; n <= 6; n++ {
		p := switchback.MarkedPoint{Point: switchback.Point{Sequence: switchback.Sequence(n), Kind: switchback.CrashConsistent, Time: noon.Add(time.Duration(n) * time.Minute)}}
		list = append(list, p)
	}
	list[1].Kind = switchback.ApplicationConsistent
	list[1].Mark.Boot = &switchback.BootProof{At: noon, Passed: true}
	list[2].Mark = switchback.Mark{Tag: "before-upgrade", Suspicious: "everything was rewritten", Boot: &switchback.BootProof{At: noon, Report: "op-7"}}
	list[4].Time = noon.Add(90 * time.Second)
	list[5].Kind = switchback.ShutdownConsistent
	return list
}

func TestChoose(t *testing.T) {
	now := noon.Add(10 * time.Minute)
	for _, c := range []struct {
		text string
		want switchback.Sequence
		code switchback.Code
		part string // of the error
	}{
		{"", 6, "", ""},
		{"latest", 6, "", ""},
		{"latest-processed", 6, "", ""},
		{"latest-app", 2, "", ""},
		{"latest-verified", 2, "", ""},
		{"4", 4, "", ""},
		{"tag:before-upgrade", 3, "", ""},
		{"before-upgrade", 3, "", ""},
		{"before:2026-05-04T12:03:30Z", 5, "", ""},
		{"before:2026-05-04T14:01:10+02:00", 1, "", ""},
		{"before:6m30s", 5, "", ""},
		{"before:0s", 6, "", ""},
		{"before:1h", 0, switchback.CodeNotFound, "no point is of 2026-05-04T11:10:00Z or before"},
		{"before:yesterday", 0, switchback.CodeInvalid, "neither a time nor a duration"},
		{"before:-5m", 0, switchback.CodeInvalid, "neither"},
		{"0", 0, switchback.CodeNotFound, "no point 0"},
		{"9999", 0, switchback.CodeNotFound, "no point 9999"},
		{"tag:", 0, switchback.CodeInvalid, "without a name"},
		{"no-such-tag", 0, switchback.CodeNotFound, "tags before-upgrade"},
		{"a tag", 0, switchback.CodeInvalid, "is no point"},
		{"-3", 0, switchback.CodeInvalid, "is no point"},
	} {
		choice, err := ParseChoice(c.text)
		var p switchback.MarkedPoint
		if err == nil {
			if again, perr := ParseChoice(choice.String()); perr != nil || again != choice {
				t.Errorf("%q reads back as %+v, %v", choice, again, perr)
			}
			p, err = choice.Choose(somePoints(), now)
		}
		if switchback.CodeOf(err) != c.code || p.Sequence != c.want {
			t.Errorf("%q: point %d, %v; want %d, %q", c.text, p.Sequence, err, c.want, c.code)
		}
		if err != nil && !strings.Contains(err.Error(), c.part) {
			t.Errorf("%q: %v does not say %q", c.text, err, c.part)
		}
	}
}

func TestChooseAmongNone(t *testing.T) {
	for _, text := range []string{"latest", "latest-processed", "latest-app", "latest-verified", "1", "tag:x", "before:1m"} {
		choice, err := ParseChoice(text)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := choice.Choose(nil, noon); switchback.CodeOf(err) != switchback.CodeNotFound || !strings.Contains(err.Error(), "wait for the first") {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestWarning(t *testing.T) {
	for i, p := range somePoints() {
		w := Warning(p)
		if (w != "") != (i == 2) {
			t.Errorf("point %d: %q", p.Sequence, w)
		}
		if i == 2 && (!strings.Contains(w, "everything was rewritten") || !strings.Contains(w, "op-7")) {
			t.Errorf("point 3: %q", w)
		}
	}
}

package recovery

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// ChoiceKind says how a recovery point is chosen.
type ChoiceKind string

const (
	// ChooseLatest: ship or process everything that exists, then the newest.
	ChooseLatest ChoiceKind = "latest"
	// ChooseProcessed: the newest that is complete at the target at that moment; nothing is waited for.
	ChooseProcessed ChoiceKind = "latest-processed"
	// ChooseApplication: the newest application-consistent one.
	ChooseApplication ChoiceKind = "latest-app"
	// ChooseVerified: the newest that a drill has booted and found well.
	ChooseVerified ChoiceKind = "latest-verified"
	// ChooseSequence: the one with that number.
	ChooseSequence ChoiceKind = "sequence"
	// ChooseTag: the one with that tag.
	ChooseTag ChoiceKind = "tag"
	// ChooseBefore: the newest whose instant is not after a time.
	ChooseBefore ChoiceKind = "before"
)

// ChoiceHelp names what a choice may be, for messages and flags.
const ChoiceHelp = "latest, latest-processed, latest-app, latest-verified, a point's number, tag:NAME, before:TIME (RFC 3339) or before:DURATION (10m)"

// Choice is one way to choose a recovery point of a VM. The zero value is latest.
type Choice struct {
	Kind     ChoiceKind
	Sequence switchback.Sequence // ChooseSequence
	Tag      string              // ChooseTag
	// Before is the instant of ChooseBefore; where it is zero, Ago before the
	// instant that Choose is given.
	Before time.Time
	Ago    time.Duration
}

// Newest reports whether the choice is latest, which loses nothing in a planned switch.
func (c Choice) Newest() bool { return c.Kind == "" || c.Kind == ChooseLatest }

// String is the text that ParseChoice makes the choice of.
func (c Choice) String() string {
	switch c.Kind {
	case "":
		return string(ChooseLatest)
	case ChooseSequence:
		return fmt.Sprint(c.Sequence)
	case ChooseTag:
		return "tag:" + c.Tag
	case ChooseBefore:
		if c.Before.IsZero() {
			return "before:" + c.Ago.String()
		}
		return "before:" + c.Before.Format(time.RFC3339Nano)
	}
	return string(c.Kind)
}

var bareTag = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9._-]*$`)

// ParseChoice reads a choice. Text that is nothing else is a tag where it can
// be one; anything else is CodeInvalid.
func ParseChoice(text string) (Choice, error) {
	invalid := func(format string, args ...any) (Choice, error) {
		return Choice{}, switchback.Errorf(switchback.CodeInvalid, format, args...).WithHint("%s", ChoiceHelp)
	}
	switch k := ChoiceKind(text); k {
	case "", ChooseLatest:
		return Choice{Kind: ChooseLatest}, nil
	case ChooseProcessed, ChooseApplication, ChooseVerified:
		return Choice{Kind: k}, nil
	}
	if tag, ok := strings.CutPrefix(text, "tag:"); ok {
		if tag == "" {
			return invalid("a tag without a name")
		}
		return Choice{Kind: ChooseTag, Tag: tag}, nil
	}
	if when, ok := strings.CutPrefix(text, "before:"); ok {
		if at, err := time.Parse(time.RFC3339Nano, when); err == nil {
			return Choice{Kind: ChooseBefore, Before: at}, nil
		}
		if d, err := time.ParseDuration(when); err == nil && d >= 0 {
			return Choice{Kind: ChooseBefore, Ago: d}, nil
		}
		return invalid("%q is neither a time nor a duration", when)
	}
	if n, err := strconv.ParseUint(text, 10, 64); err == nil {
		return Choice{Kind: ChooseSequence, Sequence: switchback.Sequence(n)}, nil
	}
	if bareTag.MatchString(text) {
		return Choice{Kind: ChooseTag, Tag: text}, nil
	}
	return invalid("%q is no point", text)
}

// Choose finds the chosen one among points, which are in order of their
// sequence. now is the instant that a duration counts back from. Without such a
// point it is CodeNotFound, with a remedy that lists what there is. Points marked
// as suspicious are chosen like any other: see Warning.
func (c Choice) Choose(points []switchback.MarkedPoint, now time.Time) (switchback.MarkedPoint, error) {
	none := func(format string, args ...any) (switchback.MarkedPoint, error) {
		return switchback.MarkedPoint{}, switchback.Errorf(switchback.CodeNotFound, format, args...).WithHint("%s", available(points))
	}
	newest := func(ok func(switchback.MarkedPoint) bool) (switchback.MarkedPoint, bool) {
		for _, p := range slices.Backward(points) {
			if ok(p) {
				return p, true
			}
		}
		return switchback.MarkedPoint{}, false
	}
	switch c.Kind {
	case "", ChooseLatest, ChooseProcessed:
		if p, ok := newest(func(switchback.MarkedPoint) bool { return true }); ok {
			return p, nil
		}
		return none("there is no recovery point yet")
	case ChooseApplication:
		if p, ok := newest(func(p switchback.MarkedPoint) bool { return p.Kind == switchback.ApplicationConsistent }); ok {
			return p, nil
		}
		return none("there is no application-consistent point")
	case ChooseVerified:
		if p, ok := newest(func(p switchback.MarkedPoint) bool { return p.Mark.Boot != nil && p.Mark.Boot.Passed }); ok {
			return p, nil
		}
		return none("no point has been proven to boot")
	case ChooseSequence:
		if p, ok := newest(func(p switchback.MarkedPoint) bool { return p.Sequence == c.Sequence }); ok && c.Sequence > 0 {
			return p, nil
		}
		return none("there is no point %d", c.Sequence)
	case ChooseTag:
		if p, ok := newest(func(p switchback.MarkedPoint) bool { return p.Mark.Tag == c.Tag }); ok {
			return p, nil
		}
		return none("no point has the tag %q", c.Tag)
	case ChooseBefore:
		at := c.Before
		if at.IsZero() {
			at = now.Add(-c.Ago)
		}
		// Clocks may jump: of all that are old enough, the one highest in sequence.
		if p, ok := newest(func(p switchback.MarkedPoint) bool { return !p.Time.After(at) }); ok {
			return p, nil
		}
		return none("no point is of %s or before", at.UTC().Format(time.RFC3339))
	}
	return switchback.MarkedPoint{}, switchback.Errorf(switchback.CodeInvalid, "%q is no choice of a point", c.Kind).WithHint("%s", ChoiceHelp)
}

// available tells what could be chosen instead.
func available(points []switchback.MarkedPoint) string {
	if len(points) == 0 {
		return "wait for the first recovery point"
	}
	first, last := points[0], points[len(points)-1]
	var apps, verified int
	var tags []string
	for _, p := range points {
		if p.Kind == switchback.ApplicationConsistent {
			apps++
		}
		if p.Mark.Boot != nil && p.Mark.Boot.Passed {
			verified++
		}
		if p.Mark.Tag != "" {
			tags = append(tags, p.Mark.Tag)
		}
	}
	text := fmt.Sprintf("there are %d points, %d (%s) to %d (%s), %d of them application-consistent, %d proven to boot", len(points),
		first.Sequence, first.Time.UTC().Format(time.RFC3339), last.Sequence, last.Time.UTC().Format(time.RFC3339), apps, verified)
	if len(tags) > 0 {
		text += ", tags " + strings.Join(tags, ", ")
	}
	return text + "; 'vm points' lists them"
}

// Warning says why the point is to be looked at twice before a VM runs from it; "" = nothing is known.
func Warning(p switchback.MarkedPoint) string {
	var reasons []string
	if p.Mark.Suspicious != "" {
		reasons = append(reasons, "it is marked as suspicious: "+p.Mark.Suspicious)
	}
	if b := p.Mark.Boot; b != nil && !b.Passed {
		reasons = append(reasons, fmt.Sprintf("a drill at %s did not find it well (%s)", b.At.UTC().Format(time.RFC3339), b.Report))
	}
	if len(reasons) == 0 {
		return ""
	}
	return fmt.Sprintf("point %d: %s", p.Sequence, strings.Join(reasons, "; "))
}

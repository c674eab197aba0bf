package switchback_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

func TestErrorText(t *testing.T) {
	for _, c := range []struct {
		err  *switchback.Error
		want string
	}{
		{&switchback.Error{Message: "disk vda is gone"}, "disk vda is gone"},
		{&switchback.Error{Op: "riga", Message: "disk vda is gone"}, "riga: disk vda is gone"},
		{&switchback.Error{Message: "open", Err: fs.ErrNotExist}, "open: file does not exist"},
		{&switchback.Error{Err: fs.ErrNotExist}, "file does not exist"},
		{&switchback.Error{Op: "riga", Message: "open", Err: fs.ErrNotExist, Hint: "put it back"}, "riga: open: file does not exist (put it back)"},
		{switchback.Errorf(switchback.CodeInvalid, "no size %d", 7).WithHint("use %d", 8), "no size 7 (use 8)"},
		{switchback.Errorf(switchback.CodeInvalid, "open: %w", fs.ErrNotExist), "open: file does not exist"}, // once, not twice
	} {
		if got := c.err.Error(); got != c.want {
			t.Errorf("%+v reads %q, want %q", c.err, got, c.want)
		}
	}
}

func TestErrorChain(t *testing.T) {
	e := switchback.Errorf(switchback.CodeNotFound, "open: %w", fs.ErrNotExist)
	if !errors.Is(e, fs.ErrNotExist) {
		t.Error("the cause of a percent-w is not found")
	}
	if switchback.Errorf(switchback.CodeNotFound, "open: %v", fs.ErrNotExist).Err != nil {
		t.Error("a cause that was only printed is kept")
	}
	hinted := e.WithHint("look")
	if e.Hint != "" || hinted.Hint != "look" || !errors.Is(hinted, fs.ErrNotExist) {
		t.Errorf("WithHint changes %+v or loses the cause of %+v", e, hinted)
	}
}

func TestCodeOf(t *testing.T) {
	inner := switchback.Errorf(switchback.CodeNoSpace, "full")
	for _, c := range []struct {
		err       error
		want      switchback.Code
		retryable bool
	}{
		{nil, "", false},
		{errors.New("x"), switchback.CodeInternal, false},
		{inner, switchback.CodeNoSpace, true},
		{fmt.Errorf("wrapped: %w", inner), switchback.CodeNoSpace, true},
		{switchback.Errorf(switchback.CodeRefused, "outer: %w", inner), switchback.CodeRefused, false}, // the outermost counts
		{errors.Join(errors.New("x"), switchback.Errorf(switchback.CodeTimeout, "late")), switchback.CodeTimeout, true},
		{switchback.Errorf(switchback.CodeUnavailable, "away"), switchback.CodeUnavailable, true},
		{switchback.Errorf(switchback.CodeCancelled, "stop"), switchback.CodeCancelled, false},
		{switchback.Errorf(switchback.CodeStaleEpoch, "old"), switchback.CodeStaleEpoch, false},
		{switchback.Errorf(switchback.CodeCorrupt, "bad"), switchback.CodeCorrupt, false},
		{context.Canceled, switchback.CodeInternal, false},
	} {
		if got := switchback.CodeOf(c.err); got != c.want {
			t.Errorf("CodeOf(%v) = %q, want %q", c.err, got, c.want)
		}
		if got := switchback.IsRetryable(c.err); got != c.retryable {
			t.Errorf("IsRetryable(%v) = %v", c.err, got)
		}
	}
}

func TestPolicyValidate(t *testing.T) {
	if err := switchback.DefaultPolicy().Validate(); err != nil {
		t.Errorf("the default policy: %v", err)
	}
	for _, c := range []struct {
		name   string
		change func(*switchback.Policy)
		ok     bool
	}{
		{"one second", func(p *switchback.Policy) { p.Interval = time.Second }, true},
		{"less than a second", func(p *switchback.Policy) { p.Interval = time.Second - 1 }, false},
		{"no interval", func(p *switchback.Policy) { p.Interval = 0 }, false},
		{"two points", func(p *switchback.Policy) { p.KeepPoints = 2 }, true},
		{"one point", func(p *switchback.Policy) { p.KeepPoints = 1 }, false},
		{"zstd", func(p *switchback.Policy) { p.Compression = "zstd" }, true},
		{"s2", func(p *switchback.Policy) { p.Compression = "s2" }, true},
		{"none", func(p *switchback.Policy) { p.Compression = "none" }, true},
		{"no compression named", func(p *switchback.Policy) { p.Compression = "" }, false},
		{"gzip", func(p *switchback.Policy) { p.Compression = "gzip" }, false},
	} {
		p := switchback.DefaultPolicy()
		c.change(&p)
		err := p.Validate()
		if (err == nil) != c.ok || err != nil && switchback.CodeOf(err) != switchback.CodeInvalid {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestHomeward(t *testing.T) {
	p := switchback.Protection{Home: "berlin", Source: "berlin", Target: "riga"}
	if p.Homeward() {
		t.Error("a VM at home that replicates away is homeward")
	}
	p.Source, p.Target = p.Target, p.Source
	if !p.Homeward() {
		t.Error("a VM away that replicates home is not homeward")
	}
	if n := switchback.DisksSize([]switchback.Disk{{SizeBytes: 1 << 40}, {SizeBytes: 512}}); n != 1<<40+512 {
		t.Errorf("sizes add up to %d", n)
	}
}

func TestFlatten(t *testing.T) {
	inner := switchback.Errorf(switchback.CodeNoSpace, "full").WithHint("make room")
	for _, c := range []struct {
		err  error
		code switchback.Code
		text string
		hint string
	}{
		{inner, switchback.CodeNoSpace, "full (make room)", "make room"},
		{fmt.Errorf("store: %w", inner), switchback.CodeNoSpace, "store: full (make room)", "make room"}, // the hint once
		{&switchback.Error{Code: switchback.CodeInternal, Op: "riga", Message: "open", Err: fs.ErrNotExist}, switchback.CodeInternal, "riga: open: file does not exist", ""},
		{switchback.Errorf(switchback.CodeInvalid, "open: %w", fs.ErrNotExist), switchback.CodeInvalid, "open: file does not exist", ""},
		{fmt.Errorf("call: %w", context.DeadlineExceeded), switchback.CodeTimeout, "call: context deadline exceeded", ""},
		{errors.New("x"), switchback.CodeInternal, "x", ""},
	} {
		got := switchback.Flatten(c.err)
		if got.Code != c.code || got.Error() != c.text || got.Hint != c.hint || got.Err != nil {
			t.Errorf("Flatten(%v) = %+v, want %s %q (%s)", c.err, got, c.code, c.text, c.hint)
		}
	}
	if inner.Hint != "make room" {
		t.Error("Flatten changes its argument")
	}
}

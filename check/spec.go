package check

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// DefaultTimeout is how long a check may take to pass that says nothing else.
const DefaultTimeout = 2 * time.Minute

const maxTimeout = time.Hour

// Parse reads the text form of a check. CodeInvalid says what is wrong.
func Parse(text string) (switchback.GuestCheck, error) {
	var c switchback.GuestCheck
	rest := strings.TrimSpace(text)
	for more := true; more; {
		var err error
		if rest, more, err = cutOption(rest, &c); err != nil {
			return c, err
		}
	}
	kind, target, _ := strings.Cut(rest, ":")
	c.Kind, c.Target = switchback.CheckKind(kind), target
	if kind == "http" || kind == "https" {
		c.Kind, c.Target = switchback.CheckHTTP, rest
	}
	return c, Validate(c)
}

// cutOption takes one option off the end.
func cutOption(rest string, c *switchback.GuestCheck) (string, bool, error) {
	for _, suffix := range []string{":optional", ";optional"} {
		if before, ok := strings.CutSuffix(rest, suffix); ok {
			c.Optional = true
			return before, true, nil
		}
	}
	at := strings.LastIndex(rest, ";")
	if at < 0 {
		return rest, false, nil
	}
	name, value, ok := strings.Cut(rest[at+1:], "=")
	if !ok {
		return rest, false, nil // part of the target
	}
	var err error
	switch name {
	case "timeout":
		c.Timeout, err = time.ParseDuration(value)
	case "retries":
		c.Retries, err = strconv.Atoi(value)
	default:
		return rest, false, nil
	}
	if err != nil {
		return "", false, switchback.Errorf(switchback.CodeInvalid, "option %s of a check: %w", name, err)
	}
	return rest[:at], true, nil
}

// Format writes the text form; Parse reads it back.
func Format(c switchback.GuestCheck) string {
	text := string(c.Kind)
	switch {
	case c.Kind == switchback.CheckHTTP:
		text = c.Target
	case c.Target != "":
		text += ":" + c.Target
	}
	if c.Timeout > 0 {
		text += ";timeout=" + c.Timeout.String()
	}
	if c.Retries > 0 {
		text += ";retries=" + strconv.Itoa(c.Retries)
	}
	if c.Optional {
		text += ";optional"
	}
	return text
}

// Validate reports what cannot work in a check.
func Validate(c switchback.GuestCheck) error {
	bad := func(format string, args ...any) error {
		return switchback.Errorf(switchback.CodeInvalid, "check %q: %s", Format(c), fmt.Sprintf(format, args...)).
			WithHint("power, agent, console:REGEXP, tcp:HOST:PORT, http://…, icmp:ADDRESS or exec:COMMAND, each with ;timeout=, ;retries= and :optional")
	}
	if c.Timeout < 0 || c.Timeout > maxTimeout {
		return bad("the timeout must be from 0 to %v", maxTimeout)
	}
	if c.Retries < 0 {
		return bad("the number of retries cannot be negative")
	}
	switch c.Kind {
	case switchback.CheckPower, switchback.CheckAgent:
		if c.Target != "" {
			return bad("%s has no target", c.Kind)
		}
	case switchback.CheckConsole:
		if c.Target == "" {
			return bad("no pattern")
		}
		if _, err := regexp.Compile(c.Target); err != nil {
			return bad("%v", err)
		}
	case switchback.CheckTCP:
		host, port, err := net.SplitHostPort(c.Target)
		if err != nil || host == "" {
			return bad("the target must be HOST:PORT")
		}
		if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 {
			return bad("%q is no port", port)
		}
	case switchback.CheckHTTP:
		u, err := url.Parse(c.Target)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			return bad("the target must be a URL")
		}
	case switchback.CheckICMP:
		if a, err := netip.ParseAddr(c.Target); err != nil || !a.Is4() {
			return bad("the target must be an IPv4 address")
		}
	case switchback.CheckExec:
		if strings.TrimSpace(c.Target) == "" {
			return bad("no command")
		}
	default:
		return bad("unknown kind")
	}
	return nil
}

// ValidateAll reports the first check that cannot work.
func ValidateAll(list []switchback.GuestCheck) error {
	for _, c := range list {
		if err := Validate(c); err != nil {
			return err
		}
	}
	return nil
}

// Budget is how long running a list takes at most.
func Budget(list []switchback.GuestCheck) time.Duration {
	longest := time.Duration(0)
	for _, c := range list {
		longest = max(longest, timeout(c))
	}
	return longest + attemptTimeout
}

func timeout(c switchback.GuestCheck) time.Duration {
	if c.Timeout > 0 {
		return c.Timeout
	}
	return DefaultTimeout
}

// Verdict is nil when every required check passed; otherwise CodeRefused with
// each that did not, and why.
func Verdict(results []switchback.CheckResult) error {
	var failed []string
	for _, r := range results {
		if r.Required && !r.Passed {
			failed = append(failed, fmt.Sprintf("%s (%d attempts): %s", r.Check, r.Attempts, r.Error))
		}
	}
	if len(failed) == 0 {
		return nil
	}
	noun := "check"
	if len(failed) > 1 {
		noun = "checks"
	}
	return switchback.Errorf(switchback.CodeRefused, "%d required %s of the guest failed: %s", len(failed), noun, strings.Join(failed, "; ")).
		WithHint("look at the guest's console; a check that asks too much is changed with 'vm edit --check', or made optional")
}

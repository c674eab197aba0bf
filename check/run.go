package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

const (
	// attemptTimeout bounds one attempt.
	attemptTimeout = 10 * time.Second
	pause          = 500 * time.Millisecond
	// settle is how long a VM must stay running.
	settle = 2 * time.Second
	// maxConsole is how much of a console is looked at, from its end.
	maxConsole = 4 << 20
)

// Guest is what is asked of the guest's platform.
type Guest interface {
	// Running is nil while the VM runs, else it says how it is.
	Running(ctx context.Context) error
	// Ping asks the guest agent.
	Ping(ctx context.Context, timeout time.Duration) error
	// Exec runs a command in the guest.
	Exec(ctx context.Context, command []string, timeout time.Duration) (exitCode int, output string, err error)
	// Console is the file that receives the guest's console, and where in it
	// this start begins.
	Console(ctx context.Context) (path string, from int64, err error)
}

// Runner runs checks on one guest.
type Runner struct {
	Guest Guest
	// Device is the network device that connections leave through; "" = as the
	// host's routes say.
	Device string
	// Report, if set, is told what is still waited for.
	Report func(message string)
}

// Run runs all checks at once and returns how each ended, in order. The error is
// that of the context only.
func (r Runner) Run(ctx context.Context, list []switchback.GuestCheck) ([]switchback.CheckResult, error) {
	results := make([]switchback.CheckResult, len(list))
	waiting := map[int]string{}
	var (
		mu sync.Mutex
		wg sync.WaitGroup
	)
	report := func() {
		if r.Report == nil {
			return
		}
		var names []string
		for i := range list {
			if n, ok := waiting[i]; ok {
				names = append(names, n)
			}
		}
		r.Report("waiting for " + strings.Join(names, ", "))
	}
	for i, c := range list {
		waiting[i] = Format(c)
	}
	report()
	for i, c := range list {
		wg.Go(func() {
			res := r.one(ctx, c)
			mu.Lock()
			defer mu.Unlock()
			results[i] = res
			delete(waiting, i)
			if len(waiting) > 0 {
				report()
			}
		})
	}
	wg.Wait()
	return results, ctx.Err()
}

// one tries a check until it passes or its time is over.
func (r Runner) one(ctx context.Context, c switchback.GuestCheck) switchback.CheckResult {
	res := switchback.CheckResult{Check: Format(c), Kind: c.Kind, Required: !c.Optional, StartedAt: time.Now()}
	deadline := res.StartedAt.Add(timeout(c))
	for {
		res.Attempts++
		try, cancel := context.WithDeadline(ctx, earlier(deadline, time.Now().Add(attemptTimeout)))
		detail, err := r.attempt(try, c)
		cancel()
		res.EndedAt = time.Now()
		if err == nil {
			res.Passed, res.Detail, res.Error = true, detail, ""
			return res
		}
		res.Error = err.Error()
		var never final
		if errors.As(err, &never) || ctx.Err() != nil || c.Retries > 0 && res.Attempts > c.Retries || time.Now().Add(pause).After(deadline) {
			return res
		}
		wait := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			wait.Stop()
		case <-wait.C:
		}
	}
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}

// final is an error that trying again does not mend.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// attempt returns what was seen, or why the check does not pass now.
func (r Runner) attempt(ctx context.Context, c switchback.GuestCheck) (detail string, err error) {
	switch c.Kind {
	case switchback.CheckPower:
		return r.power(ctx)
	case switchback.CheckAgent:
		return "", r.Guest.Ping(ctx, 2*time.Second)
	case switchback.CheckConsole:
		return r.console(ctx, c.Target)
	case switchback.CheckTCP:
		return r.tcp(ctx, c.Target)
	case switchback.CheckHTTP:
		return r.http(ctx, c.Target)
	case switchback.CheckICMP:
		return r.icmp(ctx, c.Target)
	case switchback.CheckExec:
		return r.exec(ctx, c.Target)
	}
	return "", final{switchback.Errorf(switchback.CodeInvalid, "unknown kind %q", c.Kind)}
}

func (r Runner) power(ctx context.Context) (string, error) {
	if err := r.Guest.Running(ctx); err != nil {
		return "", err
	}
	since := time.Now()
	for time.Since(since) < settle {
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
		if err := r.Guest.Running(ctx); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("running for %v", settle), nil
}

func (r Runner) console(ctx context.Context, pattern string) (string, error) {
	expr, err := regexp.Compile("(?m)" + pattern)
	if err != nil {
		return "", final{err}
	}
	path, from, err := r.Guest.Console(ctx)
	if switchback.CodeOf(err) == switchback.CodeUnsupported {
		return "", final{err}
	}
	if err != nil {
		return "", err
	}
	text, err := readFrom(path, from)
	if err != nil {
		return "", err
	}
	match := expr.FindIndex(text)
	if match == nil {
		return "", fmt.Errorf("nothing on the console matches; its last line is %q", lastLine(text))
	}
	return string(clip(lineAt(text, match[0]), 200)), nil
}

// readFrom reads a file from an offset on, at most its last maxConsole bytes. A
// file that is shorter was begun anew.
func readFrom(path string, from int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.Size() < from {
		from = 0
	}
	from = max(from, st.Size()-maxConsole)
	text := make([]byte, st.Size()-from)
	n, err := f.ReadAt(text, from)
	if n < len(text) {
		return nil, err
	}
	return text, nil
}

func lineAt(text []byte, at int) []byte {
	begin, end := at, at
	for begin > 0 && text[begin-1] != '\n' {
		begin--
	}
	for end < len(text) && text[end] != '\n' && text[end] != '\r' {
		end++
	}
	return text[begin:end]
}

func lastLine(text []byte) string {
	trimmed := strings.TrimSpace(string(text))
	return string(clip([]byte(trimmed[strings.LastIndex(trimmed, "\n")+1:]), 200))
}

func clip(b []byte, n int) []byte {
	if len(b) > n {
		return b[:n]
	}
	return b
}

// exec has the guest's shell run the command; where there is none (Windows),
// the command is run by itself.
func (r Runner) exec(ctx context.Context, command string) (string, error) {
	code, output, err := r.Guest.Exec(ctx, []string{"/bin/sh", "-c", command}, attemptTimeout)
	if err != nil && strings.Contains(err.Error(), "No such file") {
		code, output, err = r.Guest.Exec(ctx, strings.Fields(command), attemptTimeout)
	}
	if err != nil {
		return "", err
	}
	output = string(clip([]byte(strings.TrimSpace(output)), 500))
	if code != 0 {
		return "", fmt.Errorf("it ended with status %d: %s", code, output)
	}
	return output, nil
}

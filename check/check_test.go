package check

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	switchback "github.com/switchback-dr/switchback"
)

func TestParse(t *testing.T) {
	for _, c := range []struct {
		text string
		want switchback.GuestCheck
	}{
		{"power", switchback.GuestCheck{Kind: switchback.CheckPower}},
		{"agent:optional", switchback.GuestCheck{Kind: switchback.CheckAgent, Optional: true}},
		{"tcp:10.0.0.5:5432", switchback.GuestCheck{Kind: switchback.CheckTCP, Target: "10.0.0.5:5432"}},
		{"http://10.0.0.5/health?x=1;y=2", switchback.GuestCheck{Kind: switchback.CheckHTTP, Target: "http://10.0.0.5/health?x=1;y=2"}},
		{"https://a:8443/;retries=3;timeout=30s;optional", switchback.GuestCheck{Kind: switchback.CheckHTTP, Target: "https://a:8443/", Retries: 3, Timeout: 30 * time.Second, Optional: true}},
		{"console:^login: $", switchback.GuestCheck{Kind: switchback.CheckConsole, Target: "^login: $"}},
		{"exec:systemctl is-active x; true", switchback.GuestCheck{Kind: switchback.CheckExec, Target: "systemctl is-active x; true"}},
		{"icmp:10.0.0.5;timeout=5s", switchback.GuestCheck{Kind: switchback.CheckICMP, Target: "10.0.0.5", Timeout: 5 * time.Second}},
	} {
		got, err := Parse(c.text)
		if d := cmp.Diff(c.want, got); d != "" || err != nil {
			t.Errorf("%s: %v %s", c.text, err, d)
		}
		again, err := Parse(Format(got))
		if d := cmp.Diff(got, again); d != "" || err != nil {
			t.Errorf("%s, written as %s: %v %s", c.text, Format(got), err, d)
		}
	}
	for _, text := range []string{"", "ping:10.0.0.1", "tcp:10.0.0.5", "tcp::80", "tcp:a:99999", "console:", "console:(", "icmp:host", "exec: ", "power:x", "agent;timeout=x", "agent;timeout=-1s", "agent;retries=x", "http://"} {
		if c, err := Parse(text); switchback.CodeOf(err) != switchback.CodeInvalid {
			t.Errorf("%q is read as %+v, %v", text, c, err)
		}
	}
}

// guest is a Guest that tests set up.
type guest struct {
	running error
	pings   []error // in turn, the last for ever
	asked   int
	code    int
	console string
	from    int64
	missing string // a program that the guest lacks
	ran     []string
}

func (g *guest) Running(context.Context) error { return g.running }
func (g *guest) Ping(context.Context, time.Duration) error {
	err := g.pings[min(g.asked, len(g.pings)-1)]
	g.asked++
	return err
}
func (g *guest) Exec(_ context.Context, command []string, _ time.Duration) (int, string, error) {
	g.ran = command
	if command[0] == g.missing {
		return 0, "", errors.New("Failed to execute child process (No such file or directory)")
	}
	return g.code, "said\n", nil
}
func (g *guest) Console(context.Context) (string, int64, error) {
	if g.console == "" {
		return "", 0, switchback.Errorf(switchback.CodeUnsupported, "no console")
	}
	return g.console, g.from, nil
}

func TestRun(t *testing.T) {
	console := filepath.Join(t.TempDir(), "console")
	if err := os.WriteFile(console, []byte("SB BOOT old\nboot\r\nSB READY t=1\r\nlast"), 0o600); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" {
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer web.Close()
	gone := errors.New("no answer")
	for _, c := range []struct {
		name   string
		check  string
		guest  guest
		detail string // of one that passes
		err    string // of one that does not
		tries  int
	}{
		{"power", "power", guest{}, "running", "", 1},
		{"power off", "power;retries=1", guest{running: errors.New("it is off")}, "", "it is off", 2},
		{"agent at once", "agent", guest{pings: []error{nil}}, "", "", 1},
		{"agent late", "agent", guest{pings: []error{gone, gone, nil}}, "", "", 3},
		{"agent never", "agent;retries=2", guest{pings: []error{gone}}, "", "no answer", 3},
		{"agent too late", "agent;timeout=700ms", guest{pings: []error{gone}}, "", "no answer", 2},
		{"console", "console:^SB READY", guest{console: console}, "SB READY t=1", "", 1},
		{"console of before", "console:SB BOOT;retries=1", guest{console: console, from: 12}, "", `last line is "last"`, 2},
		{"console begun anew", "console:SB BOOT", guest{console: console, from: 1 << 20}, "SB BOOT old", "", 1},
		{"console not kept", "console:x", guest{}, "", "no console", 1},
		{"exec", "exec:true", guest{}, "said", "", 1},
		{"exec fails", "exec:false;retries=1", guest{code: 3}, "", "status 3: said", 2},
		{"exec without a shell", "exec:sc query x", guest{missing: "/bin/sh"}, "said", "", 1},
		{"tcp", "tcp:" + listener.Addr().String(), guest{}, "connected", "", 1},
		{"tcp refused", "tcp:127.0.0.1:1;retries=1", guest{}, "", "refused", 2},
		{"http", web.URL + "/health", guest{}, "200 OK", "", 1},
		{"http fails", web.URL + "/;retries=1", guest{}, "", "503", 2},
		{"icmp", "icmp:127.0.0.1", guest{}, "answered in", "", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec, err := Parse(c.check)
			if err != nil {
				t.Fatal(err)
			}
			results, err := Runner{Guest: &c.guest}.Run(context.Background(), []switchback.GuestCheck{spec})
			if err != nil {
				t.Fatal(err)
			}
			r := results[0]
			if r.Passed != (c.err == "") || !strings.Contains(r.Detail, c.detail) || !strings.Contains(r.Error, c.err) || r.Attempts != c.tries {
				t.Errorf("%+v", r)
			}
			if c.guest.missing != "" && cmp.Diff([]string{"sc", "query", "x"}, c.guest.ran) != "" {
				t.Errorf("ran %v", c.guest.ran)
			}
		})
	}
}

// TestRunDevice: connections leave through the device, and nowhere else.
func TestRunDevice(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	list := []switchback.GuestCheck{{Kind: switchback.CheckTCP, Target: listener.Addr().String(), Retries: 1}}
	for device, want := range map[string]bool{"lo": true, "no-such-device": false} {
		results, err := Runner{Guest: &guest{}, Device: device}.Run(context.Background(), list)
		if err != nil || results[0].Passed != want {
			t.Errorf("through %s: %+v, %v", device, results, err)
		}
	}
}

func TestVerdict(t *testing.T) {
	passed := switchback.CheckResult{Check: "power", Required: true, Passed: true}
	optional := switchback.CheckResult{Check: "agent;optional", Error: "silent"}
	failed := switchback.CheckResult{Check: "tcp:a:1", Required: true, Attempts: 4, Error: "refused"}
	if err := Verdict([]switchback.CheckResult{passed, optional}); err != nil {
		t.Error(err)
	}
	err := Verdict([]switchback.CheckResult{passed, failed, optional, {Check: "agent", Required: true, Attempts: 1, Error: "silent"}})
	if switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), "2 required checks") ||
		!strings.Contains(err.Error(), "tcp:a:1 (4 attempts): refused; agent (1 attempts): silent") {
		t.Error(err)
	}
}

func TestRunCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err := Runner{Guest: &guest{pings: []error{errors.New("no")}}}.Run(ctx, []switchback.GuestCheck{{Kind: switchback.CheckAgent}})
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

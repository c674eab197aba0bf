package witness

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const consoleText = `
Booting from ROM...
SB BOOT 0102 vm=0d5e7f2a-4a57-4b6b-9b1e-0123456789ab t=1000000000 up=2100

SB MOUNTED vda ms=30 t=1100000000 up=2200

SB CHECKED 67108864 ok ms=410 t=1500000000 up=2700

SB RESUME seq=0 boot=00 t=1600000000 up=2800

SB ACK 1-5 t=1700000000 up=2900
[    3.1] a kernel message
SB ACK 6-9 t=1720000000 up=2920

SB EIO write seq=10 disk=vda errno=5 t=1800000000 up=3000

SB SHUTDOWN cause=button t=1900000000 up=3100

SB POWEROFF seq=12 errors=1 cause=button t=1950000000 up=3150

SB ACK 10-12 t=1960000000 up=3160

SB ACK 13-1
SB BOOT 0304 vm=0d5e7f2a-4a57-4b6b-9b1e-0123456789ab t=9000000000 up=2000

SB CHECKED 4096 BAD ms=1 error=wrong content of file-0001 t=9100000000 up=2100

SB FAIL writer: no disk vdb t=9200000000 up=2200

SB ACK 13-1`

func TestParseConsole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(consoleText, "\n", "\r\n")), 0o644); err != nil {
		t.Fatal(err)
	}
	c, err := ParseConsole(path)
	if err != nil {
		t.Fatal(err)
	}
	at := func(ms int64) time.Time { return time.Unix(0, ms*1e6) }
	const vm = "0d5e7f2a-4a57-4b6b-9b1e-0123456789ab"
	want := &Console{Boots: []Boot{
		{ID: "0102", VM: vm, Time: at(1000), ResumedBoot: "00", Resumes: 1,
			Acks:     []Ack{{1, 5, at(1700)}, {6, 9, at(1720)}, {10, 12, at(1960)}},
			Checks:   []Check{{64 * MiB, true, 410 * time.Millisecond, at(1500), 2700 * time.Millisecond}},
			EIO:      []string{"EIO write seq=10 disk=vda errno=5 t=1800000000 up=3000"},
			PowerOff: &PowerOff{Seq: 12, Errors: 1, Cause: "button", Time: at(1950)}},
		{ID: "0304", VM: vm, Time: at(9000),
			Checks:   []Check{{4096, false, time.Millisecond, at(9100), 2100 * time.Millisecond}},
			Failures: []string{"FAIL writer: no disk vdb t=9200000000 up=2200"}},
	}}
	if diff := cmp.Diff(want, c); diff != "" {
		t.Error(diff)
	}
	if n := c.Boots[0].Acknowledged(); n != 12 {
		t.Errorf("acknowledged %d", n)
	}
	if age, ok := c.Boots[0].AckAge(); !ok || age != -10*time.Millisecond {
		t.Errorf("the last acknowledgement is %v old, %v", age, ok)
	}
	if _, ok := c.Boots[1].AckAge(); ok {
		t.Error("a boot without acknowledgements has a last one")
	}
	if c, err := ParseConsole(path + ".none"); err != nil || c.Last() != nil {
		t.Errorf("missing console: %+v, %v", c, err)
	}
}

func TestParseConsoleRefuses(t *testing.T) {
	const boot = "SB BOOT 01 vm=x t=1 up=1\n"
	const end = "SB SHUTDOWN cause=x t=9 up=9\n"
	for name, text := range map[string]string{
		"before boot":  "SB ACK 1-2 t=1 up=1\n",
		"no time":      boot + "SB ACK 1-2\n" + end,
		"not whole":    boot + "SB ACK 1-2 t=1 \n" + end,
		"no arguments": boot + "SB ACK\n" + end,
		"empty":        boot + "SB \n" + end,
		"only clocks":  boot + "SB t=1 up=1\n" + end,
		"backwards":    boot + "SB ACK 5-2 t=1 up=1\n",
		"twice":        boot + "SB ACK 1-5 t=1 up=1\nSB ACK 5-6 t=1 up=1\n",
		"no number":    boot + "SB ACK x-y t=1 up=1\n",
		"bad clock":    boot + "SB ACK 1-2 t=x up=1\n",
		"no result":    boot + "SB CHECKED t=1 up=1\n",
	} {
		if c, err := parseConsole(text); err == nil {
			t.Errorf("%s: accepted as %+v", name, c)
		}
	}
}

func TestAwaitLine(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	write := func(s string) {
		f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		f.WriteString(s)
	}
	write("SB CHECKED 1 ok\n")
	from := ConsoleSize(path)
	written := make(chan time.Time, 1)
	go func() {
		write("SB CHEC")
		time.Sleep(20 * time.Millisecond)
		write("KED 2 ok")
		time.Sleep(20 * time.Millisecond)
		written <- time.Now()
		write("\n")
	}()
	line, seen, err := AwaitLine(t.Context(), path, from, "SB CHECKED ")
	if err != nil || line != "SB CHECKED 2 ok" {
		t.Errorf("%q, %v", line, err)
	}
	if w := <-written; seen.Before(w) {
		t.Errorf("seen %v before it was written", w.Sub(seen))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if line, _, err := AwaitLine(ctx, path, ConsoleSize(path), "SB"); err == nil {
		t.Errorf("found %q after the end", line)
	}
}

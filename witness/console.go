package witness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
)

// Console is what a guest said on its serial console, all its boots at one site.
type Console struct {
	Boots []Boot `json:"boots"`
}

// Boot is one life of a guest. Times are the guest's own clock.
type Boot struct {
	ID   string    `json:"id"`
	VM   string    `json:"vm"`
	Time time.Time `json:"time"`
	// Resumed is the highest record found on the disks, written in the boot
	// ResumedBoot; Resumes tells 0 from not yet.
	Resumed     uint64    `json:"resumed"`
	ResumedBoot string    `json:"resumed_boot"`
	Resumes     int       `json:"resumes"`
	Acks        []Ack     `json:"acks"`
	Checks      []Check   `json:"checks"`
	EIO         []string  `json:"eio"`
	Failures    []string  `json:"failures"`
	PowerOff    *PowerOff `json:"power_off,omitempty"`
}

// Ack says that the guest held the records First to Last for durable.
type Ack struct {
	First uint64    `json:"first"`
	Last  uint64    `json:"last"`
	Time  time.Time `json:"time"`
}

// Check is the result of reading files with known checksums.
type Check struct {
	Bytes int64         `json:"bytes"`
	OK    bool          `json:"ok"`
	Took  time.Duration `json:"took"`
	Time  time.Time     `json:"time"`
	// Up is the time since the guest's kernel started.
	Up time.Duration `json:"up"`
}

// PowerOff is the guest's last word.
type PowerOff struct {
	Seq    uint64    `json:"seq"`
	Errors int64     `json:"errors"`
	Cause  string    `json:"cause"`
	Time   time.Time `json:"time"`
}

// Last is the newest boot; nil if there is none.
func (c *Console) Last() *Boot {
	if len(c.Boots) == 0 {
		return nil
	}
	return &c.Boots[len(c.Boots)-1]
}

// Acknowledged counts the records that the boot acknowledged.
func (b *Boot) Acknowledged() (n uint64) {
	for _, a := range b.Acks {
		n += a.Last - a.First + 1
	}
	return n
}

// LastAck is the newest acknowledgement; zero if there is none.
func (b *Boot) LastAck() Ack {
	if len(b.Acks) == 0 {
		return Ack{}
	}
	return b.Acks[len(b.Acks)-1]
}

// AckAge is how long before power-off the last acknowledgement came: a writer
// that writes to the end has a small one. Not positive if it came even later than
// the last word, false if there was no acknowledgement or no power-off.
func (b *Boot) AckAge() (time.Duration, bool) {
	if b.PowerOff == nil || len(b.Acks) == 0 {
		return 0, false
	}
	return b.PowerOff.Time.Sub(b.LastAck().Time), true
}

// Loss is the answer of AcknowledgedLost.
type Loss struct {
	Acknowledged uint64 `json:"acknowledged"`
	// Lost are acknowledged records that are not on the disks.
	Lost uint64 `json:"lost"`
	// Overwritten were acknowledged and may not be there any more, since the ring
	// has gone round after them; of these only the number is judged.
	Overwritten uint64 `json:"overwritten"`
	// FirstLost is the lowest lost number, 0 if there is none.
	FirstLost uint64 `json:"first_lost"`
}

// AcknowledgedLost holds what one boot acknowledged against what lies on the
// disks. The disks must be at rest, and none but this boot may have written to
// them since (later boots may overwrite, which counts as loss only if the number
// was given to another record).
func AcknowledgedLost(b *Boot, r *Records) Loss {
	var l Loss
	for _, a := range b.Acks {
		for seq := a.First; seq <= a.Last; seq++ {
			l.Acknowledged++
			switch {
			case seq <= r.lower:
				l.Overwritten++
			case !r.Has(seq, b.ID):
				l.Lost++
				if l.FirstLost == 0 {
					l.FirstLost = seq
				}
			}
		}
	}
	return l
}

// ParseConsole reads a console's log; a missing file is an empty console. Lines
// that are not the workload's are skipped. A line of the workload that makes no
// sense is an error, save where a killed guest leaves one: at the end of a boot.
func ParseConsole(path string) (*Console, error) {
	b, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	return parseConsole(string(b))
}

func parseConsole(text string) (*Console, error) {
	c := &Console{}
	var torn error // of the line before
	for line := range strings.Lines(text) {
		if !strings.HasSuffix(line, "\n") {
			break // cut off
		}
		line = strings.TrimRight(line, "\r\n")
		rest, ok := strings.CutPrefix(line, "SB ")
		if !ok {
			continue
		}
		if torn != nil && !strings.HasPrefix(rest, "BOOT ") {
			return nil, torn
		}
		torn = nil
		if err := c.add(rest); errors.Is(err, errTorn) {
			torn = fmt.Errorf("console line %q: %w", line, err)
		} else if err != nil {
			return nil, fmt.Errorf("console line %q: %w", line, err)
		}
	}
	return c, nil
}

// errTorn: every whole line ends with the guest's clocks.
var errTorn = errors.New("the line is not whole")

func (c *Console) add(line string) error {
	f := strings.Fields(line)
	kv := map[string]string{}
	for _, w := range f {
		if k, v, ok := strings.Cut(w, "="); ok {
			kv[k] = v
		}
	}
	if len(f) < 3 || kv["t"] == "" || kv["up"] == "" {
		return errTorn
	}
	var p parser
	at := time.Unix(0, p.int(kv["t"]))
	up := time.Duration(p.int(kv["up"])) * time.Millisecond
	if p.err != nil {
		return p.err
	}
	if f[0] == "BOOT" {
		c.Boots = append(c.Boots, Boot{ID: f[1], VM: kv["vm"], Time: at})
		return p.err
	}
	b := c.Last()
	if b == nil {
		return errors.New("before any BOOT")
	}
	switch f[0] {
	case "RESUME":
		b.Resumed, b.ResumedBoot = p.uint(kv["seq"]), kv["boot"]
		b.Resumes++
	case "ACK":
		first, last, _ := strings.Cut(f[1], "-")
		a := Ack{First: p.uint(first), Last: p.uint(last), Time: at}
		if a.First > a.Last || a.Last-a.First > 1<<20 || a.First <= b.LastAck().Last {
			return fmt.Errorf("acknowledges %d to %d after %d", a.First, a.Last, b.LastAck().Last)
		}
		b.Acks = append(b.Acks, a)
	case "CHECKED":
		if len(f) < 4 {
			return errors.New("no result")
		}
		b.Checks = append(b.Checks, Check{Bytes: p.int(f[1]), OK: f[2] == "ok", Time: at, Up: up, Took: time.Duration(p.int(kv["ms"])) * time.Millisecond})
	case "EIO":
		b.EIO = append(b.EIO, line)
	case "FAIL":
		b.Failures = append(b.Failures, line)
	case "POWEROFF":
		b.PowerOff = &PowerOff{Seq: p.uint(kv["seq"]), Errors: p.int(kv["errors"]), Cause: kv["cause"], Time: at}
	}
	return p.err
}

type parser struct{ err error }

func (p *parser) int(s string) int64 {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil && p.err == nil {
		p.err = err
	}
	return n
}

func (p *parser) uint(s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil && p.err == nil {
		p.err = err
	}
	return n
}

// ConsoleSize is where the next line of a console will begin; 0 for no file.
func ConsoleSize(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// AwaitLine waits for a whole line after the given offset whose beginning is
// prefix ("SB CHECKED "), and returns it with the machine's time at which it was
// seen, at most 2 ms after it was written.
func AwaitLine(ctx context.Context, path string, from int64, prefix string) (line string, seen time.Time, err error) {
	var text []byte
	for {
		if f, err := os.Open(path); err == nil {
			more, err := io.ReadAll(io.NewSectionReader(f, from+int64(len(text)), 1<<40))
			f.Close()
			if err != nil {
				return "", time.Time{}, err
			}
			text = append(text, more...)
			now := time.Now()
			for l := range strings.Lines(string(text)) {
				if strings.HasPrefix(l, prefix) && strings.HasSuffix(l, "\n") {
					return strings.TrimRight(l, "\r\n"), now, nil
				}
			}
		}
		select {
		case <-ctx.Done():
			return "", time.Time{}, fmt.Errorf("no line %q in %s: %w", prefix, path, ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

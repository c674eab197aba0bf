package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// Control speaks with a running guest through its control port. One client at
// a time; calls must not be made concurrently. It serves one life of the guest's
// QEMU.
type Control struct {
	conn net.Conn
	in   *bufio.Reader
	id   string
	next int
}

// Dial connects to a guest's control socket (ControlPath, as seen from outside:
// (*site.Site).HostPath) and waits, as long as the context allows, until the
// guest is there and answers.
func Dial(ctx context.Context, socket string) (*Control, error) {
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", socket)
		if err == nil {
			c := &Control{conn: conn, in: bufio.NewReader(conn), id: fmt.Sprintf("%d-%d", os.Getpid(), time.Now().UnixNano())}
			if _, err = c.Do(ctx, "ping"); err == nil {
				return c, nil
			}
			conn.Close()
		}
		if sleep(ctx, 20*time.Millisecond) != nil {
			return nil, fmt.Errorf("reach the guest at %s: %w", socket, err)
		}
	}
}

// Close ends the connection; the guest goes on.
func (c *Control) Close() error { return c.conn.Close() }

// Do sends a command ("dirty disk=vda bytes=…") and waits for its answer's
// values. See lab/guest/workload/control.go for the commands.
func (c *Control) Do(ctx context.Context, command string) (map[string]string, error) {
	c.next++
	id := fmt.Sprintf("%s-%d", c.id, c.next)
	verb, _, _ := strings.Cut(command, " ")
	c.conn.SetDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() { c.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := fmt.Fprintf(c.conn, "%s %s\n", id, command); err != nil {
		return nil, c.failed(ctx, verb, err)
	}
	for {
		line, err := c.in.ReadString('\n')
		if err != nil {
			return nil, c.failed(ctx, verb, err)
		}
		// Answers to a client before us may still come.
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), id+" ")
		if !ok {
			continue
		}
		if text, bad := strings.CutPrefix(rest, "error "); bad {
			return nil, fmt.Errorf("guest: %s: %s", verb, text)
		}
		values := map[string]string{}
		for _, f := range strings.Fields(rest)[1:] {
			name, value, _ := strings.Cut(f, "=")
			values[name] = value
		}
		return values, nil
	}
}

func (c *Control) failed(ctx context.Context, verb string, err error) error {
	return fmt.Errorf("guest: %s: %w", verb, errors.Join(err, ctx.Err()))
}

// State is the writer's.
type State struct {
	Seq    uint64 // the newest durable record
	Errors uint64 // failed writes since boot
	Hold   bool
}

// State asks for the writer's state.
func (c *Control) State(ctx context.Context) (State, error) {
	v, err := c.Do(ctx, "state")
	return stateOf(v), err
}

// Hold stops the writer; all that is durable has been acknowledged on return.
func (c *Control) Hold(ctx context.Context) (State, error) {
	v, err := c.Do(ctx, "hold")
	return stateOf(v), err
}

func stateOf(v map[string]string) State {
	return State{Seq: number[uint64](v["seq"]), Errors: number[uint64](v["errors"]), Hold: v["hold"] == "true"}
}

// Go lets the writer write.
func (c *Control) Go(ctx context.Context) error {
	_, err := c.Do(ctx, "go")
	return err
}

// Pace sets the pause between two records.
func (c *Control) Pace(ctx context.Context, d time.Duration) error {
	_, err := c.Do(ctx, fmt.Sprintf("pace us=%d", d.Microseconds()))
	return err
}

// Mix is a pattern of changes.
type Mix string

const (
	// Mixed is a third each of Random4K, Random64K and Sequential1M, by bytes.
	Mixed        Mix = "mixed"
	Random4K     Mix = "rand4k"
	Random64K    Mix = "rand64k"
	Sequential1M Mix = "seq1m"
)

// Changes is what Dirty writes.
type Changes struct {
	Disk   string // "vda"
	Bytes  int64  // written; random pieces may hit a place twice
	Offset int64  // of the area; default DirtyOffset
	Span   int64  // its size; default 1 GiB
	Seed   uint64 // another seed, another content and other places
	Mix    Mix    // default Mixed
	Noise  bool   // incompressible; otherwise half of each piece repeats
}

// Dirty makes the guest write seeded changes and flush them; it returns the
// bytes written.
func (c *Control) Dirty(ctx context.Context, ch Changes) (int64, error) {
	if ch.Offset == 0 {
		ch.Offset = DirtyOffset
	}
	if ch.Span == 0 {
		ch.Span = 1 << 30
	}
	if ch.Mix == "" {
		ch.Mix = Mixed
	}
	fill := "half"
	if ch.Noise {
		fill = "random"
	}
	v, err := c.Do(ctx, fmt.Sprintf("dirty disk=%s bytes=%d offset=%d span=%d seed=%d mix=%s fill=%s", ch.Disk, ch.Bytes, ch.Offset, ch.Span, ch.Seed&0x7fffffffffffffff, ch.Mix, fill))
	return number[int64](v["bytes"]), err
}

// Latency is the distribution of 4 KiB O_DSYNC writes.
type Latency struct{ P50, P90, P99, Max time.Duration }

// Latency makes the guest do n random synchronous writes to the area.
func (c *Control) Latency(ctx context.Context, disk string, n int, offset, span int64) (Latency, error) {
	v, err := c.Do(ctx, fmt.Sprintf("lat disk=%s n=%d offset=%d span=%d", disk, n, offset, span))
	us := func(name string) time.Duration { return time.Duration(number[int64](v[name])) * time.Microsecond }
	return Latency{us("p50_us"), us("p90_us"), us("p99_us"), us("max_us")}, err
}

// Read makes the guest read a range past its caches, in pieces of chunk bytes
// (default 1 MiB), and returns the XXH64 of it.
func (c *Control) Read(ctx context.Context, disk string, offset, bytes, chunk int64) (sum string, err error) {
	if chunk == 0 {
		chunk = 1 << 20
	}
	v, err := c.Do(ctx, fmt.Sprintf("read disk=%s offset=%d bytes=%d chunk=%d", disk, offset, bytes, chunk))
	return v["sum"], err
}

// Check makes the guest drop its caches and verify that many bytes of files.
func (c *Control) Check(ctx context.Context, bytes int64) error {
	_, err := c.Do(ctx, fmt.Sprintf("check bytes=%d", bytes))
	return err
}

// PowerOff asks the guest to power off by itself.
func (c *Control) PowerOff(ctx context.Context) error {
	_, err := c.Do(ctx, "poweroff")
	return err
}

func number[T int64 | uint64](s string) T {
	n, _ := strconv.ParseInt(s, 10, 64)
	return T(n)
}

package simulated

import (
	"bytes"
	"context"
	"encoding/xml"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
	"github.com/switchback-dr/switchback/nbd"
)

// Program is what a machine's guest does. It stands in the definition's
// metadata, and so moves with the machine:
//
//	<metadata><program xmlns="urn:switchback:simulated" reacts="yes" …/></metadata>
type Program struct {
	// Reacts: it powers off when it is asked to.
	Reacts bool
	// Agent: it has a guest agent, which answers once it has booted.
	Agent bool
	// Boot is how long it takes from being let run to being up.
	Boot time.Duration
	// Rate is how many records it writes a second; 0 = none.
	Rate float64
	// Seed of its records.
	Seed uint64
}

// Element is the program as an element of the definition's metadata.
func (p Program) Element() string {
	yes := map[bool]string{true: "yes", false: "no"}
	return fmt.Sprintf("<program xmlns='urn:switchback:simulated' reacts='%s' agent='%s' boot='%s' rate='%g' seed='%d'/>",
		yes[p.Reacts], yes[p.Agent], p.Boot, p.Rate, p.Seed)
}

// programOf reads a definition's program; one without does nothing at all.
func programOf(definition string) Program {
	var doc struct {
		Program struct {
			Reacts string  `xml:"reacts,attr"`
			Agent  string  `xml:"agent,attr"`
			Boot   string  `xml:"boot,attr"`
			Rate   float64 `xml:"rate,attr"`
			Seed   uint64  `xml:"seed,attr"`
		} `xml:"metadata>program"`
	}
	if err := xml.Unmarshal([]byte(definition), &doc); err != nil {
		return Program{}
	}
	boot, _ := time.ParseDuration(doc.Program.Boot) // none: at once
	return Program{Reacts: doc.Program.Reacts == "yes", Agent: doc.Program.Agent == "yes", Boot: boot, Rate: doc.Program.Rate, Seed: doc.Program.Seed}
}

// guest is the program of a running machine.
type guest struct {
	program Program
	socket  string
	disks   []string
	console string
	boot    int64
	first   bool // the machine has not run before
	log     func(msg string, args ...any)
	off     func() error

	ctx     context.Context
	cancel  context.CancelFunc
	done    chan struct{}
	pressed atomic.Bool
	button  chan struct{}
	up      atomic.Bool

	mu      sync.Mutex // held over each write
	running bool
	frozen  bool
	changed chan struct{}
}

// startGuest starts the program, not yet let run. The domain's lock is held.
func (d *domain) startGuest(first bool) {
	h := d.host
	g := &guest{program: programOf(d.s.Live.Definition), socket: d.nbdSocket(), console: ConsolePath(h.dir, d.uuid), boot: d.s.Boot, first: first,
		done: make(chan struct{}), button: make(chan struct{}), changed: make(chan struct{})}
	if parsed, err := libvirt.ParseDefinition(d.s.Live.Definition); err == nil {
		for _, disk := range parsed.Disks {
			if _, ok := d.s.Live.Nodes[disk.Name]; ok {
				g.disks = append(g.disks, disk.Name)
			}
		}
	}
	mon, log := d.mon, h.log.With("vm", d.uuid)
	g.log = func(msg string, args ...any) { log.Warn(msg, args...) }
	g.off = func() error { return mon.do("quit", nil, nil) }
	g.ctx, g.cancel = context.WithCancel(context.Background())
	d.guest = g
	h.guests.Go(func() {
		defer close(g.done)
		if err := g.live(); err != nil && g.ctx.Err() == nil {
			g.say("error %v", err)
			g.log("the guest's program ended", "error", err)
		}
	})
}

// say appends a line to the console.
func (g *guest) say(format string, a ...any) {
	f, err := os.OpenFile(g.console, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err == nil {
		_, err = fmt.Fprintf(f, format+"\n", a...)
		f.Close()
	}
	if err != nil {
		g.log("console", "error", err)
	}
}

func (g *guest) booted() bool { return g.up.Load() }

func (g *guest) stop() {
	g.cancel()
	<-g.done
}

// let makes the program run, or pause; when it returns no write is under way.
func (g *guest) let(run bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running = run
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *guest) setFrozen(frozen bool) (was bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	was, g.frozen = g.frozen, frozen
	close(g.changed)
	g.changed = make(chan struct{})
	return was
}

func (g *guest) pressButton() {
	if g.program.Reacts && g.pressed.CompareAndSwap(false, true) {
		close(g.button)
	}
}

// may blocks until the program may run (and write) and returns with mu held.
func (g *guest) may() error {
	for {
		g.mu.Lock()
		if g.ctx.Err() != nil {
			g.mu.Unlock()
			return g.ctx.Err()
		}
		if g.running && !g.frozen {
			return nil
		}
		changed := g.changed
		g.mu.Unlock()
		select {
		case <-changed:
		case <-g.ctx.Done():
			return g.ctx.Err()
		}
	}
}

func (g *guest) sleep(d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-g.ctx.Done():
	case <-g.button:
	}
}

// live boots, writes and powers off.
func (g *guest) live() error {
	if err := g.may(); err != nil {
		return err
	}
	g.mu.Unlock()
	if g.first {
		g.sleep(g.program.Boot)
	}
	var ring Ring
	if g.program.Rate > 0 {
		ring.Seed = g.program.Seed
		for _, disk := range g.disks {
			c, err := nbd.Dial(g.ctx, "unix", g.socket, nbd.Options{Export: deviceExport(disk)})
			if err != nil {
				return err
			}
			defer c.Close()
			ring.Disks = append(ring.Disks, c)
		}
	}
	next := uint64(1)
	if len(ring.Disks) > 0 {
		found, err := ring.Read()
		if err != nil {
			return err
		}
		if g.first {
			g.say("boot %d highest=%d records=%d damaged=%d", g.boot, found.Highest, found.Records, found.Damaged)
		}
		next = found.Highest + 1
	} else if g.first {
		g.say("boot %d", g.boot)
	}
	g.up.Store(true)
	for ; g.ctx.Err() == nil; next++ {
		if g.pressed.Load() {
			if err := g.may(); err != nil {
				return err
			}
			g.mu.Unlock()
			g.say("off %d", g.boot)
			for _, c := range ring.Disks {
				c.(*nbd.Client).Close()
			}
			return g.off()
		}
		if len(ring.Disks) == 0 {
			g.sleep(time.Hour)
			continue
		}
		if err := g.may(); err != nil {
			return err
		}
		err := ring.Write(next)
		g.mu.Unlock()
		if err != nil {
			return err
		}
		g.say("ack %d", next)
		g.sleep(time.Duration(float64(time.Second) / g.program.Rate))
	}
	return g.ctx.Err()
}

// Console is what a guest's program has said.
type Console struct {
	// Boots in order.
	Boots []Boot
}

// Boot is one boot and what followed.
type Boot struct {
	// Number of the start, as in PowerEvent.Boot.
	Number int64
	// What the ring held when it booted.
	Found Found
	// Acked is the newest record that was on the disks; 0 = none in this boot.
	Acked uint64
	// Off: it powered off by itself.
	Off bool
	// Errors that ended the program.
	Errors []string
}

// ReadConsole reads a console; one that does not exist yet is empty.
func ReadConsole(path string) (Console, error) {
	var c Console
	b, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return c, nil
	}
	if err != nil {
		return c, err
	}
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseUint(string(f[1]), 10, 64) // an error line has none
		if string(f[0]) == "boot" {
			boot := Boot{Number: int64(n)}
			if len(f) > 2 {
				_, err := fmt.Sscanf(string(bytes.Join(f[2:], []byte(" "))), "highest=%d records=%d damaged=%d", &boot.Found.Highest, &boot.Found.Records, &boot.Found.Damaged)
				if err != nil {
					return c, switchback.Errorf(switchback.CodeCorrupt, "console %s: %q", path, line)
				}
			}
			c.Boots = append(c.Boots, boot)
			continue
		}
		if len(c.Boots) == 0 {
			continue
		}
		last := &c.Boots[len(c.Boots)-1]
		switch string(f[0]) {
		case "ack":
			last.Acked = n
		case "off":
			last.Off = true
		case "error":
			last.Errors = append(last.Errors, string(line))
		}
	}
	return c, nil
}

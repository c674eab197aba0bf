package main

import (
	"bufio"
	"errors"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/switchback-dr/switchback/lab/guest/manifest"
)

// serveControl answers commands on the control port, one after the other:
// "<id> <verb> name=value …" is answered with "<id> ok name=value …" or
// "<id> error <text>".
func (g *guest) serveControl() {
	dev := waitPort("org.switchback.lab.0")
	if dev == "" {
		return
	}
	// The file is opened in blocking mode: the poller does not know such ports.
	fd, err := syscall.Open(dev, syscall.O_RDWR, 0)
	if err != nil {
		say("FAIL control: " + err.Error())
		return
	}
	in := bufio.NewReader(portReader(fd))
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			say("FAIL control: " + err.Error())
			return
		}
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		reply, err := g.obey(f[1], parameters(f[2:]))
		if err != nil {
			reply = f[0] + " error " + err.Error() + "\n"
		} else {
			reply = f[0] + " ok " + reply + "\n"
		}
		if _, err := syscall.Write(fd, []byte(reply)); err != nil {
			say("FAIL control: " + err.Error())
		}
	}
}

// portReader waits out the times when nobody is connected: reads give 0 bytes then.
type portReader int

func (p portReader) Read(b []byte) (int, error) {
	for {
		n, err := syscall.Read(int(p), b)
		if n > 0 {
			return n, nil
		}
		if err != nil && err != syscall.EINTR && err != syscall.EAGAIN {
			return 0, err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

type params map[string]string

func parameters(fields []string) params {
	p := params{}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, "=")
		p[name] = value
	}
	return p
}

func (p params) int(name string, dflt int64) int64 {
	if n, err := strconv.ParseInt(p[name], 10, 64); err == nil {
		return n
	}
	return dflt
}

func (g *guest) obey(verb string, p params) (string, error) {
	switch verb {
	case "ping":
		return "t=" + dec(time.Now().UnixNano()), nil
	case "state":
		seq, errs, hold := g.writer.state()
		return "seq=" + dec(seq) + " errors=" + dec(errs) + " hold=" + strconv.FormatBool(hold), nil
	case "hold":
		g.writer.setHold(true)
		return g.obey("state", nil)
	case "go":
		g.writer.setHold(false)
		return "", nil
	case "pace":
		g.writer.setPace(time.Duration(p.int("us", 0)) * time.Microsecond)
		return "", nil
	case "check":
		if err := dropCaches(); err != nil {
			return "", err
		}
		n, err := g.check(p.int("bytes", 64<<20))
		return "bytes=" + dec(n), err
	case "dirty":
		return dirty(p)
	case "lat":
		return latency(p)
	case "read":
		return read(p)
	case "poweroff":
		go g.powerOff("command")
		return "", nil
	}
	return "", errors.New("unknown command " + verb)
}

type random uint64

func (r *random) next() uint64 {
	x := uint64(*r)
	x ^= x << 13
	x ^= x >> 7
	x ^= x << 17
	*r = random(x)
	return x
}

// fill makes seeded content. Compressible content repeats a short text in its
// second half, as real data does.
func (r *random) fill(b []byte, compressible bool) {
	n := len(b)
	if compressible {
		n /= 2
		for i := n; i < len(b); i++ {
			b[i] = "switchback lab data "[i%20]
		}
	}
	for i := 0; i+8 <= n; i += 8 {
		x := r.next()
		b[i], b[i+1], b[i+2], b[i+3] = byte(x), byte(x>>8), byte(x>>16), byte(x>>24)
		b[i+4], b[i+5], b[i+6], b[i+7] = byte(x>>32), byte(x>>40), byte(x>>48), byte(x>>56)
	}
}

// dirty writes bytes of new content within [offset, offset+span): a third in
// random 4 KiB, a third in random 64 KiB, the rest in sequential 1 MiB pieces, or
// only one of these.
func dirty(p params) (string, error) {
	path, err := waitDevice(p["disk"])
	if err != nil {
		return "", err
	}
	// Through the cache: the kernel then keeps many requests in flight, which is
	// ten times faster than one after the other.
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	begin := time.Now()
	total, offset, span := p.int("bytes", 1<<20), p.int("offset", 0), p.int("span", 0)
	if span < 1<<20 || total < 0 {
		return "", errors.New("span must be at least 1 MiB")
	}
	r := random(uint64(p.int("seed", 1))*0x9e3779b97f4a7c15 | 1)
	r.next()
	buf := alignedBuffer(1 << 20)
	defer syscall.Munmap(buf)
	var done int64
	write := func(b []byte, at int64) error {
		r.fill(b, p["fill"] != "random")
		_, err := f.WriteAt(b, offset+at)
		done += int64(len(b))
		return err
	}
	scatter := func(size, upTo int64) error {
		for done < upTo {
			if err := write(buf[:size], int64(r.next()%uint64(span/size))*size); err != nil {
				return err
			}
		}
		return nil
	}
	sequential := func() error {
		at := int64(r.next()%uint64(span>>20)) << 20
		for done < total {
			n := min(total-done, 1<<20)
			if err := write(buf[:(n+4095)&^4095], at); err != nil {
				return err
			}
			if at += 1 << 20; at+1<<20 > span {
				at = 0
			}
		}
		return nil
	}
	switch p["mix"] {
	case "rand4k":
		err = scatter(4<<10, total)
	case "rand64k":
		err = scatter(64<<10, total)
	case "seq1m":
		err = sequential()
	case "mixed", "":
		if err = scatter(4<<10, total/3); err == nil {
			if err = scatter(64<<10, 2*total/3); err == nil {
				err = sequential()
			}
		}
	default:
		return "", errors.New("unknown mix " + p["mix"])
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		say("EIO dirty disk=" + p["disk"] + " errno=" + errno(err))
		return "", err
	}
	return "bytes=" + dec(done) + " ms=" + dec(time.Since(begin).Milliseconds()), nil
}

// latency times n random 4 KiB writes, each durable before the next.
func latency(p params) (string, error) {
	f, err := openDirect(p["disk"], syscall.O_DSYNC)
	if err != nil {
		return "", err
	}
	defer f.Close()
	n, offset, span := p.int("n", 1000), p.int("offset", 0), p.int("span", 64<<20)
	if n < 1 || span < 4096 {
		return "", errors.New("n must be at least 1 and span 4096")
	}
	r := random(uint64(time.Now().UnixNano()) | 1)
	buf := alignedBuffer(4 << 10)
	defer syscall.Munmap(buf)
	r.fill(buf, false)
	took := make([]int64, n)
	for i := range took {
		buf[0]++
		at := offset + int64(r.next()%uint64(span/4096))*4096
		begin := time.Now()
		if _, err := f.WriteAt(buf, at); err != nil {
			say("EIO lat disk=" + p["disk"] + " errno=" + errno(err))
			return "", err
		}
		took[i] = time.Since(begin).Microseconds()
	}
	slices.Sort(took)
	at := func(per1000 int64) string { return dec(took[min(n-1, n*per1000/1000)]) }
	return "n=" + dec(n) + " p50_us=" + at(500) + " p90_us=" + at(900) + " p99_us=" + at(990) + " max_us=" + at(1000), nil
}

// read reads a range past all caches of the guest.
func read(p params) (string, error) {
	f, err := openDirect(p["disk"], 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	begin := time.Now()
	offset, total, chunk := p.int("offset", 0), p.int("bytes", 1<<20), p.int("chunk", 1<<20)
	if chunk < 512 || chunk > 1<<20 {
		return "", errors.New("chunk must be 512 to 1 MiB")
	}
	buf := alignedBuffer(int(chunk))
	defer syscall.Munmap(buf)
	h := manifest.NewHash()
	var done int64
	for done < total {
		n, err := f.ReadAt(buf[:min(chunk, total-done)], offset+done)
		h.Write(buf[:n])
		done += int64(n)
		if err == io.EOF {
			break
		} else if err != nil {
			say("EIO read disk=" + p["disk"] + " offset=" + dec(offset+done) + " errno=" + errno(err))
			return "", err
		}
	}
	return "bytes=" + dec(done) + " sum=" + strconv.FormatUint(h.Sum(), 16) + " ms=" + dec(time.Since(begin).Milliseconds()), nil
}

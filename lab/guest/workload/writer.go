package main

import (
	"encoding/hex"
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/switchback-dr/switchback/lab/guest/record"
)

// ackEvery bounds how long a durable record may go unacknowledged.
const ackEvery = 20 * time.Millisecond

// writer writes records strictly one after the other, each durable before the
// next is issued, until the power goes.
type writer struct {
	g       *guest
	fds     []int
	mu      sync.Mutex
	turn    *sync.Cond // signalled when hold or pace changes
	hold    bool
	pace    time.Duration
	durable uint64 // the newest durable record
	acked   uint64 // the newest that was printed
	errors  uint64
	leaving bool // the power goes: errors are nobody's fault
}

func (w *writer) init() { w.turn = sync.NewCond(&w.mu) }

// open finds the highest valid record on the disks; writing goes on after it.
func (w *writer) open(g *guest) error {
	w.g = g
	buf := alignedBuffer(1 << 20)
	best := record.Header{}
	for _, name := range g.opt.records {
		path, err := waitDevice(name)
		if err != nil {
			return err
		}
		fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_DIRECT|syscall.O_DSYNC, 0)
		if err != nil {
			return errors.New("open " + path + ": " + err.Error())
		}
		w.fds = append(w.fds, fd)
		for at := int64(0); at < g.opt.slots*record.Size; {
			n, err := syscall.Pread(fd, buf[:min(int64(len(buf)), g.opt.slots*record.Size-at)], g.opt.offset+at)
			if err != nil || n < record.Size {
				say("EIO read seq=0 disk=" + name + " errno=" + errno(err))
				time.Sleep(200 * time.Millisecond)
				continue
			}
			for b := buf[:n]; len(b) >= record.Size; b = b[record.Size:] {
				if h, ok := record.Peek(b); ok && h.Seq > best.Seq && record.Valid(b) {
					best = h
				}
			}
			at += int64(n)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hold, w.pace = g.opt.hold, g.opt.pace
	w.durable, w.acked = best.Seq, best.Seq
	say("RESUME seq=" + dec(best.Seq) + " boot=" + hex.EncodeToString(best.Boot[:]))
	return nil
}

func (w *writer) run() {
	buf := alignedBuffer(record.Size)
	h := record.Header{Boot: w.g.boot, VM: w.g.vm, Disks: uint16(len(w.fds)), Slots: uint32(w.g.opt.slots)}
	lastAck := time.Now()
	for {
		w.mu.Lock()
		for w.hold {
			w.ackLocked()
			w.turn.Wait()
		}
		pace, seq := w.pace, w.durable+1
		w.mu.Unlock()

		now := time.Now()
		h.Seq, h.TimeNanos = seq, uint64(now.UnixNano())
		h.Disk = uint16(seq % uint64(len(w.fds)))
		h.Encode(buf)
		at := w.g.opt.offset + int64(h.Slot())*record.Size
		n, err := syscall.Pwrite(w.fds[h.Disk], buf, at)

		w.mu.Lock()
		if err != nil || n != record.Size {
			if w.leaving {
				w.mu.Unlock()
				return
			}
			w.errors++
			w.mu.Unlock()
			say("EIO write seq=" + dec(seq) + " disk=" + w.g.opt.records[h.Disk] + " errno=" + errno(err))
			time.Sleep(200 * time.Millisecond)
			continue
		}
		w.durable = seq
		if now = time.Now(); now.Sub(lastAck) >= ackEvery {
			w.ackLocked()
			lastAck = now
		}
		w.mu.Unlock()
		if pace > 0 {
			time.Sleep(pace)
		}
	}
}

// ackLocked prints that all records up to the newest are durable.
func (w *writer) ackLocked() {
	if w.durable > w.acked {
		say("ACK " + dec(w.acked+1) + "-" + dec(w.durable))
		w.acked = w.durable
	}
}

func (w *writer) setHold(hold bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.hold = hold
	if hold {
		w.ackLocked()
	}
	w.turn.Broadcast()
}

// leave makes the next failed write the end of the writer, in silence.
func (w *writer) leave() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.leaving = true
}

func (w *writer) setPace(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pace = d
}

func (w *writer) state() (durable, errs uint64, hold bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.durable, w.errors, w.hold
}

// alignedBuffer is memory that O_DIRECT takes.
func alignedBuffer(n int) []byte {
	b, err := syscall.Mmap(-1, 0, n, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		say("FAIL memory: " + err.Error())
		return make([]byte, n)
	}
	return b
}

func openDirect(disk string, flags int) (*os.File, error) {
	path, err := waitDevice(disk)
	if err != nil {
		return nil, err
	}
	return os.OpenFile(path, os.O_RDWR|syscall.O_DIRECT|flags, 0)
}

package main

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// lines keeps lines of several goroutines apart.
var lines sync.Mutex

// say prints one line with the guest's clock and time since the kernel started:
// "SB <text> t=<unix ns> up=<ms>". The leading newline ends whatever a kernel
// message or a cut at power-off left on the line before.
func say(text string) {
	lines.Lock()
	defer lines.Unlock()
	os.Stdout.WriteString("\nSB " + text + " t=" + dec(time.Now().UnixNano()) + " up=" + dec(uptime().Milliseconds()) + "\n")
}

// drain blocks until the console has sent what was written to it.
func drain() { ioctl(os.Stdout.Fd(), 0x5409 /* TCSBRK */, 1) }

func ioctl(fd, req, arg uintptr) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, req, arg); errno != 0 {
		return errno
	}
	return nil
}

func uptime() time.Duration {
	var ts syscall.Timespec
	const bootTime = 7
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, bootTime, uintptr(unsafe.Pointer(&ts)), 0)
	return time.Duration(ts.Nano())
}

func dec[T int | int64 | uint16 | uint32 | uint64](n T) string {
	return strconv.FormatInt(int64(n), 10)
}

func readLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// errno prints an error as its number, for lines that programs read.
func errno(err error) string {
	for err != nil {
		if n, ok := err.(syscall.Errno); ok {
			return dec(int(n))
		}
		u, ok := err.(interface{ Unwrap() error })
		if !ok {
			break
		}
		err = u.Unwrap()
	}
	return "?"
}

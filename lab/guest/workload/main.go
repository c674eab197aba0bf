// Command workload is the whole user space of a lab guest: it is /init of the
// initrd. It mounts and checks the data disk, writes records (package record),
// obeys a control port and powers off in good order. Everything of interest is
// said on the console in lines that package lab/guest documents.
//
// Its size and its start count, since processors are mostly emulated: no fmt, no
// collector, no shell on the way up.
//
// Called under the name "shutdown" (by the QEMU guest agent) it asks process 1
// to power off.
package main

import (
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
)

func main() {
	if filepath.Base(os.Args[0]) == "shutdown" {
		if err := syscall.Kill(1, syscall.SIGUSR1); err != nil {
			os.Exit(1)
		}
		return
	}
	if os.Getpid() != 1 {
		os.Stderr.WriteString("workload: runs as /init of a lab guest only\n")
		os.Exit(2)
	}
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(64 << 20)

	g, err := boot()
	if err != nil {
		say("FAIL " + err.Error())
	}
	agent := make(chan os.Signal, 1)
	signal.Notify(agent, syscall.SIGUSR1)
	go reap()
	go g.watchPowerButton()
	go g.serveControl()
	g.startAgent()
	go g.run()
	<-agent
	g.powerOff("agent")
}

// run is the guest's service: check what is on the disk, then write to it.
func (g *guest) run() {
	if g.opt.fs != "" {
		if err := g.mount(g.opt.fs); err != nil {
			say("FAIL mount " + g.opt.fs + ": " + err.Error())
		} else if g.opt.check > 0 {
			g.check(g.opt.check)
		}
	}
	if len(g.opt.records) > 0 {
		if err := g.writer.open(g); err != nil {
			say("FAIL writer: " + err.Error())
			return
		}
		g.writer.run()
	}
}

// reap collects processes that were left to process 1.
func reap() {
	child := make(chan os.Signal, 8)
	signal.Notify(child, syscall.SIGCHLD)
	for range child {
		for {
			var ws syscall.WaitStatus
			if pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

package main

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// watchPowerButton powers off when the machine's ACPI button is pressed.
func (g *guest) watchPowerButton() {
	seen := map[string]bool{}
	for range 100 { // the button's device appears a little after its module
		devs, _ := filepath.Glob("/dev/input/event*")
		for _, d := range devs {
			if !seen[d] {
				seen[d] = true
				go g.watchInput(d)
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (g *guest) watchInput(dev string) {
	f, err := os.Open(dev)
	if err != nil {
		return
	}
	defer f.Close()
	const evKey, keyPower = 1, 116
	ev := make([]byte, 24) // struct input_event: 16 bytes of time, type, code, value
	for {
		if n, err := f.Read(ev); err != nil || n != len(ev) {
			return
		}
		if binary.LittleEndian.Uint16(ev[16:]) == evKey && binary.LittleEndian.Uint16(ev[18:]) == keyPower && ev[20] == 1 {
			g.powerOff("button")
		}
	}
}

// powerOff leaves the file system clean and turns the machine off. The writer is
// not told: it writes until the power goes.
func (g *guest) powerOff(cause string) {
	<-g.off
	say("SHUTDOWN cause=" + cause)
	if err := syscall.Unmount(mountPoint, 0); err != nil {
		syscall.Mount("", mountPoint, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
	}
	seq, errs, _ := g.writer.state()
	say("POWEROFF seq=" + dec(seq) + " errors=" + dec(errs) + " cause=" + cause)
	drain()
	// From here on the kernel takes the disks away: what fails now fails by design.
	g.writer.leave()
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
}

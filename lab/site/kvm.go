package site

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

const (
	emulator = "/usr/bin/qemu-system-x86_64"
	// probeLoops takes about 50 ms where the processor runs guest code. Where
	// KVM opens but interprets each instruction (seen on nested machines: 1.3 µs
	// each) it would take two minutes.
	probeLoops = 50_000_000
	probeLimit = 3 * time.Second
)

// KVMWorks starts a tiny guest under KVM and reports whether it ran at native
// speed. That /dev/kvm exists, opens, or even runs a few instructions says
// nothing: some machines have a KVM that interprets every one of them. It takes
// 0.2 s where KVM works and at most 3 s.
func KVMWorks(ctx context.Context) bool {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return false
	} else {
		f.Close()
	}
	ok, err := probe(ctx, "kvm", probeLoops)
	return err == nil && ok
}

// probe runs a ROM that counts down and then leaves QEMU through the
// isa-debug-exit device with a status nothing else produces.
func probe(ctx context.Context, accel string, loops uint32) (bool, error) {
	const magic = 0x2a
	dir, err := os.MkdirTemp("", "switchback-kvm-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	rom := filepath.Join(dir, "rom")
	if err := os.WriteFile(rom, probeROM(loops, magic), 0o600); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, emulator, "-accel", accel, "-machine", "pc", "-m", "4", "-nodefaults",
		"-display", "none", "-no-reboot", "-bios", rom, "-device", "isa-debug-exit,iobase=0xf4,iosize=4")
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode() == magic<<1|1, nil
	}
	return false, fmt.Errorf("run %s: %w", emulator, err)
}

// probeROM is a 64 KiB BIOS: the reset vector at FFF0 jumps to FF00, where
// `mov ecx,loops; dec ecx; jnz -4; mov al,magic; out 0xf4,al; hlt` lies.
func probeROM(loops uint32, magic byte) []byte {
	rom := make([]byte, 64<<10)
	code := append(rom[0xff00:0xff00], 0x66, 0xb9)
	code = binary.LittleEndian.AppendUint32(code, loops)
	_ = append(code, 0x66, 0x49, 0x75, 0xfc, 0xb0, magic, 0xe6, 0xf4, 0xf4)
	back := int16(-0xf3) // from FFF3, after the jump, to FF00
	copy(rom[0xfff0:], []byte{0xe9, byte(back), byte(uint16(back) >> 8)})
	return rom
}

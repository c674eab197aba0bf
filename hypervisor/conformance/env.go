// Package conformance judges implementations of hypervisor.Hypervisor: the
// real one and the simulated one must pass the same suite. It knows nothing of
// QEMU or libvirt; what it needs beside the interface, a way to make virtual
// machines and to write in their guests, comes from an Env.
package conformance

import (
	"testing"

	switchback "github.com/switchback-dr/switchback"
)

// DiskBytes is the virtual size of every disk of the suite's machines.
const DiskBytes = 8 << 20

// Granularity is the coarsest unit in which changes may be reported. The suite
// writes whole units, so that it can tell exactly what must be dirty.
const Granularity = 64 << 10

// Network is the network of the suite's machines, where they have one.
const Network = "conformance-net"

// VM is a machine to make.
type VM struct {
	// Disks by target name, in order, each DiskBytes large and empty. Empty: one, "vda".
	Disks []string
	// Backed puts each disk on an overlay above a base image.
	Backed bool
	// Reacts asks for a guest that powers off when it is asked to; else the
	// guest must ignore the request.
	Reacts bool
	// Network connects the machine to Network. It is never started then.
	Network bool
}

// Env is what the suite needs of a platform. Functions report their own
// failures through t and clean up after themselves with t.Cleanup.
type Env struct {
	// NewVM defines a machine and leaves it off.
	NewVM func(t testing.TB, vm VM) switchback.VMUUID
	// Write writes length bytes of the pattern as the guest would, durably. The
	// domain has a process, running or paused. off and length are multiples of
	// Granularity, or for a hypervisor.FineTracker of its unit.
	Write func(t testing.TB, uuid switchback.VMUUID, disk string, off, length int64, pattern byte)
	// Boot returns when a machine that Reacts is ready to do so.
	Boot func(t testing.TB, uuid switchback.VMUUID)
	// Kill ends the domain as a crash of its host would: dirty bitmaps are lost.
	Kill func(t testing.TB, uuid switchback.VMUUID)
	// NewImage makes an empty image of DiskBytes in the format that can be
	// protected, above a backing image unless that is "", and returns its path.
	NewImage func(t testing.TB, backing string) string
	// Path returns a new path at which the platform can make a socket or file.
	Path func(t testing.TB) string
	// Export connects to one disk of an open backup job. metaContext is "" for
	// none. The suite closes it.
	Export func(t testing.TB, socket, disk, metaContext string) Export
}

// Export is one disk of an open backup job.
type Export interface {
	Size() int64
	ReadAt(p []byte, off int64) (int, error)
	// Dirty returns what the meta context marks, in order, not overlapping.
	Dirty() ([]Range, error)
	Close() error
}

// Range is a range of bytes.
type Range struct{ Offset, Length int64 }

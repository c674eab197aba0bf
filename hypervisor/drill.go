package hypervisor

import (
	"context"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Network is a virtual network of the platform.
type Network struct {
	Name   string `json:"name"`
	Active bool   `json:"active"`
	// Forward is how the network reaches beyond its own machines: "nat",
	// "route", "bridge", "open" …; "" = not at all.
	Forward string `json:"forward,omitempty"`
	// Bridge is the host's bridge device of the network; "" where it has none.
	Bridge string `json:"bridge,omitempty"`
	// Devices are host devices that the network forwards to.
	Devices []string `json:"devices,omitempty"`
}

// Isolation is what changes in a definition so that a copy of the VM can run
// beside the VM itself: in nothing that it writes to or answers as may it be
// taken for the original.
type Isolation struct {
	Name string
	UUID switchback.VMUUID
	// Disks by target device name. Disks not named here are left out.
	Disks map[string]DiskSource
	// Networks by the name used in the definition; Network is for all others.
	// An interface for which there is neither is left out.
	Networks map[string]string
	Network  string
	// KeepMACs leaves MAC addresses as they are.
	KeepMACs bool
	// ConsoleLog is the file that receives what the guest says on its first serial port.
	ConsoleLog string
}

// ExecResult is how a command in a guest ended.
type ExecResult struct {
	ExitCode int    `json:"exit_code"`
	Output   string `json:"output"` // standard output, then standard error
}

// Inspector is implemented by a Hypervisor that can look into guests and run
// copies of them: what guest checks and drills need. The errors are those of
// the package comment.
type Inspector interface {
	// Isolate rewrites a definition for a copy. Pure: touches nothing. notes
	// says what was left out or replaced.
	Isolate(definition string, i Isolation) (copied string, notes []string, err error)
	// Networks lists the platform's virtual networks.
	Networks(ctx context.Context) ([]Network, error)
	// Screenshot takes a picture of the first screen, in the format that mime
	// names. CodeUnsupported: the domain has no screen.
	Screenshot(ctx context.Context, uuid switchback.VMUUID) (mime string, picture []byte, err error)
	// GuestExec runs a command through the guest agent and waits for its end.
	// An exit status is no error. CodeUnavailable: the agent does not answer;
	// CodeTimeout: the command did not end in time and goes on.
	GuestExec(ctx context.Context, uuid switchback.VMUUID, command []string, timeout time.Duration) (ExecResult, error)
	// ConsoleLog names the file that receives the console of the domain that a
	// definition describes. CodeUnsupported: it goes to no file.
	ConsoleLog(definition string) (path string, err error)
}

// Package hypervisor is what Switchback asks of a virtualisation platform. An
// implementation drives one host (or one cluster seen as one); it holds no
// state of its own that a restart would lose, and every method may be called
// from several goroutines. Methods block until the effect is done, honour
// their context, and return *switchback.Error:
//
//	CodeNotFound     the domain, checkpoint or job does not exist
//	CodeConflict     the domain is in another state than the call needs, or a job is in the way
//	CodeBitmapLost   the checkpoint's dirty bitmap is missing or inconsistent
//	CodeUnsupported  the platform or disk cannot do this
//	CodeUnavailable  the platform does not answer
//	CodeTimeout      a deadline passed
//
// Every implementation passes the suite in package hypervisor/conformance.
package hypervisor

import (
	"context"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// State is the power state of a domain.
type State string

const (
	StateRunning State = "running"
	StatePaused  State = "paused"
	StateOff     State = "off"
	// StateOther: in transition, crashed, suspended by the guest.
	StateOther State = "other"
)

// PauseReason says why a paused domain is paused.
type PauseReason string

const (
	PauseUser    PauseReason = "user"
	PauseIOError PauseReason = "io-error"
	PauseOther   PauseReason = "other"
)

// Host describes the platform.
type Host struct {
	Name       string `json:"name"`
	Hypervisor string `json:"hypervisor"` // e.g. "QEMU 7.2.22, libvirt 9.0.0"
	UUID       string `json:"uuid"`
	MemoryMiB  int64  `json:"memory_mib"`
	CPUs       int    `json:"cpus"`
}

// AgentChannel is the state of a guest agent's channel; "" = the domain has none,
// or does not run.
type AgentChannel string

const (
	AgentConnected    AgentChannel = "connected"
	AgentDisconnected AgentChannel = "disconnected"
)

// Domain is one VM as the platform knows it.
type Domain struct {
	Name        string            `json:"name"`
	UUID        switchback.VMUUID `json:"uuid"`
	State       State             `json:"state"`
	PauseReason PauseReason       `json:"pause_reason,omitempty"`
	Persistent  bool              `json:"persistent"`
	Autostart   bool              `json:"autostart"`
	MemoryMiB   int64             `json:"memory_mib"`
	CPUs        int               `json:"cpus"`
	// Disks lists every disk device in definition order, CD-ROMs and floppies
	// included. The live configuration counts where the domain runs.
	Disks []Disk `json:"disks"`
	// Networks are the distinct source networks or bridges of its interfaces.
	Networks []string `json:"networks"`
	// GuestAgent says how the channel of the guest agent of a running domain stands.
	GuestAgent AgentChannel `json:"guest_agent,omitempty"`
}

// Disk is one disk device of a domain.
type Disk struct {
	switchback.Disk
	Device   string `json:"device"` // "disk", "cdrom", "floppy", "lun"
	ReadOnly bool   `json:"read_only"`
	Shared   bool   `json:"shared"`
	// Unsupported is empty for a disk that can be protected, else the reason
	// (passthrough, shareable, raw without bitmap support, network source …).
	// CD-ROMs and floppies are "not a disk".
	Unsupported string `json:"unsupported,omitempty"`
	// Backing lists the image's backing chain from the live (or inactive)
	// definition, nearest first; empty for a plain disk.
	Backing []string `json:"backing,omitempty"`
}

// ShutdownOptions govern Shutdown.
type ShutdownOptions struct {
	// Deadline is how long the guest may take; required.
	Deadline time.Duration
	// Force pulls the plug when the deadline has passed. Without it Shutdown
	// returns CodeTimeout and leaves the guest running.
	Force bool
}

// BackupDisk is one disk of a backup job.
type BackupDisk struct {
	Name string // target device, e.g. "vda"
	// Scratch is the file that keeps the old content of blocks the guest
	// overwrites while the job is open: an empty image of the disk's size that
	// the caller has made for this job, and removes after it.
	Scratch string
	// Incremental is the checkpoint from which changes are exposed; "" = no
	// bitmap, the whole disk is new.
	Incremental string
}

// BackupSpec describes a pull-mode backup job. All disks share one instant.
type BackupSpec struct {
	// Socket is the unix socket on which the platform serves NBD. Export names
	// are the disk names; the dirty bitmap's meta context of an incremental
	// disk is "qemu:dirty-bitmap:backup-" followed by the disk name.
	Socket string
	// Checkpoint is created at the same instant; "" = none.
	Checkpoint string
	Disks      []BackupDisk
}

// Checkpoint is a named instant from which the platform records changes.
type Checkpoint struct {
	Name   string    `json:"name"`
	Parent string    `json:"parent,omitempty"`
	Time   time.Time `json:"time"`
	Disks  []string  `json:"disks"`
}

// CopyTarget is where BlockCopy moves a disk: an existing image file made for
// the purpose, and the plain file it is backed by ("" = none).
type CopyTarget struct {
	Path          string
	Format        string
	Backing       string
	BackingFormat string
	// Shallow copies only the top layer of the source chain.
	Shallow bool
}

// JobProgress is the state of a block job; Ready means it can be pivoted.
type JobProgress struct {
	Current, Total int64
	Ready          bool
}

// Event is something that happened to a domain without us asking.
type Event struct {
	UUID switchback.VMUUID
	Name string
	Kind EventKind
	// Time is when the driver received it.
	Time time.Time
	// Detail is the platform's own word for the cause, for logs.
	Detail string
	// Disk is set for EventIOError.
	Disk string
}

// EventKind classifies events.
type EventKind string

const (
	EventStarted   EventKind = "started"
	EventStopped   EventKind = "stopped"
	EventSuspended EventKind = "suspended"
	EventResumed   EventKind = "resumed"
	EventDefined   EventKind = "defined"
	EventUndefined EventKind = "undefined"
	// EventIOError: a disk error paused the guest or was reported to it.
	EventIOError EventKind = "io-error"
	// EventLost: the connection to the platform was lost and is made anew;
	// events in between are missing, look again.
	EventLost EventKind = "lost"
)

// DiskSource is where a disk's content comes from in a translated definition:
// a local image, optionally backed by an NBD export on a unix socket.
type DiskSource struct {
	Path   string
	Format string
	// BackingSocket and BackingExport name a read-only raw NBD backing; both
	// empty = the image stands alone.
	BackingSocket string
	BackingExport string
}

// Translation is what changes in a definition when a VM moves between sites.
// Everything not named here survives unchanged, unknown elements too.
type Translation struct {
	// Disks by target device name. Disks not named keep their source.
	Disks map[string]DiskSource
	// Networks by the name used at the site the definition comes from.
	Networks map[string]string
	// Emulator replaces the emulator path; "" keeps it.
	Emulator string
}

// Hypervisor drives one platform. See the package comment for what holds for
// all methods. A domain is always named by UUID.
type Hypervisor interface {
	Host(ctx context.Context) (Host, error)
	Domains(ctx context.Context) ([]Domain, error)
	Domain(ctx context.Context, uuid switchback.VMUUID) (Domain, error)
	// Definition returns the full description, secrets included: the
	// inactive (persistent) one, or the live one when live is true.
	Definition(ctx context.Context, uuid switchback.VMUUID, live bool) (string, error)
	// Define makes or replaces a persistent domain. Idempotent.
	Define(ctx context.Context, definition string) (Domain, error)
	// Undefine removes the persistent definition with checkpoint metadata,
	// snapshots' metadata, managed save and NVRAM. A missing domain is no error.
	Undefine(ctx context.Context, uuid switchback.VMUUID) error
	// Translate rewrites a definition for another site. Pure: touches nothing.
	Translate(definition string, t Translation) (string, error)

	// Start starts a defined domain, paused if asked. Already running: CodeConflict.
	Start(ctx context.Context, uuid switchback.VMUUID, paused bool) error
	// Resume lets a paused domain run. One that runs is no error; one that is off: CodeConflict.
	Resume(ctx context.Context, uuid switchback.VMUUID) error
	// Suspend pauses a domain. One that is paused is no error; one that is off: CodeConflict.
	Suspend(ctx context.Context, uuid switchback.VMUUID) error
	// Shutdown asks the guest to power off and waits until it is off. A domain
	// that is off already is no error. on_poweroff=restart is overridden. The
	// guest of a paused domain cannot react: CodeConflict, or with Force the
	// plug is pulled at once.
	Shutdown(ctx context.Context, uuid switchback.VMUUID, o ShutdownOptions) error
	// Destroy pulls the plug. A domain that is off is no error. Bitmaps are kept.
	Destroy(ctx context.Context, uuid switchback.VMUUID) error
	SetAutostart(ctx context.Context, uuid switchback.VMUUID, on bool) error
	// AgentPing reports whether the guest agent answers within the timeout.
	AgentPing(ctx context.Context, uuid switchback.VMUUID, timeout time.Duration) error

	// BeginBackup opens a pull-mode job; its socket answers when it returns. A
	// job in the way, a domain that is off, a checkpoint that exists: CodeConflict.
	// After CodeTimeout or CodeCancelled the job may still come to be: EndBackup.
	BeginBackup(ctx context.Context, uuid switchback.VMUUID, spec BackupSpec) error
	// EndBackup ends whatever backup job the domain has and waits until it is gone. No job is no error.
	EndBackup(ctx context.Context, uuid switchback.VMUUID) error
	// HasBackup reports whether a backup job is open (e.g. left by a dead agent).
	HasBackup(ctx context.Context, uuid switchback.VMUUID) (bool, error)
	// CreateCheckpoint starts recording from now on all named disks. Needs a live domain.
	CreateCheckpoint(ctx context.Context, uuid switchback.VMUUID, name string, disks []string) error
	// Checkpoints lists them, parents before children.
	Checkpoints(ctx context.Context, uuid switchback.VMUUID) ([]Checkpoint, error)
	// DeleteCheckpoint drops one; its changes merge into its parent. Where the
	// bitmap is gone or the domain is off, only the metadata goes (the caller
	// removes bitmaps of a domain at rest from the image). Missing is no error.
	DeleteCheckpoint(ctx context.Context, uuid switchback.VMUUID, name string) error

	// BlockCopy starts copying a disk to the target, following its writes.
	BlockCopy(ctx context.Context, uuid switchback.VMUUID, disk string, to CopyTarget) error
	// BlockCommit starts merging the disk's active layer into its backing image.
	BlockCommit(ctx context.Context, uuid switchback.VMUUID, disk string) error
	// BlockJob returns the running job's progress; CodeNotFound when there is none.
	BlockJob(ctx context.Context, uuid switchback.VMUUID, disk string) (JobProgress, error)
	// BlockPivot ends a ready job by switching the domain to its target, and waits.
	BlockPivot(ctx context.Context, uuid switchback.VMUUID, disk string) error
	// BlockAbort ends a job and leaves the domain on its present disk. No job is no error.
	BlockAbort(ctx context.Context, uuid switchback.VMUUID, disk string) error

	// Events delivers events until ctx ends; the channel is then closed. A slow
	// reader loses none of the last 1024; where older ones were dropped, EventLost
	// stands in their place.
	Events(ctx context.Context) (<-chan Event, error)
	Close() error
}

// Freezer is implemented by a Hypervisor that can make application-consistent
// points: it brings a guest's file systems to rest around BeginBackup.
type Freezer interface {
	// Freeze flushes the guest's file systems and holds their writes until
	// Thaw. CodeUnsupported: no guest agent; CodeUnavailable: it does not
	// answer. After any error the caller thaws, too: some may be frozen.
	Freeze(ctx context.Context, uuid switchback.VMUUID) error
	// Thaw lets writes go on. File systems that are not frozen are no error.
	Thaw(ctx context.Context, uuid switchback.VMUUID) error
}

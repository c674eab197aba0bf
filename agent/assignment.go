package agent

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/internal/durable"
)

// Assignment is what an agent durably knows of one protected VM.
type Assignment struct {
	Protection switchback.ProtectionID `json:"protection"`
	VM         switchback.VMUUID       `json:"vm"`
	Name       string                  `json:"name"`
	// Epoch is the newest this agent has heard of; commands with an older one are refused.
	Epoch  switchback.Epoch  `json:"epoch"`
	Role   agentapi.Role     `json:"role"`
	Peer   agentapi.Peer     `json:"peer"`
	Policy switchback.Policy `json:"policy"`
	// Held: a source takes no points for now.
	Held bool `json:"held,omitempty"`
	// Disks at this site: of the domain, or of the replica's bases.
	Disks []switchback.Disk `json:"disks"`
	// Dir is this VM's directory in the site's storage.
	Dir string `json:"dir,omitempty"`
	// ReplicaDir is the open replica; empty when none is kept here.
	ReplicaDir string `json:"replica_dir,omitempty"`
	// BaseCheckpoint is the source's checkpoint that continues from a base of
	// kept disks, for which there is no point.
	BaseCheckpoint string `json:"base_checkpoint,omitempty"`
	// Session names the base while it is being seeded.
	Session string `json:"session,omitempty"`
	// MustSend is what the first point has to carry beside the bitmaps.
	MustSend map[string]extent.Set `json:"must_send,omitempty"`
	// Run is what an uncommitted VM runs on.
	Run *Run `json:"run,omitempty"`
	// Drills are copies of points that run here, or left something.
	Drills []Drill `json:"drills,omitempty"`
	// Change is set while the run is being replaced by another.
	Change *Change `json:"change,omitempty"`
	// Snapshots are what abandoned runs wrote.
	Snapshots []Snapshot `json:"snapshots,omitempty"`
	// Kept are points that a commit has kept.
	Kept *KeptPoints `json:"kept,omitempty"`
	// Rest is the state of the disks here when the VM left.
	Rest *Rest `json:"rest,omitempty"`
	// ShutdownUntil is set while the guest has been asked to power off: until
	// when it may take to do so.
	ShutdownUntil time.Time `json:"shutdown_until,omitzero"`
	// Autostart: the VM is to start with its host. The agent does that, once it is
	// granted: libvirt's own flag is off while the VM is protected.
	Autostart bool `json:"autostart,omitempty"`
	// Heard, Leaving and Takeover are package fencing's.
	Heard    fencing.Ruling    `json:"heard,omitzero"`
	Leaving  bool              `json:"leaving,omitempty"`
	Takeover *fencing.Takeover `json:"takeover,omitempty"`
	// Override is set while the VM is contested.
	Override *Override `json:"override,omitempty"`
}

// Run is an uncommitted VM on overlays over a view.
type Run struct {
	Epoch      switchback.Epoch    `json:"epoch"`
	Sequence   switchback.Sequence `json:"sequence"`
	Socket     string              `json:"socket"`
	Pin        string              `json:"pin"`
	Overlays   map[string]string   `json:"overlays"`
	Checkpoint string              `json:"checkpoint"`
	// Previous is the definition of this UUID that stood here before; empty when there was none.
	Previous string `json:"previous,omitempty"`
	// ConsoleFrom is where in the console's log this run begins.
	ConsoleFrom int64 `json:"console_from,omitempty"`
	// Definition is what the VM is defined from, where the run follows another;
	// SetAside the snapshot that the other has become, and OffAt when its guest was off.
	Definition string    `json:"definition,omitempty"`
	SetAside   string    `json:"set_aside,omitempty"`
	OffAt      time.Time `json:"off_at,omitzero"`
	// Snapshot names the kept writes that the run goes on from. What they had
	// changed is Written: the run's checkpoint does not know of it.
	Snapshot string                `json:"snapshot,omitempty"`
	Written  map[string]extent.Set `json:"written,omitempty"`
	// Started is set once the guest was let run.
	Started   bool      `json:"started"`
	StartedAt time.Time `json:"started_at,omitzero"`
	// Viewless is set at commit when nothing reads the view any more.
	Viewless bool `json:"viewless,omitempty"`
	// CopiedBytes counts what collapse has moved, per disk.
	CopiedBytes map[string]int64 `json:"copied_bytes,omitempty"`
	Folded      bool             `json:"folded,omitempty"`
	// Abandoned is what the points after Sequence had changed, fixed before they are dropped.
	Abandoned map[string]extent.Set `json:"abandoned,omitempty"`
}

// Rest says what the disks held when the VM left, and how to tell that nobody touched them.
type Rest struct {
	Point switchback.Point        `json:"point"`
	Files map[string]FileIdentity `json:"files"`
	// Distrust says why the disks are not what Point says, once that was found.
	Distrust string `json:"distrust,omitempty"`
}

// FileIdentity changes when a file is written or replaced.
type FileIdentity struct {
	Inode     uint64 `json:"inode"`
	SizeBytes int64  `json:"size_bytes"`
	ModTimeNs int64  `json:"mod_time_ns"`
}

func identify(path string) (FileIdentity, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return FileIdentity{}, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	return FileIdentity{Inode: st.Ino, SizeBytes: st.Size, ModTimeNs: st.Mtim.Nano()}, nil
}

// loadAssignments reads all of dir. A file that does not parse stops the agent: guessing is worse.
func loadAssignments(dir string) ([]Assignment, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var list []Assignment
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		var a Assignment
		if err := json.Unmarshal(b, &a); err != nil {
			return nil, switchback.Errorf(switchback.CodeCorrupt, "assignment %s: %w", path, err).
				WithHint("restore the file from a backup, or remove it and protect the VM again")
		}
		list = append(list, a)
	}
	return list, nil
}

func saveAssignment(dir string, a Assignment) error {
	b, err := json.MarshalIndent(a, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, string(a.Protection)+".json"), b, 0o600)
}

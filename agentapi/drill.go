package agentapi

import (
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// Actions of drills and guest checks, carried out at the replica's site.
const (
	ActionDrillPreflight = "drill-preflight"  // the networks are isolated
	ActionDrillOpen      = "drill-open"       // pin the point, serve its view
	ActionDrillStart     = "drill-start"      // run a copy of the VM from the view
	ActionDrillScreen    = "drill-screenshot" // a picture of its screen
	ActionDrillMark      = "drill-mark"       // note on the point whether it boots
	ActionDrillClean     = "drill-clean"      // everything of it goes
	ActionGuestChecks    = "guest-checks"     // of a VM that was started, or of a drill
)

// DrillNetworks say where a copy is connected.
type DrillNetworks struct {
	// Networks maps networks of the definition to isolated ones; Network is for
	// all others. Interfaces with neither are left out.
	Networks map[string]string `json:"networks,omitempty"`
	Network  string            `json:"network,omitempty"`
	// Production are networks at this site that protected VMs use, or would use
	// after a failover.
	Production []string `json:"production,omitempty"`
}

// Used lists the isolated networks, without repetition.
func (n DrillNetworks) Used() []string {
	var used []string
	seen := map[string]bool{"": true}
	for _, name := range n.Networks {
		if !seen[name] {
			seen[name] = true
			used = append(used, name)
		}
	}
	if !seen[n.Network] {
		used = append(used, n.Network)
	}
	return used
}

// DrillOpenParams begin a drill. From then on the agent clears it by itself at ExpiresAt.
type DrillOpenParams struct {
	Drill     switchback.OperationID `json:"drill"`
	Sequence  switchback.Sequence    `json:"sequence"`
	ExpiresAt time.Time              `json:"expires_at"`
}

// DrillOpenResult answers ActionDrillOpen.
type DrillOpenResult struct {
	Socket string `json:"socket"`
}

// DrillStartParams start the copy.
type DrillStartParams struct {
	Drill      switchback.OperationID `json:"drill"`
	Definition string                 `json:"definition"` // of the VM, inactive
	DrillNetworks
	KeepMACs bool `json:"keep_macs,omitempty"`
}

// DrillStartResult says what runs, and since when.
type DrillStartResult struct {
	Name      string            `json:"name"`
	UUID      switchback.VMUUID `json:"uuid"`
	RunningAt time.Time         `json:"running_at"`
	// Notes say how the copy differs from the VM.
	Notes []string `json:"notes,omitempty"`
}

// GuestChecksParams name a drill, or none: then the VM itself is meant.
type GuestChecksParams struct {
	Drill  switchback.OperationID  `json:"drill,omitempty"`
	Checks []switchback.GuestCheck `json:"checks"`
}

// GuestChecksResult answers ActionGuestChecks; failed checks are no error.
type GuestChecksResult struct {
	Results []switchback.CheckResult `json:"results"`
}

// DrillParams name a drill; "" means all of the VM (ActionDrillClean).
type DrillParams struct {
	Drill switchback.OperationID `json:"drill,omitempty"`
}

// DrillScreenResult is a picture. Missing says why there is none.
type DrillScreenResult struct {
	PNG     []byte `json:"png,omitempty"`
	Width   int    `json:"width,omitempty"`
	Height  int    `json:"height,omitempty"`
	Missing string `json:"missing,omitempty"`
}

// DrillMarkParams are for the point's mark.
type DrillMarkParams struct {
	Sequence switchback.Sequence  `json:"sequence"`
	Proof    switchback.BootProof `json:"proof"`
}

// DrillCleanResult says what the drill had written.
type DrillCleanResult struct {
	BytesWritten int64    `json:"bytes_written"`
	Removed      []string `json:"removed,omitempty"`
}

// DrillStatus is a drill that an agent keeps.
type DrillStatus struct {
	Drill     switchback.OperationID `json:"drill"`
	Name      string                 `json:"name"` // of the domain
	Sequence  switchback.Sequence    `json:"sequence"`
	Started   bool                   `json:"started"`
	ExpiresAt time.Time              `json:"expires_at"`
	// Left lists what could not be removed, each with cause and remedy; empty
	// while nothing was tried.
	Left []string `json:"left,omitempty"`
}

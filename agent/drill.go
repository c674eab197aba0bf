package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/google/uuid"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/qemu"
)

// Drill is a copy of a point that runs, or ran, beside the VM. It stands in the
// assignment before its first effect, and goes from it after its last trace.
type Drill struct {
	ID switchback.OperationID `json:"id"`
	// Name and VM are the copy's own.
	Name     string              `json:"name"`
	VM       switchback.VMUUID   `json:"vm"`
	Sequence switchback.Sequence `json:"sequence"`
	Pin      string              `json:"pin"`
	Socket   string              `json:"socket"`
	// Dir holds the overlays and the console's log.
	Dir string `json:"dir"`
	// Networks are those the copy is connected to.
	Networks []string `json:"networks,omitempty"`
	// ExpiresAt is when the agent clears it whatever the server says.
	ExpiresAt time.Time `json:"expires_at"`
	Started   bool      `json:"started,omitempty"`
	StartedAt time.Time `json:"started_at,omitzero"`
	Notes     []string  `json:"notes,omitempty"`
	// Left is what the last attempt to clear it could not remove.
	Left []string `json:"left,omitempty"`
}

func (d Drill) console() string { return filepath.Join(d.Dir, "console.log") }

// unit names the process that serves the view, and its log.
func (d Drill) unit() string { return "switchback-view-" + filepath.Base(d.Socket) }

func (d Drill) overlay(disk string) string { return filepath.Join(d.Dir, disk+".qcow2") }

func (a Assignment) drill(id switchback.OperationID) (Drill, bool) {
	for _, d := range a.Drills {
		if d.ID == id {
			return d, true
		}
	}
	return Drill{}, false
}

// setDrill makes a drill durable, in the place of the one of that ID; remove
// takes it out.
func (v *vm) setDrill(d Drill, remove bool) error {
	return v.change(func(a *Assignment) {
		a.Drills = slices.DeleteFunc(slices.Clone(a.Drills), func(x Drill) bool { return x.ID == d.ID })
		if !remove {
			a.Drills = append(a.Drills, d)
		}
	})
}

// newDrill names everything a drill will make. The same ID gives the same names.
func (v *vm) newDrill(p agentapi.DrillOpenParams) (Drill, error) {
	if len(p.Drill) < 8 {
		return Drill{}, switchback.Errorf(switchback.CodeInvalid, "%q is no ID of a drill", p.Drill)
	}
	as := v.assignment()
	if as.Dir == "" {
		return Drill{}, switchback.Errorf(switchback.CodeConflict, "no replica of %s is kept at this site", as.Name)
	}
	short := string(p.Drill[len(p.Drill)-6:])
	return Drill{ID: p.Drill, Name: as.Name + "-drill-" + short, Sequence: p.Sequence, Pin: "drill-" + short,
		VM:     switchback.VMUUID(uuid.NewSHA1(uuid.NameSpaceOID, []byte("switchback drill "+p.Drill)).String()),
		Socket: filepath.Join(v.agent.cfg.RunDir, string(as.Protection)+"."+short+".drill"),
		Dir:    filepath.Join(as.Dir, "drill-"+short), ExpiresAt: p.ExpiresAt}, nil
}

func (a *Agent) inspector() (hypervisor.Inspector, error) {
	i, ok := a.hv.(hypervisor.Inspector)
	if !ok {
		return nil, switchback.Errorf(switchback.CodeUnsupported, "this hypervisor cannot run drills")
	}
	return i, nil
}

func (a *Agent) drillPreflight(ctx context.Context, _ *task, v *vm, req agentapi.Task, p agentapi.DrillNetworks) (any, error) {
	return nil, a.isolated(ctx, p)
}

// drillOpen pins the point and serves its view, from a process of its own.
func (a *Agent) drillOpen(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.DrillOpenParams) (any, error) {
	d, ok := v.assignment().drill(p.Drill)
	if !ok {
		var err error
		if d, err = v.newDrill(p); err != nil {
			return nil, err
		}
		if !time.Now().Before(d.ExpiresAt) {
			return nil, switchback.Errorf(switchback.CodeRefused, "the time of the drill is over: it was asked for too long ago").WithHint("begin a new one")
		}
		if err := v.setDrill(d, false); err != nil {
			return nil, err
		}
	}
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	if err := replica.Pin(d.Pin, d.Sequence, map[string]string{"vm": v.assignment().Name, "for": "drill " + string(d.ID)}); err != nil {
		return nil, err
	}
	t.Report("opening the view", nil)
	return agentapi.DrillOpenResult{Socket: d.Socket}, v.serveDrill(ctx, d)
}

func (v *vm) serveDrill(ctx context.Context, d Drill) error {
	return v.serveView(ctx, d.Sequence, "", d.Socket, d.unit())
}

// drillStart runs the copy. A drill that was cleared meanwhile is not begun again.
func (a *Agent) drillStart(ctx context.Context, t *task, v *vm, req agentapi.Task, p agentapi.DrillStartParams) (any, error) {
	hv, err := a.inspector()
	if err != nil {
		return nil, err
	}
	as := v.assignment()
	d, ok := as.drill(p.Drill)
	if !ok {
		return nil, switchback.Errorf(switchback.CodeCancelled, "the drill was cleared before its guest was started")
	}
	result := func() agentapi.DrillStartResult {
		return agentapi.DrillStartResult{Name: d.Name, UUID: d.VM, RunningAt: d.StartedAt, Notes: d.Notes}
	}
	if d.Started {
		dom, err := a.hv.Domain(ctx, d.VM)
		if err != nil {
			return nil, err
		}
		if dom.State == hypervisor.StatePaused { // killed just before it was let run
			if err := a.hv.Resume(ctx, d.VM); err != nil {
				return nil, err
			}
		}
		return result(), nil
	}
	if err := a.isolated(ctx, p.DrillNetworks); err != nil {
		return nil, err
	}
	if err := v.serveDrill(ctx, d); err != nil {
		return nil, err
	}
	// What an earlier attempt has left never ran.
	if err := a.hv.Destroy(ctx, d.VM); err != nil && switchback.CodeOf(err) != switchback.CodeNotFound {
		return nil, err
	}
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		return nil, err
	}
	sources := map[string]hypervisor.DiskSource{}
	for _, disk := range as.Disks {
		path := d.overlay(disk.Name)
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return nil, err
		}
		backing := fmt.Sprintf("nbd+unix:///%s?socket=%s", disk.Name, d.Socket)
		if err := qemu.Create(ctx, path, qemu.CreateOptions{Format: "qcow2", SizeBytes: disk.SizeBytes, Backing: backing, BackingFormat: "raw"}); err != nil {
			return nil, err
		}
		sources[disk.Name] = hypervisor.DiskSource{Path: path, Format: "qcow2", BackingSocket: d.Socket, BackingExport: disk.Name}
	}
	definition, notes, err := hv.Isolate(p.Definition, hypervisor.Isolation{Name: d.Name, UUID: d.VM, Disks: sources,
		Networks: p.Networks, Network: p.Network, KeepMACs: p.KeepMACs, ConsoleLog: d.console()})
	if err != nil {
		return nil, err
	}
	if _, err := a.hv.Define(ctx, definition); err != nil {
		return nil, err
	}
	t.Report("starting the guest", nil)
	if err := a.hv.Start(ctx, d.VM, true); err != nil {
		return nil, err
	}
	d.Started, d.StartedAt, d.Notes, d.Networks = true, time.Now(), notes, p.Used()
	if err := v.setDrill(d, false); err != nil {
		return nil, err
	}
	a.log.Info("drill started", "protection", as.Protection, "drill", d.ID, "domain", d.Name, "point", d.Sequence)
	return result(), a.hv.Resume(ctx, d.VM)
}

// drillMark notes on the point whether it boots.
func (a *Agent) drillMark(_ context.Context, _ *task, v *vm, req agentapi.Task, p agentapi.DrillMarkParams) (any, error) {
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	return nil, replica.SetMark(p.Sequence, func(m *switchback.Mark) error {
		proof := p.Proof
		m.Boot = &proof
		return nil
	})
}

func drillStatus(a Assignment) []agentapi.DrillStatus {
	var list []agentapi.DrillStatus
	for _, d := range a.Drills {
		list = append(list, agentapi.DrillStatus{Drill: d.ID, Name: d.Name, Sequence: d.Sequence, Started: d.Started, ExpiresAt: d.ExpiresAt, Left: d.Left})
	}
	return list
}

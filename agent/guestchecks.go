package agent

import (
	"bytes"
	"context"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"os"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/check"
	"github.com/switchback-dr/switchback/hypervisor"
)

// guestChecks runs checks on the VM or on a drill of it. It does not keep other
// actions waiting: what it looks at may be taken away meanwhile, then it fails.
func (a *Agent) guestChecks(ctx context.Context, t *task, req agentapi.Task, p agentapi.GuestChecksParams) (any, error) {
	if err := check.ValidateAll(p.Checks); err != nil {
		return nil, err
	}
	v, err := a.vm(req.Protection)
	if err != nil {
		return nil, err
	}
	if err := v.checkEpoch(req.Epoch); err != nil {
		return nil, err
	}
	hv, err := a.inspector()
	if err != nil {
		return nil, err
	}
	as := v.assignment()
	g := &checkedGuest{agent: a, hv: hv, vm: as.VM}
	run := check.Runner{Guest: g, Report: func(m string) { t.Report(m, nil) }}
	if p.Drill != "" {
		d, err := v.startedDrill(p.Drill)
		if err != nil {
			return nil, err
		}
		g.vm, g.console = d.VM, d.console()
		if run.Device, err = a.deviceOf(ctx, hv, d.Networks); err != nil {
			return nil, err
		}
	} else if as.Run != nil {
		g.from = as.Run.ConsoleFrom
	}
	results, err := run.Run(ctx, p.Checks)
	return agentapi.GuestChecksResult{Results: results}, err
}

func (v *vm) startedDrill(id switchback.OperationID) (Drill, error) {
	d, ok := v.assignment().drill(id)
	if !ok || !d.Started {
		return d, switchback.Errorf(switchback.CodeCancelled, "the drill was cleared, or its guest never started")
	}
	return d, nil
}

// deviceOf is the bridge through which a drill is reached: connections must not
// go to the original, which may have the same address.
func (a *Agent) deviceOf(ctx context.Context, hv hypervisor.Inspector, used []string) (string, error) {
	if len(used) == 0 {
		return "no-network", nil // there is no way to it, and none to anything else
	}
	networks, err := hv.Networks(ctx)
	if err != nil {
		return "", err
	}
	n, ok := networkNamed(networks, used[0])
	if !ok || n.Bridge == "" {
		return "", switchback.Errorf(switchback.CodeNotFound, "network %s of the drill is gone", used[0])
	}
	return n.Bridge, nil
}

// checkedGuest implements check.Guest.
type checkedGuest struct {
	agent   *Agent
	hv      hypervisor.Inspector
	vm      switchback.VMUUID
	console string // "" = as the definition says
	from    int64
}

func (g *checkedGuest) Running(ctx context.Context) error {
	dom, err := g.agent.hv.Domain(ctx, g.vm)
	if err != nil {
		return err
	}
	if dom.State != hypervisor.StateRunning {
		return fmt.Errorf("it is %s %s", dom.State, dom.PauseReason)
	}
	return nil
}

func (g *checkedGuest) Ping(ctx context.Context, timeout time.Duration) error {
	return g.agent.hv.AgentPing(ctx, g.vm, timeout)
}

func (g *checkedGuest) Exec(ctx context.Context, command []string, timeout time.Duration) (int, string, error) {
	r, err := g.hv.GuestExec(ctx, g.vm, command, timeout)
	return r.ExitCode, r.Output, err
}

func (g *checkedGuest) Console(ctx context.Context) (string, int64, error) {
	if g.console != "" {
		return g.console, g.from, nil
	}
	definition, err := g.agent.hv.Definition(ctx, g.vm, true)
	if err != nil {
		return "", 0, err
	}
	path, err := g.hv.ConsoleLog(definition)
	return path, g.from, err
}

// consoleSize is how much the console's log of a definition holds now: a start
// after it writes behind. Zero where there is no such log.
func (a *Agent) consoleSize(definition string) int64 {
	hv, err := a.inspector()
	if err != nil {
		return 0
	}
	path, err := hv.ConsoleLog(definition)
	if err != nil {
		return 0
	}
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// drillScreen takes a picture; that there is none does not fail a drill.
func (a *Agent) drillScreen(ctx context.Context, _ *task, req agentapi.Task, p agentapi.DrillParams) (any, error) {
	v, err := a.vm(req.Protection)
	if err != nil {
		return nil, err
	}
	hv, err := a.inspector()
	if err != nil {
		return nil, err
	}
	d, err := v.startedDrill(p.Drill)
	if err != nil {
		return nil, err
	}
	_, picture, err := hv.Screenshot(ctx, d.VM)
	if err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return agentapi.DrillScreenResult{Missing: err.Error()}, nil
	}
	img, err := decodePicture(picture)
	if err != nil {
		return agentapi.DrillScreenResult{Missing: err.Error()}, nil
	}
	var out bytes.Buffer
	if err := png.Encode(&out, img); err != nil {
		return nil, err
	}
	return agentapi.DrillScreenResult{PNG: out.Bytes(), Width: img.Bounds().Dx(), Height: img.Bounds().Dy()}, nil
}

const maxPixels = 64 << 20

// decodePicture reads what QEMU makes: PNG, or binary PPM (P6) with 8 bits.
func decodePicture(b []byte) (image.Image, error) {
	if !bytes.HasPrefix(b, []byte("P6")) {
		img, err := png.Decode(bytes.NewReader(b))
		if err != nil {
			return nil, fmt.Errorf("the picture of the screen: %w", err)
		}
		return img, nil
	}
	var width, height, depth int
	r := bytes.NewReader(b[2:])
	if _, err := fmt.Fscan(r, &width, &height, &depth); err != nil {
		return nil, fmt.Errorf("the picture of the screen: %w", err)
	}
	if _, err := r.ReadByte(); err != nil { // one white space ends the header
		return nil, fmt.Errorf("the picture of the screen: %w", err)
	}
	if width < 1 || height < 1 || width > maxPixels/height || depth != 255 || r.Len() != 3*width*height {
		return nil, fmt.Errorf("the picture of the screen: %d×%d of depth %d in %d bytes", width, height, depth, r.Len())
	}
	img, data := image.NewRGBA(image.Rect(0, 0, width, height)), b[len(b)-r.Len():]
	for i := range width * height {
		img.SetRGBA(i%width, i/width, color.RGBA{data[3*i], data[3*i+1], data[3*i+2], 255})
	}
	return img, nil
}

package agent

import (
	"bytes"
	"context"
	"errors"
	"image"
	"image/color"
	"image/png"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/hypervisor"
)

func TestJudgeNetwork(t *testing.T) {
	quiet := hypervisor.Network{Name: "quiet", Active: true, Bridge: "br7"}
	with := func(f func(*hypervisor.Network)) hypervisor.Network { n := quiet; f(&n); return n }
	for _, c := range []struct {
		name       string
		network    hypervisor.Network
		ports      []port
		production []string
		inUse      map[string]string
		others     []hypervisor.Network
		want       string // of the refusal; "" = fit
	}{
		{"isolated", quiet, nil, []string{"lan"}, map[string]string{"lan": "db"}, nil, ""},
		{"with other drills on it", quiet, []port{{"vnet3", "tun"}, {"br7-nic", "dummy"}}, nil, nil, nil, ""},
		{"nat", with(func(n *hypervisor.Network) { n.Forward = "nat" }), nil, nil, nil, nil, `forward mode is "nat"`},
		{"routed to a device", with(func(n *hypervisor.Network) { n.Forward, n.Devices = "route", []string{"eth0"} }), nil, nil, nil, nil, "to eth0"},
		{"no bridge", with(func(n *hypervisor.Network) { n.Bridge = "" }), nil, nil, nil, nil, "no bridge"},
		{"inactive", with(func(n *hypervisor.Network) { n.Active = false }), nil, nil, nil, nil, "not active"},
		{"production by name", quiet, nil, []string{"lan", "quiet"}, nil, nil, "after a failover"},
		{"production by bridge", quiet, nil, []string{"br7"}, nil, nil, "after a failover"},
		{"a protected VM on it", quiet, nil, nil, map[string]string{"quiet": "db"}, nil, "VM db"},
		{"a protected VM on its bridge", quiet, nil, nil, map[string]string{"br7": "db"}, nil, "VM db"},
		{"a network card in its bridge", quiet, []port{{"vnet3", "tun"}, {"eth1", ""}}, nil, nil, nil, "the port eth1"},
		{"a VLAN in its bridge", quiet, []port{{"eth1.5", "vlan"}}, nil, nil, nil, "the port eth1.5"},
		{"two networks on one bridge", quiet, nil, nil, nil, []hypervisor.Network{quiet, {Name: "lan", Bridge: "br7"}}, "network lan has the same bridge"},
	} {
		err := judgeNetwork("quiet", c.network, true, c.ports, c.production, c.inUse, c.others)
		if (err == nil) != (c.want == "") || err != nil && (switchback.CodeOf(err) != switchback.CodeRefused || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if err := judgeNetwork("br0", hypervisor.Network{}, false, nil, nil, nil, nil); err == nil || !strings.Contains(err.Error(), "no libvirt network of that name") {
		t.Error(err)
	}
}

func TestDecodePicture(t *testing.T) {
	img := image.NewRGBA(image.Rect(0, 0, 3, 2))
	img.SetRGBA(2, 1, color.RGBA{9, 8, 7, 255})
	var b bytes.Buffer
	if err := png.Encode(&b, img); err != nil {
		t.Fatal(err)
	}
	ppm := append([]byte("P6\n3 2\n255\n"), make([]byte, 15)...)
	ppm = append(ppm, 9, 8, 7)
	for name, picture := range map[string][]byte{"png": b.Bytes(), "ppm": ppm} {
		got, err := decodePicture(picture)
		if err != nil {
			t.Fatal(name, err)
		}
		if r, g, bl, _ := got.At(2, 1).RGBA(); got.Bounds() != img.Bounds() || r>>8 != 9 || g>>8 != 8 || bl>>8 != 7 {
			t.Errorf("%s: %v, %v", name, got.Bounds(), got.At(2, 1))
		}
	}
	for _, bad := range [][]byte{nil, []byte("P6"), ppm[:len(ppm)-1], []byte("P6\n99999999 99999999\n255\n"), []byte("P6\n-1 -1\n255\nxxx"), b.Bytes()[:20]} {
		if _, err := decodePicture(bad); err == nil {
			t.Errorf("%q is a picture", bad)
		}
	}
}

// copies is a hypervisor that has domains to destroy.
type copies struct {
	hypervisor.Hypervisor
	stuck   error
	defined bool
}

func (c *copies) Destroy(context.Context, switchback.VMUUID) error { return c.stuck }
func (c *copies) Undefine(context.Context, switchback.VMUUID) error {
	c.defined = false
	return nil
}

// TestClearDrill: what cannot be removed is listed with its remedy and kept in
// the assignment; nothing that a running copy uses goes before it.
func TestClearDrill(t *testing.T) {
	dir := t.TempDir()
	hv := &copies{stuck: errors.New("the domain does not die"), defined: true}
	a := &Agent{cfg: Config{StateDir: dir, RunDir: dir, LogDir: dir}, hv: hv, log: slog.New(slog.DiscardHandler), vms: map[switchback.ProtectionID]*vm{}}
	v := &vm{agent: a, a: Assignment{Protection: "p-0123456789ab", Name: "app", Dir: filepath.Join(dir, "app")}}
	a.vms[v.a.Protection] = v
	d, err := v.newDrill(agentapi.DrillOpenParams{Drill: "op-0123456789abcdef", Sequence: 7, ExpiresAt: time.Now().Add(-time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	if err := v.setDrill(d, false); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.overlay("vda"), make([]byte, 100<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if d.written() < 100<<10 {
		t.Errorf("it has written %d", d.written())
	}
	clear := func() (any, error) {
		return a.drillClean(context.Background(), &task{}, agentapi.Task{Protection: v.a.Protection}, agentapi.DrillParams{Drill: d.ID})
	}
	_, err = clear()
	if switchback.CodeOf(err) != switchback.CodeUnavailable || !strings.Contains(err.Error(), "the domain does not die (remedy: virsh destroy app-drill-") {
		t.Error(err)
	}
	if _, err := os.Stat(d.overlay("vda")); err != nil {
		t.Errorf("the disk of a running copy: %v", err)
	}
	list, err := loadAssignments(a.assignmentDir())
	if err != nil || len(list) != 1 || len(list[0].Drills) != 1 || len(list[0].Drills[0].Left) != 3 {
		t.Fatalf("assignments %+v, %v", list, err)
	}
	if st := drillStatus(list[0]); len(st) != 1 || len(st[0].Left) != 3 {
		t.Errorf("reported as %+v", st)
	}

	// An agent that finds the drill expired goes on, without the server.
	hv.stuck = nil
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	go a.expireDrills(ctx)
	for len(v.assignment().Drills) > 0 && ctx.Err() == nil {
		time.Sleep(5 * time.Millisecond)
	}
	if _, err := os.Stat(d.Dir); !os.IsNotExist(err) || hv.defined || len(v.assignment().Drills) > 0 {
		t.Errorf("not cleared: %v, defined %v, %+v", err, hv.defined, v.assignment().Drills)
	}
	if r, err := clear(); err != nil || r.(agentapi.DrillCleanResult).BytesWritten != 0 {
		t.Errorf("once more: %+v, %v", r, err)
	}
	// A drill is not begun again after it was cleared.
	a.hv = struct {
		*copies
		hypervisor.Inspector
	}{hv, nil}
	if _, err := a.drillStart(context.Background(), &task{}, v, agentapi.Task{}, agentapi.DrillStartParams{Drill: d.ID}); switchback.CodeOf(err) != switchback.CodeCancelled {
		t.Error(err)
	}
	if _, err := v.newDrill(agentapi.DrillOpenParams{Drill: "x"}); err == nil {
		t.Error("a short ID")
	}
}

func TestBridgePorts(t *testing.T) {
	if ports, err := bridgePorts("no-such-bridge"); err != nil || len(ports) != 0 {
		t.Errorf("%v, %v", ports, err)
	}
}

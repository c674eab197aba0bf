package demo

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/recovery"

	switchback "github.com/switchback-dr/switchback"
)

// drill boots a copy of the newest point of the last guest beside it.
func (d *demo) drill(ctx context.Context) error {
	vm := d.guests[len(d.guests)-1].Name
	newest := func() (switchback.Sequence, error) {
		v, err := d.client.VM(ctx, vm)
		if err != nil {
			return 0, err
		}
		if v.LastPoint == nil {
			return 0, fmt.Errorf("%s has no point", vm)
		}
		return v.LastPoint.Sequence, nil
	}
	before, err := newest()
	if err != nil {
		return err
	}
	sum, err := d.operate(ctx, vm, recovery.TestFailover, api.OperationRequest{Drill: &api.DrillRequest{NoNetwork: true,
		Checks: []switchback.GuestCheck{{Kind: switchback.CheckPower}, {Kind: switchback.CheckConsole, Target: "^SB CHECKED", Timeout: 5 * time.Minute}}}})
	if err != nil {
		return err
	}
	after, err := newest()
	if err != nil {
		return err
	}
	domains, err := d.lab.Virsh(ctx, lab.Recovery, "list", "--all", "--name")
	if err != nil {
		return err
	}
	x := sum.Drill
	d.report.Drill = Drill{VM: vm, Passed: x.Passed, GuestUpSeconds: x.GuestUpAt.Sub(x.RequestedAt).Seconds(), CheckedSeconds: x.CheckedAt.Sub(x.RequestedAt).Seconds(),
		BytesWritten: x.BytesWritten, PointsMeanwhile: int64(after - before), Left: strings.Contains(domains, "-drill-")}
	d.say("drill: a copy of %s from point %d was up after %.1f s and had checked its files after %.1f s; %d points came meanwhile; it is cleared", vm, x.Point.Sequence,
		d.report.Drill.GuestUpSeconds, d.report.Drill.CheckedSeconds, after-before)
	return nil
}

package demo

import (
	"context"
	"fmt"
	"time"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/witness"
)

// changePoint has the last guest run from an older point, and go back to what it
// had written before.
func (d *demo) changePoint(ctx context.Context) error {
	vm := d.guests[len(d.guests)-1].Name
	points, err := d.client.Points(ctx, vm)
	if err != nil {
		return err
	}
	if len(points) < 4 {
		return fmt.Errorf("%s has only %d points", vm, len(points))
	}
	older := points[len(points)-4].Sequence
	seq, err := d.newestRecord(ctx, vm)
	if err != nil {
		return err
	}
	c := Change{VM: vm, Point: uint64(older), RecordBefore: seq}
	away, err := d.change(ctx, vm, api.OperationRequest{Point: fmt.Sprint(older)})
	if err != nil {
		return err
	}
	c.OutageSeconds, c.RecordAtPoint = away.Outage.Seconds(), away.record
	back, err := d.change(ctx, vm, api.OperationRequest{Snapshot: away.SetAside})
	if err != nil {
		return err
	}
	c.OutageBackSeconds, c.RecordAfter = back.Outage.Seconds(), back.record
	d.report.Change = c
	d.say("change of point: %s ran from point %d, at record %d instead of %d, after %.1f s; back to what it had written, at record %d, after %.1f s",
		vm, older, c.RecordAtPoint, c.RecordBefore, c.OutageSeconds, c.RecordAfter, c.OutageBackSeconds)
	return nil
}

type changed struct {
	*api.Changed
	record uint64 // the newest, soon after the boot
}

func (d *demo) change(ctx context.Context, vm string, req api.OperationRequest) (changed, error) {
	from := witness.ConsoleSize(d.lab.Console(lab.Recovery, vm))
	sum, err := d.operate(ctx, vm, recovery.ChangePoint, req)
	if err != nil {
		return changed{}, err
	}
	if _, err := d.awaitLine(ctx, lab.Recovery, vm, from, "SB CHECKED"); err != nil {
		return changed{}, err
	}
	seq, err := d.newestRecord(ctx, vm)
	return changed{sum.Change, seq}, err
}

// newestRecord waits for the first record since the guest's boot, and returns the
// newest one's number. It goes on from the newest on the disk.
func (d *demo) newestRecord(ctx context.Context, vm string) (uint64, error) {
	c, err := d.lab.Control(ctx, lab.Recovery, vm)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		s, err := c.State(ctx)
		if err != nil || s.Seq > 0 {
			return s.Seq, err
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("%s writes no record: %w", vm, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

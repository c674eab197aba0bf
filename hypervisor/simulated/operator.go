package simulated

import (
	"bytes"
	"context"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/nbd"
)

// AgentPing answers when the guest has an agent, has booted and runs.
func (h *Host) AgentPing(ctx context.Context, id switchback.VMUUID, timeout time.Duration) error {
	g, err := h.agent(ctx, id)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.running {
		return switchback.Errorf(switchback.CodeUnavailable, "the guest agent of %s does not answer: it is paused", id)
	}
	return nil
}

// agent returns the guest, if it has a guest agent that is up.
func (h *Host) agent(ctx context.Context, id switchback.VMUUID) (*guest, error) {
	d, err := h.running(ctx, id)
	if err != nil {
		return nil, err
	}
	defer d.mu.Unlock()
	if !programOf(d.s.Live.Definition).Agent {
		return nil, switchback.Errorf(switchback.CodeUnsupported, "the guest of %s has no guest agent", id)
	}
	if d.guest == nil || !d.guest.booted() {
		return nil, switchback.Errorf(switchback.CodeUnavailable, "the guest agent of %s does not answer yet", id)
	}
	return d.guest, nil
}

// Freeze holds the guest's writes.
func (h *Host) Freeze(ctx context.Context, id switchback.VMUUID) error {
	g, err := h.agent(ctx, id)
	if err != nil {
		return err
	}
	if g.setFrozen(true) {
		return switchback.Errorf(switchback.CodeConflict, "the file systems of %s are frozen already", id)
	}
	return nil
}

// Thaw lets them go on.
func (h *Host) Thaw(ctx context.Context, id switchback.VMUUID) error {
	g, err := h.agent(ctx, id)
	if err != nil {
		return err
	}
	g.setFrozen(false)
	return nil
}

// GuestWrite writes a pattern as the guest of a machine would, durably; it may be paused.
func (h *Host) GuestWrite(ctx context.Context, id switchback.VMUUID, disk string, off, length int64, pattern byte) error {
	d, err := h.running(ctx, id)
	if err != nil {
		return err
	}
	socket := d.nbdSocket()
	d.mu.Unlock()
	c, err := nbd.Dial(ctx, "unix", socket, nbd.Options{Export: deviceExport(disk)})
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.WriteAtContext(ctx, bytes.Repeat([]byte{pattern}, int(length)), off); err != nil {
		return err
	}
	return c.Flush(ctx)
}

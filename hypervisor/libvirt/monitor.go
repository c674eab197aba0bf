package libvirt

import (
	"context"
	"encoding/json"
	"fmt"

	switchback "github.com/switchback-dr/switchback"
)

// monitorError is what QEMU's monitor refused.
type monitorError struct{ command, class, text string }

func (e *monitorError) Error() string { return fmt.Sprintf("QEMU refused %s: %s", e.command, e.text) }

// monitor sends a command to a domain's QEMU past libvirt, which marks the
// domain as tainted by it ("custom-monitor"). Only what libvirt has no call
// for and does not itself keep book of may be done so.
func (d *Driver) monitor(ctx context.Context, r domainRef, command string, arguments, out any) error {
	if d.cfg.NoMonitor {
		return switchback.Errorf(switchback.CodeUnsupported, "commands to QEMU's monitor are switched off")
	}
	message := map[string]any{"execute": command}
	if arguments != nil {
		message["arguments"] = arguments
	}
	text, err := json.Marshal(message)
	if err != nil {
		return err
	}
	var reply string
	err = d.do(ctx, r, procMonitorCommand, newArgs().domain(r).str(string(text)).u32(0), func(r *result) { reply = r.str() })
	if err != nil {
		return err
	}
	var answer struct {
		Return json.RawMessage `json:"return"`
		Error  *struct {
			Class string `json:"class"`
			Desc  string `json:"desc"`
		} `json:"error"`
	}
	if err := json.Unmarshal([]byte(reply), &answer); err != nil {
		return fmt.Errorf("answer of QEMU to %s: %w", command, err)
	}
	if answer.Error != nil {
		return &monitorError{command, answer.Error.Class, answer.Error.Desc}
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(answer.Return, out); err != nil {
		return fmt.Errorf("answer of QEMU to %s: %w", command, err)
	}
	return nil
}

// action is one part of a monitor transaction, which is done whole or not at all.
type action struct {
	Type string         `json:"type"`
	Data map[string]any `json:"data"`
}

func (d *Driver) transaction(ctx context.Context, r domainRef, actions []action) error {
	if len(actions) == 0 {
		return nil
	}
	return d.monitor(ctx, r, "transaction", map[string]any{"actions": actions}, nil)
}

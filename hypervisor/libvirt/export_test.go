package libvirt

import (
	"context"
	"fmt"

	switchback "github.com/switchback-dr/switchback"
)

// Monitor sends a human monitor command to a domain's QEMU. It taints the
// domain, so only tests do it.
func (d *Driver) Monitor(ctx context.Context, id switchback.VMUUID, format string, a ...any) (answer string, err error) {
	r, err := ref(id)
	if err != nil {
		return "", err
	}
	command := newArgs().domain(r).str(fmt.Sprintf(format, a...)).u32(monitorCommandHMP)
	err = d.do(ctx, r, procMonitorCommand, command, func(r *result) { answer = r.str() })
	return answer, err
}

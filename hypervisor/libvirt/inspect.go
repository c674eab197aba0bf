package libvirt

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/beevik/etree"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
)

const maxNetworks = 16384

// networkRef is remote_nonnull_network.
type networkRef struct {
	name string
	uuid [16]byte
}

func (r *result) network() networkRef {
	n := networkRef{name: r.str()}
	copy(n.uuid[:], r.take(16))
	return n
}

// Networks implements hypervisor.Inspector.
func (d *Driver) Networks(ctx context.Context) ([]hypervisor.Network, error) {
	const op = "libvirt.Networks"
	var lists [2][]networkRef // all, then the active ones
	for i, flags := range []uint32{0, listNetworksActive} {
		err := d.query(ctx, procConnectListAllNetworks, newArgs().i32(1).u32(flags), func(r *result) {
			for range r.count(maxNetworks, 20) {
				lists[i] = append(lists[i], r.network())
			}
		})
		if err != nil {
			return nil, wrap(op, err)
		}
	}
	active := map[networkRef]bool{}
	for _, n := range lists[1] {
		active[n] = true
	}
	networks := []hypervisor.Network{}
	for _, n := range lists[0] {
		var text string
		err := d.query(ctx, procNetworkGetXMLDesc, newArgs().str(n.name).opaque(n.uuid[:]).u32(0), func(r *result) { text = r.str() })
		if isNumber(err, errNoNetwork) {
			continue // gone meanwhile
		}
		if err != nil {
			return nil, wrap(op, err)
		}
		parsed, err := parseNetwork(text)
		if err != nil {
			return nil, wrap(op, err)
		}
		parsed.Active = active[n]
		networks = append(networks, parsed)
	}
	return networks, nil
}

// parseNetwork reads a network's XML. A forward element without mode is NAT, as
// in libvirt; without the element nothing is forwarded.
func parseNetwork(text string) (hypervisor.Network, error) {
	doc := etree.NewDocument()
	if err := doc.ReadFromString(text); err != nil {
		return hypervisor.Network{}, fmt.Errorf("parse a network: %w", err)
	}
	root := doc.SelectElement("network")
	if root == nil {
		return hypervisor.Network{}, switchback.Errorf(switchback.CodeInvalid, "not a libvirt network")
	}
	n := hypervisor.Network{Name: childText(root, "name")}
	if b := root.SelectElement("bridge"); b != nil {
		n.Bridge = b.SelectAttrValue("name", "")
	}
	if f := root.SelectElement("forward"); f != nil {
		if n.Forward = f.SelectAttrValue("mode", "nat"); n.Forward == "none" {
			n.Forward = ""
		}
		for _, e := range f.ChildElements() {
			if dev := e.SelectAttrValue("dev", ""); dev != "" {
				n.Devices = append(n.Devices, dev)
			}
		}
		if dev := f.SelectAttrValue("dev", ""); dev != "" && len(n.Devices) == 0 {
			n.Devices = append(n.Devices, dev)
		}
	}
	return n, nil
}

// Screenshot implements hypervisor.Inspector. QEMU makes PNG, or PPM where it
// is older.
func (d *Driver) Screenshot(ctx context.Context, id switchback.VMUUID) (mime string, picture []byte, err error) {
	const op = "libvirt.Screenshot"
	r, err := ref(id)
	if err != nil {
		return "", nil, wrap(op, err)
	}
	answer, picture, err := d.work[int(r.uuid[15])%lanes].download(ctx, procDomainScreenshot, newArgs().domain(r).u32(0).u32(0))
	// Which number "no screens to take screenshot from" has depends on the release.
	if isNumber(err, errInternal, errInvalidArg, errOperationInvalid, errOperationUnsupported) {
		return "", nil, wrap(op, switchback.Errorf(switchback.CodeUnsupported, "no picture of the screen: %w", err).
			WithHint("the VM needs a video device"))
	}
	if err != nil {
		return "", nil, wrap(op, err)
	}
	mime = answer.optional()
	return mime, picture, wrap(op, answer.err)
}

const execPoll = 200 * time.Millisecond

// GuestExec implements hypervisor.Inspector.
func (d *Driver) GuestExec(ctx context.Context, id switchback.VMUUID, command []string, timeout time.Duration) (hypervisor.ExecResult, error) {
	const op = "libvirt.GuestExec"
	var res hypervisor.ExecResult
	if len(command) == 0 {
		return res, wrap(op, switchback.Errorf(switchback.CodeInvalid, "no command"))
	}
	deadline := time.Now().Add(timeout)
	ask := func(execute string, arguments, into any) error {
		line, err := json.Marshal(map[string]any{"execute": execute, "arguments": arguments})
		if err != nil {
			return err
		}
		answer, err := d.agent(ctx, id, string(line), max(time.Second, min(5*time.Second, time.Until(deadline))))
		if err != nil {
			return err
		}
		var envelope struct{ Return json.RawMessage }
		if err := json.Unmarshal([]byte(answer), &envelope); err != nil {
			return fmt.Errorf("the guest agent's answer to %s: %w", execute, err)
		}
		return json.Unmarshal(envelope.Return, into)
	}
	var begun struct{ PID int64 }
	err := ask("guest-exec", map[string]any{"path": command[0], "arg": command[1:], "capture-output": true}, &begun)
	if err != nil {
		return res, wrap(op, err)
	}
	for {
		var st struct {
			Exited   bool
			ExitCode *int   `json:"exitcode"`
			Signal   *int   `json:"signal"`
			Out      string `json:"out-data"`
			Err      string `json:"err-data"`
		}
		if err := ask("guest-exec-status", map[string]any{"pid": begun.PID}, &st); err != nil {
			return res, wrap(op, err)
		}
		if st.Exited {
			for _, s := range []string{st.Out, st.Err} {
				text, err := base64.StdEncoding.DecodeString(s)
				if err != nil {
					return res, wrap(op, fmt.Errorf("the output of the command: %w", err))
				}
				res.Output += string(text)
			}
			switch {
			case st.ExitCode != nil:
				res.ExitCode = *st.ExitCode
			case st.Signal != nil:
				res.ExitCode = 128 + *st.Signal // as a shell says it
			}
			return res, nil
		}
		if time.Now().After(deadline) {
			return res, wrap(op, switchback.Errorf(switchback.CodeTimeout, "the command %q runs for longer than %v", strings.Join(command, " "), timeout))
		}
		select {
		case <-ctx.Done():
			return res, wrap(op, ctx.Err())
		case <-time.After(execPoll):
		}
	}
}

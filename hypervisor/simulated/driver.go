package simulated

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
)

// Driver speaks to the daemon of a simulated host. It implements
// hypervisor.Hypervisor and hypervisor.Freezer.
type Driver struct {
	client *http.Client
	dir    string
}

// New returns a driver for the host in dir. It connects at the first call.
func New(dir string) *Driver {
	t := &http.Transport{DisableCompression: true, MaxIdleConnsPerHost: 8,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", Socket(dir))
		}}
	return &Driver{client: &http.Client{Transport: t}, dir: dir}
}

// call calls a method of the daemon's Host.
func (d *Driver) call(ctx context.Context, method string, out any, params ...any) error {
	op := "simulated." + method
	if params == nil {
		params = []any{}
	}
	b, err := json.Marshal(params)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://simulated/call/"+method, bytes.NewReader(b))
	if err != nil {
		return err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return d.unreachable(ctx, op, err)
	}
	defer resp.Body.Close()
	var answer response
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return d.unreachable(ctx, op, err)
	}
	if answer.Error != nil {
		return answer.Error
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer.Result, out)
}

func (d *Driver) unreachable(ctx context.Context, op string, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return &switchback.Error{Code: switchback.CodeTimeout, Op: op, Message: "the hypervisor did not answer in time"}
	case ctx.Err() != nil:
		return &switchback.Error{Code: switchback.CodeCancelled, Op: op, Message: "given up before the hypervisor answered"}
	}
	return &switchback.Error{Code: switchback.CodeUnavailable, Op: op, Message: "the simulated hypervisor in " + d.dir + " does not answer", Err: err}
}

// Host is (*Host).Host, asked of the daemon.
func (d *Driver) Host(ctx context.Context) (out hypervisor.Host, err error) {
	return out, d.call(ctx, "Host", &out)
}

// Domains is (*Host).Domains, asked of the daemon.
func (d *Driver) Domains(ctx context.Context) (out []hypervisor.Domain, err error) {
	err = d.call(ctx, "Domains", &out)
	return out, err
}

// Domain is (*Host).Domain, asked of the daemon.
func (d *Driver) Domain(ctx context.Context, id switchback.VMUUID) (out hypervisor.Domain, err error) {
	err = d.call(ctx, "Domain", &out, id)
	return out, err
}

// Definition is (*Host).Definition, asked of the daemon.
func (d *Driver) Definition(ctx context.Context, id switchback.VMUUID, live bool) (out string, err error) {
	err = d.call(ctx, "Definition", &out, id, live)
	return out, err
}

// Define is (*Host).Define, asked of the daemon.
func (d *Driver) Define(ctx context.Context, definition string) (out hypervisor.Domain, err error) {
	err = d.call(ctx, "Define", &out, definition)
	return out, err
}

// Undefine is (*Host).Undefine, asked of the daemon.
func (d *Driver) Undefine(ctx context.Context, id switchback.VMUUID) error {
	return d.call(ctx, "Undefine", nil, id)
}

// Translate is (*Host).Translate, asked of the daemon.
func (d *Driver) Translate(definition string, t hypervisor.Translation) (string, error) {
	return libvirt.TranslateDefinition(definition, t)
}

// Start is (*Host).Start, asked of the daemon.
func (d *Driver) Start(ctx context.Context, id switchback.VMUUID, paused bool) error {
	return d.call(ctx, "Start", nil, id, paused)
}

// Resume is (*Host).Resume, asked of the daemon.
func (d *Driver) Resume(ctx context.Context, id switchback.VMUUID) error {
	return d.call(ctx, "Resume", nil, id)
}

// Suspend is (*Host).Suspend, asked of the daemon.
func (d *Driver) Suspend(ctx context.Context, id switchback.VMUUID) error {
	return d.call(ctx, "Suspend", nil, id)
}

// Shutdown is (*Host).Shutdown, asked of the daemon.
func (d *Driver) Shutdown(ctx context.Context, id switchback.VMUUID, o hypervisor.ShutdownOptions) error {
	return d.call(ctx, "Shutdown", nil, id, o)
}

// Destroy is (*Host).Destroy, asked of the daemon.
func (d *Driver) Destroy(ctx context.Context, id switchback.VMUUID) error {
	return d.call(ctx, "Destroy", nil, id)
}

// SetAutostart is (*Host).SetAutostart, asked of the daemon.
func (d *Driver) SetAutostart(ctx context.Context, id switchback.VMUUID, on bool) error {
	return d.call(ctx, "SetAutostart", nil, id, on)
}

// AgentPing is (*Host).AgentPing, asked of the daemon.
func (d *Driver) AgentPing(ctx context.Context, id switchback.VMUUID, timeout time.Duration) error {
	return d.call(ctx, "AgentPing", nil, id, timeout)
}

// BeginBackup is (*Host).BeginBackup, asked of the daemon.
func (d *Driver) BeginBackup(ctx context.Context, id switchback.VMUUID, spec hypervisor.BackupSpec) error {
	return d.call(ctx, "BeginBackup", nil, id, spec)
}

// EndBackup is (*Host).EndBackup, asked of the daemon.
func (d *Driver) EndBackup(ctx context.Context, id switchback.VMUUID) error {
	return d.call(ctx, "EndBackup", nil, id)
}

// HasBackup is (*Host).HasBackup, asked of the daemon.
func (d *Driver) HasBackup(ctx context.Context, id switchback.VMUUID) (out bool, err error) {
	err = d.call(ctx, "HasBackup", &out, id)
	return out, err
}

// CreateCheckpoint is (*Host).CreateCheckpoint, asked of the daemon.
func (d *Driver) CreateCheckpoint(ctx context.Context, id switchback.VMUUID, name string, disks []string) error {
	return d.call(ctx, "CreateCheckpoint", nil, id, name, disks)
}

// Checkpoints is (*Host).Checkpoints, asked of the daemon.
func (d *Driver) Checkpoints(ctx context.Context, id switchback.VMUUID) (out []hypervisor.Checkpoint, err error) {
	err = d.call(ctx, "Checkpoints", &out, id)
	return out, err
}

// DeleteCheckpoint is (*Host).DeleteCheckpoint, asked of the daemon.
func (d *Driver) DeleteCheckpoint(ctx context.Context, id switchback.VMUUID, name string) error {
	return d.call(ctx, "DeleteCheckpoint", nil, id, name)
}

// BlockCopy is (*Host).BlockCopy, asked of the daemon.
func (d *Driver) BlockCopy(ctx context.Context, id switchback.VMUUID, disk string, to hypervisor.CopyTarget) error {
	return d.call(ctx, "BlockCopy", nil, id, disk, to)
}

// BlockCommit is (*Host).BlockCommit, asked of the daemon.
func (d *Driver) BlockCommit(ctx context.Context, id switchback.VMUUID, disk string) error {
	return d.call(ctx, "BlockCommit", nil, id, disk)
}

// BlockJob is (*Host).BlockJob, asked of the daemon.
func (d *Driver) BlockJob(ctx context.Context, id switchback.VMUUID, disk string) (out hypervisor.JobProgress, err error) {
	err = d.call(ctx, "BlockJob", &out, id, disk)
	return out, err
}

// BlockPivot is (*Host).BlockPivot, asked of the daemon.
func (d *Driver) BlockPivot(ctx context.Context, id switchback.VMUUID, disk string) error {
	return d.call(ctx, "BlockPivot", nil, id, disk)
}

// BlockAbort is (*Host).BlockAbort, asked of the daemon.
func (d *Driver) BlockAbort(ctx context.Context, id switchback.VMUUID, disk string) error {
	return d.call(ctx, "BlockAbort", nil, id, disk)
}

// Freeze is (*Host).Freeze, asked of the daemon.
func (d *Driver) Freeze(ctx context.Context, id switchback.VMUUID) error {
	return d.call(ctx, "Freeze", nil, id)
}

// Thaw is (*Host).Thaw, asked of the daemon.
func (d *Driver) Thaw(ctx context.Context, id switchback.VMUUID) error {
	return d.call(ctx, "Thaw", nil, id)
}

// GuestWrite is Host.GuestWrite.
func (d *Driver) GuestWrite(ctx context.Context, id switchback.VMUUID, disk string, off, length int64, pattern byte) error {
	return d.call(ctx, "GuestWrite", nil, id, disk, off, length, pattern)
}

// Kill is Host.Kill.
func (d *Driver) Kill(ctx context.Context, id switchback.VMUUID) error {
	return d.call(ctx, "Kill", nil, id)
}

// PowerCut is Host.PowerCut.
func (d *Driver) PowerCut(ctx context.Context) error { return d.call(ctx, "PowerCut", nil) }

// Events delivers the daemon's events until ctx ends. While the daemon is away
// it is asked again and again; then EventLost stands for what is missing.
func (d *Driver) Events(ctx context.Context) (<-chan hypervisor.Event, error) {
	body, err := d.openEvents(ctx)
	if err != nil {
		return nil, err
	}
	out := make(chan hypervisor.Event, 1024)
	go func() {
		defer close(out)
		for ctx.Err() == nil {
			if body != nil {
				dec := json.NewDecoder(body)
				for {
					var e hypervisor.Event
					if dec.Decode(&e) != nil {
						break
					}
					select {
					case out <- e:
					case <-ctx.Done():
					}
				}
				body.Close()
				select {
				case out <- hypervisor.Event{Kind: hypervisor.EventLost, Time: time.Now()}:
				case <-ctx.Done():
				}
			}
			select {
			case <-time.After(50 * time.Millisecond):
			case <-ctx.Done():
			}
			body, _ = d.openEvents(ctx) // not yet: again
		}
		if body != nil {
			body.Close()
		}
	}()
	return out, nil
}

func (d *Driver) openEvents(ctx context.Context) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://simulated/events", nil)
	if err != nil {
		return nil, err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		return nil, d.unreachable(ctx, "simulated.Events", err)
	}
	return resp.Body, nil
}

// Close lets go of the daemon.
func (d *Driver) Close() error {
	d.client.CloseIdleConnections()
	return nil
}

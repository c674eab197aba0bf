package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/fencing"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/journal"
	"github.com/switchback-dr/switchback/qemu"
	"github.com/switchback-dr/switchback/replicator"
)

// prepareReplica makes the replica at its target: over empty images, or over
// the disks that this site kept when the VM left.
func (a *Agent) prepareReplica(ctx context.Context, _ *task, req agentapi.Task, p agentapi.PrepareReplicaParams) (any, error) {
	if p.DryRun {
		v := &vm{agent: a}
		if known, err := a.vm(req.Protection); err == nil {
			v = known
		}
		return a.checkPrepare(ctx, v.assignment(), p)
	}
	v := a.ensureVM(req.Protection)
	v.act.Lock()
	defer v.act.Unlock()
	if err := v.checkEpoch(req.Epoch); err != nil {
		return nil, err
	}
	as := v.assignment()
	if as.Role == agentapi.RoleTarget && as.Epoch == req.Epoch && as.ReplicaDir != "" {
		// Done before: a retry after a crash. Only the answer is made again.
		if _, err := v.openReplica(); err == nil {
			return agentapi.PrepareReplicaResult{Dir: as.ReplicaDir, Trusted: p.FromRest && as.Rest != nil, Reason: "prepared before"}, v.change(func(x *Assignment) { x.Peer = p.Peer })
		}
	}
	if as.Role.Owns() {
		// It has not heard yet that it does not own the VM any more. It acts on it, and is asked again.
		if err := v.hear(ctx, fencing.Ruling{Epoch: req.Epoch, Site: p.Peer.Site}, 0, "command"); err != nil {
			return nil, err
		}
		if req.Epoch > as.Epoch {
			return nil, switchback.Errorf(switchback.CodeUnavailable, "site %s is being fenced first", a.site())
		}
		return nil, switchback.Errorf(switchback.CodeConflict, "VM %s is active at this site: it cannot be its target", p.Name)
	}
	result, err := a.checkPrepare(ctx, as, p)
	if err != nil {
		return nil, err
	}
	v.closeReplica()
	dir := as.Dir
	if dir == "" {
		dir = filepath.Join(a.cfg.StorageDir, safeName(p.Name)+"-"+string(req.Protection))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	replicaDir := filepath.Join(dir, fmt.Sprintf("journal-%d", req.Epoch))
	// A replica that a crash left half made is made again; no point ever was in it.
	if err := os.RemoveAll(replicaDir); err != nil {
		return nil, err
	}
	var disks []switchback.Disk
	session := ""
	if p.FromRest {
		disks, err = a.restDisks(ctx, as, p)
	} else {
		disks, err = emptyBases(ctx, dir, p.Disks)
		session = newSession()
	}
	if err != nil {
		return nil, err
	}
	spec := journal.Spec{Protection: req.Protection, VM: p.VM, Name: p.Name, Epoch: req.Epoch, BaseIsOriginal: p.FromRest}
	for _, d := range disks {
		spec.Disks = append(spec.Disks, journal.ReplicaDisk{Name: d.Name, SizeBytes: d.SizeBytes, BasePath: d.Path})
	}
	files := map[string]FileIdentity{}
	if p.FromRest {
		if files, err = identifyAll(disks); err != nil {
			return nil, err
		}
	}
	replica, err := journal.Options{ReserveBytes: a.cfg.StorageReserveBytes}.Create(replicaDir, spec)
	if err != nil {
		return nil, err
	}
	if err := a.applySealing(replica, p.Policy); err != nil {
		replica.Close()
		return nil, err
	}
	err = v.change(func(x *Assignment) {
		x.VM, x.Name, x.Peer, x.Policy = p.VM, p.Name, p.Peer, p.Policy
		x.become(agentapi.RoleTarget, req.Epoch)
		x.Disks, x.Dir, x.ReplicaDir, x.Session, x.Run, x.MustSend = disks, dir, replicaDir, session, nil, nil
		x.BaseCheckpoint = p.Checkpoint
		if p.FromRest {
			// Our bitmaps are gone from the files: this is how they are left now.
			rest := *x.Rest
			rest.Files, rest.Distrust = files, result.Reason
			x.Rest = &rest
		}
	})
	if err != nil {
		replica.Close()
		return nil, err
	}
	v.mu.Lock()
	v.replica = replica
	v.mu.Unlock()
	// Whatever copy of the VM is defined here must not start beside its source.
	if err := a.setFence(p.VM, fmt.Sprintf("VM %s is protected and active at site %s; this site is its recovery target", p.Name, p.Peer.Site)); err != nil {
		return nil, err
	}
	if err := v.dropGrant(); err != nil {
		return nil, err
	}
	result.Dir = replicaDir
	return result, nil
}

// checkPrepare finds what would be in the way, without touching anything.
func (a *Agent) checkPrepare(ctx context.Context, as Assignment, p agentapi.PrepareReplicaParams) (agentapi.PrepareReplicaResult, error) {
	r := agentapi.PrepareReplicaResult{Trusted: true}
	if err := a.checkStorage(p.Policy); err != nil {
		return r, err
	}
	if err := a.diskRoom(as.Protection, len(p.Disks)); err != nil {
		return r, err
	}
	r.FreeBytes, _ = freeBytes(a.cfg.StorageDir)
	domains, err := a.hv.Domains(ctx)
	if err != nil {
		return r, err
	}
	for _, d := range domains {
		switch {
		case d.UUID == p.VM && as.VM != p.VM:
			return r, switchback.Errorf(switchback.CodeConflict, "a VM with the UUID of %s is defined at the target site as %s", p.Name, d.Name).
				WithHint("undefine it there, or choose another target site")
		case d.UUID == p.VM && d.State != hypervisor.StateOff:
			return r, switchback.Errorf(switchback.CodeConflict, "VM %s is %s at the target site", d.Name, d.State).
				WithHint("turn it off there; only one site may run it")
		case d.UUID != p.VM && d.Name == p.Name:
			return r, switchback.Errorf(switchback.CodeConflict, "another VM named %s is defined at the target site", p.Name).
				WithHint("rename one of the two")
		}
	}
	if !p.FromRest {
		var need int64
		for _, d := range p.Disks {
			if d.AllocatedBytes > 0 {
				need += d.AllocatedBytes
			} else {
				need += d.SizeBytes
			}
		}
		if need += a.cfg.StorageReserveBytes; need > r.FreeBytes {
			return r, switchback.Errorf(switchback.CodeNoSpace, "the first copy of %s needs %d MiB, the target's storage %s has %d MiB left",
				p.Name, need>>20, a.cfg.StorageDir, r.FreeBytes>>20).WithHint("make room there, or choose another target site")
		}
		return r, nil
	}
	if as.Rest == nil || len(as.Disks) == 0 {
		return r, switchback.Errorf(switchback.CodeNotFound, "this site keeps no disks of %s from before", p.Name).
			WithHint("unprotect the VM and protect it anew: that copies everything")
	}
	if as.Rest.Distrust != "" {
		r.Trusted, r.Reason = false, as.Rest.Distrust
	}
	for _, d := range as.Disks {
		id, err := identify(d.Path)
		if errors.Is(err, fs.ErrNotExist) {
			return r, switchback.Errorf(switchback.CodeNotFound, "disk %s of %s is gone from this site: %s", d.Name, p.Name, d.Path).
				WithHint("put it back, or unprotect the VM and protect it anew")
		}
		if err != nil {
			return r, err
		}
		if was := as.Rest.Files[d.Name]; id != was {
			r.Trusted = false
			r.Reason = fmt.Sprintf("disk %s was changed here since point %d (%s)", d.Name, as.Rest.Point.Sequence, d.Path)
		}
	}
	for _, want := range p.Disks {
		if d, ok := diskNamed(as.Disks, want.Name); !ok || d.SizeBytes != want.SizeBytes {
			return r, switchback.Errorf(switchback.CodeUnsupported, "disk %s is not the same at both sites", want.Name).
				WithHint("unprotect the VM and protect it anew")
		}
	}
	return r, nil
}

func diskNamed(disks []switchback.Disk, name string) (switchback.Disk, bool) {
	for _, d := range disks {
		if d.Name == name {
			return d, true
		}
	}
	return switchback.Disk{}, false
}

// restDisks readies kept disks to be a base again: our bitmaps go, since a
// commit would merge them with those of the VM's next life.
func (a *Agent) restDisks(ctx context.Context, as Assignment, p agentapi.PrepareReplicaParams) ([]switchback.Disk, error) {
	if _, err := a.hv.Domain(ctx, p.VM); err == nil {
		if err := a.dropCheckpoints(ctx, p.VM); err != nil {
			return nil, err
		}
	}
	for _, d := range as.Disks {
		if err := removeBitmaps(ctx, d.Path); err != nil {
			return nil, err
		}
	}
	return as.Disks, nil
}

// dropCheckpoints deletes every checkpoint of ours, newest first, and every
// finer record of writes.
func (a *Agent) dropCheckpoints(ctx context.Context, vm switchback.VMUUID) error {
	if h, ok := a.hv.(hypervisor.FineTracker); ok {
		if err := h.ForgetWrites(ctx, vm); err != nil {
			a.log.Warn("records of writes are left in the VM's process until it ends", "vm", vm, "error", err)
		}
	}
	list, err := a.hv.Checkpoints(ctx, vm)
	if err != nil {
		return err
	}
	for i := len(list) - 1; i >= 0; i-- {
		if strings.HasPrefix(list[i].Name, replicator.CheckpointPrefix) {
			if err := a.hv.DeleteCheckpoint(ctx, vm, list[i].Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeBitmaps removes our bitmaps from an image at rest.
func removeBitmaps(ctx context.Context, path string) error {
	info, err := qemu.Info(ctx, path)
	if err != nil {
		return err
	}
	for _, b := range info.Bitmaps {
		if strings.HasPrefix(b.Name, replicator.CheckpointPrefix) {
			if err := qemu.RemoveBitmap(ctx, path, b.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// emptyBases makes an empty image per disk, replacing what an interrupted attempt left.
func emptyBases(ctx context.Context, dir string, disks []switchback.Disk) ([]switchback.Disk, error) {
	out := make([]switchback.Disk, len(disks))
	for i, d := range disks {
		out[i] = switchback.Disk{Name: d.Name, SizeBytes: d.SizeBytes, Format: "qcow2", Path: filepath.Join(dir, d.Name+".qcow2")}
		if err := os.Remove(out[i].Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if err := qemu.Create(ctx, out[i].Path, qemu.CreateOptions{Format: "qcow2", SizeBytes: d.SizeBytes}); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// newSession names a base; it has the form of a digest since the point that
// ends the seeding carries it as its digest.
func newSession() string {
	var b [32]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// safeName keeps what is harmless in a file name.
func safeName(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' {
			return r
		}
		return '_'
	}, s)
}

func (a *Agent) verifyReplica(ctx context.Context, t *task, v *vm, req agentapi.Task, _ struct{}) (any, error) {
	replica, err := v.openReplica()
	if err != nil {
		return nil, err
	}
	var r agentapi.VerifyResult
	damage, err := replica.Verify(ctx, func(done, total int64) {
		r.Bytes = total
		t.Report("verifying", &replicator.Progress{DoneBytes: done, TotalBytes: total})
	})
	if err != nil {
		return nil, err
	}
	for _, d := range damage {
		r.Damage = append(r.Damage, d.Error())
	}
	if len(r.Damage) > 0 {
		return r, switchback.Errorf(switchback.CodeCorrupt, "the replica is damaged: %s", joinReasons(r.Damage))
	}
	return r, nil
}

// openFoldWriter opens one base for a fold.
func (v *vm) openFoldWriter(g journal.DiskGeometry) (journal.BaseWriter, func() error, error) {
	d, ok := diskNamed(v.assignment().Disks, g.Name)
	if !ok {
		return nil, nil, switchback.Errorf(switchback.CodeInternal, "no base for disk %s", g.Name)
	}
	b, err := v.openBase(context.Background(), g.Name, d.Path)
	if err != nil {
		return nil, nil, err
	}
	return b, b.close, nil
}

package simulated

import (
	"context"
	"errors"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/hypervisor"
	"github.com/switchback-dr/switchback/hypervisor/libvirt"
)

// blockJob is a copy or commit under way.
type blockJob struct {
	Path   string `json:"path"` // where the disk will be
	Format string `json:"format"`
	Node   string `json:"node"`
	// Made: the node was opened for the job, and is closed if that is aborted.
	Made bool `json:"made"`
}

// jobInfo is what query-block-jobs says.
type jobInfo struct {
	Device string `json:"device"`
	Type   string `json:"type"`
	Offset int64  `json:"offset"`
	Len    int64  `json:"len"`
	Ready  bool   `json:"ready"`
	Status string `json:"status"`
}

func copyJob(disk string) string { return "copy-" + disk }

func (d *domain) job(id string) (jobInfo, bool, error) {
	var list []jobInfo
	if err := d.mon.do("query-block-jobs", nil, &list); err != nil {
		return jobInfo{}, false, err
	}
	for _, j := range list {
		if j.Device == id {
			return j, true, nil
		}
	}
	return jobInfo{}, false, nil
}

// awaitJob waits until a job is gone.
func (d *domain) awaitJob(id string) error {
	for deadline := time.Now().Add(commandTime); ; {
		_, there, err := d.job(id)
		if err != nil || !there {
			return err
		}
		if time.Now().After(deadline) {
			return switchback.Errorf(switchback.CodeTimeout, "job %s does not end", id)
		}
		time.Sleep(time.Millisecond)
	}
}

func (d *domain) cancelJob(id string) error {
	if _, there, err := d.job(id); err != nil || !there {
		return err
	}
	var refused *qmpError
	if err := d.mon.do("block-job-cancel", args{"device": id, "force": true}, nil); err != nil && !errors.As(err, &refused) {
		return err // refused: it has just ended
	}
	return d.awaitJob(id)
}

// idle returns the node of a disk on which no job works, with the lock held.
func (h *Host) idle(ctx context.Context, id switchback.VMUUID, disk string) (*domain, string, error) {
	d, err := h.running(ctx, id)
	if err != nil {
		return nil, "", err
	}
	name := d.s.Live.Nodes[disk]
	_, busy := d.s.Live.Jobs[disk]
	switch {
	case name == "":
		err = switchback.Errorf(switchback.CodeInvalid, "domain %s has no disk %s", id, disk)
	case busy || d.s.Live.Backup != nil:
		err = switchback.Errorf(switchback.CodeConflict, "disk %s of domain %s has a job already", disk, id)
	}
	if err != nil {
		d.mu.Unlock()
		return nil, "", err
	}
	return d, name, nil
}

func (d *domain) begin(disk string, job blockJob) error {
	if d.s.Live.Jobs == nil {
		d.s.Live.Jobs = map[string]blockJob{}
	}
	d.s.Live.Jobs[disk] = job
	return d.save()
}

// BlockCopy mirrors a disk onto the target.
func (h *Host) BlockCopy(ctx context.Context, id switchback.VMUUID, disk string, to hypervisor.CopyTarget) error {
	d, source, err := h.idle(ctx, id, disk)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	target := d.nextNode(disk)
	if err := d.mon.do("blockdev-add", imageNode(target, to.Path, to.Format), nil); err != nil {
		return err
	}
	sync := "full"
	if to.Shallow {
		sync = "top"
	}
	if err := d.begin(disk, blockJob{Path: to.Path, Format: to.Format, Node: target, Made: true}); err != nil {
		return err
	}
	err = d.mon.do("blockdev-mirror", args{"job-id": copyJob(disk), "device": source, "target": target, "sync": sync}, nil)
	if err != nil {
		return errors.Join(err, d.abort(disk))
	}
	return nil
}

// BlockCommit merges a disk's active layer into the image below it.
func (h *Host) BlockCommit(ctx context.Context, id switchback.VMUUID, disk string) error {
	d, source, err := h.idle(ctx, id, disk)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	nodes, err := d.nodes()
	if err != nil {
		return err
	}
	backing := nodes[source].Image.Backing
	if backing == nil {
		return switchback.Errorf(switchback.CodeConflict, "disk %s of domain %s has no backing image", disk, id)
	}
	var base node
	for _, n := range nodes {
		if n.Image.Filename == backing.Filename && n.Driver == "qcow2" {
			base = n
		}
	}
	if base.Name == "" {
		return switchback.Errorf(switchback.CodeUnsupported, "the backing of disk %s, %s, is no qcow2 image", disk, backing.Filename)
	}
	if err := d.begin(disk, blockJob{Path: base.File, Format: "qcow2", Node: base.Name}); err != nil {
		return err
	}
	err = d.mon.do("block-commit", args{"job-id": copyJob(disk), "device": source, "base-node": base.Name}, nil)
	if err != nil {
		return errors.Join(err, d.abort(disk))
	}
	return nil
}

// ended forgets a job that QEMU has ended by itself.
func (d *domain) ended(disk string) (jobInfo, error) {
	none := switchback.Errorf(switchback.CodeNotFound, "disk %s of domain %s has no job", disk, d.uuid)
	if _, ok := d.s.Live.Jobs[disk]; !ok {
		return jobInfo{}, none
	}
	j, there, err := d.job(copyJob(disk))
	if err != nil {
		return j, err
	}
	if !there {
		return j, errors.Join(none, d.abort(disk))
	}
	return j, nil
}

// BlockJob says how far the job is.
func (h *Host) BlockJob(ctx context.Context, id switchback.VMUUID, disk string) (hypervisor.JobProgress, error) {
	d, err := h.domain(ctx, id)
	if err != nil {
		return hypervisor.JobProgress{}, err
	}
	defer d.mu.Unlock()
	if d.mon == nil {
		return hypervisor.JobProgress{}, switchback.Errorf(switchback.CodeNotFound, "domain %s is off", id)
	}
	j, err := d.ended(disk)
	return hypervisor.JobProgress{Current: min(j.Offset, j.Len), Total: j.Len, Ready: j.Ready}, err
}

// BlockPivot switches the disk to the job's target. The bitmaps of the
// checkpoints go with it, as they do under libvirt.
func (h *Host) BlockPivot(ctx context.Context, id switchback.VMUUID, disk string) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	if d.mon == nil {
		return switchback.Errorf(switchback.CodeNotFound, "domain %s is off", id)
	}
	j, err := d.ended(disk)
	if err != nil {
		return err
	}
	if !j.Ready {
		return switchback.Errorf(switchback.CodeConflict, "the job of disk %s is not ready", disk)
	}
	job := d.s.Live.Jobs[disk]
	if err := d.carryBitmaps(disk, job); err != nil {
		return err
	}
	if err := d.mon.do("block-job-complete", args{"device": copyJob(disk)}, nil); err != nil {
		return err
	}
	if err := d.awaitJob(copyJob(disk)); err != nil {
		return err
	}
	return d.pivoted(disk, job)
}

// carryBitmaps gives the target the bitmaps of all checkpoints. From this
// instant on it records itself what the guest writes to both.
func (d *domain) carryBitmaps(disk string, job blockJob) error {
	nodes, err := d.nodes()
	if err != nil {
		return err
	}
	source := nodes[d.s.Live.Nodes[disk]]
	var actions []action
	for _, c := range d.s.Checkpoints {
		b, ok := source.bitmap(c.Name)
		if !ok || b.Inconsistent {
			continue
		}
		if _, there := nodes[job.Node].bitmap(c.Name); !there {
			actions = append(actions, action{"block-dirty-bitmap-add", args{"node": job.Node, "name": c.Name, "granularity": granularity, "persistent": true, "disabled": !b.Recording}})
		}
		actions = append(actions, action{"block-dirty-bitmap-merge", args{"node": job.Node, "target": c.Name,
			"bitmaps": []args{{"node": source.Name, "name": c.Name}}}})
	}
	return d.mon.transaction(actions)
}

// pivoted records where the disk is now, in both definitions.
func (d *domain) pivoted(disk string, job blockJob) error {
	old := d.s.Live.Nodes[disk]
	to := hypervisor.Translation{Disks: map[string]hypervisor.DiskSource{disk: {Path: job.Path, Format: job.Format}}}
	var err error
	if d.s.Live.Definition, err = libvirt.TranslateDefinition(d.s.Live.Definition, to); err != nil {
		return err
	}
	if d.s.Definition != "" {
		if d.s.Definition, err = libvirt.TranslateDefinition(d.s.Definition, to); err != nil {
			return err
		}
	}
	d.s.Live.Nodes[disk] = job.Node
	delete(d.s.Live.Jobs, disk)
	if err := d.save(); err != nil {
		return err
	}
	if nodes, err := d.nodes(); err != nil || nodes[old].Name == "" {
		return err
	}
	return d.deleteNode(old)
}

// abort ends a disk's job, if there is one, and leaves the disk where it is.
func (d *domain) abort(disk string) error {
	job, ok := d.s.Live.Jobs[disk]
	if !ok {
		return nil
	}
	if err := d.cancelJob(copyJob(disk)); err != nil {
		return err
	}
	if nodes, err := d.nodes(); err != nil {
		return err
	} else if job.Made && nodes[job.Node].Name != "" {
		if err := d.deleteNode(job.Node); err != nil {
			return err
		}
	}
	delete(d.s.Live.Jobs, disk)
	return d.save()
}

// BlockAbort ends a job.
func (h *Host) BlockAbort(ctx context.Context, id switchback.VMUUID, disk string) error {
	d, err := h.domain(ctx, id)
	if err != nil {
		return err
	}
	defer d.mu.Unlock()
	if d.mon == nil {
		return nil
	}
	return d.abort(disk)
}

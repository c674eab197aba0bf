package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
)

const pushName = "libvirt push-mode backup (virsh backup-begin, incremental) to a local qcow2"

const checkpointXML = `<domaincheckpoint><name>%s</name><disks><disk name='` + diskName + `' checkpoint='bitmap'/></disks></domaincheckpoint>`

// pushed is one incremental backup by libvirt itself.
type pushed struct {
	total, begin, end time.Duration // begin to job running; end: old checkpoint deleted
	bytes             int64         // allocated by the target
}

func (p pushed) core() time.Duration { return p.total - p.begin - p.end }

func pushCheckpoint(n int) string { return fmt.Sprintf("push-%d", n) }

// ensurePush gives the peer a checkpoint for the next incremental backup.
func (b *bed) ensurePush(ctx context.Context) error {
	v := b.virsh[lab.Primary]
	list, err := v.do(ctx, "checkpoint-list "+b.peer.name+" --name")
	if err != nil || strings.Contains(list, pushCheckpoint(b.pushes)) {
		return err
	}
	if err := b.dropCheckpoints(ctx); err != nil {
		return err
	}
	file, err := b.writeXML("push-checkpoint", fmt.Sprintf(checkpointXML, pushCheckpoint(b.pushes)))
	if err != nil {
		return err
	}
	_, err = v.do(ctx, "checkpoint-create "+b.peer.name+" "+file)
	return err
}

// dropCheckpoints deletes all of the peer's, newest first.
func (b *bed) dropCheckpoints(ctx context.Context) error {
	v := b.virsh[lab.Primary]
	list, err := v.do(ctx, "checkpoint-list "+b.peer.name+" --name --topological")
	names := strings.Fields(list)
	for i := len(names) - 1; i >= 0 && err == nil; i-- {
		_, err = v.do(ctx, "checkpoint-delete "+b.peer.name+" "+names[i])
	}
	return err
}

// push makes one incremental backup of the peer, until its job has ended and the
// older checkpoint is deleted.
func (b *bed) push(ctx context.Context) (p pushed, err error) {
	v := b.virsh[lab.Primary]
	from, to := pushCheckpoint(b.pushes), pushCheckpoint(b.pushes+1)
	target := guest.ImageDir + "/" + to + ".qcow2"
	backup, err := b.writeXML("push-backup", fmt.Sprintf(`<domainbackup mode='push'><incremental>%s</incremental><disks>`+
		`<disk name='%s' backup='yes' type='file'><driver type='qcow2'/><target file='%s'/></disk></disks></domainbackup>`, from, diskName, target))
	if err != nil {
		return p, err
	}
	checkpoint, err := b.writeXML("push-checkpoint", fmt.Sprintf(checkpointXML, to))
	if err != nil {
		return p, err
	}
	defer os.Remove(b.hostPath(target))
	start := time.Now()
	if _, err := v.do(ctx, "backup-begin "+b.peer.name+" "+backup+" "+checkpoint); err != nil {
		return p, err
	}
	b.pushes++
	p.begin = time.Since(start)
	for {
		info, err := v.do(ctx, "domjobinfo "+b.peer.name)
		if err != nil {
			return p, err
		}
		if f := strings.Fields(info); len(f) >= 3 && f[2] == "None" {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	done := time.Since(start)
	info, err := v.do(ctx, "domjobinfo "+b.peer.name+" --completed")
	if err != nil {
		return p, err
	}
	if !strings.Contains(info, "Completed") {
		return p, fmt.Errorf("the push-mode backup did not complete: %s", info)
	}
	asked := time.Since(start) // our question is not the peer's time
	if _, err := v.do(ctx, "checkpoint-delete "+b.peer.name+" "+from); err != nil {
		return p, err
	}
	p.end = time.Since(start) - asked
	p.total = done + p.end
	st, err := os.Stat(b.hostPath(target))
	if err != nil {
		return p, err
	}
	p.bytes = st.Sys().(*syscall.Stat_t).Blocks * 512
	return p, nil
}

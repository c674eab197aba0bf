package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/lab"
	"github.com/switchback-dr/switchback/lab/guest"
)

// bed is what everything is measured on: a lab with two guests at its primary
// site whose disks are equal.
type bed struct {
	cfg    config
	sizes  sizes
	lab    *lab.Lab
	api    *api.Client
	image  guest.Image
	virsh  map[string]*virsh // by site
	ours   *machine
	peer   *machine
	begin  time.Time
	seed   uint64 // of the next changes
	pushes int    // checkpoints that push-mode backups have made
}

// machine is a running guest.
type machine struct {
	name    string
	uuid    string
	disk    string // inside the site
	control *guest.Control
}

const diskName = "vda"

// tools are the programs that measure or are measured against.
var tools = map[string]string{
	"virsh": "libvirt-clients", "qemu-img": "qemu-utils", "qemu-nbd": "qemu-utils", "nbdcopy": "libnbd-bin",
	"virtnbdbackup": "virtnbdbackup", "nsenter": "util-linux", "ip": "iproute2", "mkfs.ext4": "e2fsprogs",
}

func checkTools() error {
	var missing []string
	for tool, pkg := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			missing = append(missing, tool+" (package "+pkg+")")
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("not installed: %s: run scripts/install-packages.sh bench", strings.Join(missing, ", "))
	}
	return nil
}

func (b *bed) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%6.1fs load %.1f  %s\n", time.Since(b.begin).Seconds(), load(), fmt.Sprintf(format, args...))
}

// load is the machine's load average over one minute; 0 if it cannot be told.
func load() float64 {
	b, _ := os.ReadFile("/proc/loadavg")
	one, _, _ := strings.Cut(string(b), " ")
	v, _ := strconv.ParseFloat(one, 64)
	return v
}

func makeBed(ctx context.Context, cfg config) (_ *bed, err error) {
	b := &bed{cfg: cfg, sizes: sizesOf(cfg.quick), begin: time.Now(), virsh: map[string]*virsh{}}
	// It is removed with all that is in it, so it must be our own.
	if err := os.Mkdir(cfg.dir, 0o755); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.takeDown(context.WithoutCancel(ctx)))
		}
	}()
	executable := filepath.Join(cfg.dir, "switchback")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", executable, "github.com/switchback-dr/switchback/cmd/switchback")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if cfg.executable != "" {
		build = exec.CommandContext(ctx, "cp", cfg.executable, executable)
	}
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build switchback: %w: %s", err, out)
	}
	b.say("lab in %s", cfg.dir)
	b.lab, err = lab.Up(ctx, lab.Config{Dir: cfg.dir, Executable: executable, Log: b.say})
	if err != nil {
		return nil, err
	}
	if b.api, err = b.lab.Client(); err != nil {
		return nil, err
	}
	if b.image, err = lab.Image(ctx); err != nil {
		return nil, err
	}
	for _, site := range []string{lab.Primary, lab.Recovery} {
		if b.virsh[site], err = openVirsh(ctx, b.lab.Site(site).URI()); err != nil {
			return nil, err
		}
	}
	b.ours, b.peer = newMachine("ours"), newMachine("peer")
	b.say("disks of %d GiB with %d MiB of content", b.sizes.disk>>30, b.sizes.content>>20)
	if err := makeDisk(ctx, b.hostPath(b.ours.disk), b.sizes); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "cp", "--sparse=always", b.hostPath(b.ours.disk), b.hostPath(b.peer.disk)).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("copy the disk: %w: %s", err, out)
	}
	for _, m := range []*machine{b.ours, b.peer} {
		if err := b.start(ctx, m); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func newMachine(name string) *machine {
	return &machine{name: name, uuid: uuid.NewSHA1(uuid.NameSpaceOID, []byte("switchback bench "+name)).String(),
		disk: filepath.Join(guest.ImageDir, name+".qcow2")}
}

// start defines and starts a guest; its writer holds from the start.
func (b *bed) start(ctx context.Context, m *machine) error {
	w := guest.Workload{MountDisk: diskName, CheckBytes: b.sizes.check, RecordDisks: []string{diskName}, Hold: true}
	site := b.lab.Site(lab.Primary)
	text, err := guest.DomainXML(guest.Spec{Name: m.name, UUID: m.uuid, Type: site.DomainType(), Image: b.image,
		Disks: []guest.SpecDisk{{Path: m.disk, Target: diskName}}, Cmdline: w.Cmdline()})
	if err != nil {
		return err
	}
	file, err := b.writeXML(m.name, text)
	if err != nil {
		return err
	}
	v := b.virsh[lab.Primary]
	if _, err := v.do(ctx, "define "+file); err != nil {
		return err
	}
	if _, err := v.do(ctx, "start "+m.name); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if m.control, err = b.lab.Control(bounded, lab.Primary, m.name); err != nil {
		return err
	}
	// It is busy with its files until it has checked them.
	if err := b.waitConsole(bounded, lab.Primary, m.name, 0, " CHECKED "); err != nil {
		return err
	}
	// That has changed access times. A check of nothing writes them out first, so
	// that nothing is written later but what is asked for.
	return m.control.Check(bounded, 0)
}

func (b *bed) writeXML(name, text string) (path string, err error) {
	path = filepath.Join(b.cfg.dir, name+".xml")
	return path, os.WriteFile(path, []byte(text), 0o644)
}

// hostPath is where a path inside the primary site lies.
func (b *bed) hostPath(inside string) string { return b.lab.Site(lab.Primary).HostPath(inside) }

// waitConsole waits until a guest has said a line with text after offset from of
// its console. A line of failure is an error.
func (b *bed) waitConsole(ctx context.Context, site, name string, from int64, text string) error {
	for {
		content, _ := os.ReadFile(b.lab.Console(site, name))
		said := string(content[min(from, int64(len(content))):])
		// Whole lines only.
		said = said[:strings.LastIndexByte(said, '\n')+1]
		for _, bad := range []string{"SB FAIL ", " BAD ", "SB EIO "} {
			if _, after, ok := strings.Cut(said, bad); ok {
				line, _, _ := strings.Cut(after, "\n")
				return fmt.Errorf("guest %s: %s%s", name, bad, line)
			}
		}
		if strings.Contains(said, text) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("guest %s did not say %q: %w", name, text, ctx.Err())
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// settle lets the disk finish what earlier samples have left to write.
func (b *bed) settle() error {
	d, err := os.Open(b.cfg.dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	time.Sleep(200 * time.Millisecond)
	return nil
}

// change makes the same changes in both guests and lets them settle.
func (b *bed) change(ctx context.Context, bytes int64, mix guest.Mix) error {
	b.seed++
	for _, m := range []*machine{b.ours, b.peer} {
		n, err := m.control.Dirty(ctx, guest.Changes{Disk: diskName, Bytes: bytes, Span: b.sizes.span, Seed: b.seed, Mix: mix})
		if err != nil {
			return err
		}
		if n < bytes {
			return fmt.Errorf("guest %s wrote %d of %d bytes", m.name, n, bytes)
		}
	}
	return b.settle()
}

func (b *bed) takeDown(ctx context.Context) error {
	for _, v := range b.virsh {
		v.close()
	}
	for _, m := range []*machine{b.ours, b.peer} {
		if m != nil && m.control != nil {
			m.control.Close()
		}
	}
	if b.cfg.keep && b.lab != nil {
		b.say("the lab is left up: switchback lab down --dir %s", b.cfg.dir)
		return nil
	}
	if b.lab == nil {
		return os.RemoveAll(b.cfg.dir)
	}
	return b.lab.Down(ctx)
}

// alternate runs ours and the peer's n times each; whose turn is first changes.
// before, if not nil, readies both.
func alternate(ctx context.Context, n int, before, ours, peer func(context.Context) error) error {
	for i := range n {
		if before != nil {
			if err := before(ctx); err != nil {
				return err
			}
		}
		order := []func(context.Context) error{ours, peer}
		if i%2 == 1 {
			order[0], order[1] = order[1], order[0]
		}
		for _, f := range order {
			if err := f(ctx); err != nil {
				return err
			}
		}
	}
	return nil
}

// command runs cmd; what it printed matters only when it fails.
func command(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

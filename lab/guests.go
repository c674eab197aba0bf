package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/switchback-dr/switchback/lab/guest"
)

// Guest is a guest of the lab. Its first disk has a file system whose files it
// checks at boot; it writes ordered records over all of its disks.
type Guest struct {
	Name string `json:"name"`
	// Disks are the sizes in bytes; at least 4 GiB each.
	Disks []int64 `json:"disks"`
	// ContentBytes of files on the first disk.
	ContentBytes int64 `json:"content_bytes"`
	// CheckBytes of them are read and verified at each boot.
	CheckBytes int64 `json:"check_bytes"`
	// Pace between two records.
	Pace time.Duration `json:"pace"`
	// Wire is a libvirt network for an interface; "" = none. Screen adds a video device.
	Wire   string `json:"wire,omitempty"`
	Screen bool   `json:"screen,omitempty"`
}

// DefaultGuests are the guests of `switchback lab up` and of the demo: one VM
// with a log and a data disk, one with a single disk.
func DefaultGuests() []Guest {
	return []Guest{
		{Name: "app", Disks: []int64{4 << 30, 4 << 30}, ContentBytes: 160 << 20, CheckBytes: 72 << 20, Pace: time.Millisecond},
		{Name: "web", Disks: []int64{4 << 30}, ContentBytes: 128 << 20, CheckBytes: 72 << 20, Pace: time.Millisecond},
	}
}

// UUID is the guest's UUID, derived from its name.
func (g Guest) UUID() string {
	return uuid.NewSHA1(uuid.NameSpaceOID, []byte("switchback lab "+g.Name)).String()
}

// DiskPath is a disk's path inside a site.
func (g Guest) DiskPath(i int) string {
	return filepath.Join(guest.ImageDir, fmt.Sprintf("%s-%s.qcow2", g.Name, diskName(i)))
}

func diskName(i int) string { return "vd" + string(rune('a'+i)) }

// Workload is what the guest does.
func (g Guest) Workload() guest.Workload {
	w := guest.Workload{MountDisk: "vda", CheckBytes: g.CheckBytes, Pace: g.Pace}
	for i := range g.Disks {
		w.RecordDisks = append(w.RecordDisks, diskName(i))
	}
	return w
}

// Image builds the guests' kernel and initrd (from the cache, mostly).
func Image(ctx context.Context) (guest.Image, error) {
	cache := guest.DefaultCacheDir()
	workload, err := guest.BuildWorkload(ctx, "", cache)
	if err != nil {
		return guest.Image{}, err
	}
	return guest.Build(ctx, cache, workload)
}

// AddGuest makes a guest's disks at the primary site, defines it and starts it.
func (l *Lab) AddGuest(ctx context.Context, g Guest) error {
	image, err := Image(ctx)
	if err != nil {
		return err
	}
	s := l.sites[Primary]
	var disks []guest.SpecDisk
	for i, size := range g.Disks {
		host := s.HostPath(g.DiskPath(i))
		if err := os.MkdirAll(filepath.Dir(host), 0o755); err != nil {
			return err
		}
		c := guest.Content{Seed: uint64(len(g.Name)*100 + i)}
		if i == 0 {
			c.Bytes = g.ContentBytes
		}
		if err := guest.MakeDisk(ctx, host, size, c); err != nil {
			return err
		}
		// Written now: otherwise the first sync of a guest or of a replica waits
		// for all of it, for half a minute where the disk is slow.
		if err := syncFile(host); err != nil {
			return err
		}
		disks = append(disks, guest.SpecDisk{Path: g.DiskPath(i), Target: diskName(i)})
	}
	xml, err := guest.DomainXML(guest.Spec{Name: g.Name, UUID: g.UUID(), Type: s.DomainType(), Image: image, Disks: disks,
		Network: g.Wire, Screen: g.Screen, Cmdline: g.Workload().Cmdline()})
	if err != nil {
		return err
	}
	file := filepath.Join(l.cfg.Dir, g.Name+".xml")
	if err := os.WriteFile(file, []byte(xml), 0o644); err != nil {
		return err
	}
	if _, err := l.Virsh(ctx, Primary, "define", file); err != nil {
		return err
	}
	_, err = l.Virsh(ctx, Primary, "start", g.Name)
	return err
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Virsh runs virsh against a site.
func (l *Lab) Virsh(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "virsh", append([]string{"-q", "-c", l.sites[name].URI()}, args...)...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("virsh %s at %s: %w: %s", strings.Join(args, " "), name, err, strings.TrimSpace(string(out)))
	}
	return strings.TrimRight(string(out), "\n"), nil
}

// Control connects to a running guest's control port.
func (l *Lab) Control(ctx context.Context, site, name string) (*guest.Control, error) {
	return guest.Dial(ctx, l.sites[site].HostPath(guest.ControlPath(name)))
}

// Console is the path of a guest's console at a site, on this machine.
func (l *Lab) Console(site, name string) string {
	return l.sites[site].HostPath(guest.ConsolePath(name))
}

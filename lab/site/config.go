package site

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
)

// maxSocketPath is what fits into sockaddr_un.sun_path with its final zero.
const maxSocketPath = 107

// Config says how a site is made. Name and Dir are required.
type Config struct {
	// Name is the site's name: lower-case letters, digits and '-', at most 20.
	Name string `json:"name"`
	// Dir holds everything of the site that survives a reboot: configuration,
	// disks, logs and the state file.
	Dir string `json:"dir"`
	// RunDir holds what does not; it should be on a tmpfs. Default: a directory
	// under /dev/shm whose name is derived from Dir.
	RunDir string `json:"run_dir"`
	// CapabilityCache is a directory that several sites may share, so that QEMU
	// is probed once (1.6 s) and not by every site. Default: the site's own.
	CapabilityCache string `json:"capability_cache,omitempty"`
	// HostUUID is what libvirt reports as the host's UUID. Default: random.
	HostUUID string `json:"host_uuid"`
	// KVM leaves /dev/kvm visible. Set it from KVMWorks, never from the mere
	// existence of the device.
	KVM bool `json:"kvm"`
	// Detach starts holder and libvirtd in sessions of their own, so that they
	// outlive the process that called Start. Without it they die with it.
	Detach bool `json:"detach"`
	// QEMUConf is appended to the site's qemu.conf.
	QEMUConf string `json:"qemu_conf,omitempty"`
}

var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,19}$`)

func (c Config) withDefaults() (Config, error) {
	if !nameRE.MatchString(c.Name) {
		return c, fmt.Errorf("site name %q: use 1 to 20 of a-z, 0-9 and '-'", c.Name)
	}
	if c.Dir == "" {
		return c, errors.New("site has no directory")
	}
	var err error
	if c.Dir, err = filepath.Abs(c.Dir); err != nil {
		return c, err
	}
	if c.RunDir == "" {
		sum := sha256.Sum256([]byte(c.Dir))
		c.RunDir = "/dev/shm/switchback-" + hex.EncodeToString(sum[:4]) + "-" + c.Name
	}
	if c.RunDir, err = filepath.Abs(c.RunDir); err != nil {
		return c, err
	}
	if s := c.socket(); len(s) > maxSocketPath {
		return c, fmt.Errorf("socket path %s has %d characters, at most %d fit: choose a shorter run directory", s, len(s), maxSocketPath)
	}
	if c.CapabilityCache != "" {
		if c.CapabilityCache, err = filepath.Abs(c.CapabilityCache); err != nil {
			return c, err
		}
	}
	if c.HostUUID == "" {
		var b [16]byte
		rand.Read(b[:])
		b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
		c.HostUUID = fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
	}
	return c, nil
}

func (c Config) socket() string    { return filepath.Join(c.RunDir, "libvirt", "libvirt-sock") }
func (c Config) stateFile() string { return filepath.Join(c.Dir, "site.json") }

// bind is one directory of the site seen under a standard path inside.
type bind struct{ inside, outside string }

// binds lists the site's own directories, the longest inside path first where
// one lies within another.
func (c Config) binds() []bind {
	bs := []bind{
		{"/etc/libvirt", filepath.Join(c.Dir, "etc-libvirt")},
		{"/var/lib/libvirt", filepath.Join(c.Dir, "lib-libvirt")},
		{"/var/cache/libvirt", filepath.Join(c.Dir, "cache-libvirt")},
		{"/var/log/libvirt", filepath.Join(c.Dir, "log-libvirt")},
		{"/run/libvirt", filepath.Join(c.RunDir, "libvirt")},
		{"/etc/switchback", filepath.Join(c.Dir, "etc-switchback")},
		{"/var/lib/switchback", filepath.Join(c.Dir, "lib-switchback")},
		{"/run/switchback", filepath.Join(c.RunDir, "switchback")},
	}
	if c.CapabilityCache != "" {
		// After its parent, which it covers in part.
		bs = slices.Insert(bs, 3, bind{"/var/cache/libvirt/qemu/capabilities", c.CapabilityCache})
	}
	return bs
}

const libvirtdConf = `unix_sock_group = "root"
unix_sock_rw_perms = "0700"
auth_unix_rw = "none"
auth_unix_ro = "none"
host_uuid = %q
`

// qemuConf: stdio_handler "file" does without virtlogd; no controllers, or two
// daemons would fight for the same cgroup names; no namespaces, or each guest
// would leave the site's mount namespace.
const qemuConf = `user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
namespaces = []
cgroup_controllers = []
stdio_handler = "file"
lock_manager = "nop"
backup_tls_x509_verify = 0
`

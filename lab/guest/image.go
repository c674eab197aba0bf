package guest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// Image is what a guest boots.
type Image struct {
	Kernel string `json:"kernel"`
	Initrd string `json:"initrd"`
}

// packages are fetched, not installed. The kernel's name is found at run time.
var packages = []string{"busybox-static", "qemu-guest-agent", "libglib2.0-0", "libudev1", "liburing2", "libnuma1", "libpcre2-8-0", "libc6"}

var modules = []string{"virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci",
	"virtio_blk", "virtio_console", "failover", "net_failover", "virtio_net", "button", "evdev"}

// formatVersion is part of every cache key; raise it when Build changes.
const formatVersion = "1"

// DefaultCacheDir is switchback-lab in the user's cache directory, or in
// /var/cache if the environment names none.
func DefaultCacheDir() string {
	if d, err := os.UserCacheDir(); err == nil {
		return filepath.Join(d, "switchback-lab")
	}
	return "/var/cache/switchback-lab"
}

// Build makes kernel and initrd of a guest that runs the given workload binary
// (see BuildWorkload). Everything is kept in cacheDir, named by what it was made
// from: the first call fetches 32 MB of Debian packages (about 10 s), later ones
// take milliseconds and need no network. Processes that build at once wait for
// each other. Needs Debian 12's apt-get and dpkg-deb, and its package lists;
// it fetches these if there are none.
func Build(ctx context.Context, cacheDir, workload string) (Image, error) {
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return Image{}, err
	}
	program, err := os.ReadFile(workload)
	if err != nil {
		return Image{}, fmt.Errorf("read the workload: %w", err)
	}
	unlock, err := lockFile(ctx, filepath.Join(cacheDir, "lock"))
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	pkgs := filepath.Join(cacheDir, "packages-"+key(strings.Join(packages, " ")))
	if err := once(pkgs, func(tmp string) error { return fetchPackages(ctx, tmp) }); err != nil {
		return Image{}, fmt.Errorf("fetch the guest's packages: %w", err)
	}
	out := filepath.Join(cacheDir, "image-"+key(filepath.Base(pkgs), string(program)))
	if err := once(out, func(tmp string) error { return assemble(tmp, pkgs, program) }); err != nil {
		return Image{}, fmt.Errorf("assemble the guest's image: %w", err)
	}
	return Image{Kernel: filepath.Join(out, "vmlinuz"), Initrd: filepath.Join(out, "initrd.cpio")}, nil
}

// BuildWorkload compiles the guest's program from the module's source, which
// the current directory must belong to, and returns its path in cacheDir. goTool
// is the go command; "" looks it up.
func BuildWorkload(ctx context.Context, goTool, cacheDir string) (string, error) {
	if goTool == "" {
		goTool = "go"
	}
	if err := os.MkdirAll(cacheDir, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(cacheDir, "workload-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	bin := filepath.Join(tmp, "workload")
	cmd := exec.CommandContext(ctx, goTool, "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", bin, "github.com/switchback-dr/switchback/lab/guest/workload")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the guest's workload: %w: %s", err, bytes.TrimSpace(out))
	}
	program, err := os.ReadFile(bin)
	if err != nil {
		return "", err
	}
	final := filepath.Join(cacheDir, "workload-"+key(string(program)))
	return final, os.Rename(bin, final)
}

func key(parts ...string) string {
	h := sha256.New()
	h.Write([]byte(formatVersion))
	for _, p := range parts {
		fmt.Fprintf(h, "%d %s", len(p), p)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

// once makes a directory with all or nothing in it.
func once(dir string, fill func(tmp string) error) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	tmp := dir + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(tmp, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := fill(tmp); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

func lockFile(ctx context.Context, path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if err := sleep(ctx, lockPoll); err != nil {
			f.Close()
			return nil, fmt.Errorf("wait for the lock on %s: %w", path, err)
		}
	}
}

// fetchPackages downloads and unpacks into tmp/root.
func fetchPackages(ctx context.Context, tmp string) error {
	debs := filepath.Join(tmp, "debs")
	if err := os.Mkdir(debs, 0o755); err != nil {
		return err
	}
	kernel, err := kernelPackage(ctx)
	if err != nil { // a machine without package lists
		if _, err := run(ctx, tmp, "apt-get", "update", "-q"); err != nil {
			return err
		}
		if kernel, err = kernelPackage(ctx); err != nil {
			return err
		}
	}
	// As root apt would download as user _apt, who may not write here.
	args := append([]string{"download", "-q", "-o", "APT::Sandbox::User=root", kernel}, packages...)
	if _, err := run(ctx, debs, "apt-get", args...); err != nil {
		if _, err := run(ctx, tmp, "apt-get", "update", "-q"); err != nil {
			return err
		}
		if kernel, err = kernelPackage(ctx); err != nil {
			return err
		}
		args[4] = kernel
		if _, err := run(ctx, debs, "apt-get", args...); err != nil {
			return err
		}
	}
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if _, err := run(ctx, tmp, "dpkg-deb", "-x", f, filepath.Join(tmp, "root")); err != nil {
			return err
		}
	}
	return os.RemoveAll(debs)
}

func kernelPackage(ctx context.Context) (string, error) {
	out, err := run(ctx, "", "apt-cache", "depends", "--important", "linux-image-cloud-amd64")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "Depends:" && strings.HasPrefix(f[1], "linux-image-") {
			return f[1], nil
		}
	}
	return "", errors.New("apt knows no package linux-image-cloud-amd64: run apt-get update")
}

// assemble writes vmlinuz and initrd.cpio. The archive is not compressed: an
// emulated processor reads faster than it inflates.
func assemble(tmp, pkgs string, program []byte) error {
	root := filepath.Join(pkgs, "root")
	kernels, _ := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if len(kernels) != 1 {
		return fmt.Errorf("%d kernels in %s, want 1", len(kernels), root)
	}
	if err := copyFile(filepath.Join(tmp, "vmlinuz"), kernels[0]); err != nil {
		return err
	}
	var a archive
	for _, d := range []string{"bin", "dev", "etc", "lib", "lib/modules", "lib/x86_64-linux-gnu", "lib64", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr", "usr/sbin", "var", "var/log"} {
		a.dir(d)
	}
	a.file("init", 0o755, program)
	a.link("sbin/shutdown", "/init") // what the guest agent calls to power off
	a.link("var/run", "/run")
	if err := a.copy("bin/busybox", filepath.Join(root, "bin/busybox")); err != nil {
		return err
	}
	a.link("bin/sh", "busybox")
	paths := map[string]string{}
	err := filepath.WalkDir(filepath.Join(root, "lib/modules"), func(p string, _ fs.DirEntry, err error) error {
		paths[strings.TrimSuffix(filepath.Base(p), ".ko")] = p
		return err
	})
	if err != nil {
		return err
	}
	for _, m := range modules {
		if paths[m] == "" {
			return fmt.Errorf("the kernel has no module %s", m)
		}
		if err := a.copy("lib/modules/"+m+".ko", paths[m]); err != nil {
			return err
		}
	}
	agent := filepath.Join(root, "usr/sbin/qemu-ga")
	if err := a.copy("usr/sbin/qemu-ga", agent); err != nil {
		return err
	}
	if err := addLibraries(&a, root, agent, map[string]bool{}); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(tmp, "initrd.cpio"), a.bytes(), 0o644)
}

// addLibraries adds what an ELF file needs, and what that needs.
func addLibraries(a *archive, root, path string, have map[string]bool) error {
	f, err := elf.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	libs, err := f.ImportedLibraries()
	if err != nil {
		return err
	}
	const loader = "ld-linux-x86-64.so.2"
	for _, lib := range append(libs, loader) {
		if have[lib] {
			continue
		}
		have[lib] = true
		from := ""
		for _, d := range []string{"lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "lib64"} {
			if p, err := filepath.EvalSymlinks(filepath.Join(root, d, lib)); err == nil {
				from = p
				break
			}
		}
		if from == "" {
			return fmt.Errorf("no package has %s, which %s needs", lib, filepath.Base(path))
		}
		to := "lib/x86_64-linux-gnu/" + lib
		if lib == loader {
			to = "lib64/" + lib
		}
		if err := a.copy(to, from); err != nil {
			return err
		}
		if err := addLibraries(a, root, from, have); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(to, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}

// run runs a program and returns what it printed; the error has its last words.
func run(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, bytes.TrimSpace(errs.Bytes()))
	}
	return out.String(), nil
}

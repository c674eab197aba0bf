package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/switchback-dr/switchback/qemu"
)

// makeScratch makes an empty image by copying one that QEMU's tool has made for
// this size before: a cycle every second cannot afford a process for it.
func (a *Agent) makeScratch(ctx context.Context, path string, sizeBytes int64) error {
	template := filepath.Join(a.cfg.ScratchDir, fmt.Sprintf("empty-%d.qcow2", sizeBytes))
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	from, err := os.Open(template)
	if errors.Is(err, fs.ErrNotExist) {
		temp := path + ".new"
		os.Remove(temp)
		if err := qemu.Create(ctx, temp, qemu.CreateOptions{Format: "qcow2", SizeBytes: sizeBytes}); err != nil {
			return err
		}
		if err := os.Rename(temp, template); err != nil {
			return err
		}
		from, err = os.Open(template)
	}
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	return errors.Join(err, to.Close())
}

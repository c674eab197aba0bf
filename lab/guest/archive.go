package guest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"time"
)

const lockPoll = 50 * time.Millisecond

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// archive is a cpio archive in the "newc" format that the kernel takes as an
// initial file system (Documentation/driver-api/early-userspace/buffer-format.rst).
// It is the same bytes for the same content: no times, no owners.
type archive struct {
	buf   bytes.Buffer
	inode int
}

func (a *archive) dir(name string)                               { a.add(name, 0o040755, nil) }
func (a *archive) link(name, target string)                      { a.add(name, 0o120777, []byte(target)) }
func (a *archive) file(name string, perm uint32, content []byte) { a.add(name, 0o100000|perm, content) }

// copy adds a file of the machine, executable.
func (a *archive) copy(name, from string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	a.file(name, 0o755, b)
	return nil
}

func (a *archive) add(name string, mode uint32, content []byte) {
	a.inode++
	// magic, then inode, mode, uid, gid, links, mtime, size, 4 × device, name size, check.
	fmt.Fprintf(&a.buf, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		a.inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	a.pad()
	a.buf.Write(content)
	a.pad()
}

func (a *archive) pad() {
	for a.buf.Len()%4 != 0 {
		a.buf.WriteByte(0)
	}
}

func (a *archive) bytes() []byte {
	a.inode = -1
	a.add("TRAILER!!!", 0, nil)
	return a.buf.Bytes()
}

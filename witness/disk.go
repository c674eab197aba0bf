package witness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// disk is an opened source of guest-visible content. It serves one goroutine.
type disk struct {
	*nbdConn
	server *exec.Cmd // of our own, for a path
	died   chan struct{}
	dir    string
	uri    string
}

// openDisk opens a path or an NBD URI.
func openDisk(ctx context.Context, name string) (_ *disk, err error) {
	d := &disk{uri: name}
	defer func() {
		if err != nil {
			d.close()
			err = fmt.Errorf("open disk %s: %w", name, err)
		}
	}()
	if !isURI(name) {
		if err := d.serve(ctx, name); err != nil {
			return nil, err
		}
	}
	d.nbdConn, err = dialNBD(ctx, d.uri)
	return d, err
}

func isURI(name string) bool {
	return strings.HasPrefix(name, "nbd:") || strings.HasPrefix(name, "nbd+")
}

func (d *disk) close() {
	if d.nbdConn != nil {
		d.nbdConn.close()
	}
	if d.server != nil {
		d.server.Process.Kill()
		<-d.died
	}
	if d.dir != "" {
		os.RemoveAll(d.dir)
	}
}

// serve starts qemu-nbd on an image. Locks are left alone: a guest that is
// started meanwhile is not kept from it.
func (d *disk) serve(ctx context.Context, path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	format, err := imageFormat(ctx, path)
	if err != nil {
		return err
	}
	if d.dir, err = os.MkdirTemp("", "witness-"); err != nil {
		return err
	}
	opts, err := json.Marshal(map[string]any{"driver": format, "force-share": true, "read-only": true,
		"file": map[string]any{"driver": "file", "filename": path}})
	if err != nil {
		return err
	}
	socket := filepath.Join(d.dir, "s")
	// The json: file name can quote any path; --image-opts cannot.
	d.server = exec.CommandContext(ctx, "qemu-nbd", "-r", "-t", "-e", "8", "-k", socket, "json:"+string(opts))
	var out bytes.Buffer
	d.server.Stderr = &out
	if err := d.server.Start(); err != nil {
		d.server = nil
		return err
	}
	d.died = make(chan struct{})
	go func() { // ends with the process; close kills it and waits
		d.server.Wait()
		close(d.died)
	}()
	for begin := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		// The file is there a moment before the server listens.
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			d.uri = "nbd+unix:///?socket=" + url.QueryEscape(socket)
			return nil
		}
		select {
		case <-d.died:
			return fmt.Errorf("qemu-nbd ended: %s", bytes.TrimSpace(out.Bytes()))
		default:
		}
		if time.Since(begin) > 20*time.Second {
			return errors.New("qemu-nbd does not come up")
		}
	}
}

func imageFormat(ctx context.Context, path string) (string, error) {
	out, err := exec.CommandContext(ctx, "qemu-img", "info", "-U", "--output=json", path).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			return "", fmt.Errorf("qemu-img info: %s", bytes.TrimSpace(exit.Stderr))
		}
		return "", err
	}
	var info struct{ Format string }
	if err := json.Unmarshal(out, &info); err != nil {
		return "", err
	}
	return info.Format, nil
}

// extents maps the whole disk in order. Neighbours of one kind are joined.
func (d *disk) extents() ([]extent, error) {
	var es []extent
	for off := int64(0); off < d.size; {
		part, err := d.blockStatus(off, min(d.size-off, 1<<30))
		if err != nil {
			return nil, err
		}
		for _, e := range part {
			if e.n <= 0 {
				return nil, errors.New("block status of no length")
			}
			off += e.n
			if k := len(es) - 1; k >= 0 && es[k].zero == e.zero {
				es[k].n += e.n
			} else {
				es = append(es, e)
			}
		}
	}
	return es, nil
}

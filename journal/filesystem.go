package journal

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"github.com/switchback-dr/switchback"
)

// fileSystem is the operations that a crash can come between. Tests count,
// fail and record them.
type fileSystem interface {
	// create makes an empty file for writing, replacing one that exists.
	create(path string) (file, error)
	rename(from, to string) error
	remove(path string) error
	// syncDir makes creations, renames and removals in dir durable.
	syncDir(dir string) error
	// free returns the bytes that this process may still write below dir.
	free(dir string) (int64, error)
}

type file interface {
	io.WriteCloser
	Sync() error
}

// osFileSystem is the real one.
type osFileSystem struct{}

func (osFileSystem) create(path string) (file, error) {
	return os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
}
func (osFileSystem) rename(from, to string) error { return os.Rename(from, to) }
func (osFileSystem) remove(path string) error     { return os.Remove(path) }

func (osFileSystem) syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

func (osFileSystem) free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, err
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// fault classifies an error of the file system. An error that is classified
// already is returned as it is.
func fault(err error, format string, args ...any) error {
	var typed *switchback.Error
	if err == nil || errors.As(err, &typed) {
		return err
	}
	code := switchback.CodeInternal
	hint := ""
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		code, hint = switchback.CodeNoSpace, "free space or add some; replication goes on by itself"
	}
	e := switchback.Errorf(code, format, args...)
	e.Err, e.Hint = err, hint
	return e
}

// envelope is how manifest and pins lie on disk.
type envelope struct {
	Version  int             `json:"version"`
	Checksum string          `json:"checksum"`
	Content  json.RawMessage `json:"content"`
}

const documentVersion = 1

func documentSum(content []byte) (string, error) {
	var compact bytes.Buffer
	if err := json.Compact(&compact, content); err != nil {
		return "", err
	}
	sum := xxh3.Hash128(compact.Bytes()).Bytes()
	return hex.EncodeToString(sum[:]), nil
}

// writeDocument durably replaces the document at path.
func writeDocument(fs fileSystem, path string, content any) error {
	raw, err := json.Marshal(content)
	if err != nil {
		return err
	}
	sum, err := documentSum(raw)
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(envelope{documentVersion, sum, raw}, "", " ")
	if err != nil {
		return err
	}
	temp := path + ".tmp"
	err = func() error {
		f, err := fs.create(temp)
		if err != nil {
			return err
		}
		if _, err = f.Write(append(b, '\n')); err == nil {
			err = f.Sync()
		}
		if e := f.Close(); err == nil {
			err = e
		}
		if err == nil {
			err = fs.rename(temp, path)
		}
		if err != nil {
			fs.remove(temp)
			return err
		}
		return fs.syncDir(filepath.Dir(path))
	}()
	return fault(err, "write %s", path)
}

// readDocument reads the document at path into content.
func readDocument(path string, content any) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return switchback.Errorf(switchback.CodeNotFound, "no file %s: %w", path, err)
	} else if err != nil {
		return fault(err, "read %s", path)
	}
	var e envelope
	if err := json.Unmarshal(b, &e); err != nil {
		return corrupt("%s: %w", path, err)
	}
	if e.Version != documentVersion {
		return switchback.Errorf(switchback.CodeUnsupported, "%s has format version %d", path, e.Version).
			WithHint("this build knows version %d; upgrade it", documentVersion)
	}
	sum, err := documentSum(e.Content)
	if err != nil || sum != e.Checksum {
		return corrupt("%s does not match its checksum", path)
	}
	if err := json.Unmarshal(e.Content, content); err != nil {
		return corrupt("%s: %w", path, err)
	}
	return nil
}

package server

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"github.com/switchback-dr/switchback/internal/durable"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/klauspost/compress/zstd"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/operation"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// A backup is a tar archive, compressed with zstd. Its first entry is
// backup.json, a Backup; the others are the files it lists, in that order, with
// paths as in the state directory.

// manifestFile is the first entry of a backup.
const manifestFile = "backup.json"

// unfinishedPrefix is of the folders in which backups are made.
const unfinishedPrefix = ".backup-"

// backupFormat is the version of the format above.
const backupFormat = 1

// kept are the files of the state directory, beside the database, that a backup
// holds. The server's and the first administrator's credentials are not among
// them: the CA makes new ones.
var kept = []string{caDir + "/ca.pem"}

// Backup says what a backup holds.
type Backup struct {
	Format       int          `json:"format"`
	MadeAt       time.Time    `json:"made_at"`
	Version      string       `json:"version"`
	Installation string       `json:"installation"`
	Files        []BackupFile `json:"files"`
	// Suspended are the operations that were under way; set by Restore.
	Suspended []switchback.OperationID `json:"suspended,omitempty"`
}

// BackupFile is one file of a backup.
type BackupFile struct {
	Name      string `json:"name"`
	SizeBytes int64  `json:"size_bytes"`
	// SHA256 is hexadecimal.
	SHA256 string `json:"sha256"`
}

// WriteBackup copies the embedded installation in stateDir into a new file,
// readable by the owner only: the database as of one instant, also while a server
// runs on it, checked, and the CA. Whoever has it can act as any part of the
// installation. CodeConflict: the file exists.
func WriteBackup(ctx context.Context, stateDir, file, version string) (b Backup, err error) {
	if _, err := os.Lstat(file); err == nil {
		return b, switchback.Errorf(switchback.CodeConflict, "%s exists", file).WithHint("choose another name: a backup is never overwritten")
	}
	database := filepath.Join(stateDir, databaseFile)
	if _, err := os.Stat(database); err != nil {
		return b, switchback.Errorf(switchback.CodeNotFound, "no embedded installation: %w", err).
			WithHint("name its directory with --state; an installation on PostgreSQL is backed up with PostgreSQL's tools and a copy of %s", keyFile)
	}
	ca, err := transport.OpenCA(filepath.Join(stateDir, caDir))
	if err != nil {
		return b, err
	}
	work, err := os.MkdirTemp(filepath.Dir(file), unfinishedPrefix+"*") // 0700
	if err != nil {
		return b, err
	}
	defer os.RemoveAll(work)
	if err := store.Snapshot(ctx, database, filepath.Join(work, databaseFile)); err != nil {
		return b, err
	}
	b = Backup{Format: backupFormat, MadeAt: time.Now().UTC(), Version: version, Installation: ca.Installation()}
	paths := map[string]string{databaseFile: filepath.Join(work, databaseFile)}
	for _, name := range kept {
		paths[name] = filepath.Join(stateDir, filepath.FromSlash(name))
	}
	for _, name := range append([]string{databaseFile}, kept...) {
		f, err := describe(name, paths[name])
		if err != nil {
			return b, err
		}
		b.Files = append(b.Files, f)
	}
	archive := filepath.Join(work, "archive")
	if err := writeArchive(archive, b, paths); err != nil {
		return b, fmt.Errorf("write backup: %w", err)
	}
	// A link does not replace what has come to be there meanwhile.
	if err := os.Link(archive, file); err != nil {
		return b, fmt.Errorf("write backup: %w", err)
	}
	return b, durable.SyncDir(filepath.Dir(file))
}

func describe(name, path string) (BackupFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return BackupFile{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	return BackupFile{Name: name, SizeBytes: n, SHA256: hex.EncodeToString(h.Sum(nil))}, err
}

func writeArchive(path string, b Backup, paths map[string]string) (err error) {
	out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	z, err := zstd.NewWriter(out)
	if err != nil {
		return err
	}
	defer z.Close()
	t := tar.NewWriter(z)
	manifest, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return err
	}
	header := func(name string, size int64) error {
		return t.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: size, ModTime: b.MadeAt, Format: tar.FormatPAX})
	}
	if err := header(manifestFile, int64(len(manifest))); err != nil {
		return err
	}
	if _, err := t.Write(manifest); err != nil {
		return err
	}
	for _, f := range b.Files {
		if err := header(f.Name, f.SizeBytes); err != nil {
			return err
		}
		in, err := os.Open(paths[f.Name])
		if err != nil {
			return err
		}
		_, err = io.Copy(t, in)
		if err = errors.Join(err, in.Close()); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close(), out.Sync())
}

// Restore makes an embedded installation in stateDir, which must be missing or
// empty, from a backup. All of it is checked before stateDir appears. The restored
// server knows nothing of what happened after the backup; what was under way then
// is suspended (failed, to be retried or cancelled), since it may have ended since;
// what nobody had approved is cancelled.
// Agents refuse commands of an epoch that they know to be over.
func Restore(ctx context.Context, file, stateDir string) (b Backup, err error) {
	if entries, err := os.ReadDir(stateDir); err == nil && len(entries) > 0 {
		return b, switchback.Errorf(switchback.CodeConflict, "%s is not empty", stateDir).WithHint("restore into a new directory; nothing is overwritten")
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return b, err
	}
	stateDir = filepath.Clean(stateDir)
	if err := os.MkdirAll(filepath.Dir(stateDir), 0o755); err != nil {
		return b, err
	}
	work, err := os.MkdirTemp(filepath.Dir(stateDir), ".restore-*") // 0700
	if err != nil {
		return b, err
	}
	defer os.RemoveAll(work)
	if b, err = readArchive(file, work); err != nil {
		return b, err
	}
	database := filepath.Join(work, databaseFile)
	if err := store.CheckFile(ctx, database); err != nil {
		return b, err
	}
	ca, err := transport.OpenCA(filepath.Join(work, caDir))
	if err != nil {
		return b, err
	}
	if ca.Installation() != b.Installation {
		return b, switchback.Errorf(switchback.CodeCorrupt, "backup of %s holds the CA of %s", b.Installation, ca.Installation())
	}
	if err := suspend(ctx, database, &b); err != nil {
		return b, err
	}
	if err := durable.SyncDir(work); err != nil {
		return b, err
	}
	if err := os.Remove(stateDir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return b, err
	}
	if err := os.Rename(work, stateDir); err != nil {
		return b, err
	}
	return b, durable.SyncDir(filepath.Dir(stateDir))
}

// suspend stops what was under way when the backup was made.
func suspend(ctx context.Context, database string, b *Backup) (err error) {
	st, err := store.Open(ctx, database)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	cause := switchback.Errorf(switchback.CodeRefused, "the server was restored from its backup of %s, when this was under way", b.MadeAt.Format(time.RFC3339)).
		WithHint("see how the VM stands at both sites, then retry or cancel the operation")
	if err := markRestored(ctx, st, time.Now()); err != nil {
		return err
	}
	list, err := st.SuspendOperations(ctx, cause, time.Now())
	if err != nil {
		return err
	}
	for _, rec := range list {
		if rec.State == operation.StateFailed {
			b.Suspended = append(b.Suspended, rec.ID)
		}
		if rec.Protection == "" || rec.Lane != "" {
			continue
		}
		p, err := st.Protection(ctx, rec.Protection)
		if switchback.CodeOf(err) == switchback.CodeNotFound {
			continue
		}
		if err != nil {
			return err
		}
		switch {
		case rec.State == operation.StateCancelled: // nothing of it has happened
			if p.Operation == rec.ID {
				p.Operation = ""
			}
			p.Ended = rec.ID
			notApproved(&p, rec, time.Now())
		case p.Operation == rec.ID:
			continue
		default:
			p.Operation = rec.ID
		}
		if _, err := st.UpdateProtection(ctx, p); err != nil {
			return err
		}
	}
	return nil
}

// maxManifest bounds what is believed to be a manifest.
const maxManifest = 1 << 20

// readArchive unpacks a backup into dir. CodeCorrupt: it is none, or damaged.
func readArchive(file, dir string) (b Backup, err error) {
	in, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return b, switchback.Errorf(switchback.CodeNotFound, "no backup: %w", err)
	}
	if err != nil {
		return b, err
	}
	defer in.Close()
	damaged := func(err error) error {
		return switchback.Errorf(switchback.CodeCorrupt, "%s is not a whole backup of a Switchback server: %w", file, err).WithHint("use another backup")
	}
	z, err := zstd.NewReader(in)
	if err != nil {
		return b, damaged(err)
	}
	defer z.Close()
	t := tar.NewReader(z)
	h, err := t.Next()
	if err != nil {
		return b, damaged(err)
	}
	if h.Name != manifestFile || h.Size > maxManifest {
		return b, damaged(fmt.Errorf("it begins with %q", h.Name))
	}
	if err := json.NewDecoder(t).Decode(&b); err != nil {
		return b, damaged(err)
	}
	if b.Format != backupFormat {
		return b, switchback.Errorf(switchback.CodeUnsupported, "%s has format %d, this version reads %d", file, b.Format, backupFormat).
			WithHint("restore with the version that made it, %s", b.Version)
	}
	for _, f := range b.Files {
		h, err := t.Next()
		if err != nil {
			return b, damaged(err)
		}
		if h.Name != f.Name || !filepath.IsLocal(f.Name) {
			return b, damaged(fmt.Errorf("%q where %q should be", h.Name, f.Name))
		}
		if err := unpack(t, f, filepath.Join(dir, filepath.FromSlash(f.Name))); err != nil {
			return b, damaged(err)
		}
	}
	if _, err := t.Next(); err != io.EOF {
		return b, damaged(errors.New("there is more in it than it lists"))
	}
	return b, nil
}

func unpack(r io.Reader, f BackupFile, path string) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(out, h), r)
	if err != nil {
		return err
	}
	if n != f.SizeBytes || hex.EncodeToString(h.Sum(nil)) != f.SHA256 {
		return fmt.Errorf("%s does not match its checksum", f.Name)
	}
	return errors.Join(out.Sync(), durable.SyncDir(filepath.Dir(path)))
}

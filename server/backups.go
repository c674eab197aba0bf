package server

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/objectstore"
)

// BackupConfig says where a server with an embedded store backs itself up to.
type BackupConfig struct {
	// Dir keeps the backups; "" = none are made.
	Dir string
	// Every is the time between two; 1 h if zero.
	Every time.Duration
	// Keep is how many are kept, the newest; 24 if zero.
	Keep int
	// Objects, if set, gets a copy of each that is kept.
	Objects *objectstore.Config
}

const (
	backupName   = "switchback-20060102T150405Z.backup" // as time.Format takes it
	backupPrefix = "switchback-"
	// backupRetry is how soon a backup that failed is tried again.
	backupRetry = time.Minute
)

// check completes the configuration and makes the directory.
func (c *BackupConfig) check(embedded bool) error {
	if c.Dir == "" {
		if c.Objects != nil {
			return switchback.Errorf(switchback.CodeInvalid, "copies of backups need a directory of backups").WithHint("add --backup-dir")
		}
		return nil
	}
	if !embedded {
		return switchback.Errorf(switchback.CodeUnsupported, "the server backs up its embedded store only").
			WithHint("back PostgreSQL up with its own tools (pg_dump, pg_basebackup), and keep a copy of %s", keyFile)
	}
	if c.Every < 0 || c.Keep < 0 {
		return switchback.Errorf(switchback.CodeInvalid, "backups every %s, %d kept: both must be positive", c.Every, c.Keep)
	}
	if c.Every == 0 {
		c.Every = time.Hour
	}
	if c.Keep == 0 {
		c.Keep = 24
	}
	if c.Objects != nil {
		if err := c.Objects.Validate(); err != nil {
			return err
		}
	}
	return os.MkdirAll(c.Dir, 0o700)
}

// backups makes backups until ctx ends. A restarted server goes on with the
// rhythm of the backups that it finds.
func (s *Server) backups(ctx context.Context) {
	cfg := s.cfg.Backup
	for {
		wait := time.Duration(0)
		if list, err := listBackups(cfg.Dir); err == nil && len(list) > 0 {
			newest, _ := time.Parse(backupName, list[len(list)-1]) // as it was found
			if age := time.Since(newest); age >= 0 {               // else the clock was wrong
				wait = max(0, cfg.Every-age)
			}
		}
		if !sleep(ctx, wait) {
			return
		}
		if err := s.backUp(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("no backup of the server, trying again", "dir", cfg.Dir, "error", err)
			if !sleep(ctx, min(backupRetry, cfg.Every)) {
				return
			}
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return true
	}
}

// backUp makes one backup, copies what is not copied yet, and thins.
func (s *Server) backUp(ctx context.Context) error {
	cfg := s.cfg.Backup
	if err := clearUnfinished(cfg.Dir, time.Now()); err != nil {
		return err
	}
	name := time.Now().UTC().Format(backupName)
	_, err := WriteBackup(ctx, s.cfg.StateDir, filepath.Join(cfg.Dir, name), s.cfg.Version)
	if err != nil && switchback.CodeOf(err) != switchback.CodeConflict { // made in this very second
		return err
	}
	s.log.Debug("backed up", "backup", name)
	list, err := listBackups(cfg.Dir)
	if err != nil {
		return err
	}
	old := list[:max(0, len(list)-cfg.Keep)]
	for _, name := range old {
		if err := os.Remove(filepath.Join(cfg.Dir, name)); err != nil {
			return err
		}
	}
	if cfg.Objects == nil {
		return nil
	}
	if err := copyBackups(ctx, *cfg.Objects, cfg.Dir, list[len(old):], cfg.Keep); err != nil {
		// The backup is made; its copy comes with the next one.
		s.log.Warn("backup of the server not copied, trying again with the next", "error", err)
	}
	return nil
}

// clearUnfinished removes what backups that a crash cut short have left. One of
// today may be in the making.
func clearUnfinished(dir string, now time.Time) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), unfinishedPrefix) || !e.IsDir() {
			continue
		}
		if st, err := e.Info(); err != nil || now.Sub(st.ModTime()) < 24*time.Hour {
			continue // gone meanwhile, or young
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// listBackups returns the names of the backups in a directory, oldest first.
func listBackups(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir) // sorted
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if _, err := time.Parse(backupName, e.Name()); err == nil {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// copyBackups puts the backups that are missing into the object store, and removes
// all but the newest there.
func copyBackups(ctx context.Context, cfg objectstore.Config, dir string, names []string, keep int) error {
	objects, err := objectstore.Open(cfg)
	if err != nil {
		return err
	}
	list, err := objects.List(ctx, backupPrefix)
	if err != nil {
		return err
	}
	var there []string
	for _, o := range list {
		if _, err := time.Parse(backupName, o.Key); err == nil {
			there = append(there, o.Key)
		}
	}
	for _, name := range names {
		if slices.Contains(there, name) {
			continue
		}
		if err := putFile(ctx, objects, name, filepath.Join(dir, name)); err != nil {
			return err
		}
		there = append(there, name)
	}
	slices.Sort(there)
	for _, name := range there[:max(0, len(there)-keep)] {
		if err := objects.Remove(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func putFile(ctx context.Context, objects *objectstore.Store, key, path string) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return objects.Put(ctx, key, f, st.Size())
}

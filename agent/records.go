package agent

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/recovery"
)

// records are copies of what the server knows of the VMs that this agent has a
// part in, one file each. The agent makes no use of them: they are what a new
// server learns where the old one is lost. They come with the answers to reports.
type records struct {
	dir  string
	mu   sync.Mutex
	byID map[switchback.ProtectionID]recovery.Record
}

// loadRecords reads all of dir. A file that does not parse is no copy: the server sends it again.
func loadRecords(dir string) (*records, error) {
	r := &records{dir: dir, byID: map[switchback.ProtectionID]recovery.Record{}}
	entries, err := os.ReadDir(dir)
	if err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			return nil, err
		}
		var rec recovery.Record
		if json.Unmarshal(b, &rec) == nil {
			r.byID[switchback.ProtectionID(id)] = rec
		}
	}
	return r, nil
}

func (r *records) path(id switchback.ProtectionID) string {
	return filepath.Join(r.dir, string(id)+".json")
}

func (r *records) of(id switchback.ProtectionID) (recovery.Record, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	rec, ok := r.byID[id]
	return rec, ok
}

// keep stores a record unless the one here is as new.
func (r *records) keep(rec recovery.Record) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	id := rec.Protection.ID
	if old, ok := r.byID[id]; ok && !rec.Newer(old) {
		return nil
	}
	b, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := durable.WriteFile(r.path(id), b, 0o600); err != nil {
		return err
	}
	r.byID[id] = rec
	return nil
}

func (r *records) forget(id switchback.ProtectionID) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.byID[id]; !ok {
		return nil
	}
	delete(r.byID, id)
	return durable.Remove(r.path(id))
}

// keepRecords stores what the server has told of the VMs that are known here.
func (a *Agent) keepRecords(list []recovery.Record) {
	for _, rec := range list {
		if _, err := a.vm(rec.Protection.ID); err != nil {
			continue // released meanwhile
		}
		if err := a.records.keep(rec); err != nil {
			a.log.Warn("the server's record of a VM is not stored", "protection", rec.Protection.ID, "error", err)
		}
	}
}

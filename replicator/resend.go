package replicator

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/extent"
	"github.com/switchback-dr/switchback/internal/durable"
)

// Ranges that the target holds damaged are sent again with the next point,
// whether they have changed or not. They are kept in a file until a point with
// them is acknowledged. In the index their blocks become invalid at the beginning
// of each cycle that carries them, so that it suppresses nothing of them; a cycle
// that fails, or dies, does that again.

func (e *Engine) resendPath() string { return filepath.Join(e.cfg.Dir, "resend.json") }

// Resend makes the next point carry these ranges, by disk, durably.
func (e *Engine) Resend(ranges map[string]extent.Set) error {
	for name := range ranges {
		if !containsDisk(e.cfg.Disks, name) {
			return switchback.Errorf(switchback.CodeNotFound, "the VM has no disk %s", name)
		}
	}
	e.resendMu.Lock()
	defer e.resendMu.Unlock()
	have, err := e.loadResend()
	if err != nil {
		return err
	}
	return e.saveResend(unite(have, ranges))
}

func containsDisk(disks []switchback.Disk, name string) bool {
	for _, d := range disks {
		if d.Name == name {
			return true
		}
	}
	return false
}

func unite(a, b map[string]extent.Set) map[string]extent.Set {
	out := map[string]extent.Set{}
	for _, m := range []map[string]extent.Set{a, b} {
		for name, s := range m {
			out[name] = out[name].Union(s)
		}
	}
	return out
}

func (e *Engine) loadResend() (map[string]extent.Set, error) {
	b, err := os.ReadFile(e.resendPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var m map[string]extent.Set
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		return nil, fmt.Errorf("ranges to send again: %w", err)
	}
	return m, nil
}

func (e *Engine) saveResend(m map[string]extent.Set) error {
	path := e.resendPath()
	if len(m) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("ranges to send again: %w", err)
		}
		return nil
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	err = durable.WriteFile(path, b, 0o600)
	if err != nil {
		return fmt.Errorf("ranges to send again: %w", err)
	}
	return nil
}

// resendToo adds what has to be sent again to must and voids it in the index.
func (e *Engine) resendToo(must map[string]extent.Set) (with, resend map[string]extent.Set, err error) {
	e.resendMu.Lock()
	defer e.resendMu.Unlock()
	if resend, err = e.loadResend(); err != nil || len(resend) == 0 {
		return must, nil, err
	}
	aligned := map[string]extent.Set{}
	for i, d := range e.cfg.Disks {
		aligned[d.Name] = resend[d.Name].Align(BlockSize).Clip(0, d.SizeBytes)
		for _, r := range aligned[d.Name].Ranges() {
			if err := e.index.Void(i, r.Offset, r.Length); err != nil {
				return must, nil, err
			}
		}
	}
	return unite(must, aligned), resend, e.index.SyncDistrust()
}

// resent forgets what a point that was acknowledged has carried.
func (e *Engine) resent(carried map[string]extent.Set) error {
	if len(carried) == 0 {
		return nil
	}
	e.resendMu.Lock()
	defer e.resendMu.Unlock()
	have, err := e.loadResend()
	if err != nil {
		return err
	}
	left := map[string]extent.Set{}
	for name, s := range have {
		if s = s.Subtract(carried[name]); !s.IsEmpty() {
			left[name] = s
		}
	}
	return e.saveResend(left)
}

// Void makes blocks invalid: equal to nothing, whatever the index knew of them.
func (x *Index) Void(disk int, off, length int64) error {
	d := x.disks[disk]
	first, last := off/BlockSize, (off+length+BlockSize-1)/BlockSize
	for first < last {
		n := min(last-first, 1<<14)
		entries := make([]byte, 16*n)
		for i := range entries {
			entries[i] = 0xff
		}
		if err := d.write(first, entries); err != nil {
			return err
		}
		first += n
	}
	d.distrusted = true
	return nil
}

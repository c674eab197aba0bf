package journal

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/switchback-dr/switchback"
)

// Pin keeps a point readable: no fold passes it and it is not dropped. It is
// durable and outlives the process that set it.
type Pin struct {
	Name     string              `json:"name"`
	Sequence switchback.Sequence `json:"sequence"`
	// Info is for whoever set it, to find what it belongs to.
	Info map[string]string `json:"info,omitempty"`
	// Damaged: the file cannot be read; everything is kept until the pin is removed.
	Damaged bool `json:"-"`
}

const pinDir = "pins"

var pinName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

func pinPath(dir, name string) string { return filepath.Join(dir, pinDir, name+".json") }

// readPins reads all pins of the replica in dir.
func readPins(dir string) (map[string]Pin, error) {
	pins := map[string]Pin{}
	entries, err := os.ReadDir(filepath.Join(dir, pinDir))
	if errors.Is(err, os.ErrNotExist) {
		return pins, nil
	} else if err != nil {
		return nil, fault(err, "read pins")
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		var p Pin
		if err := readDocument(filepath.Join(dir, pinDir, e.Name()), &p); err != nil || p.Name != name {
			p = Pin{Name: name, Damaged: true}
		}
		pins[name] = p
	}
	return pins, nil
}

// Pin durably pins the point seq under name. Pinning the same point under the
// same name again replaces info; another point is refused with CodeConflict.
func (r *Replica) Pin(name string, seq switchback.Sequence, info map[string]string) error {
	if !pinName.MatchString(name) {
		return switchback.Errorf(switchback.CodeInvalid, "pin name %q: use letters, digits, dots, dashes and underscores", name)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.checkReadable(seq); err != nil {
		return err
	}
	if old, ok := r.pins[name]; ok && old.Sequence != seq {
		return switchback.Errorf(switchback.CodeConflict, "pin %s is at point %d", name, old.Sequence).WithHint("unpin it first")
	}
	p := Pin{Name: name, Sequence: seq, Info: info}
	if err := writeDocument(r.fs, pinPath(r.dir, name), p); err != nil {
		return err
	}
	r.pins[name] = p
	return nil
}

// Unpin durably removes a pin; one that is not there is no error. One that keeps
// a branch's point is refused (CodeRefused).
func (r *Replica) Unpin(name string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.pins[name]; !ok {
		return nil
	}
	for _, b := range r.branches {
		if b.Pin == name {
			return switchback.Errorf(switchback.CodeRefused, "pin %s keeps point %d, which branch %s needs", name, b.Point, b.Name).WithHint("drop the branch first")
		}
	}
	err := r.fs.remove(pinPath(r.dir, name))
	if err == nil || errors.Is(err, os.ErrNotExist) {
		err = r.fs.syncDir(filepath.Join(r.dir, pinDir))
	}
	if err != nil {
		return fault(err, "remove pin %s", name)
	}
	delete(r.pins, name)
	return nil
}

// Pins returns all pins, by name.
func (r *Replica) Pins() []Pin {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sortedPins()
}

func (r *Replica) sortedPins() []Pin {
	var out []Pin
	for _, p := range r.pins {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b Pin) int { return strings.Compare(a.Name, b.Name) })
	return out
}

package journal

import (
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/switchback-dr/switchback"
)

// Definition describes the VM whose points a replica holds, as its source last
// said, so that the points can be started with the source gone. It belongs to no
// point: it is the newest one.
type Definition struct {
	// Text is the hypervisor's own form of the inactive definition. It is kept as
	// it is, also where segments are sealed: secrets do not belong in it.
	Text string `json:"text"`
	// Networks are those the VM is connected to at its source.
	Networks []string `json:"networks,omitempty"`
	// Time is when the source was seen to have it, by the source's clock.
	Time time.Time `json:"time"`
}

func definitionPath(dir string) string { return filepath.Join(dir, "definition.json") }

// ReadDefinition reads the definition kept in the replica in dir. It needs no
// lock. CodeNotFound: none was sent yet.
func ReadDefinition(dir string) (Definition, error) {
	var d Definition
	err := readDocument(definitionPath(dir), &d)
	if errors.Is(err, fs.ErrNotExist) {
		return d, switchback.Errorf(switchback.CodeNotFound, "replica %s keeps no definition of its VM", dir).
			WithHint("the source's agent sends it while it replicates")
	}
	return d, err
}

// SetDefinition durably replaces the definition. One that says the same is left
// alone; a damaged one is replaced.
func (r *Replica) SetDefinition(d Definition) error {
	if d.Text == "" {
		return switchback.Errorf(switchback.CodeInvalid, "an empty definition")
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return switchback.Errorf(switchback.CodeInternal, "replica is closed")
	}
	old, err := ReadDefinition(r.dir)
	if err == nil && old.Text == d.Text && slices.Equal(old.Networks, d.Networks) {
		return nil
	}
	if err != nil && switchback.CodeOf(err) != switchback.CodeNotFound && switchback.CodeOf(err) != switchback.CodeCorrupt {
		return err
	}
	return writeDocument(r.fs, definitionPath(r.dir), d)
}

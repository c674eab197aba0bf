package replicator

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
)

// indexKey returns the key of the block hashes in dir, made once at random so
// that nobody can prepare two blocks which look equal to it.
func indexKey(dir string) (uint64, error) {
	path := filepath.Join(dir, "index.key")
	if b, err := os.ReadFile(path); err == nil && len(b) == 8 {
		return binary.LittleEndian.Uint64(b), nil
	}
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, fmt.Errorf("make index key: %w", err)
	}
	if err := os.WriteFile(path, b[:], 0o600); err != nil {
		return 0, fmt.Errorf("write index key: %w", err)
	}
	return binary.LittleEndian.Uint64(b[:]), nil
}

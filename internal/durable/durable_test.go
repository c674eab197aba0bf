package durable_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/switchback-dr/switchback/internal/durable"
)

func TestWriteFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	path := filepath.Join(dir, "f")
	for _, content := range []string{"one", "two"} {
		if err := durable.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(path)
		st, serr := os.Stat(path)
		if err != nil || serr != nil || string(b) != content || st.Mode().Perm() != 0o755 {
			t.Errorf("%q, %v, %v, %v", b, st.Mode(), err, serr)
		}
	}
	if err := durable.WriteFile(filepath.Join(path, "below"), nil, 0o600); err == nil {
		t.Error("a file was made below a file")
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
		t.Errorf("left behind: %v, %v", list, err)
	}
	for range 2 {
		if err := durable.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

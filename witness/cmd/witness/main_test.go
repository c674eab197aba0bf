package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestRun(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b.qcow2")
	if err := os.WriteFile(a, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("qemu-img", "convert", "-O", "qcow2", a, b).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	c := filepath.Join(dir, "c")
	if err := os.WriteFile(c, append(make([]byte, 1<<20-4096), "garbage that is not a record"...), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(c, 1<<20); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		args []string
		good bool
		fail bool
	}{
		"hash":          {[]string{"sha256", a}, true, false},
		"plain hash":    {[]string{"sha256", "-plain", b}, true, false},
		"identical":     {[]string{"compare", a, b}, true, false},
		"different":     {[]string{"compare", c, b}, false, false},
		"changed":       {[]string{"changed", "-block", "4096", c, b}, true, false},
		"records":       {[]string{"records", "-offset", "0", "-slots", "256", a}, true, false},
		"bad records":   {[]string{"records", "-offset", "0", "-slots", "256", c}, false, false},
		"empty console": {[]string{"console", filepath.Join(dir, "none")}, true, false},
		"nothing":       {nil, false, true},
		"unknown":       {[]string{"frob"}, false, true},
		"no disk":       {[]string{"sha256"}, false, true},
		"missing disk":  {[]string{"sha256", filepath.Join(dir, "none")}, false, true},
	} {
		good, err := run(t.Context(), tt.args)
		if good != tt.good || (err != nil) != tt.fail {
			t.Errorf("%s: %v, %v", name, good, err)
		}
	}
}

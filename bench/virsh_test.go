package main

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestVirsh(t *testing.T) {
	if _, err := exec.LookPath("virsh"); err != nil {
		t.Fatal("virsh is not installed: scripts/install-packages.sh test")
	}
	v, err := openVirsh(t.Context(), "test:///default")
	if err != nil {
		t.Fatal(err)
	}
	defer v.close()
	for range 3 {
		out, err := v.do(t.Context(), "list --name")
		if err != nil || out != "test" {
			t.Fatalf("list: %q, %v", out, err)
		}
		if _, err := v.do(t.Context(), "dominfo nobody"); err == nil || !strings.Contains(err.Error(), "nobody") {
			t.Fatalf("an unknown domain gave %v", err)
		}
	}
	begin := time.Now()
	for range 100 {
		if _, err := v.do(t.Context(), "domstate test"); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%v a command", time.Since(begin)/100)
}

package lab

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/objectstore/s3test"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/seal"
)

// TestStorage keeps the points of a guest that writes encrypted and, when they
// are some seconds old, in an S3 bucket: what was asked of an agent without key
// or store is refused, an old point starts from the bucket, a store that is down
// costs no point, and what unprotect removes is removed there, too.
func TestStorage(t *testing.T) {
	f := addGuest(t, Guest{Name: "st", ContentBytes: 32 << 20, Pace: time.Millisecond})
	policy := &switchback.Policy{Interval: time.Second, Compression: "auto", KeepPoints: 200, Encrypt: true, OffloadAfter: 5 * time.Second}
	_, err := f.client.Request(t.Context(), f.Name, recovery.Protect, api.OperationRequest{To: Recovery, Policy: policy})
	if switchback.CodeOf(err) != switchback.CodeRefused {
		t.Errorf("encryption without a key: %v", err)
	}

	srv := s3test.Start(t, f.Network().B.HostAddr.String())
	srv.MakeBucket("points", true)
	dir := t.TempDir()
	key, objects := filepath.Join(dir, "key"), filepath.Join(dir, "objects.json")
	f.must(seal.MakeKeyFile(key))
	b, err := json.Marshal(srv.Config("points", "recovery"))
	f.must(err)
	f.must(os.WriteFile(objects, b, 0o600))
	restart := func(args ...string) {
		t.Helper()
		f.kill(t, Recovery)
		f.start(t, Recovery, args...)
		f.awaitAgent(t, Recovery)
	}
	args := []string{"--encryption-key-file", key, "--object-store", objects}
	restart(args...)
	defer restart() // as it was, for the other tests

	f.operate(recovery.Protect, api.OperationRequest{To: Recovery, Policy: policy})
	first := f.morePoints(1)[0]
	replica := f.vm().AtTarget.Replica.Dir
	var was []string
	f.export(Recovery, replica, first.Sequence, func(uris []string) { was = f.shas(uris...) })
	offloaded := func() int { return f.vm().AtTarget.Replica.Offloaded }
	f.eventually(120*time.Second, "points are moved to the bucket", func() (bool, string) {
		f.dirty(Primary, "vda", 1<<20)
		return offloaded() >= 4, ""
	})
	files, err := filepath.Glob(filepath.Join(f.Site(Recovery).HostPath(replica), "segments", "*.seg"))
	f.must(err)
	if len(files) == 0 {
		t.Fatal("no segment files are found")
	}
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && !seal.Sealed(b) {
			t.Errorf("%s is not encrypted", file)
		}
	}
	f.export(Recovery, replica, first.Sequence, func(uris []string) {
		if now := f.shas(uris...); !slices.Equal(now, was) {
			t.Errorf("point %d reads as %v from the bucket, %v before", first.Sequence, now, was)
		}
	})

	if r, err := f.client.RotateKey(t.Context(), f.Name); err != nil || r.Keys != 2 {
		t.Errorf("rotate: %+v, %v", r, err)
	}

	// The store is down: points are taken, the condition says it, nothing is lost.
	srv.Stop()
	f.eventually(120*time.Second, "the condition", func() (bool, string) {
		for _, c := range f.vm().Conditions {
			if c.Name == "object-store-failing" {
				return true, ""
			}
		}
		return false, "not yet"
	})
	f.incremental(f.morePoints(3))
	restart(args...)
	f.incremental(f.morePoints(2))
	srv.Start()
	before := offloaded()
	f.eventually(120*time.Second, "points are moved again", func() (bool, string) { return offloaded() > before, "" })

	// A guest runs from the bucket, and ends on plain local disks.
	f.operate(recovery.Failover, api.OperationRequest{Point: fmt.Sprint(first.Sequence), AcceptLoss: true})
	f.operate(recovery.Commit, api.OperationRequest{})
	f.writes(Recovery)
	f.operate(recovery.Unprotect, api.OperationRequest{RemoveData: true})
}

package agent

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/recovery"
	"github.com/switchback-dr/switchback/transport"
)

// TestAdoptionIsFinished: an agent that was killed while its new identity was put
// into place is the new one when it starts, wherever that was.
func TestAdoptionIsFinished(t *testing.T) {
	issue := func(installation string) (*transport.CA, *transport.Credentials, transport.JoinResponse, []byte) {
		ca, err := transport.NewCA(installation)
		if err != nil {
			t.Fatal(err)
		}
		key, csr, err := transport.NewKeyAndCSR()
		if err != nil {
			t.Fatal(err)
		}
		cert, err := ca.Sign(csr, transport.Identity{Installation: installation, Role: transport.RoleAgent, Site: "a", ID: "a-1"}, time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		creds, err := transport.NewCredentials(cert, key, ca.CertificatePEM())
		if err != nil {
			t.Fatal(err)
		}
		return ca, creds, transport.JoinResponse{CertificatePEM: string(cert), CAPEM: string(ca.CertificatePEM()), RecoveryKey: transport.NewRecoveryKey(ca).Public()}, key
	}
	lost, old, _, _ := issue("lost")
	_, fresh, joined, key := issue("next")
	for name, done := range map[string]int{"nothing": 0, "addresses": 1, "credentials": 2, "recovery key": 3} {
		t.Run("killed after "+name, func(t *testing.T) {
			state := t.TempDir()
			dir := IdentityDir(state)
			must := func(err error) {
				t.Helper()
				if err != nil {
					t.Fatal(err)
				}
			}
			must(transport.SaveCredentials(dir, old))
			must(durable.WriteFile(filepath.Join(dir, identityFile), []byte(`{"address":"x:1","reachable":"auto","server":"lost:1"}`), 0o600))
			must(SetRecoveryKey(state, transport.NewRecoveryKey(lost).Public()))
			for _, f := range []string{adoptKey, adoptCSR} {
				must(os.WriteFile(filepath.Join(dir, f), []byte("x"), 0o600))
			}
			b, err := json.Marshal(adopting{Credentials: joined, KeyPEM: string(key), Servers: []string{"next:1", "next:2"}})
			must(err)
			must(os.WriteFile(filepath.Join(dir, adoptingFile), b, 0o600))
			if done > 0 {
				must(os.WriteFile(filepath.Join(dir, identityFile), []byte(`{"address":"x:1","reachable":"auto","server":"next:1","servers":["next:2"]}`), 0o600))
			}
			if done > 1 {
				must(transport.SaveCredentials(dir, fresh))
			}
			if done > 2 {
				must(SetRecoveryKey(state, joined.RecoveryKey))
			}
			for range 2 {
				id, err := LoadIdentity(state)
				must(err)
				if id.Credentials.Identity() != fresh.Identity() || id.Server != "next:1" || len(id.Servers) != 1 || id.Address != "x:1" || id.Reachable != agentapi.ReachableAuto {
					t.Errorf("it is %s of %s %v at %s, reachable %q", id.Credentials.Identity(), id.Server, id.Servers, id.Address, id.Reachable)
				}
				if public, err := RecoveryKey(state); err != nil || public != joined.RecoveryKey {
					t.Errorf("it believes %q, %v", public, err)
				}
			}
			if entries, err := os.ReadDir(dir); err != nil || len(entries) != 3 {
				t.Errorf("left: %v, %v", entries, err)
			}
		})
	}
}

func TestRecordsAreKept(t *testing.T) {
	dir := t.TempDir()
	r, err := loadRecords(dir)
	if err != nil {
		t.Fatal(err)
	}
	put := func(epoch switchback.Epoch, version int64) {
		t.Helper()
		if err := r.keep(recovery.Record{Protection: switchback.Protection{ID: "p-1", Epoch: epoch, Version: version}}); err != nil {
			t.Fatal(err)
		}
	}
	put(3, 10)
	put(3, 9)  // of a server that was restored from a backup
	put(2, 99) // of one that lost more
	if r, err = loadRecords(dir); err != nil {
		t.Fatal(err)
	}
	if rec, ok := r.of("p-1"); !ok || rec.Protection.Version != 10 {
		t.Errorf("kept %+v", rec)
	}
	put(4, 1)
	if rec, _ := r.of("p-1"); rec.Protection.Epoch != 4 {
		t.Errorf("kept %+v", rec)
	}
	if err := r.forget("p-1"); err != nil {
		t.Fatal(err)
	}
	if r, err = loadRecords(dir); err != nil || len(r.byID) != 0 {
		t.Errorf("left %v, %v", r.byID, err)
	}
}

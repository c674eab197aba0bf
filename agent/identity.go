package agent

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/internal/killpoint"
	"github.com/switchback-dr/switchback/transport"
)

// Identity is what joining gave this agent.
type Identity struct {
	Credentials *transport.Credentials `json:"-"`
	// Address is how others reach this agent, Server how it reaches the server.
	Address string `json:"address"`
	Server  string `json:"server"`
	// Servers are further servers of the installation, tried where Server does
	// not answer; the control plane names them in its answers to reports.
	Servers []string `json:"servers,omitempty"`
	// Reachable says whether others can dial Address; "" = yes.
	Reachable agentapi.Reachable `json:"reachable,omitempty"`
}

// identityFile holds an Identity.
const identityFile = "agent.json"

// IdentityDir is where an agent's credentials are.
func IdentityDir(stateDir string) string { return filepath.Join(stateDir, "identity") }

// saveIdentity stores what stands beside the credentials.
func saveIdentity(stateDir string, id Identity) error {
	b, err := json.Marshal(id)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(IdentityDir(stateDir), identityFile), b, 0o600)
}

// LoadIdentity reads what Join stored.
func LoadIdentity(stateDir string) (Identity, error) {
	var id Identity
	if _, err := finishAdoption(stateDir); err != nil {
		return id, err
	}
	creds, err := transport.LoadCredentials(IdentityDir(stateDir))
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return id, switchback.Errorf(switchback.CodeRefused, "this agent has not joined a site").
			WithHint("on the server: switchback site add SITE; here: switchback agent join TOKEN")
	}
	if err != nil {
		return id, err
	}
	id, err = readIdentity(stateDir)
	id.Credentials = creds
	return id, err
}

func readIdentity(stateDir string) (id Identity, err error) {
	b, err := os.ReadFile(filepath.Join(IdentityDir(stateDir), identityFile))
	if err != nil {
		return id, err
	}
	return id, json.Unmarshal(b, &id)
}

// joinFiles keep the key of a join whose answer is awaited.
func joinFiles(stateDir string) (keyFile, csrFile string) {
	return filepath.Join(IdentityDir(stateDir), "join.key"), filepath.Join(IdentityDir(stateDir), "join.csr")
}

// joinKey returns the key to join with, made once, so that a join whose answer
// was lost can be repeated.
func joinKey(stateDir string) (key, csr []byte, err error) {
	keyFile, csrFile := joinFiles(stateDir)
	key, kerr := os.ReadFile(keyFile)
	csr, cerr := os.ReadFile(csrFile)
	if errors.Is(kerr, fs.ErrNotExist) || errors.Is(cerr, fs.ErrNotExist) {
		if key, csr, err = transport.NewKeyAndCSR(); err != nil {
			return nil, nil, err
		}
		return key, csr, errors.Join(durable.WriteFile(keyFile, key, 0o600), durable.WriteFile(csrFile, csr, 0o600))
	}
	return key, csr, errors.Join(kerr, cerr)
}

// Join redeems a one-time token and stores the identity.
func Join(ctx context.Context, stateDir, token, address string, reachable agentapi.Reachable, version string) (transport.Identity, error) {
	if err := checkReachable(reachable, address); err != nil {
		return transport.Identity{}, err
	}
	key, csr, err := joinKey(stateDir)
	if err != nil {
		return transport.Identity{}, err
	}
	if reachable == agentapi.ReachableNo {
		id, err := transport.AgentIDFor(csr)
		if err != nil {
			return transport.Identity{}, err
		}
		address = transport.AgentName(id)
	}
	host, _ := os.Hostname()
	resp, err := transport.Join(ctx, token, csr, transport.AgentInfo{Address: address, Version: version, Hostname: host})
	if err != nil {
		return transport.Identity{}, err
	}
	return settleJoin(stateDir, key, resp, Identity{Address: address, Reachable: reachable, Server: resp.Server})
}

// settleJoin stores what a join gave.
func settleJoin(stateDir string, key []byte, resp transport.JoinResponse, joined Identity) (transport.Identity, error) {
	creds, err := transport.NewCredentials([]byte(resp.CertificatePEM), key, []byte(resp.CAPEM))
	if err != nil {
		return transport.Identity{}, err
	}
	if err := SetRecoveryKey(stateDir, resp.RecoveryKey); err != nil {
		return transport.Identity{}, err
	}
	if err := transport.SaveCredentials(IdentityDir(stateDir), creds); err != nil {
		return transport.Identity{}, err
	}
	if err := saveIdentity(stateDir, joined); err != nil {
		return transport.Identity{}, err
	}
	keyFile, csrFile := joinFiles(stateDir)
	return creds.Identity(), errors.Join(os.Remove(keyFile), os.Remove(csrFile))
}

// renewals keeps the certificate fresh until ctx ends.
func (a *Agent) renewals(ctx context.Context) {
	for ctx.Err() == nil {
		if wait := time.Until(a.cfg.Credentials.RenewAt()); wait > 0 {
			sleep(ctx, min(wait, time.Hour))
			continue
		}
		if err := a.renew(ctx); err != nil && ctx.Err() == nil {
			a.log.Warn("certificate not renewed, trying again", "expires", a.cfg.Credentials.Expires(), "error", err)
			sleep(ctx, time.Minute)
		}
	}
}

// renew gets a new certificate for a new key.
func (a *Agent) renew(ctx context.Context) error {
	a.trust.Lock()
	defer a.trust.Unlock()
	key, csr, err := transport.NewKeyAndCSR()
	if err != nil {
		return err
	}
	address := a.servers.address()
	resp, err := transport.Call[transport.JoinResponse](ctx, a.server, http.MethodPost, "https://"+address+"/v1/agents/renew", transport.JoinRequest{CSRPEM: string(csr)})
	if err != nil {
		return err
	}
	creds, err := transport.NewCredentials([]byte(resp.CertificatePEM), key, []byte(resp.CAPEM))
	if err != nil {
		return err
	}
	killpoint.At("agent", "trust", "certificate", killpoint.BeforeEffect)
	if err := transport.SaveCredentials(IdentityDir(a.cfg.StateDir), creds); err != nil {
		return err
	}
	killpoint.At("agent", "trust", "certificate", killpoint.AfterEffect)
	a.log.Info("certificate renewed", "expires", creds.Expires())
	return a.cfg.Credentials.Replace(creds)
}

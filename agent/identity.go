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
	"github.com/switchback-dr/switchback/internal/durable"
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
}

// identityFile holds an Identity.
const identityFile = "agent.json"

func identityDir(stateDir string) string { return filepath.Join(stateDir, "identity") }

// LoadIdentity reads what Join stored.
func LoadIdentity(stateDir string) (Identity, error) {
	var id Identity
	if _, err := finishAdoption(stateDir); err != nil {
		return id, err
	}
	creds, err := transport.LoadCredentials(identityDir(stateDir))
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return id, switchback.Errorf(switchback.CodeRefused, "this agent has not joined a site").
			WithHint("on the server: switchback site add SITE; here: switchback agent join TOKEN")
	}
	if err != nil {
		return id, err
	}
	b, err := os.ReadFile(filepath.Join(identityDir(stateDir), identityFile))
	if err != nil {
		return id, err
	}
	id.Credentials = creds
	return id, json.Unmarshal(b, &id)
}

// Join redeems a one-time token and stores the identity. The key is made once,
// so that a join whose answer was lost can be repeated.
func Join(ctx context.Context, stateDir, token, address, version string) (transport.Identity, error) {
	dir := identityDir(stateDir)
	keyFile, csrFile := filepath.Join(dir, "join.key"), filepath.Join(dir, "join.csr")
	key, kerr := os.ReadFile(keyFile)
	csr, cerr := os.ReadFile(csrFile)
	if errors.Is(kerr, fs.ErrNotExist) || errors.Is(cerr, fs.ErrNotExist) {
		var err error
		if key, csr, err = transport.NewKeyAndCSR(); err != nil {
			return transport.Identity{}, err
		}
		if err := errors.Join(durable.WriteFile(keyFile, key, 0o600), durable.WriteFile(csrFile, csr, 0o600)); err != nil {
			return transport.Identity{}, err
		}
	}
	host, _ := os.Hostname()
	resp, err := transport.Join(ctx, token, csr, transport.AgentInfo{Address: address, Version: version, Hostname: host})
	if err != nil {
		return transport.Identity{}, err
	}
	creds, err := transport.NewCredentials([]byte(resp.CertificatePEM), key, []byte(resp.CAPEM))
	if err != nil {
		return transport.Identity{}, err
	}
	if err := SetRecoveryKey(stateDir, resp.RecoveryKey); err != nil {
		return transport.Identity{}, err
	}
	if err := transport.SaveCredentials(dir, creds); err != nil {
		return transport.Identity{}, err
	}
	b, err := json.Marshal(Identity{Address: address, Server: resp.Server})
	if err != nil {
		return transport.Identity{}, err
	}
	if err := durable.WriteFile(filepath.Join(dir, identityFile), b, 0o600); err != nil {
		return transport.Identity{}, err
	}
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

func (a *Agent) renew(ctx context.Context) error {
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
	if err := transport.SaveCredentials(identityDir(a.cfg.StateDir), creds); err != nil {
		return err
	}
	a.log.Info("certificate renewed", "expires", creds.Expires())
	return a.cfg.Credentials.Replace(creds)
}

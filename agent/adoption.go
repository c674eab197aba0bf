package agent

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/agentapi"
	"github.com/switchback-dr/switchback/internal/durable"
	"github.com/switchback-dr/switchback/transport"
)

// Files in the identity directory.
const (
	// recoveryFile holds the public half of the installation's recovery key.
	recoveryFile = "recovery.pub"
	// adoptKey and adoptCSR are of an adoption that was begun; adoptingFile is the
	// new identity, from when it was given until it is in place.
	adoptKey, adoptCSR = "adopt.key", "adopt.csr"
	adoptingFile       = "adopting.json"
)

// livingServer is how recently a server must have taken a report to count as alive.
const livingServer = 15 * time.Second

// RecoveryKey returns the public half of the recovery key that this agent
// believes; "" = none.
func RecoveryKey(stateDir string) (string, error) {
	b, err := os.ReadFile(filepath.Join(IdentityDir(stateDir), recoveryFile))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(b)), err
}

// SetRecoveryKey makes an agent believe a recovery key. Whoever can write to the
// state directory may do so: it has the agent's own key.
func SetRecoveryKey(stateDir, public string) error {
	if key, err := base64.RawURLEncoding.DecodeString(public); public != "" && (err != nil || len(key) != ed25519.PublicKeySize) {
		return switchback.Errorf(switchback.CodeInvalid, "%q is no public recovery key", public).WithHint("'switchback agent recovery-key' on another agent of the installation shows it")
	}
	return durable.WriteFile(filepath.Join(IdentityDir(stateDir), recoveryFile), []byte(public+"\n"), 0o600)
}

// learnRecoveryKey keeps what the agent's own server says of it.
func (a *Agent) learnRecoveryKey(public string) {
	if public == "" {
		return
	}
	known, err := RecoveryKey(a.cfg.StateDir)
	if err == nil && known == public {
		return
	}
	if err := SetRecoveryKey(a.cfg.StateDir, public); err != nil {
		a.log.Warn("the installation's recovery key is not stored", "error", err)
		return
	}
	a.log.Info("recovery key of the installation", "public", public)
}

// adopting is a new identity on its way into place.
type adopting struct {
	Credentials transport.JoinResponse `json:"credentials"`
	KeyPEM      string                 `json:"key_pem"`
	Servers     []string               `json:"servers"`
}

// finishAdoption puts a new identity that was given into place: each file for
// itself, the note of it last. It returns nil where there is none.
func finishAdoption(stateDir string) (*transport.Credentials, error) {
	dir := IdentityDir(stateDir)
	b, err := os.ReadFile(filepath.Join(dir, adoptingFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var n adopting
	if err := json.Unmarshal(b, &n); err != nil {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "%s: %w", filepath.Join(dir, adoptingFile), err).
			WithHint("remove it, and adopt the agent again")
	}
	creds, err := transport.NewCredentials([]byte(n.Credentials.CertificatePEM), []byte(n.KeyPEM), []byte(n.Credentials.CAPEM))
	if err != nil {
		return nil, err
	}
	// How the agent is reached stays as it is.
	place, err := readIdentity(stateDir)
	if err != nil {
		return nil, err
	}
	place.Server, place.Servers = n.Servers[0], n.Servers[1:]
	if err := saveIdentity(stateDir, place); err != nil {
		return nil, err
	}
	if err := transport.SaveCredentials(dir, creds); err != nil {
		return nil, err
	}
	if err := SetRecoveryKey(stateDir, n.Credentials.RecoveryKey); err != nil {
		return nil, err
	}
	for _, name := range []string{adoptKey, adoptCSR, adoptingFile} {
		if err := durable.Remove(filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	return creds, nil
}

// adoptable lets servers of other installations speak to this agent on one path,
// where they have to prove that they may; all else goes to next.
func (a *Agent) adoptable(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != agentapi.AdoptionPath || r.Method != http.MethodPost {
			next.ServeHTTP(w, r)
			return
		}
		answer, err := a.adoption(r)
		if err != nil {
			a.log.Warn("an adoption was refused", "remote", r.RemoteAddr, "error", err)
			transport.WriteError(w, err)
			return
		}
		transport.WriteJSON(w, http.StatusOK, answer)
	})
}

func (a *Agent) adoption(r *http.Request) (agentapi.Holdings, error) {
	var none agentapi.Holdings
	var req agentapi.AdoptionRequest
	if err := transport.ReadJSON(r, &req); err != nil {
		return none, err
	}
	public, err := RecoveryKey(a.cfg.StateDir)
	if err != nil {
		return none, err
	}
	by, err := a.cfg.Credentials.ProvenServer(req.Proof, public, r.TLS, time.Now())
	if err != nil {
		return none, err
	}
	h := a.holdings(r.Context())
	if alive := time.Since(h.ServerAnswered); req.Do != agentapi.AdoptionInspect && !req.TakeOver && alive < livingServer {
		return none, switchback.Errorf(switchback.CodeRefused, "the server of installation %s took a report of agent %s %.0f s ago: it is not lost", h.Installation, h.Agent.Agent, alive.Seconds()).
			WithHint("stop it first; to move the agent out of a living installation, add --take-over")
	}
	a.adopt.Lock()
	defer a.adopt.Unlock()
	switch req.Do {
	case agentapi.AdoptionInspect:
		return h, nil
	case agentapi.AdoptionEnrol:
		_, csr, err := a.adoptionKey()
		h.CSRPEM = string(csr)
		return h, err
	case agentapi.AdoptionInstall:
		if req.Joined == nil || len(req.Servers) == 0 {
			return none, switchback.Errorf(switchback.CodeInvalid, "no certificate or no server to install")
		}
		if err := a.installIdentity(*req.Joined, req.Servers, by); err != nil {
			return none, err
		}
		a.log.Info("adopted", "from", h.Installation, "to", by.Installation, "servers", req.Servers)
		return a.holdings(r.Context()), nil
	}
	return none, switchback.Errorf(switchback.CodeInvalid, "unknown part of an adoption %q", req.Do)
}

// adoptionKey is the key of the identity to come: made once, so that what was
// interrupted can be repeated.
func (a *Agent) adoptionKey() (key, csr []byte, err error) {
	dir := IdentityDir(a.cfg.StateDir)
	key, kerr := os.ReadFile(filepath.Join(dir, adoptKey))
	csr, cerr := os.ReadFile(filepath.Join(dir, adoptCSR))
	if kerr == nil && cerr == nil {
		return key, csr, nil
	}
	if key, csr, err = transport.NewKeyAndCSR(); err != nil {
		return nil, nil, err
	}
	return key, csr, errors.Join(durable.WriteFile(filepath.Join(dir, adoptKey), key, 0o600), durable.WriteFile(filepath.Join(dir, adoptCSR), csr, 0o600))
}

// installIdentity makes this agent one of the installation that by is a server of.
func (a *Agent) installIdentity(joined transport.JoinResponse, servers []string, by transport.Identity) error {
	a.trust.Lock() // a renewal under way would put the old identity back
	defer a.trust.Unlock()
	key, _, err := a.adoptionKey()
	if err != nil {
		return err
	}
	creds, err := transport.NewCredentials([]byte(joined.CertificatePEM), key, []byte(joined.CAPEM))
	if err != nil {
		return err
	}
	own, is := a.cfg.Credentials.Identity(), creds.Identity()
	own.Installation = by.Installation
	if is != own {
		return switchback.Errorf(switchback.CodeInvalid, "the new certificate is of %s, not of %s", is, own)
	}
	b, err := json.Marshal(adopting{Credentials: joined, KeyPEM: string(key), Servers: servers})
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(IdentityDir(a.cfg.StateDir), adoptingFile), b, 0o600); err != nil {
		return err
	}
	if creds, err = finishAdoption(a.cfg.StateDir); err != nil {
		return err
	}
	if err := a.cfg.Credentials.Adopt(creds); err != nil {
		return err
	}
	a.reach.inbound.Judge() // lines of peers that are not adopted yet are made anew
	a.servers.replace(servers)
	a.answered.Store(0)
	return nil
}

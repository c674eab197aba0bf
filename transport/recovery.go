package transport

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// recoveryPrefix marks a recovery key and its version.
const recoveryPrefix = "sbrecovery1."

// RecoveryKey is the secret, made with an installation and kept apart from it,
// that lets another installation adopt its agents once its servers are lost.
// Agents know the public half.
type RecoveryKey struct {
	// Installation is whose agents it is for, CA the SHA-256 of that
	// installation's CA certificate, hexadecimal: how its agents are recognised.
	Installation string    `json:"installation"`
	CA           string    `json:"ca"`
	MadeAt       time.Time `json:"made_at"`
	// Seed is the Ed25519 seed.
	Seed []byte `json:"seed"`
}

// NewRecoveryKey makes the recovery key of ca's installation. It is stored nowhere yet.
func NewRecoveryKey(ca *CA) RecoveryKey {
	k := RecoveryKey{Installation: ca.Installation(), CA: ca.Fingerprint(), MadeAt: ca.now().UTC().Truncate(time.Second), Seed: make([]byte, ed25519.SeedSize)}
	_, _ = rand.Read(k.Seed) // never fails
	return k
}

// Public is the half that agents keep, in unpadded base64url.
func (k RecoveryKey) Public() string {
	public := ed25519.NewKeyFromSeed(k.Seed).Public().(ed25519.PublicKey)
	return base64.RawURLEncoding.EncodeToString(public)
}

// String returns the text form; it is the secret.
func (k RecoveryKey) String() string {
	data, _ := json.Marshal(k) // strings, bytes and a time in range: never fails
	return recoveryPrefix + base64.RawURLEncoding.EncodeToString(data)
}

// File is the text form with instructions, as it is to be kept.
func (k RecoveryKey) File() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, `# Recovery key of Switchback installation %s, made %s.
#
# Move this file to a place that survives the loss of the server's host, and that nobody reads:
# whoever has it can take the installation's agents, and the VMs that they protect, over.
#
# If every server of the installation is lost and there is no backup of them:
#   1. start a new server:            switchback server --state DIR --listen HOST:PORT
#   2. let it adopt what agents hold: switchback site adopt --recovery-key THIS-FILE AGENT-HOST:PORT
# The new installation has a recovery key of its own; this one is of no use then.
%s
`, k.Installation, k.MadeAt.Format(time.RFC3339), k)
	return b.Bytes()
}

// ParseRecoveryKey reads RecoveryKey.File or RecoveryKey.String. CodeInvalid: it is neither.
func ParseRecoveryKey(text string) (RecoveryKey, error) {
	damaged := switchback.Errorf(switchback.CodeInvalid, "this is not a whole recovery key").
		WithHint("name the file that the server made at installation, recovery.key; its last line begins with %q", recoveryPrefix)
	for _, line := range strings.Split(text, "\n") {
		body, ok := strings.CutPrefix(strings.TrimSpace(line), recoveryPrefix)
		if !ok {
			continue
		}
		data, err := base64.RawURLEncoding.DecodeString(body)
		if err != nil {
			return RecoveryKey{}, damaged
		}
		var k RecoveryKey
		if err := json.Unmarshal(data, &k); err != nil || len(k.Seed) != ed25519.SeedSize || k.CA == "" || k.Installation == "" {
			return RecoveryKey{}, damaged
		}
		return k, nil
	}
	return RecoveryKey{}, damaged
}

// AdoptionProof says that the holder of a recovery key wants the agents of
// installation From to belong to the installation whose CA is To. It is no
// secret: only To's own servers can use it.
type AdoptionProof struct {
	// From names the old installation, FromCA the SHA-256 of its CA.
	From   string `json:"from"`
	FromCA string `json:"from_ca"`
	// To is the SHA-256 of the new installation's CA, hexadecimal.
	To        string    `json:"to"`
	ExpiresAt time.Time `json:"expires_at"`
	Signature []byte    `json:"signature"`
}

func (p AdoptionProof) text() []byte {
	return []byte("switchback adoption v1\n" + p.From + "\n" + p.FromCA + "\n" + p.To + "\n" + p.ExpiresAt.UTC().Format(time.RFC3339) + "\n")
}

// Prove makes the proof for the installation whose CA has the fingerprint to.
func (k RecoveryKey) Prove(to string, expires time.Time) AdoptionProof {
	p := AdoptionProof{From: k.Installation, FromCA: k.CA, To: to, ExpiresAt: expires.UTC().Truncate(time.Second)}
	p.Signature = ed25519.Sign(ed25519.NewKeyFromSeed(k.Seed), p.text())
	return p
}

// ProvenServer returns whom a request comes from that is not of this
// installation, if it carries a proof made with this installation's recovery key
// and is sent by a server of the installation that the proof names.
// CodeUnauthorized otherwise; CodeRefused: no recovery key is known here.
func (c *Credentials) ProvenServer(p AdoptionProof, public string, state *tls.ConnectionState, now time.Time) (Identity, error) {
	own := c.Identity()
	refuse := func(format string, args ...any) error {
		return switchback.Errorf(switchback.CodeUnauthorized, format, args...).
			WithHint("use the recovery key of %s, which its server made at installation; without it this agent stays with %s", own.Installation, own.Installation)
	}
	if public == "" {
		return Identity{}, switchback.Errorf(switchback.CodeRefused, "%s was never told a recovery key by its server: nobody can prove anything to it", own).
			WithHint("on its host: 'switchback agent recovery-key PUBLIC' names one, 'switchback agent join TOKEN' joins another installation")
	}
	if p.From == "" && len(p.Signature) == 0 {
		return Identity{}, refuse("no proof: %s belongs to installation %s", own, own.Installation)
	}
	if p.From != own.Installation {
		return Identity{}, refuse("the proof is made with the recovery key of installation %s, this agent belongs to %s", p.From, own.Installation)
	}
	key, err := base64.RawURLEncoding.DecodeString(public)
	if err != nil || len(key) != ed25519.PublicKeySize {
		return Identity{}, switchback.Errorf(switchback.CodeCorrupt, "the recovery key known to %s is damaged", own)
	}
	if !ed25519.Verify(key, p.text(), p.Signature) {
		return Identity{}, refuse("the proof is not made with the recovery key of installation %s", own.Installation)
	}
	if now.After(p.ExpiresAt) {
		return Identity{}, switchback.Errorf(switchback.CodeUnauthorized, "the proof expired at %s, by this agent's clock it is %s", p.ExpiresAt.Format(time.RFC3339), now.UTC().Format(time.RFC3339)).
			WithHint("run 'site adopt' again; if it was run just now, set the clocks right")
	}
	if state == nil || len(state.PeerCertificates) == 0 {
		return Identity{}, refuse("the proof is not sent by the server that it is for")
	}
	id, err := verifyUnder(state.PeerCertificates, p.To, now)
	if err != nil {
		return Identity{}, refuse("the proof is not sent by the server that it is for: %v", err)
	}
	if err := wantRole(id, RoleServer); err != nil {
		return Identity{}, err
	}
	return id, nil
}

// verifyUnder returns whom a chain speaks for that carries the CA with that
// fingerprint; at is when the leaf has to be valid.
func verifyUnder(chain []*x509.Certificate, ca string, at time.Time) (Identity, error) {
	roots := x509.NewCertPool()
	found := false
	for _, cert := range chain[1:] {
		if fingerprint(cert) == ca && cert.IsCA {
			roots.AddCert(cert)
			found = true
		}
	}
	if !found {
		return Identity{}, fmt.Errorf("it is not under the CA %.16s…", ca)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
		return Identity{}, err
	}
	return identityOf(chain[0])
}

// AdoptionClient returns a client for one agent of another installation, the one
// whose CA has the fingerprint ca. The agent's certificate may have ended: its
// server was lost. see is told whom the agent's certificate speaks for, and its end.
func AdoptionClient(c *Credentials, ca string, see func(id Identity, expires time.Time)) *http.Client {
	return &http.Client{
		Timeout: 2 * time.Minute,
		Transport: &http.Transport{
			TLSHandshakeTimeout: 2 * dialTimeout,
			DisableKeepAlives:   true,
			TLSClientConfig: &tls.Config{
				MinVersion: tls.VersionTLS13,
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
					return &c.held.Load().tls, nil
				},
				InsecureSkipVerify: true, // pinned instead:
				VerifyConnection: func(cs tls.ConnectionState) error {
					leaf := cs.PeerCertificates[0]
					at := time.Now()
					if at.After(leaf.NotAfter) {
						at = leaf.NotAfter
					}
					id, err := verifyUnder(cs.PeerCertificates, ca, at)
					if err != nil {
						return switchback.Errorf(switchback.CodeUnauthorized, "it is no agent of the installation that the recovery key is of: %w", err).
							WithHint("check the address; if that installation's CA was replaced since the key was made, name the CA that the agent shows with --ca")
					}
					if err := wantRole(id, RoleAgent); err != nil {
						return err
					}
					see(id, leaf.NotAfter)
					return nil
				},
			},
		},
	}
}

// Adopt is Replace for credentials of another installation: the agent stays the
// same, of the same site, and refuses whom it refused.
func (c *Credentials) Adopt(n *Credentials) error {
	was, is := c.Identity(), n.Identity()
	was.Installation = is.Installation
	if was != is {
		return switchback.Errorf(switchback.CodeInvalid, "cannot replace the credentials of %s by those of %s", c.Identity(), is)
	}
	c.take(n)
	return nil
}

// CAFingerprint returns the SHA-256 of the first authority's certificate, hexadecimal.
func (c *Credentials) CAFingerprint() string {
	b, err := parseBundle(c.held.Load().caPEM)
	if err != nil || len(b.certs) == 0 {
		return "" // cannot be: newHeld parsed it
	}
	return fingerprint(b.certs[0])
}

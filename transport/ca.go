package transport

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"github.com/switchback-dr/switchback/internal/durable"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// caFile holds key and certificate of the authority.
const caFile = "ca.pem"

const (
	caLifetime = 20 * 365 * 24 * time.Hour
	// backdate lets clocks of peers be behind by this much.
	backdate = 10 * time.Minute
)

// CA is the certificate authority of one installation, while it is replaced
// both the old and the new one (see RotationPhase). It may be used from several
// goroutines.
type CA struct {
	state atomic.Pointer[caState]
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// caState is one immutable generation.
type caState struct {
	key          *ecdsa.PrivateKey
	cert         *x509.Certificate
	installation string
	other        *rotating // nil while there is one authority
}

// NewCA makes the authority of a new installation. It is stored nowhere yet: see PEM.
func NewCA(installation string) (*CA, error) {
	if !installationPattern.MatchString(installation) {
		return nil, switchback.Errorf(switchback.CodeInvalid, "%q is not a valid installation name", installation).
			WithHint("lower-case letters, digits, dots and dashes")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make CA key: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber:          newSerial(),
		Subject:               pkix.Name{CommonName: "Switchback CA of " + installation},
		URIs:                  []*url.URL{{Scheme: "spiffe", Host: installation}},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(caLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("make CA certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("make CA certificate: %w", err)
	}
	ca := &CA{}
	ca.state.Store(&caState{key: key, cert: cert, installation: installation})
	return ca, nil
}

// PEM returns key and certificate of the authority: whoever has it can make
// itself any agent, server or administrator of the installation.
func (ca *CA) PEM() ([]byte, error) {
	s := ca.state.Load()
	out, err := encodeKey(s.key)
	if err != nil {
		return nil, err
	}
	out = append(out, encodeCertificate(s.cert.Raw)...)
	if s.other == nil {
		return out, nil
	}
	rotation, err := s.other.encode()
	return append(out, rotation...), err
}

// ParseCA is the inverse of CA.PEM. CodeCorrupt: it is not.
func ParseCA(data []byte) (*CA, error) {
	signing, other, err := cutRotation(data)
	if err != nil {
		return nil, err
	}
	b, err := parseBundle(signing)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "%v", err)
	}
	key, ok := b.key.(*ecdsa.PrivateKey)
	if !ok || len(b.certs) != 1 || !b.certs[0].IsCA || len(b.certs[0].URIs) != 1 || !key.PublicKey.Equal(b.certs[0].PublicKey) {
		return nil, switchback.Errorf(switchback.CodeCorrupt, "not a certificate authority of Switchback")
	}
	ca := &CA{}
	ca.state.Store(&caState{key: key, cert: b.certs[0], installation: b.certs[0].URIs[0].Host, other: other})
	return ca, nil
}

// CreateCA makes the authority of a new installation and stores it in dir,
// readable by the owner only. CodeConflict: dir holds one already.
func CreateCA(dir, installation string) (*CA, error) {
	if _, err := os.Stat(filepath.Join(dir, caFile)); !errors.Is(err, fs.ErrNotExist) {
		return nil, switchback.Errorf(switchback.CodeConflict, "%s holds a certificate authority already", dir)
	}
	ca, err := NewCA(installation)
	if err != nil {
		return nil, err
	}
	if err := SaveCA(dir, ca); err != nil {
		return nil, err
	}
	return OpenCA(dir)
}

// SaveCA stores an authority in dir, replacing what was there at once or not at all.
func SaveCA(dir string, ca *CA) error {
	data, err := ca.PEM()
	if err != nil {
		return err
	}
	if err := durable.WriteFile(filepath.Join(dir, caFile), data, 0o600); err != nil {
		return fmt.Errorf("store CA: %w", err)
	}
	return nil
}

// OpenCA loads what CreateCA stored. CodeNotFound: there is none.
func OpenCA(dir string) (*CA, error) {
	path := filepath.Join(dir, caFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, switchback.Errorf(switchback.CodeNotFound, "no certificate authority in %s", dir)
	}
	if err != nil {
		return nil, fmt.Errorf("open CA: %w", err)
	}
	ca, err := ParseCA(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return ca, nil
}

// Installation returns the name of the trust domain.
func (ca *CA) Installation() string { return ca.state.Load().installation }

// CertificatePEM returns the certificate of the authority that signs.
func (ca *CA) CertificatePEM() []byte { return encodeCertificate(ca.state.Load().cert.Raw) }

// Fingerprint returns the SHA-256 of the signing authority's certificate, hexadecimal.
func (ca *CA) Fingerprint() string { return fingerprint(ca.state.Load().cert) }

func fingerprint(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

func (ca *CA) now() time.Time {
	if ca.Now != nil {
		return ca.Now()
	}
	return time.Now()
}

// Sign issues a certificate for id to the key that signed the request, valid
// for ttl. Of the request nothing but the key is taken.
func (ca *CA) Sign(csrPEM []byte, id Identity, ttl time.Duration) (certPEM []byte, err error) {
	if err := id.Validate(); err != nil {
		return nil, err
	}
	s := ca.state.Load()
	if id.Installation != s.installation {
		return nil, switchback.Errorf(switchback.CodeInvalid, "%s is not of installation %s", id, s.installation)
	}
	csr, err := parseCSR(csrPEM)
	if err != nil {
		return nil, err
	}
	now := ca.now()
	template := &x509.Certificate{
		SerialNumber: newSerial(),
		Subject:      pkix.Name{CommonName: string(id.Role) + " " + id.ID},
		URIs:         []*url.URL{id.URI()},
		NotBefore:    now.Add(-backdate),
		NotAfter:     now.Add(ttl),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, s.cert, csr.PublicKey, s.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate of %s: %w", id, err)
	}
	return encodeCertificate(der), nil
}

// Issue makes a new key and a certificate for it: how the server, and a command
// line beside it, get theirs.
func (ca *CA) Issue(id Identity, ttl time.Duration) (*Credentials, error) {
	keyPEM, csr, err := NewKeyAndCSR()
	if err != nil {
		return nil, err
	}
	cert, err := ca.Sign(csr, id, ttl)
	if err != nil {
		return nil, err
	}
	return NewCredentials(cert, keyPEM, ca.BundlePEM())
}

// NewKeyAndCSR makes an ECDSA P-256 key and a request for a certificate, which
// proves that its sender has the key.
func NewKeyAndCSR() (keyPEM, csrPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make key: %w", err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make certificate request: %w", err)
	}
	keyPEM, err = encodeKey(key)
	return keyPEM, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), err
}

// parseCSR decodes a request and checks the proof of possession.
func parseCSR(csrPEM []byte) (*x509.CertificateRequest, error) {
	block, _ := pem.Decode(csrPEM)
	if block == nil || block.Type != "CERTIFICATE REQUEST" {
		return nil, switchback.Errorf(switchback.CodeInvalid, "not a certificate request")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeInvalid, "certificate request: %v", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "the certificate request is not signed by the key it names")
	}
	if key, ok := csr.PublicKey.(*ecdsa.PublicKey); !ok || key.Curve != elliptic.P256() {
		return nil, switchback.Errorf(switchback.CodeInvalid, "the certificate request is not for an ECDSA P-256 key")
	}
	return csr, nil
}

// AgentIDFor derives an agent's ID from the key of its certificate request, so
// that a join repeated with the same key names the same agent: "a-" and 12
// hexadecimal digits.
func AgentIDFor(csrPEM []byte) (switchback.AgentID, error) {
	csr, err := parseCSR(csrPEM)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(csr.RawSubjectPublicKeyInfo)
	return switchback.AgentID("a-" + hex.EncodeToString(sum[:6])), nil
}

func newSerial() *big.Int {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[0] &= 0x7f
	return new(big.Int).SetBytes(b[:])
}

func encodeKey(key crypto.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func encodeCertificate(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// bundle is what a PEM file holds.
type bundle struct {
	key   crypto.PrivateKey // nil if absent
	certs []*x509.Certificate
}

func parseBundle(data []byte) (b bundle, err error) {
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			return b, nil
		}
		switch block.Type {
		case "PRIVATE KEY":
			if b.key, err = x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
				return b, err
			}
		case "CERTIFICATE":
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return b, err
			}
			b.certs = append(b.certs, cert)
		}
	}
}

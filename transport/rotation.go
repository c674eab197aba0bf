package transport

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// RotationPhase is how far the replacement of an authority is. Each phase is
// entered only when nobody depends any more on what it ends:
//
//	"" ──▶ introducing ──▶ replacing ──▶ ""
//	new authority believed   new one signs   old one dropped
type RotationPhase string

const (
	// RotationNone: there is one authority.
	RotationNone RotationPhase = ""
	// RotationIntroducing: the old one signs; the new one is made known.
	RotationIntroducing RotationPhase = "introducing"
	// RotationReplacing: the new one signs, the old one's key is gone; its
	// certificates are still believed, and replaced.
	RotationReplacing RotationPhase = "replacing"
)

// Rotation is how an authority's replacement stands.
type Rotation struct {
	Phase RotationPhase `json:"phase"`
	Since time.Time     `json:"since,omitzero"`
	// Other is the SHA-256 of the authority that does not sign: the new one
	// while it is introduced, then the old one.
	Other string `json:"other,omitempty"`
}

const (
	rotationBlock = "SWITCHBACK CA ROTATION"
	rotationPhase = "Phase"
	rotationSince = "Since"
)

// rotating is the other authority of a rotation.
type rotating struct {
	phase RotationPhase
	since time.Time
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey // nil once it never signs again
}

// Rotation returns how far a rotation is.
func (ca *CA) Rotation() Rotation {
	s := ca.state.Load()
	if s.other == nil {
		return Rotation{}
	}
	return Rotation{Phase: s.other.phase, Since: s.other.since, Other: fingerprint(s.other.cert)}
}

// Next returns the authority in the next phase; at is when that begins. It is
// not in effect: it is stored first (PEM), then ca takes it over (Become).
// From no rotation it begins one, with a new key.
func (ca *CA) Next(at time.Time) (*CA, error) {
	s := ca.state.Load()
	n := *s
	at = at.UTC().Truncate(time.Second)
	switch {
	case s.other == nil:
		fresh, err := NewCA(s.installation)
		if err != nil {
			return nil, err
		}
		f := fresh.state.Load()
		n.other = &rotating{phase: RotationIntroducing, since: at, cert: f.cert, key: f.key}
	case s.other.phase == RotationIntroducing:
		n.key, n.cert = s.other.key, s.other.cert
		n.other = &rotating{phase: RotationReplacing, since: at, cert: s.cert}
	default:
		n.other = nil
	}
	next := &CA{Now: ca.Now}
	next.state.Store(&n)
	return next, nil
}

// Become takes over what n is: the same authority in another phase.
func (ca *CA) Become(n *CA) { ca.state.Store(n.state.Load()) }

// BundlePEM returns the certificates of all authorities to be believed.
func (ca *CA) BundlePEM() []byte {
	s := ca.state.Load()
	out := encodeCertificate(s.cert.Raw)
	if s.other != nil {
		out = append(out, encodeCertificate(s.other.cert.Raw)...)
	}
	return out
}

// Expires returns when the signing authority's certificate ends.
func (ca *CA) Expires() time.Time { return ca.state.Load().cert.NotAfter }

// encodeRotation is what CA.PEM appends while there is a rotation.
func (r *rotating) encode() ([]byte, error) {
	out := pem.EncodeToMemory(&pem.Block{Type: rotationBlock, Headers: map[string]string{
		rotationPhase: string(r.phase), rotationSince: r.since.Format(time.RFC3339)}})
	out = append(out, encodeCertificate(r.cert.Raw)...)
	if r.key == nil {
		return out, nil
	}
	key, err := encodeKey(r.key)
	return append(out, key...), err
}

// cutRotation divides what CA.PEM returned at the rotation's block; nil = there is none.
func cutRotation(data []byte) (signing []byte, r *rotating, err error) {
	rest := data
	for {
		before := rest
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return data, nil, nil
		}
		if block.Type != rotationBlock {
			continue
		}
		b, err := parseBundle(rest)
		since, terr := time.Parse(time.RFC3339, block.Headers[rotationSince])
		r := &rotating{phase: RotationPhase(block.Headers[rotationPhase]), since: since}
		if b.key != nil {
			r.key, _ = b.key.(*ecdsa.PrivateKey)
		}
		if err != nil || terr != nil || len(b.certs) != 1 || (r.phase == RotationIntroducing) != (r.key != nil) ||
			r.phase != RotationIntroducing && r.phase != RotationReplacing {
			return nil, nil, switchback.Errorf(switchback.CodeCorrupt, "the rotation of the certificate authority cannot be read")
		}
		r.cert = b.certs[0]
		return data[:len(data)-len(before)], r, nil
	}
}

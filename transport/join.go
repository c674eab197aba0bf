package transport

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
)

// tokenPrefix marks a join token and its version.
const tokenPrefix = "sbjoin1."

// JoinPath is where a server takes JoinRequests, without a certificate.
const JoinPath = "/v1/join"

// Token is what a join token says. Its text form is "sbjoin1." and the JSON of
// it in unpadded base64url.
type Token struct {
	// Servers are addresses (host:port) to try in order.
	Servers []string `json:"servers"`
	// CA is the SHA-256 of the CA certificate, hexadecimal.
	CA string `json:"ca"`
	// Secret is 32 random bytes in unpadded base64url.
	Secret string `json:"secret"`
	// Site and ExpiresAt are for the reader; the server goes by its own record.
	Site      switchback.SiteID `json:"site"`
	ExpiresAt time.Time         `json:"expires_at"`
}

// MintToken makes a token for one agent of a site. Of the result the server
// stores HashSecret(t.Secret), t.Site and t.ExpiresAt; t.String() is given to
// the operator.
func MintToken(servers []string, caFingerprint string, site switchback.SiteID, expires time.Time) Token {
	var secret [32]byte
	_, _ = rand.Read(secret[:]) // never fails
	return Token{
		Servers: servers, CA: caFingerprint, Secret: base64.RawURLEncoding.EncodeToString(secret[:]),
		Site: site, ExpiresAt: expires.UTC().Truncate(time.Second),
	}
}

// String returns the text form; it holds the secret.
func (t Token) String() string {
	data, _ := json.Marshal(t) // strings and a time in range: never fails
	return tokenPrefix + base64.RawURLEncoding.EncodeToString(data)
}

// ParseToken is the inverse of Token.String. CodeInvalid: the text is damaged.
func ParseToken(text string) (Token, error) {
	damaged := switchback.Errorf(switchback.CodeInvalid, "this is not a whole join token").
		WithHint("copy it again, from %q to the end of the line", tokenPrefix)
	body, ok := strings.CutPrefix(strings.TrimSpace(text), tokenPrefix)
	if !ok {
		return Token{}, damaged
	}
	data, err := base64.RawURLEncoding.DecodeString(body)
	if err != nil {
		return Token{}, damaged
	}
	var t Token
	if err := json.Unmarshal(data, &t); err != nil {
		return Token{}, damaged
	}
	if sum, err := hex.DecodeString(t.CA); err != nil || len(sum) != sha256.Size || len(t.Servers) == 0 || t.Secret == "" {
		return Token{}, damaged
	}
	return t, nil
}

// HashSecret returns what a server stores of a token's secret: its SHA-256,
// hexadecimal. (The secret is random, so a slow hash would add nothing.)
func HashSecret(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// VerifySecret checks a secret against a stored hash and expiry, for a server
// that does not look the hash up. CodeUnauthorized otherwise.
func VerifySecret(secret, hash string, expires, now time.Time) error {
	if subtle.ConstantTimeCompare([]byte(HashSecret(secret)), []byte(hash)) != 1 {
		return switchback.Errorf(switchback.CodeUnauthorized, "unknown join token").WithHint("make a new one")
	}
	return expiredAt(expires, now)
}

func expiredAt(expires, now time.Time) error {
	if now.Before(expires) {
		return nil
	}
	return switchback.Errorf(switchback.CodeUnauthorized, "the join token expired at %s", expires.Format(time.RFC3339)).
		WithHint("make a new one; if it should still be valid, check the clocks")
}

// AgentInfo is what an agent says of itself when it joins.
type AgentInfo struct {
	// Address is where others reach it, host:port.
	Address  string `json:"address"`
	Version  string `json:"version"`
	Hostname string `json:"hostname,omitempty"`
}

// JoinRequest is the body of POST JoinPath.
type JoinRequest struct {
	Secret string    `json:"secret"`
	CSRPEM string    `json:"csr_pem"`
	Agent  AgentInfo `json:"agent"`
}

// JoinResponse is the answer to a JoinRequest, and to a renewal.
type JoinResponse struct {
	CertificatePEM string `json:"certificate_pem"`
	CAPEM          string `json:"ca_pem"`
	// RecoveryKey is RecoveryKey.Public of the installation; "" = it has none.
	RecoveryKey string `json:"recovery_key,omitempty"`
	// Server is the address that answered; filled in by Join.
	Server string `json:"server,omitempty"`
}

// Join redeems a token: it tries the token's servers in turn, and sends the
// secret only to one that presents the token's CA. The credentials are
// NewCredentials(resp.CertificatePEM, key, resp.CAPEM). It may be repeated with
// the same request for a certificate, and then gets the same identity.
//
// CodeInvalid: damaged token. CodeUnauthorized: expired, used or unknown token,
// or a server of another installation. CodeUnavailable: no server answers.
func Join(ctx context.Context, token string, csrPEM []byte, agent AgentInfo) (JoinResponse, error) {
	t, err := ParseToken(token)
	if err != nil {
		return JoinResponse{}, err
	}
	if err := expiredAt(t.ExpiresAt, time.Now()); err != nil {
		return JoinResponse{}, err
	}
	client := &http.Client{
		Timeout: 30 * time.Second,
		Transport: &http.Transport{
			TLSHandshakeTimeout: 2 * dialTimeout,
			DisableKeepAlives:   true,
			TLSClientConfig: &tls.Config{
				MinVersion:         tls.VersionTLS13,
				InsecureSkipVerify: true, // pinned instead:
				VerifyConnection:   func(cs tls.ConnectionState) error { return t.verify(cs.PeerCertificates) },
			},
		},
	}
	request := JoinRequest{Secret: t.Secret, CSRPEM: string(csrPEM), Agent: agent}
	var last error
	for _, address := range t.Servers {
		resp, err := Call[JoinResponse](ctx, client, http.MethodPost, "https://"+address+JoinPath, request)
		if err == nil {
			resp.Server = address
			return resp, t.verifyCA(resp.CAPEM)
		}
		last = err
		if !switchback.IsRetryable(err) || ctx.Err() != nil {
			break
		}
	}
	return JoinResponse{}, last
}

// verify checks that a chain is of a server under the CA the token names.
func (t Token) verify(chain []*x509.Certificate) error {
	roots := x509.NewCertPool()
	found := false
	for _, cert := range chain {
		if fingerprint(cert) == t.CA && cert.IsCA {
			roots.AddCert(cert)
			found = true
		}
	}
	if !found {
		return switchback.Errorf(switchback.CodeUnauthorized, "the server does not belong to the installation that made this join token").
			WithHint("check the server's address, and make a new token if the server was installed anew")
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: roots}); err != nil {
		return &switchback.Error{Code: switchback.CodeUnauthorized, Message: "the server's certificate is not believed", Err: err}
	}
	id, err := identityOf(chain[0])
	if err != nil {
		return err
	}
	return wantRole(id, RoleServer)
}

func (t Token) verifyCA(caPEM string) error {
	b, err := parseBundle([]byte(caPEM))
	if err == nil {
		for _, cert := range b.certs {
			if fingerprint(cert) == t.CA {
				return nil
			}
		}
	}
	return switchback.Errorf(switchback.CodeCorrupt, "the server's answer does not hold the CA certificate of the join token")
}

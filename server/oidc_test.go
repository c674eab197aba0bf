package server

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/coreos/go-oidc/v3/oidc/oidctest"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/store"
)

// provider is a small identity provider on loopback: discovery, keys, and the
// device flow, in which the person types the code when the test says so.
type provider struct {
	*httptest.Server
	key    *rsa.PrivateKey
	claims map[string]any
	// typed: the person has typed the code.
	typed bool
	polls int
}

func newProvider(t *testing.T) *provider {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p := &provider{key: key, claims: map[string]any{}}
	keys := &oidctest.Server{PublicKeys: []oidctest.PublicKey{{PublicKey: key.Public(), KeyID: "k1", Algorithm: oidc.RS256}}}
	mux := http.NewServeMux()
	mux.Handle("GET /keys", keys)
	write := func(w http.ResponseWriter, status int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(v)
	}
	mux.HandleFunc("GET /.well-known/openid-configuration", func(w http.ResponseWriter, _ *http.Request) {
		write(w, 200, map[string]any{"issuer": p.URL, "jwks_uri": p.URL + "/keys", "authorization_endpoint": p.URL + "/auth", "token_endpoint": p.URL + "/token",
			"device_authorization_endpoint": p.URL + "/device", "id_token_signing_alg_values_supported": []string{oidc.RS256}})
	})
	mux.HandleFunc("POST /device", func(w http.ResponseWriter, r *http.Request) {
		if r.FormValue("client_id") != "switchback" || r.FormValue("scope") != "openid email" {
			t.Errorf("device flow of %q for %q", r.FormValue("client_id"), r.FormValue("scope"))
		}
		write(w, 200, map[string]any{"device_code": "d1", "user_code": "ABCD", "verification_uri": p.URL + "/type", "expires_in": 60, "interval": 1})
	})
	mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		p.polls++
		switch {
		case r.FormValue("device_code") != "d1":
			write(w, 400, map[string]any{"error": "invalid_grant"})
		case !p.typed || p.polls < 2:
			write(w, 400, map[string]any{"error": "authorization_pending"})
		default:
			write(w, 200, map[string]any{"access_token": "x", "token_type": "Bearer", "id_token": p.idToken(p.key, nil)})
		}
	})
	p.Server = httptest.NewServer(mux)
	t.Cleanup(p.Close)
	return p
}

// idToken signs the provider's claims, with some changed.
func (p *provider) idToken(key *rsa.PrivateKey, change map[string]any) string {
	claims := map[string]any{"iss": p.URL, "aud": "switchback", "sub": "u-1", "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix()}
	maps.Copy(claims, p.claims)
	maps.Copy(claims, change)
	data, err := json.Marshal(claims)
	if err != nil {
		panic(err)
	}
	return oidctest.SignIDToken(key, "k1", oidc.RS256, string(data))
}

func TestLogin(t *testing.T) {
	f := newFleet(t)
	ctx := t.Context()
	p := newProvider(t)
	address := f.listen()
	dir := t.TempDir()
	if _, err := api.Login(ctx, dir, nil); switchback.CodeOf(err) != switchback.CodeInvalid {
		t.Errorf("a server that is not known: %v", err)
	}
	if err := api.Trust(dir, []string{address}, f.s.ca.CertificatePEM()); err != nil {
		t.Fatal(err)
	}
	_, err := api.Login(ctx, dir, nil)
	wantCode(t, "no provider", err, switchback.CodeUnsupported)

	f.s.announced = []string{address}
	f.s.cfg.OIDC, err = ParseOIDC(fmt.Appendf(nil, `{"issuer":%q,"client_id":"switchback","token_hours":2,"roles":[
		{"group":"dr-admins","role":"administrator"},{"group":"dr-riga","role":"operator","scope":{"sites":["riga"]}},{"group":"all","role":"viewer"}]}`, p.URL))
	if err != nil {
		t.Fatal(err)
	}
	p.claims = map[string]any{"email": "alice@example.com", "email_verified": true, "groups": []string{"all", "dr-riga"}}
	got, err := api.Login(ctx, dir, func(address, code string) {
		if address != p.URL+"/type" || code != "ABCD" {
			t.Errorf("%s, %s", address, code)
		}
		p.typed = true
	})
	if err != nil {
		t.Fatal(err)
	}
	c, err := api.Dial(dir)
	if err != nil {
		t.Fatal(err)
	}
	who, err := c.Whoami(ctx)
	if err != nil || who.Name != "alice@example.com" || who.Role != switchback.Operator || !slices.Equal(who.Scope.Sites, []switchback.SiteID{"riga"}) {
		t.Errorf("%+v, %v", who, err)
	}
	if life := time.Until(got.ExpiresAt); life > 2*time.Hour || life < time.Hour || p.polls < 2 {
		t.Errorf("good for %s after %d polls", life, p.polls)
	}

	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	post := func(token string) string {
		status, body := f.send("POST", "/v1/login", fmt.Sprintf(`{"id_token":%q}`, token))
		return fmt.Sprint(status, " ", body)
	}
	for name, x := range map[string]struct{ token, says string }{
		"another signer":   {p.idToken(other, nil), "not believed"},
		"another client":   {p.idToken(p.key, map[string]any{"aud": "mail"}), "not believed"},
		"another issuer":   {p.idToken(p.key, map[string]any{"iss": "http://127.0.0.1:1"}), "not believed"},
		"expired":          {p.idToken(p.key, map[string]any{"exp": time.Now().Add(-time.Minute).Unix()}), "not believed"},
		"old":              {p.idToken(p.key, map[string]any{"iat": time.Now().Add(-time.Hour).Unix()}), "is of"},
		"no group":         {p.idToken(p.key, map[string]any{"groups": []string{"sales"}}), "no role"},
		"not verified":     {p.idToken(p.key, map[string]any{"email_verified": false}), "not verified"},
		"no name":          {p.idToken(p.key, map[string]any{"email": ""}), "no claim email"},
		"the name of root": {p.idToken(p.key, map[string]any{"email": "admin"}), "cannot be for"},
		"no token":         {"x", "not believed"},
	} {
		if got := post(x.token); !strings.HasPrefix(got, "4") || !strings.Contains(got, x.says) {
			t.Errorf("%s: %s", name, got)
		}
	}
	entries, err := f.s.store.Audit(ctx, store.AuditFilter{Action: "login"})
	if err != nil || len(entries) != 5 || entries[0].Outcome != audit.Done || entries[0].Who != "alice@example.com" || entries[1].Outcome != audit.Refused {
		t.Errorf("%+v, %v", entries, err)
	}
}

func TestParseOIDC(t *testing.T) {
	const roles = `"roles":[{"group":"g","role":"viewer"}]`
	for text, ok := range map[string]bool{
		`{"issuer":"https://idp","client_id":"c",` + roles + `}`:                      true,
		`{"issuer":"http://127.0.0.1:5","client_id":"c",` + roles + `}`:               true,
		`{"issuer":"http://idp","client_id":"c",` + roles + `}`:                       false,
		`{"issuer":"https://idp",` + roles + `}`:                                      false,
		`{"issuer":"https://idp","client_id":"c"}`:                                    false,
		`{"issuer":"https://idp","client_id":"c","colour":1,` + roles + `}`:           false,
		`{"issuer":"https://idp","client_id":"c","token_hours":1000,` + roles + `}`:   false,
		`{"issuer":"https://idp","client_id":"c","roles":[{"group":"g","role":"x"}]}`: false,
	} {
		if _, err := ParseOIDC([]byte(text)); (err == nil) != ok {
			t.Errorf("%s: %v", text, err)
		}
	}
}

package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/danielgtaylor/huma/v2"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/audit"
	"github.com/switchback-dr/switchback/transport"
)

// OIDC says which identity provider people log in at, and what they may then. A
// login ends in an API token of short life: from there on nothing depends on the
// provider, which may be at the site that has failed.
type OIDC struct {
	// Issuer is the provider's URL (https, unless it is this machine); ClientID is
	// that of a public client which may use the device flow.
	Issuer   string `json:"issuer"`
	ClientID string `json:"client_id"`
	// Scopes beside openid; email where none is named.
	Scopes []string `json:"scopes,omitempty"`
	// PersonClaim names the claim that is the person's name, email where it is
	// empty; GroupsClaim the one that lists their groups, groups where it is empty.
	PersonClaim string `json:"person_claim,omitempty"`
	GroupsClaim string `json:"groups_claim,omitempty"`
	// Roles by group: the first whose group a person has counts.
	Roles []GroupRole `json:"roles"`
	// TokenHours is the life of the token that a login makes; 12 if zero.
	TokenHours int `json:"token_hours,omitempty"`
}

// GroupRole is what the members of a group may.
type GroupRole struct {
	Group string                `json:"group"`
	Role  switchback.AccessRole `json:"role"`
	Scope switchback.Scope      `json:"scope,omitzero"`
}

// freshLogin bounds the age of an ID token that is taken for a login.
const freshLogin = 10 * time.Minute

// ParseOIDC reads the configuration as JSON. Unknown keys are errors.
func ParseOIDC(data []byte) (*OIDC, error) {
	c := &OIDC{}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(c); err != nil {
		return nil, switchback.Errorf(switchback.CodeInvalid, "configuration of OIDC: %w", err)
	}
	if len(c.Scopes) == 0 {
		c.Scopes = []string{"email"}
	}
	if c.PersonClaim == "" {
		c.PersonClaim = "email"
	}
	if c.GroupsClaim == "" {
		c.GroupsClaim = "groups"
	}
	if c.TokenHours == 0 {
		c.TokenHours = 12
	}
	u, err := url.Parse(c.Issuer)
	local := err == nil && u.Scheme == "http" && (u.Hostname() == "127.0.0.1" || u.Hostname() == "localhost" || u.Hostname() == "::1")
	switch {
	case err != nil || u.Host == "" || u.Scheme != "https" && !local:
		return nil, switchback.Errorf(switchback.CodeInvalid, "issuer %q is not an https URL", c.Issuer)
	case c.ClientID == "":
		return nil, switchback.Errorf(switchback.CodeInvalid, "configuration of OIDC: no client_id")
	case c.TokenHours < 1 || c.TokenHours > 7*24:
		return nil, switchback.Errorf(switchback.CodeInvalid, "a login is good for 1 to 168 hours, not %d", c.TokenHours)
	case len(c.Roles) == 0:
		return nil, switchback.Errorf(switchback.CodeInvalid, "configuration of OIDC: no group has a role").WithHint(`"roles": [{"group": "dr-operators", "role": "operator"}]`)
	}
	for _, r := range c.Roles {
		if _, err := switchback.ParseAccessRole(string(r.Role)); err != nil {
			return nil, err
		}
		if r.Group == "" {
			return nil, switchback.Errorf(switchback.CodeInvalid, "configuration of OIDC: a role without group")
		}
	}
	return c, nil
}

// logins verifies ID tokens. The provider is asked for its keys at the first
// login, not when the server starts.
type logins struct {
	mu       sync.Mutex
	verifier *oidc.IDTokenVerifier
}

func (l *logins) verify(ctx context.Context, cfg *OIDC, text string) (*oidc.IDToken, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.verifier == nil {
		// The provider keeps the context for fetching keys later.
		client := &http.Client{Timeout: 10 * time.Second}
		p, err := oidc.NewProvider(oidc.ClientContext(context.WithoutCancel(ctx), client), cfg.Issuer)
		if err != nil {
			return nil, switchback.Errorf(switchback.CodeUnavailable, "identity provider %s: %w", cfg.Issuer, err).
				WithHint("see that the server reaches it; tokens that were made before work without it")
		}
		l.verifier = p.Verifier(&oidc.Config{ClientID: cfg.ClientID})
	}
	t, err := l.verifier.Verify(ctx, text)
	if err != nil {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "the identity provider's token is not believed: %w", err).WithHint("log in again")
	}
	if age := time.Since(t.IssuedAt); age > freshLogin || age < -freshLogin {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "the identity provider's token is of %s", t.IssuedAt.UTC().Format(time.RFC3339)).
			WithHint("log in again; if it is new, set the clocks right")
	}
	return t, nil
}

// granted says who a verified token speaks for and what they may.
func (c *OIDC) granted(claims map[string]any) (person string, r GroupRole, err error) {
	person, _ = claims[c.PersonClaim].(string)
	if verified, ok := claims["email_verified"].(bool); c.PersonClaim == "email" && ok && !verified {
		return person, r, switchback.Errorf(switchback.CodeUnauthorized, "the identity provider has not verified the address %q", person)
	}
	if person == "" {
		return person, r, switchback.Errorf(switchback.CodeUnauthorized, "the identity provider's token has no claim %s", c.PersonClaim).
			WithHint("ask for it with scopes, or name another as person_claim")
	}
	var groups []string
	switch g := claims[c.GroupsClaim].(type) {
	case string:
		groups = []string{g}
	case []any:
		for _, x := range g {
			if text, ok := x.(string); ok {
				groups = append(groups, text)
			}
		}
	}
	for _, r := range c.Roles {
		if slices.Contains(groups, r.Group) {
			return person, r, nil
		}
	}
	return person, r, switchback.Errorf(switchback.CodeUnauthorized, "%s has no role: none of their groups has one", person).
		WithHint("ask an administrator for a group that has the role %s", switchback.Viewer)
}

// login makes a token for who the identity provider says it is.
func (s *Server) login(r *http.Request) (any, error) {
	cfg := s.cfg.OIDC
	if cfg == nil {
		return nil, errNoOIDC
	}
	var req api.LoginRequest
	if err := transport.ReadJSON(r, &req); err != nil {
		return nil, err
	}
	ctx := r.Context()
	t, err := s.logins.verify(ctx, cfg, req.IDToken)
	if err != nil {
		s.log.Warn("login refused", "error", err)
		return nil, err
	}
	var claims map[string]any
	if err := t.Claims(&claims); err != nil {
		return nil, switchback.Errorf(switchback.CodeUnauthorized, "the identity provider's token is not understood: %w", err)
	}
	person, role, err := cfg.granted(claims)
	e := audit.Entry{Who: person, Role: role.Role, Via: "oidc " + cfg.Issuer + " " + t.Subject, Action: "login", Object: "api-tokens", Outcome: audit.Done}
	var token api.NewAPIToken
	if err == nil {
		token, err = s.createAPIToken(ctx, "oidc", api.APITokenRequest{Person: person, Role: role.Role, Scope: role.Scope, Note: "login", ValidFor: time.Duration(cfg.TokenHours) * time.Hour})
	}
	if err != nil {
		e.Outcome, e.Code, e.Detail = audit.Refused, switchback.CodeOf(err), err.Error()
	} else {
		e.Detail = "token " + token.ID
	}
	if aerr := s.audit(ctx, e); aerr != nil {
		return nil, errors.Join(err, aerr)
	}
	return token, err
}

var errNoOIDC = switchback.Errorf(switchback.CodeUnsupported, "nobody can log in at this server: it knows no identity provider").
	WithHint("start it with --oidc FILE, or ask an administrator for a token: switchback token create")

// routeLogin is for everybody: who logs in is not known yet.
func (s *Server) routeLogin(rt *routes) {
	public := func(x route, in, out any, f func(r *http.Request) (any, error)) {
		op := x.operation()
		op.Description, op.Security = "For everybody.", []map[string][]string{}
		schemas := rt.api.OpenAPI().Components.Schemas
		op.Responses = map[string]*huma.Response{"200": {Description: "OK", Content: map[string]*huma.MediaType{"application/json": {Schema: schemas.Schema(reflect.TypeOf(out), true, "")}}}}
		if in != nil {
			op.RequestBody = &huma.RequestBody{Required: true, Content: map[string]*huma.MediaType{"application/json": {Schema: schemas.Schema(reflect.TypeOf(in), true, "")}}}
		}
		rt.api.OpenAPI().AddOperation(&op)
		rt.mux.Handle(x.Pattern, answer(f))
	}
	public(route{ID: "get-login", Tag: "Access", Pattern: "GET /v1/login", Summary: "Where people log in"}, nil, api.LoginInfo{},
		func(*http.Request) (any, error) {
			if s.cfg.OIDC == nil {
				return nil, errNoOIDC
			}
			return api.LoginInfo{Issuer: s.cfg.OIDC.Issuer, ClientID: s.cfg.OIDC.ClientID, Scopes: append([]string{oidc.ScopeOpenID}, s.cfg.OIDC.Scopes...)}, nil
		})
	public(route{ID: "login", Tag: "Access", Pattern: "POST /v1/login", Summary: "Have an API token made for who the identity provider says it is"}, api.LoginRequest{}, api.NewAPIToken{}, s.login)
}

package server

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"regexp"
	"slices"
	"strings"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/api"
	"github.com/switchback-dr/switchback/store"
	"github.com/switchback-dr/switchback/transport"
)

// apiTokenPrefix marks an API token: prefix, ID, "_", secret.
const apiTokenPrefix = "sbapi_"

// maxAPITokenLife bounds how long a token that nobody thinks of stays good.
const maxAPITokenLife = 2 * 365 * 24 * time.Hour

var personPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$`)

// reserved are names that the server, and the holder of its certificate, go by.
var reserved = []string{"admin", "policy", policyName, "server"}

// createAPIToken makes a token for a person. Its secret is in the answer only.
func (s *Server) createAPIToken(ctx context.Context, by string, req api.APITokenRequest) (api.NewAPIToken, error) {
	var none api.NewAPIToken
	if !personPattern.MatchString(req.Person) || slices.Contains(reserved, req.Person) {
		return none, switchback.Errorf(switchback.CodeInvalid, "a token cannot be for %q", req.Person).
			WithHint("a name of up to 64 letters, digits, dots, dashes and @, but not %s", strings.Join(reserved, ", "))
	}
	if _, err := switchback.ParseAccessRole(string(req.Role)); err != nil {
		return none, err
	}
	if req.ValidFor < time.Minute || req.ValidFor > maxAPITokenLife {
		return none, switchback.Errorf(switchback.CodeInvalid, "an API token is valid for 1m to %s, not %s", maxAPITokenLife, req.ValidFor)
	}
	for _, site := range req.Scope.Sites {
		if _, err := s.store.Site(ctx, site); err != nil {
			return none, err
		}
	}
	for _, t := range req.Scope.Tags {
		if !tagPattern.MatchString(t) {
			return none, switchback.Errorf(switchback.CodeInvalid, "%q cannot be a tag of a VM", t)
		}
	}
	var id [6]byte
	var secret [32]byte
	rand.Read(id[:])
	rand.Read(secret[:])
	text := base64.RawURLEncoding.EncodeToString(secret[:])
	now := s.store.Now()
	t := store.APIToken{ID: hex.EncodeToString(id[:]), Hash: transport.HashSecret(text), Person: req.Person, Role: req.Role, Scope: req.Scope, Note: req.Note,
		CreatedAt: now, CreatedBy: by, ExpiresAt: now.Add(req.ValidFor)}
	if err := s.store.CreateAPIToken(ctx, t); err != nil {
		return none, err
	}
	callOf(ctx).note("token " + t.ID + " for " + t.Person)
	servers := s.announced
	if len(servers) == 0 {
		servers = s.cfg.Addresses[:1]
	}
	return api.NewAPIToken{APIToken: tokenView(t, now), Token: apiTokenPrefix + t.ID + "_" + text, Servers: servers, CA: string(s.ca.BundlePEM())}, nil
}

// tokenCaller is whom an API token speaks for. What is wrong with a token is
// said only to who has its secret.
func (s *Server) tokenCaller(ctx context.Context, text string) (caller, error) {
	unknown := switchback.Errorf(switchback.CodeUnauthorized, "unknown API token").WithHint("ask an administrator for another: switchback token create")
	id, secret, ok := strings.Cut(strings.TrimPrefix(text, apiTokenPrefix), "_")
	if !ok || !strings.HasPrefix(text, apiTokenPrefix) {
		return caller{}, unknown
	}
	t, err := s.store.APIToken(ctx, id)
	if switchback.CodeOf(err) == switchback.CodeNotFound {
		return caller{}, unknown
	}
	if err != nil {
		return caller{}, err
	}
	now := s.store.Now()
	switch {
	case subtle.ConstantTimeCompare([]byte(transport.HashSecret(secret)), []byte(t.Hash)) != 1:
		return caller{}, unknown
	case !t.RevokedAt.IsZero():
		return caller{}, switchback.Errorf(switchback.CodeUnauthorized, "the API token %s of %s was revoked at %s", t.ID, t.Person, t.RevokedAt.Format(time.RFC3339)).
			WithHint("ask an administrator for another: switchback token create")
	case !now.Before(t.ExpiresAt):
		return caller{}, switchback.Errorf(switchback.CodeUnauthorized, "the API token %s of %s expired at %s", t.ID, t.Person, t.ExpiresAt.Format(time.RFC3339)).
			WithHint("ask an administrator for another: switchback token create")
	}
	if now.Sub(t.UsedAt) > time.Minute {
		if err := s.store.UseAPIToken(ctx, t.ID, now); err != nil {
			return caller{}, err
		}
	}
	return caller{
		Principal: api.Principal{Name: t.Person, Role: t.Role, Scope: t.Scope, Via: "token " + t.ID},
		identity:  transport.Identity{Installation: s.ca.Installation(), Role: transport.RoleAdmin, ID: t.Person},
	}, nil
}

func tokenView(t store.APIToken, now time.Time) api.APIToken {
	v := api.APIToken{ID: t.ID, Person: t.Person, Role: t.Role, Scope: t.Scope, Note: t.Note, CreatedAt: t.CreatedAt, CreatedBy: t.CreatedBy,
		ExpiresAt: t.ExpiresAt, RevokedAt: t.RevokedAt, RevokedBy: t.RevokedBy, UsedAt: t.UsedAt, State: "valid"}
	switch {
	case !t.RevokedAt.IsZero():
		v.State = "revoked"
	case !now.Before(t.ExpiresAt):
		v.State = "expired"
	}
	return v
}

func (s *Server) routeTokens(rt *routes) {
	handle(rt, route{ID: "list-api-tokens", Tag: "Access", Pattern: "GET /v1/api-tokens", Summary: "List API tokens, without their secrets", Need: switchback.Administrator},
		func(ctx context.Context, in *struct {
			Paging
			Person string `query:"person" doc:"only those of a person"`
			State  string `query:"state" enum:"valid,expired,revoked"`
		}) (page api.Page[api.APIToken], err error) {
			list, err := s.store.APITokens(ctx)
			if err != nil {
				return page, err
			}
			views := []api.APIToken{}
			for _, t := range list {
				v := tokenView(t, s.store.Now())
				if (in.Person == "" || v.Person == in.Person) && (in.State == "" || v.State == in.State) {
					views = append(views, v)
				}
			}
			return pageOf(views, func(v api.APIToken) string { return v.Person + "\n" + v.ID }, in.Paging)
		})
	handle(rt, route{ID: "create-api-token", Tag: "Access", Pattern: "POST /v1/api-tokens", Summary: "Make an API token; its secret is shown once", Need: switchback.Administrator},
		func(ctx context.Context, in *struct{ Body api.APITokenRequest }) (api.NewAPIToken, error) {
			return s.createAPIToken(ctx, callOf(ctx).who.Name, in.Body)
		})
	handle(rt, route{ID: "revoke-api-token", Tag: "Access", Pattern: "DELETE /v1/api-tokens/{token}", Summary: "End an API token at once", Need: switchback.Administrator},
		func(ctx context.Context, in *struct {
			Token string `path:"token" doc:"its ID"`
		}) (struct{}, error) {
			return struct{}{}, s.store.RevokeAPIToken(ctx, in.Token, callOf(ctx).who.Name, s.store.Now())
		})
}

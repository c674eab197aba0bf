package api

import (
	"context"
	"net/http"
	"net/url"
	"time"

	switchback "github.com/switchback-dr/switchback"
	"github.com/switchback-dr/switchback/audit"
)

// Principal is who asks, and what they may.
type Principal struct {
	// Name is the person's or program's; operations and the audit log say it.
	Name  string                `json:"name"`
	Role  switchback.AccessRole `json:"role"`
	Scope switchback.Scope      `json:"scope,omitzero"`
	// Via is "certificate", or "token" and its ID.
	Via string `json:"via"`
}

// Tags of a VM.
type Tags struct {
	Tags []string `json:"tags"`
}

// APITokenRequest asks for a token for a person.
type APITokenRequest struct {
	Person string                `json:"person"`
	Role   switchback.AccessRole `json:"role"`
	Scope  switchback.Scope      `json:"scope,omitzero"`
	Note   string                `json:"note,omitempty" maxLength:"200"`
	// ValidFor is how long from now.
	ValidFor time.Duration `json:"valid_for"`
}

// APIToken is a token without its secret.
type APIToken struct {
	ID     string                `json:"id"`
	Person string                `json:"person"`
	Role   switchback.AccessRole `json:"role"`
	Scope  switchback.Scope      `json:"scope,omitzero"`
	Note   string                `json:"note,omitempty"`
	// State is "valid", "expired" or "revoked".
	State     string    `json:"state"`
	CreatedAt time.Time `json:"created_at"`
	CreatedBy string    `json:"created_by"`
	ExpiresAt time.Time `json:"expires_at"`
	RevokedAt time.Time `json:"revoked_at,omitzero"`
	RevokedBy string    `json:"revoked_by,omitempty"`
	// UsedAt is when it was last used, to the minute.
	UsedAt time.Time `json:"used_at,omitzero"`
}

// NewAPIToken is a fresh token, with all that a client needs to use it.
type NewAPIToken struct {
	APIToken
	// Token is the token itself, shown once.
	Token string `json:"token"`
	// Servers are addresses, CA the certificate by which they are known, PEM.
	Servers []string `json:"servers"`
	CA      string   `json:"ca"`
}

// Whoami says who asks and what they may.
func (c *Client) Whoami(ctx context.Context) (Principal, error) {
	return call[Principal](ctx, c, http.MethodGet, "/v1/whoami", nil)
}

// SetTags replaces the tags of a VM and returns them as they stand.
func (c *Client) SetTags(ctx context.Context, vm string, tags []string) ([]string, error) {
	t, err := call[Tags](ctx, c, http.MethodPut, "/v1/vms/"+url.PathEscape(vm)+"/tags", Tags{Tags: tags})
	return t.Tags, err
}

// APITokens lists the tokens of a person, or all.
func (c *Client) APITokens(ctx context.Context, person string) ([]APIToken, error) {
	return list[APIToken](ctx, c, "/v1/api-tokens", values("person", person), 0)
}

// CreateAPIToken makes a token for a person.
func (c *Client) CreateAPIToken(ctx context.Context, req APITokenRequest) (NewAPIToken, error) {
	return call[NewAPIToken](ctx, c, http.MethodPost, "/v1/api-tokens", req)
}

// RevokeAPIToken ends a token at once.
func (c *Client) RevokeAPIToken(ctx context.Context, id string) error {
	_, err := call[struct{}](ctx, c, http.MethodDelete, "/v1/api-tokens/"+url.PathEscape(id), nil)
	return err
}

// AuditFilter chooses entries of the audit log. Zero fields do not restrict.
type AuditFilter struct {
	Who, Action, Object, Outcome, Request string
	Since, Until                          time.Time
	// Limit is the most to return, the newest first; 0: all, the oldest first.
	Limit int
}

// Audit lists the audit log.
func (c *Client) Audit(ctx context.Context, f AuditFilter) ([]audit.Entry, error) {
	q := values("who", f.Who, "action", f.Action, "object", f.Object, "outcome", f.Outcome, "request", f.Request)
	for name, at := range map[string]time.Time{"since": f.Since, "until": f.Until} {
		if !at.IsZero() {
			q.Set(name, at.Format(time.RFC3339Nano))
		}
	}
	if f.Limit > 0 {
		q.Set("newest", "true")
	}
	return list[audit.Entry](ctx, c, "/v1/audit", q, f.Limit)
}

// VerifyAudit has the server read its whole audit log. expect are heads that
// were noted before.
func (c *Client) VerifyAudit(ctx context.Context, expect []audit.Head) (audit.Verdict, error) {
	q := url.Values{}
	for _, h := range expect {
		q.Add("expect", h.String())
	}
	return call[audit.Verdict](ctx, c, http.MethodGet, "/v1/audit/verify?"+q.Encode(), nil)
}

// values are query parameters; those without a value are left out.
func values(pairs ...string) url.Values {
	q := url.Values{}
	for i := 0; i < len(pairs); i += 2 {
		if pairs[i+1] != "" {
			q.Set(pairs[i], pairs[i+1])
		}
	}
	return q
}

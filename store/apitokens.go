package store

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"github.com/uptrace/bun"
)

// APIToken lets a person, or a program on their behalf, use the API. Only the
// hash of its secret is kept.
type APIToken struct {
	ID string `json:"id"`
	// Hash is the SHA-256 of the secret, hexadecimal.
	Hash   string                `json:"-"`
	Person string                `json:"person"`
	Role   switchback.AccessRole `json:"role"`
	Scope  switchback.Scope      `json:"scope,omitzero"`
	// Note says what it is for.
	Note      string    `json:"note,omitempty"`
	CreatedAt time.Time `json:"created_at"`
	CreatedBy string    `json:"created_by"`
	ExpiresAt time.Time `json:"expires_at"`
	// RevokedAt is zero while it is not.
	RevokedAt time.Time `json:"revoked_at,omitzero"`
	RevokedBy string    `json:"revoked_by,omitempty"`
	// UsedAt is when it was last used, to the minute; zero for never.
	UsedAt time.Time `json:"used_at,omitzero"`
}

type apiTokenRow struct {
	bun.BaseModel `bun:"table:api_tokens"`
	ID            string `bun:"id,pk"`
	Hash          string `bun:"hash"`
	Person        string `bun:"person"`
	Role          string `bun:"role"`
	Scope         string `bun:"scope"`
	Note          string `bun:"note"`
	CreatedAt     int64  `bun:"created_at"`
	CreatedBy     string `bun:"created_by"`
	ExpiresAt     int64  `bun:"expires_at"`
	RevokedAt     int64  `bun:"revoked_at"`
	RevokedBy     string `bun:"revoked_by"`
	UsedAt        int64  `bun:"used_at"`
}

func (r apiTokenRow) token() (APIToken, error) {
	t := APIToken{ID: r.ID, Hash: r.Hash, Person: r.Person, Role: switchback.AccessRole(r.Role), Note: r.Note, CreatedAt: instant(r.CreatedAt),
		CreatedBy: r.CreatedBy, ExpiresAt: instant(r.ExpiresAt), RevokedAt: instant(r.RevokedAt), RevokedBy: r.RevokedBy, UsedAt: instant(r.UsedAt)}
	if err := json.Unmarshal([]byte(r.Scope), &t.Scope); err != nil {
		return t, switchback.Errorf(switchback.CodeCorrupt, "scope of API token %s: %v", r.ID, err)
	}
	return t, nil
}

// CreateAPIToken stores a new token. CodeConflict: the ID exists.
func (s *Store) CreateAPIToken(ctx context.Context, t APIToken) error {
	scope, err := json.Marshal(t.Scope)
	if err != nil {
		return fmt.Errorf("encode scope: %w", err)
	}
	row := apiTokenRow{ID: t.ID, Hash: t.Hash, Person: t.Person, Role: string(t.Role), Scope: string(scope), Note: t.Note, CreatedAt: micros(t.CreatedAt),
		CreatedBy: t.CreatedBy, ExpiresAt: micros(t.ExpiresAt), RevokedAt: micros(t.RevokedAt), RevokedBy: t.RevokedBy, UsedAt: micros(t.UsedAt)}
	_, err = s.write.NewInsert().Model(&row).Exec(ctx)
	return failure("API token "+t.ID, err)
}

// APIToken returns one token, or CodeNotFound.
func (s *Store) APIToken(ctx context.Context, id string) (APIToken, error) {
	row := apiTokenRow{ID: id}
	if err := s.read.NewSelect().Model(&row).WherePK().Scan(ctx); err != nil {
		return APIToken{}, failure("API token "+id, err)
	}
	return row.token()
}

// APITokens returns all tokens by ID, also expired and revoked ones.
func (s *Store) APITokens(ctx context.Context) ([]APIToken, error) {
	var rows []apiTokenRow
	if err := s.read.NewSelect().Model(&rows).Order("id").Scan(ctx); err != nil {
		return nil, failure("list API tokens", err)
	}
	list := make([]APIToken, 0, len(rows))
	for _, r := range rows {
		t, err := r.token()
		if err != nil {
			return nil, err
		}
		list = append(list, t)
	}
	return list, nil
}

// RevokeAPIToken ends a token for good; of several who do so the first one
// stands. CodeNotFound: there is none.
func (s *Store) RevokeAPIToken(ctx context.Context, id, by string, now time.Time) error {
	_, err := s.write.NewUpdate().Model((*apiTokenRow)(nil)).Set("revoked_at = ?", micros(now)).Set("revoked_by = ?", by).
		Where("id = ?", id).Where("revoked_at = 0").Exec(ctx)
	if err != nil {
		return failure("revoke API token "+id, err)
	}
	_, err = s.APIToken(ctx, id)
	return err
}

// UseAPIToken notes that a token was used, at most once a minute.
func (s *Store) UseAPIToken(ctx context.Context, id string, now time.Time) error {
	_, err := s.write.NewUpdate().Model((*apiTokenRow)(nil)).Set("used_at = ?", micros(now)).
		Where("id = ?", id).Where("used_at < ?", micros(now.Add(-time.Minute))).Exec(ctx)
	return failure("API token "+id, err)
}

package store

import (
	"context"
	"database/sql"
	"errors"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"github.com/uptrace/bun"
)

// JoinToken lets one agent join a site once. Only the hash of its secret is kept.
type JoinToken struct {
	// Hash is the SHA-256 of the secret, hexadecimal.
	Hash      string            `json:"hash"`
	Site      switchback.SiteID `json:"site"`
	CreatedAt time.Time         `json:"created_at"`
	ExpiresAt time.Time         `json:"expires_at"`
	// UsedAt and UsedBy say when and by whom; zero while it can be used.
	UsedAt time.Time          `json:"used_at,omitzero"`
	UsedBy switchback.AgentID `json:"used_by,omitempty"`
}

type tokenRow struct {
	bun.BaseModel `bun:"table:join_tokens"`
	Hash          string `bun:"hash,pk"`
	Site          string `bun:"site"`
	CreatedAt     int64  `bun:"created_at"`
	ExpiresAt     int64  `bun:"expires_at"`
	UsedAt        int64  `bun:"used_at"`
	UsedBy        string `bun:"used_by"`
}

// CreateJoinToken stores a new token. CodeNotFound: no such site.
func (s *Store) CreateJoinToken(ctx context.Context, t JoinToken) error {
	row := tokenRow{Hash: t.Hash, Site: string(t.Site), CreatedAt: micros(t.CreatedAt), ExpiresAt: micros(t.ExpiresAt)}
	_, err := s.write.NewInsert().Model(&row).Exec(ctx)
	if isForeignKey(err) {
		return switchback.Errorf(switchback.CodeNotFound, "site %s does not exist", t.Site)
	}
	return failure("join token", err)
}

// RedeemJoinToken uses a token up for an agent: exactly one agent ever gets it.
// The same agent may ask again (its first answer may have been lost) and gets
// the same answer. CodeUnauthorized says whether the token is unknown, used or
// expired.
func (s *Store) RedeemJoinToken(ctx context.Context, hash string, agent switchback.AgentID, now time.Time) (JoinToken, error) {
	_, err := s.write.NewUpdate().Model((*tokenRow)(nil)).
		Set("used_at = ?", micros(now)).Set("used_by = ?", string(agent)).
		Where("hash = ?", hash).Where("used_by = ''").Where("expires_at > ?", micros(now)).Exec(ctx)
	if err != nil {
		return JoinToken{}, failure("redeem join token", err)
	}
	const hint = "make a new one: switchback site add SITE"
	row := tokenRow{Hash: hash}
	err = s.write.NewSelect().Model(&row).WherePK().Scan(ctx)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return JoinToken{}, switchback.Errorf(switchback.CodeUnauthorized, "unknown join token").WithHint(hint)
	case err != nil:
		return JoinToken{}, failure("redeem join token", err)
	case row.ExpiresAt <= micros(now):
		return JoinToken{}, switchback.Errorf(switchback.CodeUnauthorized, "the join token expired at %s",
			instant(row.ExpiresAt).Format(time.RFC3339)).WithHint(hint)
	case row.UsedBy != string(agent):
		return JoinToken{}, switchback.Errorf(switchback.CodeUnauthorized, "the join token was used by agent %s at %s",
			row.UsedBy, instant(row.UsedAt).Format(time.RFC3339)).WithHint(hint)
	}
	return JoinToken{
		Hash: row.Hash, Site: switchback.SiteID(row.Site), CreatedAt: instant(row.CreatedAt), ExpiresAt: instant(row.ExpiresAt),
		UsedAt: instant(row.UsedAt), UsedBy: switchback.AgentID(row.UsedBy),
	}, nil
}

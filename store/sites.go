package store

import (
	"context"
	"time"

	switchback "github.com/switchback-dr/switchback"

	"github.com/uptrace/bun"
)

// Site is a place with hypervisors and storage.
type Site struct {
	ID        switchback.SiteID `json:"id"`
	Name      string            `json:"name"`
	CreatedAt time.Time         `json:"created_at"`
}

type siteRow struct {
	bun.BaseModel `bun:"table:sites"`
	ID            string `bun:"id,pk"`
	Name          string `bun:"name"`
	CreatedAt     int64  `bun:"created_at"`
}

func (r siteRow) site() Site {
	return Site{ID: switchback.SiteID(r.ID), Name: r.Name, CreatedAt: instant(r.CreatedAt)}
}

// CreateSite adds a site. CodeConflict: it exists.
func (s *Store) CreateSite(ctx context.Context, site Site) error {
	row := siteRow{ID: string(site.ID), Name: site.Name, CreatedAt: micros(site.CreatedAt)}
	_, err := s.write.NewInsert().Model(&row).Exec(ctx)
	return failure("site "+row.ID, err)
}

// Site returns one site, or CodeNotFound.
func (s *Store) Site(ctx context.Context, id switchback.SiteID) (Site, error) {
	row := siteRow{ID: string(id)}
	err := s.read.NewSelect().Model(&row).WherePK().Scan(ctx)
	return row.site(), failure("site "+row.ID, err)
}

// Sites returns all sites by ID.
func (s *Store) Sites(ctx context.Context) ([]Site, error) {
	var rows []siteRow
	if err := s.read.NewSelect().Model(&rows).Order("id").Scan(ctx); err != nil {
		return nil, failure("list sites", err)
	}
	sites := make([]Site, 0, len(rows))
	for _, r := range rows {
		sites = append(sites, r.site())
	}
	return sites, nil
}

// DeleteSite removes a site and its join tokens. CodeConflict: agents belong to it.
func (s *Store) DeleteSite(ctx context.Context, id switchback.SiteID) error {
	return s.transact(ctx, func(ctx context.Context, tx bun.Tx) error {
		if _, err := tx.NewDelete().Model((*tokenRow)(nil)).Where("site = ?", string(id)).Exec(ctx); err != nil {
			return failure("delete site "+string(id), err)
		}
		n, err := changed(tx.NewDelete().Model((*siteRow)(nil)).Where("id = ?", string(id)).Exec(ctx))
		switch {
		case isForeignKey(err):
			return switchback.Errorf(switchback.CodeConflict, "site %s has agents", id).WithHint("remove its agents first")
		case err == nil && n == 0:
			return switchback.Errorf(switchback.CodeNotFound, "site %s does not exist", id)
		}
		return failure("delete site "+string(id), err)
	})
}

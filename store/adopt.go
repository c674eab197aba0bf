package store

import (
	"context"

	switchback "github.com/switchback-dr/switchback"
)

// ProtectionVersions returns the version of every protection.
func (s *Store) ProtectionVersions(ctx context.Context) (map[switchback.ProtectionID]int64, error) {
	var rows []protectionRow
	if err := s.read.NewSelect().Model(&rows).Column("id", "version").Scan(ctx); err != nil {
		return nil, failure("list versions of protections", err)
	}
	m := make(map[switchback.ProtectionID]int64, len(rows))
	for _, r := range rows {
		m[switchback.ProtectionID(r.ID)] = r.Version
	}
	return m, nil
}

// AdoptProtection stores a protection that others have kept, with its own
// version: in the place of the stored one of version was, or as a new one where
// was is 0. CodeConflict as for CreateProtection and UpdateProtection.
func (s *Store) AdoptProtection(ctx context.Context, p switchback.Protection, was int64) error {
	row, err := newProtectionRow(p)
	if err != nil {
		return err
	}
	if was == 0 {
		_, err = s.write.NewInsert().Model(&row).Exec(ctx)
	} else {
		var n int64
		n, err = changed(s.write.NewUpdate().Model(&row).WherePK().Where("version = ?", was).Exec(ctx))
		if err == nil && n == 0 {
			return switchback.Errorf(switchback.CodeConflict, "protection %s was changed meanwhile", p.ID)
		}
	}
	if isUnique(err) {
		return s.vmConflict(ctx, p)
	}
	return failure("protection "+row.ID, err)
}

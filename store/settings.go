package store

import (
	"context"

	"github.com/uptrace/bun"
)

type settingRow struct {
	bun.BaseModel `bun:"table:settings"`
	Key           string `bun:"key,pk"`
	Value         string `bun:"value"`
}

// Setting returns a setting of the installation, or CodeNotFound.
func (s *Store) Setting(ctx context.Context, key string) (string, error) {
	row := settingRow{Key: key}
	err := s.read.NewSelect().Model(&row).WherePK().Scan(ctx)
	return row.Value, failure("setting "+key, err)
}

// SetSetting stores a setting, replacing what there was.
func (s *Store) SetSetting(ctx context.Context, key, value string) error {
	_, err := s.write.NewInsert().Model(&settingRow{Key: key, Value: value}).
		On("CONFLICT (key) DO UPDATE").Set("value = EXCLUDED.value").Exec(ctx)
	return failure("set "+key, err)
}

// EnsureSetting stores a setting unless there is one, and returns what stands:
// of several callers all get the first one's value.
func (s *Store) EnsureSetting(ctx context.Context, key, value string) (string, error) {
	_, err := s.write.NewInsert().Model(&settingRow{Key: key, Value: value}).
		On("CONFLICT (key) DO NOTHING").Exec(ctx)
	if err != nil {
		return "", failure("set "+key, err)
	}
	return s.Setting(ctx, key)
}

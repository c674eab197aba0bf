package store

import (
	"context"
	"strings"

	switchback "github.com/switchback-dr/switchback"

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

// SwapSetting replaces a setting that has this value. CodeConflict: it has another.
func (s *Store) SwapSetting(ctx context.Context, key, was, value string) error {
	n, err := changed(s.write.NewUpdate().Model((*settingRow)(nil)).Set("value = ?", value).
		Where("key = ?", key).Where("value = ?", was).Exec(ctx))
	if err == nil && n == 0 {
		return switchback.Errorf(switchback.CodeConflict, "setting %s was changed by somebody else", key)
	}
	return failure("set "+key, err)
}

// SettingsUnder returns the settings whose keys begin with prefix, without it.
func (s *Store) SettingsUnder(ctx context.Context, prefix string) (map[string]string, error) {
	var rows []settingRow
	if err := s.read.NewSelect().Model(&rows).Where("substr(key, 1, ?) = ?", len(prefix), prefix).Scan(ctx); err != nil {
		return nil, failure("settings", err)
	}
	list := make(map[string]string, len(rows))
	for _, r := range rows {
		list[strings.TrimPrefix(r.Key, prefix)] = r.Value
	}
	return list, nil
}

// DeleteSetting removes a setting; one that is not there is no error.
func (s *Store) DeleteSetting(ctx context.Context, key string) error {
	_, err := s.write.NewDelete().Model(&settingRow{Key: key}).WherePK().Exec(ctx)
	return failure("delete "+key, err)
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

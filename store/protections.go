package store

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	switchback "github.com/switchback-dr/switchback"

	"github.com/uptrace/bun"
)

type protectionRow struct {
	bun.BaseModel `bun:"table:protections"`
	ID            string `bun:"id,pk"`
	VM            string `bun:"vm"`
	Name          string `bun:"name"`
	Phase         string `bun:"phase"`
	Version       int64  `bun:"version"`
	Document      string `bun:"document"`
}

func newProtectionRow(p switchback.Protection) (protectionRow, error) {
	doc, err := json.Marshal(p)
	if err != nil {
		return protectionRow{}, fmt.Errorf("encode protection %s: %w", p.ID, err)
	}
	return protectionRow{
		ID: string(p.ID), VM: string(p.VM), Name: p.Name, Phase: string(p.Phase), Version: p.Version, Document: string(doc),
	}, nil
}

func (r protectionRow) protection() (switchback.Protection, error) {
	var p switchback.Protection
	if err := json.Unmarshal([]byte(r.Document), &p); err != nil {
		return p, switchback.Errorf(switchback.CodeCorrupt, "protection %s: %v", r.ID, err)
	}
	p.Version = r.Version
	return p, nil
}

// CreateProtection stores a new protection and returns it with Version 1.
// CodeConflict: the ID exists, or the VM has another protection that is not unprotected.
func (s *Store) CreateProtection(ctx context.Context, p switchback.Protection) (switchback.Protection, error) {
	p.Version = 1
	row, err := newProtectionRow(p)
	if err != nil {
		return p, err
	}
	if _, err = s.write.NewInsert().Model(&row).Exec(ctx); isUnique(err) {
		return p, s.vmConflict(ctx, p)
	}
	return p, failure("protection "+row.ID, err)
}

// UpdateProtection replaces a protection whose stored version is p.Version and
// returns it with the next one. CodeConflict: somebody else has written it, or
// its VM has another protection.
func (s *Store) UpdateProtection(ctx context.Context, p switchback.Protection) (switchback.Protection, error) {
	was := p.Version
	p.Version++
	row, err := newProtectionRow(p)
	if err != nil {
		return p, err
	}
	n, err := changed(s.write.NewUpdate().Model(&row).WherePK().Where("version = ?", was).Exec(ctx))
	switch {
	case isUnique(err):
		return p, s.vmConflict(ctx, p)
	case err != nil:
		return p, failure("protection "+row.ID, err)
	case n == 0:
		now, err := s.Protection(ctx, p.ID)
		if err != nil {
			return p, err
		}
		return p, switchback.Errorf(switchback.CodeConflict, "protection %s was changed meanwhile: version %d, not %d", p.ID, now.Version, was).
			WithHint("read it again and repeat the change")
	}
	return p, nil
}

func (s *Store) vmConflict(ctx context.Context, p switchback.Protection) error {
	other, err := s.ProtectionOfVM(ctx, p.VM)
	if err != nil || other.ID == p.ID {
		return switchback.Errorf(switchback.CodeConflict, "protection %s exists already", p.ID)
	}
	return switchback.Errorf(switchback.CodeConflict, "VM %s has protection %s already (%s)", p.Name, other.ID, other.Phase)
}

// Protection returns one protection, or CodeNotFound.
func (s *Store) Protection(ctx context.Context, id switchback.ProtectionID) (switchback.Protection, error) {
	row := protectionRow{ID: string(id)}
	if err := s.read.NewSelect().Model(&row).WherePK().Scan(ctx); err != nil {
		return switchback.Protection{}, failure("protection "+row.ID, err)
	}
	return row.protection()
}

// ProtectionOfVM returns the protection of a VM that is not unprotected, or CodeNotFound.
func (s *Store) ProtectionOfVM(ctx context.Context, vm switchback.VMUUID) (switchback.Protection, error) {
	var row protectionRow
	err := s.read.NewSelect().Model(&row).Where("vm = ?", string(vm)).
		Where("phase <> ?", string(switchback.PhaseUnprotected)).Scan(ctx)
	if errors.Is(err, sql.ErrNoRows) {
		return switchback.Protection{}, switchback.Errorf(switchback.CodeNotFound, "VM %s is not protected", vm)
	}
	if err != nil {
		return switchback.Protection{}, failure("protection of VM "+string(vm), err)
	}
	return row.protection()
}

// Protections returns all protections by name, then ID.
func (s *Store) Protections(ctx context.Context) ([]switchback.Protection, error) {
	var rows []protectionRow
	if err := s.read.NewSelect().Model(&rows).Order("name", "id").Scan(ctx); err != nil {
		return nil, failure("list protections", err)
	}
	list := make([]switchback.Protection, 0, len(rows))
	for _, r := range rows {
		p, err := r.protection()
		if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
	return list, nil
}

// DeleteProtection removes a protection whose stored version is version.
// CodeConflict: somebody else has written it.
func (s *Store) DeleteProtection(ctx context.Context, id switchback.ProtectionID, version int64) error {
	n, err := changed(s.write.NewDelete().Model((*protectionRow)(nil)).
		Where("id = ?", string(id)).Where("version = ?", version).Exec(ctx))
	if err != nil {
		return failure("delete protection "+string(id), err)
	}
	if n == 0 {
		if _, err := s.Protection(ctx, id); err != nil {
			return err
		}
		return switchback.Errorf(switchback.CodeConflict, "protection %s was changed meanwhile", id)
	}
	return nil
}

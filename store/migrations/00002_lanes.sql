-- Operations of different lanes may work on one protection at the same time.

-- +goose Up
ALTER TABLE operations ADD COLUMN lane TEXT NOT NULL DEFAULT '';
DROP INDEX operations_one_per_protection;
CREATE UNIQUE INDEX operations_one_per_lane ON operations (protection, lane)
    WHERE protection <> '' AND state IN ('queued', 'running', 'undoing');

-- +goose Down
DROP INDEX operations_one_per_lane;
CREATE UNIQUE INDEX operations_one_per_protection ON operations (protection)
    WHERE protection <> '' AND state IN ('queued', 'running', 'undoing');
ALTER TABLE operations DROP COLUMN lane;

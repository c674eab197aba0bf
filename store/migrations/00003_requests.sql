-- A request that begins an operation may be repeated: request_key is the
-- requester's name for it. An operation that awaits approval occupies its lane.

-- +goose Up
ALTER TABLE operations ADD COLUMN request_key TEXT NOT NULL DEFAULT '';
CREATE UNIQUE INDEX operations_request_key ON operations (request_key) WHERE request_key <> '';
DROP INDEX operations_one_per_lane;
CREATE UNIQUE INDEX operations_one_per_lane ON operations (protection, lane)
    WHERE protection <> '' AND state IN ('awaiting-approval', 'queued', 'running', 'undoing');
DROP INDEX operations_unfinished;
CREATE INDEX operations_unfinished ON operations (id) WHERE state IN ('awaiting-approval', 'queued', 'running', 'undoing');

-- +goose Down
DROP INDEX operations_unfinished;
CREATE INDEX operations_unfinished ON operations (id) WHERE state IN ('queued', 'running', 'undoing');
DROP INDEX operations_one_per_lane;
CREATE UNIQUE INDEX operations_one_per_lane ON operations (protection, lane)
    WHERE protection <> '' AND state IN ('queued', 'running', 'undoing');
DROP INDEX operations_request_key;
ALTER TABLE operations DROP COLUMN request_key;

-- Only what SQLite and PostgreSQL both understand: TEXT, BIGINT, BOOLEAN.
-- Instants are BIGINT microseconds since 1970 UTC, 0 for none. Documents are JSON in TEXT;
-- a column beside one repeats what is searched or guarded, and is the truth where both say it.

-- +goose Up
CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
);

CREATE TABLE sites (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL,
    created_at BIGINT NOT NULL
);

CREATE TABLE agents (
    id                  TEXT PRIMARY KEY,
    site                TEXT NOT NULL REFERENCES sites (id),
    address             TEXT NOT NULL,
    version             TEXT NOT NULL,
    certificate_serial  TEXT NOT NULL,
    certificate_expires BIGINT NOT NULL,
    joined_at           BIGINT NOT NULL,
    last_seen           BIGINT NOT NULL,
    status              TEXT NOT NULL
);
CREATE INDEX agents_site ON agents (site);

-- hash: SHA-256 of the secret, hexadecimal; the secret itself is never stored.
CREATE TABLE join_tokens (
    hash       TEXT PRIMARY KEY,
    site       TEXT NOT NULL REFERENCES sites (id),
    created_at BIGINT NOT NULL,
    expires_at BIGINT NOT NULL,
    used_at    BIGINT NOT NULL,
    used_by    TEXT NOT NULL
);

CREATE TABLE protections (
    id       TEXT PRIMARY KEY,
    vm       TEXT NOT NULL,
    name     TEXT NOT NULL,
    phase    TEXT NOT NULL,
    version  BIGINT NOT NULL,
    document TEXT NOT NULL
);
CREATE UNIQUE INDEX protections_vm ON protections (vm) WHERE phase <> 'unprotected';

CREATE TABLE operations (
    id               TEXT PRIMARY KEY,
    kind             TEXT NOT NULL,
    protection       TEXT NOT NULL,
    state            TEXT NOT NULL,
    cancel_requested BOOLEAN NOT NULL,
    irreversible     BOOLEAN NOT NULL,
    lease_owner      TEXT NOT NULL,
    lease_epoch      BIGINT NOT NULL,
    lease_until      BIGINT NOT NULL,
    created_at       BIGINT NOT NULL,
    document         TEXT NOT NULL
);
CREATE UNIQUE INDEX operations_one_per_protection ON operations (protection)
    WHERE protection <> '' AND state IN ('queued', 'running', 'undoing');
CREATE INDEX operations_unfinished ON operations (id) WHERE state IN ('queued', 'running', 'undoing');
CREATE INDEX operations_protection ON operations (protection, id);

CREATE TABLE operation_log (
    operation TEXT NOT NULL REFERENCES operations (id),
    sequence  BIGINT NOT NULL,
    document  TEXT NOT NULL,
    PRIMARY KEY (operation, sequence)
);

-- +goose Down
DROP TABLE operation_log;
DROP TABLE operations;
DROP TABLE protections;
DROP TABLE join_tokens;
DROP TABLE agents;
DROP TABLE sites;
DROP TABLE settings;

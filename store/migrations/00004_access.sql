-- API tokens and the audit log. hash: SHA-256 of a random secret, hexadecimal.

-- +goose Up
CREATE TABLE api_tokens (
    id         TEXT PRIMARY KEY,
    hash       TEXT NOT NULL,
    person     TEXT NOT NULL,
    role       TEXT NOT NULL,
    scope      TEXT NOT NULL,
    note       TEXT NOT NULL,
    created_at BIGINT NOT NULL,
    created_by TEXT NOT NULL,
    expires_at BIGINT NOT NULL,
    revoked_at BIGINT NOT NULL,
    revoked_by TEXT NOT NULL,
    used_at    BIGINT NOT NULL
);

-- Rows are added and never changed; each names the hash of the one before.
CREATE TABLE audit_log (
    sequence   BIGINT PRIMARY KEY,
    at         BIGINT NOT NULL,
    request    TEXT NOT NULL,
    who        TEXT NOT NULL,
    role       TEXT NOT NULL,
    via        TEXT NOT NULL,
    action     TEXT NOT NULL,
    object     TEXT NOT NULL,
    outcome    TEXT NOT NULL,
    code       TEXT NOT NULL,
    detail     TEXT NOT NULL,
    previous   TEXT NOT NULL,
    hash       TEXT NOT NULL
);
CREATE INDEX audit_log_request ON audit_log (request);
CREATE INDEX audit_log_who ON audit_log (who, sequence);

-- +goose Down
DROP TABLE audit_log;
DROP TABLE api_tokens;

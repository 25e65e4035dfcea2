-- What nodes share beside mail, since version 2. `expires_at`, `until` NULL: never.
CREATE TABLE note (
  kind TEXT NOT NULL,
  key TEXT NOT NULL,
  value BLOB NOT NULL,
  expires_at INTEGER,
  PRIMARY KEY (kind, key)
) WITHOUT ROWID;
CREATE INDEX note_expires ON note (expires_at) WHERE expires_at IS NOT NULL;
CREATE TABLE job (name TEXT PRIMARY KEY, holder BLOB NOT NULL, token INTEGER NOT NULL, expires INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE suspension (
  destination TEXT PRIMARY KEY,
  until INTEGER,
  reason TEXT NOT NULL,
  by TEXT NOT NULL,
  since INTEGER NOT NULL
) WITHOUT ROWID;
-- Calls that must take effect once. `answer` NULL: running until `until`; else kept until then, and until `batch` has ended.
CREATE TABLE call (
  account TEXT NOT NULL,
  key TEXT NOT NULL,
  fingerprint BLOB NOT NULL,
  attempt BLOB NOT NULL,
  until INTEGER NOT NULL,
  batch BLOB,
  answer BLOB,
  PRIMARY KEY (account, key)
);
CREATE INDEX call_until ON call (until);

-- What cannot change after the store was made, and counters of the store itself.
CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE setting (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

-- `state` 99: staged, not committed. AUTOINCREMENT: a number is never given twice, so that what
-- is cached by number can never be another batch's.
CREATE TABLE batch (
  no INTEGER PRIMARY KEY AUTOINCREMENT,
  id BLOB NOT NULL UNIQUE,
  state INTEGER NOT NULL,
  released INTEGER NOT NULL DEFAULT 0,
  archived INTEGER NOT NULL DEFAULT 0,
  priority INTEGER NOT NULL DEFAULT 0,
  release_at INTEGER NOT NULL DEFAULT 0,
  started_at INTEGER,
  completed_at INTEGER,
  accepted INTEGER NOT NULL DEFAULT 0,
  rejected INTEGER NOT NULL DEFAULT 0,
  tracking INTEGER NOT NULL DEFAULT 0,
  account TEXT NOT NULL DEFAULT '',
  campaign TEXT,
  list TEXT NOT NULL DEFAULT '',
  head TEXT NOT NULL DEFAULT ''
);
CREATE INDEX batch_state ON batch (state, release_at);
CREATE TABLE content (batch INTEGER PRIMARY KEY, data BLOB NOT NULL);
-- id: batch << 8 | partition
CREATE TABLE counter (id INTEGER PRIMARY KEY, data BLOB NOT NULL);

-- id: batch << 32 | lot number. The large column is last, so that the others are read without it.
CREATE TABLE lot (
  id INTEGER PRIMARY KEY,
  queue TEXT NOT NULL,
  count INTEGER NOT NULL,
  overrides INTEGER NOT NULL,
  hashes BLOB NOT NULL,
  packed BLOB NOT NULL
);
CREATE INDEX lot_queue ON lot (queue);
-- The indices of a staged lot, until the commit turns them into `index_map`.
CREATE TABLE staged (lot INTEGER PRIMARY KEY, indices BLOB NOT NULL);
CREATE TABLE cell (lot INTEGER PRIMARY KEY, data BLOB NOT NULL);
-- id: batch << 32 | index / 1024. Six bytes per index: lot number and position.
CREATE TABLE index_map (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE lot_log (id INTEGER PRIMARY KEY, lot INTEGER NOT NULL, data BLOB NOT NULL);
CREATE INDEX lot_log_lot ON lot_log (lot);

-- Ranges: a piece of a lot (`lot`, `first`), or of a retry lot (`refs`). `expires` 0: free.
-- `rank` 0: transactional, before 1: bulk; known with the commit.
CREATE TABLE work (
  id INTEGER PRIMARY KEY,
  batch INTEGER NOT NULL,
  partition INTEGER NOT NULL,
  queue TEXT NOT NULL,
  rank INTEGER NOT NULL DEFAULT 1,
  due_at INTEGER NOT NULL,
  count INTEGER NOT NULL,
  holder BLOB,
  token INTEGER NOT NULL DEFAULT 0,
  expires INTEGER NOT NULL DEFAULT 0,
  window INTEGER NOT NULL DEFAULT 0,
  lot INTEGER,
  first INTEGER,
  refs BLOB
);
CREATE INDEX work_queue ON work (queue, rank, batch, due_at, expires, count);
CREATE INDEX work_batch ON work (batch, due_at);
CREATE INDEX work_holder ON work (holder) WHERE holder IS NOT NULL;

CREATE TABLE journal (id BLOB PRIMARY KEY, through INTEGER NOT NULL) WITHOUT ROWID;

-- `list` '': all lists.
CREATE TABLE suppression (
  id INTEGER PRIMARY KEY,
  hash INTEGER NOT NULL,
  account TEXT NOT NULL,
  email TEXT NOT NULL,
  list TEXT NOT NULL,
  reason INTEGER NOT NULL,
  source TEXT NOT NULL,
  created_at INTEGER NOT NULL
);
CREATE INDEX suppression_hash ON suppression (hash);
CREATE UNIQUE INDEX suppression_address ON suppression (account, email, list);

-- `kinds`: a bit for each type of event in it. `batch` 0: of several.
CREATE TABLE event (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  recorded_at INTEGER NOT NULL,
  kinds INTEGER NOT NULL,
  batch INTEGER NOT NULL,
  data BLOB NOT NULL
);
CREATE TABLE control (id INTEGER PRIMARY KEY AUTOINCREMENT, at INTEGER NOT NULL, item TEXT NOT NULL);

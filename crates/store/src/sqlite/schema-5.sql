-- Pauses, since version 5: since when a batch of which the mail may leave is paused, and how long in all it was before.
ALTER TABLE batch ADD COLUMN paused_at INTEGER;
ALTER TABLE batch ADD COLUMN paused_ms INTEGER NOT NULL DEFAULT 0;

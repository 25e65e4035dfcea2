-- Retention, since version 3. `retired` 0: all of it is there, 1: its rows are going, 2: they are gone. `last_event`: the
-- newest block of events that has one of it; of batches of before nobody knows, so it is the newest of all.
ALTER TABLE batch ADD COLUMN retired INTEGER NOT NULL DEFAULT 0;
ALTER TABLE batch ADD COLUMN last_event INTEGER NOT NULL DEFAULT 0;
UPDATE batch SET last_event=COALESCE((SELECT MAX(id) FROM event), 0);
CREATE INDEX batch_ended ON batch (completed_at) WHERE completed_at IS NOT NULL AND retired<2;

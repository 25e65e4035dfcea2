-- What people let be kept of them at most, since version 6, under names that only the store's key leads to.
CREATE TABLE consent (
    account TEXT NOT NULL,
    name TEXT NOT NULL,
    partition INTEGER NOT NULL,
    mode INTEGER NOT NULL,
    since INTEGER NOT NULL,
    PRIMARY KEY (account, name)
) WITHOUT ROWID;

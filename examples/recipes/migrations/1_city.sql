CREATE TABLE city (name text PRIMARY KEY);
-- As long as the change of a large table.
SELECT pg_sleep(0.2);
INSERT INTO city VALUES ('New York'), ('Lisbon'), ('Sao Paulo');

ALTER TABLE city ADD COLUMN slug text UNIQUE;
UPDATE city SET slug = lower(replace(name, ' ', '-'));

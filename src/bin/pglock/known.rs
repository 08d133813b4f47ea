//! The keys that other tools are known to lock, and the names of these tools.

use pglock::{Key, interop};
use sqlx::postgres::PgAdvisoryLockKey;

/// Tools that lock the same number in every database.
const FIXED: [(i64, &str); 3] = [
    (interop::GOOSE, "goose"),
    (interop::NODE_PG_MIGRATE, "node-pg-migrate"),
    (interop::PRISMA_MIGRATE, "Prisma Migrate"),
];

/// The letters of Flyway's name as a number, to which Flyway adds the hash of its table, an `int`.
const FLYWAY: i64 = i64::from_be_bytes(*b"\0\0Flyway");

/// The keys that tools with default settings derive from the name of the database.
#[derive(Debug)]
pub(crate) struct Tools([Key; 3]);

impl Tools {
    pub(crate) fn of(database: &str) -> Self {
        Self([
            interop::golang_migrate(database, "public", "schema_migrations"),
            interop::rails_migrations(database),
            interop::sqlx_migrations(database),
        ])
    }

    /// Returns the name of the tool that locks a key, if the key is known.
    pub(crate) fn name(&self, key: &Key) -> Option<&str> {
        let PgAdvisoryLockKey::BigInt(number) = PgAdvisoryLockKey::from(key) else { return None };
        if let Some((_, name)) = FIXED.iter().find(|(fixed, _)| *fixed == number) {
            return Some(name);
        }
        if i32::try_from(number.wrapping_sub(FLYWAY)).is_ok() {
            return Some("Flyway");
        }
        self.0.iter().find(|tool| *tool == key).and_then(Key::name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_are_known_by_their_keys() {
        let tools = Tools::of("zone");
        for (number, name) in [
            (72_707_369_i64, Some("Prisma Migrate")),
            (77_431_708_279_161, Some("Flyway")),
            (77_431_708_279_161 - 5_000_000, Some("Flyway")),
            // 0x3d32ad9e times the CRC-32 of "zone".
            (2_771_974_297_191_923_538, Some("sqlx migrations of zone")),
            (72_707_370, None),
        ] {
            assert_eq!(tools.name(&Key::from(number)), name, "{number}");
        }
        assert_eq!(Tools::of("other").name(&interop::rails_migrations("zone")), None);
        assert_eq!(tools.name(&Key::from((0, 72_707_369))), None);
    }
}

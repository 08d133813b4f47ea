//! Where the server's lock table shows an advisory lock.
//!
//! The layout is documented at <https://www.postgresql.org/docs/current/view-pg-locks.html>.

use crate::key::KeyId;

/// The lock table: the function behind the view `pg_locks`, which a hardened role may not read.
///
/// The conditions in this file call it `l`.
pub(super) const LOCKS: &str = "pg_catalog.pg_lock_status() AS l";

/// A condition: the row is an advisory lock of this database, because keys belong to a database. Extensions, such as
/// Citus for its shards, have advisory locks of other kinds, which are excluded.
pub(super) const ADVISORY: &str = "l.locktype OPERATOR(pg_catalog.=) 'advisory' \
    AND l.objsubid OPERATOR(pg_catalog.<=) 2 \
    AND l.database OPERATOR(pg_catalog.=) (SELECT d.oid FROM pg_catalog.pg_database AS d \
    WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())";

/// Returns a condition: the row is a lock on this key.
pub(super) fn place(key: KeyId) -> String {
    let (classid, objid, objsubid) = match key {
        KeyId::BigInt(number) => {
            let bits = number.cast_unsigned();
            (bits >> 32, bits & u64::from(u32::MAX), 1)
        }
        KeyId::IntPair(first, second) => {
            (u64::from(first.cast_unsigned()), u64::from(second.cast_unsigned()), 2)
        }
    };
    format!(
        "l.classid OPERATOR(pg_catalog.=) '{classid}'::pg_catalog.oid \
         AND l.objid OPERATOR(pg_catalog.=) '{objid}'::pg_catalog.oid \
         AND l.objsubid OPERATOR(pg_catalog.=) {objsubid}"
    )
}

/// Returns the key of a lock from its columns in the lock table.
pub(super) fn key(classid: i64, objid: i64, objsubid: impl Into<i32>) -> KeyId {
    let half = |oid| u32::try_from(oid).map_or(0, u32::cast_signed);
    if objsubid.into() == 2 {
        KeyId::IntPair(half(classid), half(objid))
    } else {
        KeyId::BigInt(classid << 32 | objid)
    }
}

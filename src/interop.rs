//! The keys that other libraries and tools lock, to share locks with them or to migrate from them one by one.
//!
//! Between services that use this crate, a plain name is the best key. With a hash of 32 bits, two names become the
//! same key sooner or later, so share only the locks that must be shared.
//!
//! | made by | on the server | the same as |
//! |---|---|---|
//! | [`fnv1a`] | a `bigint`, of 64 bits | Go: FNV-1a 64 as `int64`, which go-pglock recommends |
//! | [`hashtext`], [`hashtext_pair`] | a `bigint` of 32 bits, two `int` | SQL: `pg_advisory_lock(hashtext('name'))`, `pg_advisory_lock(hashtext('a'), hashtext('b'))` |
//! | [`hashtextextended`] | a `bigint`, of 64 bits | SQL: `pg_advisory_lock(hashtextextended('name', 0))` |
//! | [`md5()`] | a `bigint`, of 64 bits | SQL: `pg_advisory_lock(('x' \|\| left(md5('name'), 16))::bit(64)::bigint)` |
//! | [`with_advisory_lock`] | two `int`, of 31 bits and 0 | Ruby: `with_advisory_lock` |
//! | [`rails_migrations`] | a `bigint` | Ruby on Rails: `rails db:migrate` |
//! | [`django_pglocks_v1`], [`_v2`](django_pglocks_v2) | a `bigint`, of 32 and 64 bits | Python: django-pglocks 1 and 2 |
//! | [`django_pglock`] | a `bigint`, of 64 bits | Python: django-pglock |
//! | [`symfony`] | a `bigint`, of 32 bits | PHP: Symfony's `PostgreSqlStore` |
//! | [`sqlx_migrations`] | a `bigint` | Rust: `sqlx::migrate!` |
//! | [`golang_migrate`] | a `bigint`, of 32 bits | Go: golang-migrate |
//! | [`GOOSE`], [`NODE_PG_MIGRATE`], [`PRISMA_MIGRATE`] | one `bigint` for each database | the migrations of these tools |
//!
//! # Examples
//!
//! ```
//! use pglock::{Lock, interop};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> pglock::Result<()> {
//! # let pool = pglock_testkit::pool().await;
//! // No instance of the Go service runs this at the same time.
//! Lock::new(&pool, interop::fnv1a("nightly-report")).run(async {}).await?;
//! # Ok(()) }
//! ```

use md5::Md5;
use sha2::{Digest, Sha256};

use crate::key::{Key, KeyId};

/// The key that the migrations of [goose] lock.
///
/// [goose]: https://github.com/pressly/goose
pub const GOOSE: i64 = 5_887_940_537_704_921_958;

/// The key that the migrations of [node-pg-migrate] lock.
///
/// [node-pg-migrate]: https://github.com/salsita/node-pg-migrate
pub const NODE_PG_MIGRATE: i64 = 7_241_865_325_823_964;

/// The key that [Prisma Migrate] locks.
///
/// [Prisma Migrate]: https://www.prisma.io/docs/orm/prisma-migrate/workflows/development-and-production#advisory-locking
pub const PRISMA_MIGRATE: i64 = 72_707_369;

/// Hashes a name with 64-bit FNV-1a, as Go services that use go-pglock do.
///
/// The hash is the one of Go's `hash/fnv` (`fnv.New64a`), converted to `int64`. Use it to share
/// locks with such a service; between Rust services a plain name is the better hash.
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// // `fnv.New64a` of "foobar" is 0x85944171f73967e8.
/// assert_eq!(interop::fnv1a("foobar"), Key::from(0x8594_4171_f739_67e8_u64.cast_signed()));
/// ```
pub fn fnv1a(name: impl Into<String>) -> Key {
    // Offset basis and prime: http://www.isthe.com/chongo/tech/comp/fnv/, section "Parameters".
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;

    let add = |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME);
    hashed(name, |name| name.bytes().fold(OFFSET_BASIS, add).cast_signed())
}

/// Makes the key that Ruby's [`with_advisory_lock`] locks: a pair, of 31 bits of the name's CRC-32 and
/// of 0.
///
/// The second number is the value of `WITH_ADVISORY_LOCK_PREFIX`, which is usually not set. If it is set to
/// a number, make the pair yourself.
///
/// [`with_advisory_lock`]: https://github.com/ClosureTree/with_advisory_lock
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// let key = interop::with_advisory_lock("my_unique_lock_name");
/// assert_eq!(key, Key::from((258664313, 0)));
/// ```
pub fn with_advisory_lock(name: impl Into<String>) -> Key {
    let name = name.into();
    let id = KeyId::IntPair((crc32(name.as_bytes()) & 0x7fff_ffff).cast_signed(), 0);
    named(id, name)
}

/// Makes the key that the migrations of Ruby on Rails lock in the database of this name.
///
/// While the key is locked, no migrations run. The key is named after the migrations of that database.
///
/// # Examples
///
/// ```
/// use pglock::interop;
///
/// let key = interop::rails_migrations("shop_production");
/// assert_eq!(key.name(), Some("Rails migrations of shop_production"));
/// ```
pub fn rails_migrations(database: impl AsRef<str>) -> Key {
    // ActiveRecord::Migrator::MIGRATOR_SALT. The product of the salt and a CRC-32 fits into 63 bits.
    const SALT: i64 = 2_053_462_845;

    let database = database.as_ref();
    let id = KeyId::BigInt(SALT * i64::from(crc32(database.as_bytes())));
    named(id, format!("Rails migrations of {database}"))
}

/// Makes the key that Python's [`django-pglocks`] locks before version 2: the name's CRC-32, as a
/// number with a sign.
///
/// [`django-pglocks`]: https://github.com/Xof/django-pglocks
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// // The CRC-32 of "123456789" is 0xcbf43926.
/// assert_eq!(interop::django_pglocks_v1("123456789"), Key::from(0xcbf4_3926_u32.cast_signed()));
/// ```
pub fn django_pglocks_v1(name: impl Into<String>) -> Key {
    hashed(name, |name| crc32(name.as_bytes()).cast_signed().into())
}

/// Makes the key that Python's [`django-pglocks`] locks from version 2 on: the first 8 bytes of the
/// name's SHA-256, the highest first.
///
/// [`django-pglocks`]: https://github.com/Xof/django-pglocks
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// // The SHA-256 of "abc" begins with ba7816bf 8f01cfea.
/// let number = 0xba78_16bf_8f01_cfea_u64.cast_signed();
/// assert_eq!(interop::django_pglocks_v2("abc"), Key::from(number));
/// ```
pub fn django_pglocks_v2(name: impl Into<String>) -> Key {
    hashed(name, |name| i64::from_be_bytes(sha256(name)))
}

/// Makes the key that Python's [`django-pglock`] locks: the first 8 bytes of the name's SHA-256, the
/// lowest first.
///
/// [`django-pglock`]: https://github.com/Opus10/django-pglock
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// // The SHA-256 of "abc" begins with ba7816bf 8f01cfea.
/// let number = 0xeacf_018f_bf16_78ba_u64.cast_signed();
/// assert_eq!(interop::django_pglock("abc"), Key::from(number));
/// ```
pub fn django_pglock(name: impl Into<String>) -> Key {
    hashed(name, |name| i64::from_le_bytes(sha256(name)))
}

/// Makes the key of `pg_advisory_lock(hashtext(name))`, which much hand-written SQL uses.
///
/// The hash is computed locally, so nothing is sent. PostgreSQL does not document `hashtext`; the function has
/// been the same from version 8.4 on, and the tests of this crate compare it with servers from 12 to
/// 18. The server hashes the bytes that it stores, so the key is right if the database's encoding is
/// UTF-8 and the server's processor is little-endian, as nearly all are.
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// assert_eq!(interop::hashtext("x"), Key::from(1074944137));
/// ```
pub fn hashtext(name: impl Into<String>) -> Key {
    hashed(name, |name| lookup3(name.as_bytes()).1.cast_signed().into())
}

/// Makes the key of `pg_advisory_lock(hashtextextended(name, 0))`: like [`hashtext`], but with a hash of 64
/// bits.
///
/// # Examples
///
/// ```
/// use pglock::interop;
///
/// let key = interop::hashtextextended("nightly-report");
/// assert_eq!(key.name(), Some("nightly-report"));
/// ```
pub fn hashtextextended(name: impl Into<String>) -> Key {
    hashed(name, |name| {
        let (high, low) = lookup3(name.as_bytes());
        (u64::from(high) << 32 | u64::from(low)).cast_signed()
    })
}

/// Makes the key of `pg_advisory_lock(hashtext(first), hashtext(second))`.
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// let key = interop::hashtext_pair("x", "x");
/// assert_eq!(key, Key::from((1074944137, 1074944137)));
/// ```
pub fn hashtext_pair(first: impl AsRef<str>, second: impl AsRef<str>) -> Key {
    let (first, second) = (first.as_ref(), second.as_ref());
    let hash = |name: &str| lookup3(name.as_bytes()).1.cast_signed();
    named(KeyId::IntPair(hash(first), hash(second)), format!("{first}, {second}"))
}

/// Makes a key of the first 8 bytes of a name's MD5, the highest first, as
/// `('x' || left(md5(name), 16))::bit(64)::bigint` does in SQL.
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// // The MD5 of "abc" begins with 90015098 3cd24fb0.
/// let number = 0x9001_5098_3cd2_4fb0_u64.cast_signed();
/// assert_eq!(interop::md5("abc"), Key::from(number));
/// ```
pub fn md5(name: impl Into<String>) -> Key {
    hashed(name, |name| i64::from_be_bytes(first_bytes(&Md5::digest(name))))
}

/// Makes the key that PHP's [`PostgreSqlStore`] of Symfony locks: the name's CRC-32, as a number without a
/// sign.
///
/// [`PostgreSqlStore`]: https://symfony.com/doc/current/components/lock.html#postgresqlstore
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// // The CRC-32 of "123456789" is 0xcbf43926.
/// assert_eq!(interop::symfony("123456789"), Key::from(0xcbf4_3926_i64));
/// ```
pub fn symfony(name: impl Into<String>) -> Key {
    hashed(name, |name| crc32(name.as_bytes()).into())
}

/// Makes the key that sqlx's migrations lock in the database of this name.
///
/// # Examples
///
/// ```
/// use pglock::{Key, interop};
///
/// // 0x3d32ad9e times the CRC-32 of "123456789".
/// let key = interop::sqlx_migrations("123456789");
/// assert_eq!(key, Key::from(0x3d32_ad9e * 0xcbf4_3926_i64));
/// assert_eq!(key.name(), Some("sqlx migrations of 123456789"));
/// ```
pub fn sqlx_migrations(database: impl AsRef<str>) -> Key {
    const SALT: i64 = 0x3d32_ad9e;

    let database = database.as_ref();
    let id = KeyId::BigInt(SALT * i64::from(crc32(database.as_bytes())));
    named(id, format!("sqlx migrations of {database}"))
}

/// Makes the key that [golang-migrate] locks for the migrations of a database, which are listed in this table of
/// this schema (by default `schema_migrations` of `public`).
///
/// [golang-migrate]: https://github.com/golang-migrate/migrate
///
/// # Examples
///
/// ```
/// use pglock::interop;
///
/// let key = interop::golang_migrate("shop", "public", "schema_migrations");
/// assert_eq!(key.name(), Some("golang-migrate of shop"));
/// ```
pub fn golang_migrate(
    database: impl AsRef<str>,
    schema: impl AsRef<str>,
    table: impl AsRef<str>,
) -> Key {
    let (database, schema, table) = (database.as_ref(), schema.as_ref(), table.as_ref());
    let name = format!("golang-migrate of {database}");
    named(KeyId::BigInt(golang_migrate_hash(&[schema, table, database]).into()), name)
}

fn golang_migrate_hash(parts: &[&str]) -> u32 {
    const SALT: u32 = 1_486_364_155;

    crc32(parts.join("\0").as_bytes()).wrapping_mul(SALT)
}

fn hashed(name: impl Into<String>, hash: impl FnOnce(&str) -> i64) -> Key {
    let name = name.into();
    named(KeyId::BigInt(hash(&name)), name)
}

fn named(id: KeyId, name: String) -> Key {
    Key::from_id(id).called(name)
}

/// Returns the first 8 bytes of the SHA-256.
fn sha256(name: &str) -> [u8; 8] {
    first_bytes(&Sha256::digest(name))
}

fn first_bytes(hash: &[u8]) -> [u8; 8] {
    hash.first_chunk().copied().unwrap_or_default()
}

/// Returns the CRC-32 of zlib, gzip and Ethernet. Computed bit by bit, because names are short.
fn crc32(bytes: &[u8]) -> u32 {
    const REVERSED_POLYNOMIAL: u32 = 0xedb8_8320;

    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (REVERSED_POLYNOMIAL & (crc & 1).wrapping_neg())
        })
    })
}

/// Returns Bob Jenkins' hash [lookup3] as PostgreSQL computes it, without a seed: two numbers, the better one last.
///
/// PostgreSQL begins with another number than the original, mixes the same way, and leaves the lowest byte of the
/// third word free in the last block.
///
/// [lookup3]: http://burtleburtle.net/bob/hash/evahash.html
fn lookup3(bytes: &[u8]) -> (u32, u32) {
    const START: u32 = 0x9e37_79b9_u32.wrapping_add(3_923_095);

    // A PostgreSQL text is smaller than 1 GB.
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let [mut a, mut b, mut c] = [START.wrapping_add(length); 3];
    let mut blocks = bytes.chunks_exact(12);
    for block in &mut blocks {
        let [first, second, third] = words(block, 0);
        a = a.wrapping_add(first);
        b = b.wrapping_add(second);
        c = c.wrapping_add(third);
        for turn in [4, 6, 8, 16, 19, 4] {
            a = a.wrapping_sub(c) ^ c.rotate_left(turn);
            c = c.wrapping_add(b);
            (a, b, c) = (b, c, a);
        }
    }
    let [first, second, third] = words(blocks.remainder(), 1);
    a = a.wrapping_add(first);
    b = b.wrapping_add(second);
    c = c.wrapping_add(third);
    for turn in [14, 11, 25, 16, 4, 14, 24] {
        c = (c ^ b).wrapping_sub(b.rotate_left(turn));
        (a, b, c) = (b, c, a);
    }
    (a, b)
}

/// Returns up to 12 bytes as three words, the lowest byte first; the first `skip` bytes of the third word stay free.
fn words(bytes: &[u8], skip: usize) -> [u32; 3] {
    let mut words = [0; 3];
    for (place, &byte) in bytes.iter().enumerate() {
        let place = if place < 8 { place } else { place + skip };
        if let Some(word) = words.get_mut(place / 4) {
            *word |= u32::from(byte) << (8 * (place % 4));
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::golang_migrate_hash;

    /// The test vectors are from golang-migrate's own test.
    #[test]
    fn golang_migrate_is_the_published_number() {
        assert_eq!(golang_migrate_hash(&["database_name"]), 1_764_327_054);
        assert_eq!(golang_migrate_hash(&["schema_name_1", "database_name"]), 2_453_313_553);
    }
}

//! Keys are PostgreSQL's numbers, and compare as such.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};

use pglock::{Key, interop};
use sqlx::postgres::{PgAdvisoryLock, PgAdvisoryLockKey};

/// The vectors of the reference implementation: <http://www.isthe.com/chongo/tech/comp/fnv/>.
#[test]
fn fnv1a_is_the_published_hash() {
    for (name, hash) in [
        ("", 0xcbf2_9ce4_8422_2325_u64),
        ("a", 0xaf63_dc4c_8601_ec8c),
        ("b", 0xaf63_df4c_8601_f1a5),
        ("c", 0xaf63_de4c_8601_eff2),
        ("d", 0xaf63_d94c_8601_e773),
        ("e", 0xaf63_d84c_8601_e5c0),
        ("f", 0xaf63_db4c_8601_ead9),
        ("fo", 0x0898_5907_b541_d342),
        ("foo", 0xdcb2_7518_fed9_d577),
        ("foob", 0xdd12_0e79_0c25_12af),
        ("fooba", 0xcac1_65af_a2fe_f40a),
        ("foobar", 0x8594_4171_f739_67e8),
        ("chongo was here!\n", 0x4681_0940_eff5_f915),
    ] {
        let key = interop::fnv1a(name);
        assert_eq!(key, Key::from(hash.cast_signed()), "{name:?}");
        assert_eq!(key.name(), Some(name));
    }
}

/// In a set or a map, keys are equal if they are the same key for the server, whatever their names.
#[test]
fn keys_that_are_equal_hash_alike() {
    let hashes = RandomState::new();
    let named = interop::fnv1a("foobar");
    let number = Key::from(0x8594_4171_f739_67e8_u64.cast_signed());
    assert_eq!(named, number);
    assert_eq!(hashes.hash_one(&named), hashes.hash_one(&number));
    let others = (0..10).map(Key::from).chain((0..10).map(|number| Key::from((0, number))));
    let different: HashSet<u64> = others.map(|key| hashes.hash_one(key)).collect();
    assert_eq!(different.len(), 20);
}

#[test]
fn sqlx_keys_go_in_and_come_out_unchanged() {
    for theirs in [
        PgAdvisoryLockKey::BigInt(i64::MIN),
        PgAdvisoryLockKey::BigInt(42),
        PgAdvisoryLockKey::IntPair(0, 42),
        PgAdvisoryLockKey::IntPair(i32::MIN, -1),
        PgAdvisoryLock::new("nightly-report").key().clone(),
    ] {
        let ours = Key::from(&theirs);
        assert_eq!(PgAdvisoryLockKey::from(&ours), theirs);
        assert_eq!(Key::from(theirs), ours);
    }
    // A name is remembered beside the number, and does not change it.
    let named = Key::from("nightly-report");
    assert_eq!(&PgAdvisoryLockKey::from(&named), PgAdvisoryLock::new("nightly-report").key());
}

//! A name maps to the key that other programs compute from it, compared with their published numbers and with the
//! server.

use pglock::{Key, Lock, interop};
use pglock_testkit::TestDb;
use sqlx::postgres::PgAdvisoryLockKey;

use crate::support::random;

/// The check value of CRC-32, and values that others have published.
#[test]
fn crc_32_is_the_one_of_zlib() {
    for (name, crc) in [
        ("", 0),
        ("a", 0xe8b7_be43_u32),
        ("123456789", 0xcbf4_3926),
        ("The quick brown fox jumps over the lazy dog", 0x414f_a339),
    ] {
        assert_eq!(interop::django_pglocks_v1(name), Key::from(crc.cast_signed()), "{name:?}");
        let pair = ((crc & 0x7fff_ffff).cast_signed(), 0);
        assert_eq!(interop::with_advisory_lock(name), Key::from(pair), "{name:?}");
        // Rails has that number as `MIGRATOR_SALT`.
        let number = 2_053_462_845 * i64::from(crc);
        assert_eq!(interop::rails_migrations(name), Key::from(number), "{name:?}");
    }
    // This key is from the log of a Rails application.
    let key = interop::with_advisory_lock("my_unique_lock_name");
    assert_eq!(key, Key::from((258_664_313, 0)));
    assert_eq!(key.to_string(), "\"my_unique_lock_name\" (258664313, 0)");
}

/// The examples of FIPS 180.
#[test]
fn sha_256_is_read_from_its_beginning() {
    for (name, start) in [
        ("", 0xe3b0_c442_98fc_1c14_u64),
        ("abc", 0xba78_16bf_8f01_cfea),
        ("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 0x248d_6a61_d206_38b8),
    ] {
        assert_eq!(interop::django_pglocks_v2(name), Key::from(start.cast_signed()), "{name:?}");
        let swapped = start.swap_bytes().cast_signed();
        assert_eq!(interop::django_pglock(name), Key::from(swapped), "{name:?}");
    }
}

/// The hashes that skytools has published.
#[test]
fn hashtext_is_the_published_hash() {
    let hashes = [
        -1_477_818_771,
        1_074_944_137,
        -1_086_392_228,
        -1_992_236_649,
        -1_379_736_791,
        -370_454_118,
        1_489_915_569,
        -66_683_019,
        -2_126_973_000,
        1_651_296_771,
        755_764_456,
        -1_494_243_903,
        631_527_812,
        28_686_851,
        -9_498_641,
    ];
    for (length, hash) in hashes.into_iter().enumerate() {
        assert_eq!(interop::hashtext("x".repeat(length)), Key::from(hash), "{length}");
    }
}

fn number(key: &Key) -> Option<i64> {
    if let PgAdvisoryLockKey::BigInt(number) = PgAdvisoryLockKey::from(key) {
        return Some(number);
    }
    None
}

/// Names of every length, of characters of one to four bytes.
#[tokio::test]
async fn hashtext_is_what_the_server_computes() {
    let db = TestDb::new().await;
    let mut server = db.admin().await;
    let alphabet: Vec<char> = "aZ0 -_/.:'\"\\\u{1}\u{7f}éßЖ漢🔒".chars().collect();
    let mut seed = 1;
    let mut names = vec!["nightly-report".to_owned(), "x".repeat(100_000)];
    for length in (0..50).chain(0..50) {
        for _ in 0..10 {
            let mut any = || {
                let place = usize::try_from(random(&mut seed)).unwrap() % alphabet.len();
                alphabet.get(place).copied().unwrap()
            };
            names.push((0..length).map(|_| any()).collect());
        }
    }
    let hashes: Vec<(i64, i64)> = sqlx::query_as(
        "SELECT hashtext(name)::int8, hashtextextended(name, 0) \
         FROM unnest($1::text[]) WITH ORDINALITY AS given (name, place) ORDER BY place",
    )
    .bind(&names)
    .fetch_all(&mut server)
    .await
    .unwrap();
    assert_eq!(hashes.len(), names.len());
    for (name, hash) in names.iter().zip(hashes) {
        let ours = (number(&interop::hashtext(name)), number(&interop::hashtextextended(name)));
        assert_eq!(ours, (Some(hash.0), Some(hash.1)), "{name:?}");
    }
}

/// The crate's keys and hand-written SQL that locks by a name exclude each other.
#[tokio::test]
async fn a_scheme_excludes_locks_by_the_same_scheme() {
    let (db, pool) = TestDb::with_pool(1).await;
    let mut sql = db.admin().await;
    for (statement, key) in [
        ("SELECT pg_advisory_xact_lock(hashtext('job'))", interop::hashtext("job")),
        (
            "SELECT pg_advisory_xact_lock(hashtextextended('job', 0))",
            interop::hashtextextended("job"),
        ),
        (
            "SELECT pg_advisory_xact_lock(hashtext('job'), hashtext('shop'))",
            interop::hashtext_pair("job", "shop"),
        ),
        (
            "SELECT pg_advisory_xact_lock(('x' || left(md5('job'), 16))::bit(64)::bigint)",
            interop::md5("job"),
        ),
        (
            "SELECT pg_advisory_xact_lock(258664313,0)",
            interop::with_advisory_lock("my_unique_lock_name"),
        ),
    ] {
        let mut lock = Lock::new(&pool, key);
        sqlx::raw_sql("BEGIN").execute(&mut sql).await.unwrap();
        sqlx::raw_sql(statement).execute(&mut sql).await.unwrap();
        assert!(lock.try_acquire().await.unwrap().is_none(), "{statement}");
        sqlx::raw_sql("COMMIT").execute(&mut sql).await.unwrap();
        assert!(lock.try_acquire().await.unwrap().is_some(), "{statement}");
    }
}

#[test]
fn a_key_remembers_the_name() {
    for key in [
        interop::with_advisory_lock("job"),
        interop::django_pglocks_v1("job"),
        interop::django_pglocks_v2("job"),
        interop::django_pglock("job"),
        interop::hashtext("job"),
        interop::hashtextextended("job"),
        interop::md5("job"),
        interop::symfony("job"),
    ] {
        assert_eq!(key.name(), Some("job"));
        assert!(key.to_string().starts_with("\"job\" "), "{key}");
    }
}

/// The text of a key is parsed as the same key, and text that does not look like a number is a name.
#[test]
fn a_key_is_what_it_looks_like() {
    for (text, expected) in [
        ("42", Key::from(42)),
        ("-42", Key::from(-42)),
        ("9223372036854775807", Key::from(i64::MAX)),
        ("1,2", Key::from((1, 2))),
        ("-1/-2", Key::from((-1, -2))),
        ("(-1, -2)", Key::from((-1, -2))),
        ("1, 2", Key::from("1, 2")),
        ("(1,2)", Key::from("(1,2)")),
        ("1,2,3", Key::from("1,2,3")),
        ("1/2/3", Key::from("1/2/3")),
        ("2026-11-29", Key::from("2026-11-29")),
        ("name:9223372036854775808", Key::from("9223372036854775808")),
        ("", Key::from("")),
        ("name:42", Key::from("42")),
        ("name:name:42", Key::from("name:42")),
    ] {
        assert_eq!(text.parse(), Ok(expected), "{text}");
    }
    for text in ["9223372036854775808", "-9223372036854775809", "1,3000000000", "3000000000/1"] {
        assert!(text.parse::<Key>().is_err(), "{text}");
    }
}

//! `pglock key`: the numbers of a name, as the library has them and the server shows them.

use pglock::{Key, Lock, interop};
use pglock_testkit::{TestDb, advisory_locks};
use sqlx::postgres::PgAdvisoryLockKey;
use tokio::process::Command;

use crate::support::{PGLOCK, Running};

#[tokio::test]
async fn every_scheme_is_shown_where_the_server_shows_it() {
    let name = "größer, 'quoted'";
    let mut command = Command::new(PGLOCK);
    // It asks no database.
    // A name may be written as in other commands.
    command
        .args(["key", &format!("name:{name}")])
        .env("DATABASE_URL", "nonsense")
        .kill_on_drop(true);
    let ended = Running::start(command).finish().await;
    assert_eq!((ended.code(), &*ended.errors), (Some(0), ""));

    let db = TestDb::new().await;
    let pool = db.pool(1).await;
    let mut admin = db.admin().await;
    let schemes = [
        ("pglock, sqlx", Key::from(name)),
        ("go-pglock (FNV-1a)", interop::fnv1a(name)),
        ("SQL hashtext", interop::hashtext(name)),
        ("SQL hashtextextended", interop::hashtextextended(name)),
        ("Ruby with_advisory_lock", interop::with_advisory_lock(name)),
        ("Rails migrations of", interop::rails_migrations(name)),
        ("django-pglock", interop::django_pglock(name)),
        ("django-pglocks 2", interop::django_pglocks_v2(name)),
        ("django-pglocks 1", interop::django_pglocks_v1(name)),
        ("MD5, first 8 bytes", interop::md5(name)),
        ("sqlx migrations of", interop::sqlx_migrations(name)),
        ("Symfony", interop::symfony(name)),
    ];
    let mut lines = ended.output.lines().skip(1);
    for (scheme, key) in schemes {
        let number = match PgAdvisoryLockKey::from(&key) {
            PgAdvisoryLockKey::BigInt(number) => number.to_string(),
            PgAdvisoryLockKey::IntPair(first, second) => format!("{first},{second}"),
            unknown => unreachable!("{unknown:?}"),
        };
        let guard = Lock::new(&pool, key).acquire().await.unwrap();
        let lock = advisory_locks(&mut admin).await.remove(0);
        let place = [lock.classid, lock.objid, lock.objsubid.into()].map(|n: i64| n.to_string());
        guard.release().await.unwrap();

        let line = lines.next().unwrap();
        let numbers = line.strip_prefix(scheme).unwrap();
        let numbers: Vec<&str> = numbers.split_whitespace().collect();
        let expected = [&[number][..], &place].concat();
        assert_eq!(numbers, expected, "{line}");
    }
    assert_eq!(lines.next(), None);
}

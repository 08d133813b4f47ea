//! `pglock key`: the numbers of a name, and where the server shows them.

use pglock::{Key, Lock};
use pglock_testkit::{TestDb, advisory_locks};
use tokio::process::Command;

use crate::support::{PGLOCK, Running};

const NAME: &str = "größer, 'quoted'";

/// What the program and the server show for that name: how the key is written, and where `pg_locks` shows it.
const SCHEMES: [(&str, &str, [i64; 3]); 12] = [
    ("pglock, sqlx", "-3139642166501610025", [3_563_962_389, 2_278_911_447, 1]),
    ("go-pglock (FNV-1a)", "-2757435014430679082", [3_652_951_926, 3_248_660_438, 1]),
    ("SQL hashtext", "-850814071", [4_294_967_295, 3_444_153_225, 1]),
    ("SQL hashtextextended", "-606317007858984055", [4_153_798_116, 3_444_153_225, 1]),
    ("Ruby with_advisory_lock", "293956280,0", [293_956_280, 0, 2]),
    ("Rails migrations of", "5013406180447475160", [1_167_274_587, 3_830_568_408, 1]),
    ("django-pglock", "-4659873275352333712", [3_210_006_001, 4_098_474_608, 1]),
    ("django-pglocks 2", "8125137994107409599", [1_891_781_108, 4_056_765_631, 1]),
    ("django-pglocks 1", "-1853527368", [4_294_967_295, 2_441_439_928, 1]),
    ("MD5, first 8 bytes", "-1067947012831747236", [4_046_316_505, 2_637_783_900, 1]),
    ("sqlx migrations of", "2506703089003017616", [583_637_293, 2_842_047_888, 1]),
    ("Symfony", "2441439928", [0, 2_441_439_928, 1]),
];

#[tokio::test]
async fn every_scheme_is_shown_where_the_server_shows_it() {
    let mut command = Command::new(PGLOCK);
    // A name may be written as in other commands. No database is asked.
    command
        .args(["key", &format!("name:{NAME}")])
        .env("DATABASE_URL", "nonsense")
        .kill_on_drop(true);
    let ended = Running::start(command).finish().await;
    assert_eq!((ended.code(), &*ended.errors), (Some(0), ""));

    let (_db, pool, mut admin) = TestDb::scene(1).await;
    let mut lines = ended.output.lines().skip(1);
    for (scheme, number, place) in SCHEMES {
        let line = lines.next().unwrap();
        let numbers: Vec<&str> = line.strip_prefix(scheme).unwrap().split_whitespace().collect();
        let [classid, objid, objsubid] = place.map(|n| n.to_string());
        assert_eq!(numbers, [number, &classid, &objid, &objsubid]);

        let key: Key = number.parse().unwrap();
        let guard = Lock::new(&pool, key).acquire().await.unwrap();
        let lock = advisory_locks(&mut admin).await.remove(0);
        guard.release().await.unwrap();
        assert_eq!([lock.classid, lock.objid, lock.objsubid.into()], place, "{line}");
    }
    assert_eq!(lines.next(), None);
}

//! The guide is correct: its queries for `psql` return what it says, its figures are the defaults, and its links have
//! targets.

use std::fs;
use std::path::Path;

use pglock::{Key, Lock, LockOptions, Loss};
use pglock_testkit::{Server, TestDb};
use sqlx::postgres::PgRow;
use sqlx::{AssertSqlSafe, Column, PgConnection, Row};

use crate::support::{TIMEOUT, has_waiter, locks_are, prove_exclusion, spawn};
use crate::tidy::rust_files;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn page(name: &str) -> String {
    fs::read_to_string(root().join("src/guide").join(name)).unwrap()
}

/// The blocks of SQL of a page, in order.
fn queries(page: &str) -> Vec<&str> {
    page.split("```sql\n").skip(1).map(|rest| rest.split_once("```").unwrap().0).collect()
}

/// The only query of a page that contains this text.
fn query<'p>(page: &'p str, has: &str) -> &'p str {
    let mut found = queries(page).into_iter().filter(|query| query.contains(has));
    let query = found.next();
    assert!(query.is_some(), "no query has {has:?}");
    assert!(found.next().is_none(), "two queries have {has:?}");
    query.unwrap()
}

async fn run(conn: &mut PgConnection, query: &str) -> Vec<PgRow> {
    let rows = sqlx::raw_sql(AssertSqlSafe(query)).fetch_all(conn).await;
    assert!(rows.is_ok(), "{query}\n{}", rows.unwrap_err());
    rows.unwrap()
}

/// Runs all queries of the guide, with one holder, one waiter and a pair with a negative number.
#[tokio::test]
async fn the_queries_for_psql_find_what_they_say() {
    let (db, pool) = TestDb::with_pool(5).await;
    prove_exclusion(&db).await;
    let mut psql = db.admin().await;
    let (cookbook, operations) = (page("cookbook.md"), page("operations.md"));
    let mut tried = 0;
    let mut has = |page, has| {
        tried += 1;
        query(page, has)
    };

    let pair = Lock::new(&pool, (-1, 42)).acquire().await.unwrap();
    let mut lock = Lock::new(&pool, "nightly-report");
    let holder = lock.acquire().await.unwrap();
    let mut other = lock.clone();
    let waiting = spawn(async move { other.acquire().await });
    locks_are(&mut psql, 3, TIMEOUT).await;

    let one_key = run(&mut psql, has(&cookbook, "blocked_by")).await;
    let [held, waits] = one_key.as_slice() else { panic!("{} rows", one_key.len()) };
    assert!(held.get::<bool, _>("granted") && !waits.get::<bool, _>("granted"));
    assert_eq!(held.get::<i32, _>("pid"), holder.backend_pid());
    assert_eq!(waits.get::<Vec<i32>, _>("blocked_by"), [holder.backend_pid()]);
    let waiter = waits.get::<i32, _>("pid");

    let all = run(&mut psql, has(&operations, "END AS key")).await;
    let mut all: Vec<(String, i32)> =
        all.iter().map(|row| (row.get("key"), row.get("pid"))).collect();
    all.sort();
    let number = Key::from("nightly-report").to_string();
    let number = number.rsplit_once('(').unwrap().1.trim_end_matches(')').to_owned();
    let mut expected = vec![
        ("(-1, 42)".to_owned(), pair.backend_pid()),
        (number.clone(), holder.backend_pid()),
        (number, waiter),
    ];
    expected.sort();
    assert_eq!(all, expected);

    let chains = run(&mut psql, has(&operations, "AS waiter")).await;
    // Other tests wait in other databases of the server.
    let chains: Vec<(i32, i32)> = chains
        .iter()
        .map(|row| (row.get("waiter"), row.get("holder")))
        .filter(|(blocked, _)| *blocked == waiter)
        .collect();
    assert_eq!(chains, [(waiter, holder.backend_pid())]);

    let session = has(&operations, "AS last_statement");
    let session = session.replace("31337", &holder.backend_pid().to_string());
    let session = run(&mut psql, &session).await;
    let [session] = session.as_slice() else { panic!("{} rows", session.len()) };
    assert_eq!(session.get::<&str, _>("state"), "idle");

    let table = run(&mut psql, has(&operations, "in_the_table")).await;
    let [table] = table.as_slice() else { panic!("{} rows", table.len()) };
    // Other tests lock in other databases of the server.
    assert!(table.get::<i64, _>("advisory") >= 3);
    assert!(table.get::<i32, _>("room") > 0);

    let settings = run(&mut psql, has(&operations, "FROM pg_settings")).await;
    assert!(settings.len() >= 4);
    assert!(settings.iter().all(|row| row.get::<&str, _>("context") == "user"));

    // This query is the last one, because it ends the session that holds the lock.
    let ended = run(&mut psql, has(&operations, "pg_terminate_backend")).await;
    let [ended] = ended.as_slice() else { panic!("{} rows", ended.len()) };
    assert_eq!((ended.get("pid"), ended.get("ended")), (holder.backend_pid(), true));
    assert!(matches!(holder.lost().await, Loss::Disconnected(_)));
    waiting.await.unwrap().unwrap().release().await.unwrap();
    pair.release().await.unwrap();

    let pages = fs::read_dir(root().join("src/guide")).unwrap();
    let pages = pages.map(|file| fs::read_to_string(file.unwrap().path()).unwrap());
    let written: usize = pages.map(|page| queries(&page).len()).sum();
    assert_eq!(tried, written, "a query is not tried here");
}

/// The query for the exporter returns the columns that the file describes.
#[tokio::test]
async fn the_query_for_postgres_exporter_distinguishes_holders_from_waiters() {
    let file = root().join("migrations-free-docker/monitoring/postgres_exporter.yaml");
    let file = fs::read_to_string(file).unwrap();
    let (_, rest) = file.split_once("  query: |\n").unwrap();
    let (query, metrics) = rest.split_once("  metrics:\n").unwrap();
    let described = metrics.lines().filter_map(|line| line.strip_prefix("    - "));
    let described: Vec<_> = described.map(|name| name.strip_suffix(':').unwrap()).collect();

    let db = TestDb::new().await;
    prove_exclusion(&db).await;
    let (pool, mut psql) = (db.pool(3).await, db.admin().await);
    let named = LockOptions::new().application_name("billing").on(&pool).unwrap();
    let holder = Lock::new(&named, "nightly-report").acquire().await.unwrap();
    let mut lock = Lock::new(&named, "nightly-report");
    let waiting = spawn(async move { lock.acquire_shared().await });
    has_waiter(&mut psql).await;
    if psql.server_version_num() < Some(140_000) {
        return;
    }
    let rows = run(&mut psql, query).await;
    let columns: Vec<_> = rows.first().unwrap().columns().iter().map(Column::name).collect();
    assert_eq!(columns, described);
    let mut seen: Vec<(&str, &str, i64)> =
        rows.iter().map(|row| (row.get("mode"), row.get("state"), row.get("sessions"))).collect();
    seen.sort_unstable();
    assert_eq!(seen, [("ExclusiveLock", "held", 1), ("ShareLock", "awaited", 1)]);
    for row in &rows {
        assert_eq!(row.get::<&str, _>("application_name"), "billing nightly-report");
    }
    holder.release().await.unwrap();
    drop(waiting.await.unwrap().unwrap());
}

/// The table of settings has the values that a session gets.
#[tokio::test]
async fn the_table_of_settings_has_the_defaults() {
    let operations = page("operations.md");
    let figure = |setting: &str| {
        let row = operations.lines().find(|line| line.starts_with(&format!("| `{setting}` |")));
        let cell = row.unwrap().split('|').nth(2).unwrap().trim();
        cell.trim_end_matches(" s").parse::<u32>().unwrap()
    };
    let (idle, interval, count) = (
        figure("tcp_keepalives_idle"),
        figure("tcp_keepalives_interval"),
        figure("tcp_keepalives_count"),
    );
    assert_eq!(figure("tcp_user_timeout"), idle + interval * count);

    let db = TestDb::new().await;
    let guard = Lock::new(&db.pool(2).await, 42).acquire().await.unwrap();
    let mut conn = guard.connection().await.unwrap();
    // Over a unix socket, the server shows no values of the keepalive settings, so the test reads those that the crate
    // has noted.
    let noted = run(&mut conn, "SELECT current_setting('pglock.keepalives')").await;
    let noted = noted.first().unwrap().get::<&str, _>(0);
    assert_eq!(noted, format!("{idle}/{interval}/{count}"));
    if conn.server_version_num() >= Some(140_000) {
        let shown = run(&mut conn, "SHOW client_connection_check_interval").await;
        let shown = shown.first().unwrap().get::<&str, _>(0);
        assert_eq!(shown, format!("{}s", figure("client_connection_check_interval")));
    }
}

/// The page on cost says how much shared memory a slot for one more lock takes.
#[tokio::test]
async fn a_slot_of_the_lock_table_costs_about_what_the_page_says() {
    let said = page("cost.md").split_whitespace().collect::<Vec<_>>().join(" ");
    let figures = said.split_once("A slot of the formula costs about ").unwrap().1;
    let [low, high] = ["", "and "].map(|before| {
        let digits = figures.split_once(before).unwrap().1;
        digits.split_once(' ').unwrap().0.parse::<i64>().unwrap()
    });
    let mut sums = Vec::new();
    for per_transaction in ["64", "1064"] {
        let options = Server::options().setting("max_connections", "100");
        let server = options.setting("max_locks_per_transaction", per_transaction).start();
        let mut conn = TestDb::on(&server).await.admin().await;
        if conn.server_version_num() < Some(130_000) {
            // Older servers have no view of their shared memory.
            return;
        }
        let sum =
            run(&mut conn, "SELECT sum(allocated_size)::int8 FROM pg_shmem_allocations").await;
        sums.push(sum.first().unwrap().get::<i64, _>(0));
    }
    let slot = (sums.last().unwrap() - sums.first().unwrap()) / (1000 * 100);
    assert!((low * 4 / 5..=high * 5 / 4).contains(&slot), "{slot}");
}

/// The table of alerts has every warning of the crate by its message, and no other.
#[test]
fn the_table_of_alerts_has_the_warnings() {
    let mut warnings = Vec::new();
    for file in rust_files("src") {
        let code = fs::read_to_string(file).unwrap();
        let code = code.split("#[cfg(test)]").next().unwrap();
        for rest in code.split("tracing::warn!(").skip(1) {
            let message = rest.split('"').nth(1).unwrap();
            warnings
                .push(message.replace("\\\n", "").split_whitespace().collect::<Vec<_>>().join(" "));
        }
    }
    let operations = page("operations.md");
    let rows = operations.split("| warn `").skip(1);
    let told: Vec<&str> = rows.map(|row| row.split_once('`').unwrap().0).collect();
    assert_eq!(told.len(), warnings.len(), "{warnings:#?} {told:#?}");
    for told in told {
        let start = told.trim_end_matches(" …");
        assert!(warnings.iter().any(|warning| warning.starts_with(start)), "{told}: {warnings:#?}");
    }
}

/// The links within the repository, of the pages that are read as files, have targets.
#[test]
fn links_to_files_lead_somewhere() {
    for page in
        ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "examples/README.md"]
    {
        let text = fs::read_to_string(root().join(page)).unwrap();
        let directory = root().join(page).parent().unwrap().to_owned();
        for rest in text.split("](").skip(1) {
            let link = rest.split_once(')').unwrap().0;
            let file = link.split_once('#').map_or(link, |(file, _)| file);
            if file.contains("://") || file.is_empty() {
                continue;
            }
            assert!(directory.join(file).exists(), "{page}: {link}");
        }
    }
}

/// The links of a page to itself name headings that it has. (rustdoc checks all others.)
#[test]
fn links_within_a_page_lead_somewhere() {
    for file in fs::read_dir(root().join("src/guide")).unwrap() {
        let path = file.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let mut in_code = false;
        let headings = text.lines().filter(|line| {
            in_code ^= line.starts_with("```");
            !in_code && line.starts_with('#')
        });
        let headings: Vec<String> = headings.map(anchor).collect();
        for rest in text.split("](#").skip(1) {
            let link = rest.split_once(')').unwrap().0;
            assert!(headings.iter().any(|heading| heading == link), "{}: #{link}", path.display());
        }
    }
}

/// The anchor that rustdoc makes of a heading.
fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim();
    let kept = text.chars().filter_map(|c| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c.to_ascii_lowercase()),
        _ => None,
    });
    kept.collect()
}
